"""Graph passes, in the order they run.

attention_forms: every spelling of attention as one `AttentionCall`.  roles, tracking: whose tokens lie where (`actions`).
pipeline: what becomes of the graph.  rewrite: the graph of plain tensors.  nodes, segments, symbols, printing serve them.
"""
