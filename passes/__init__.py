"""Graph passes, in the order they run.

filled and apart: new tensors filled part by part as concatenations; keys and values in one tensor, each by itself.
own_tokens: what is written is no view of a cache, nor changed in place after it was cached: it is copied first.
dtensors: what is done to DTensors that are caches, done to this rank's shards.
canonicalise: every spelling of attention (spelled_as_calls, spelled_by_hand, spelled_by_users, with_lse; of tokens on
several devices, context_parallel) as one of those in attention_forms; sources tells what it is made of, small_integers
what boundaries of sequences hold.
tracking: whose tokens lie where, as `actions`: a walk over the graph that knows roles (which dimension of an input runs
along tokens), contents (what tensors hold) and copies.
pipeline: what becomes of the graph.
rewrite: the graph of plain tensors, out of pieces: lower_attention on packed tokens, or lower_reads, the model's own
operations and attention corrected for the uncertainty of its keys; flex for flex_attention; join_appends, keys and
values in one call; memory_order, what views and outputs rely on.
describe: the same for people; handed and unpacked, what passes from graph to graph, and what may be a cache and is not.
nodes, segments, symbols and printing serve them all.
"""
