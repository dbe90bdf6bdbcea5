"""Graph passes, in the order they run.

attention_forms: every spelling of attention as one `AttentionCall`.
roles, tracking: whose tokens lie where, as `actions`.
pipeline: what becomes of the graph.
rewrite: the graph of plain tensors.
nodes, segments, symbols and printing serve them.
"""
