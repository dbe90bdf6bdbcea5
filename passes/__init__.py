"""Graph passes, in the order they run.

canonicalise: every spelling of attention (spelled_as_calls, spelled_by_hand, spelled_by_users) as the one of
attention_forms; sources tells what it is made of, small_integers what boundaries of sequences hold.
roles, tracking: whose tokens lie where, as `actions`.
pipeline: what becomes of the graph.
rewrite: the graph of plain tensors.
nodes, segments, symbols and printing serve them.
"""
