"""Why attention is left in full precision, by kind, and what its user can do about each kind."""

from __future__ import annotations

import re
from enum import Enum


class Reason(Enum):
    """A kind of reason; its value is the advice."""

    GRADIENTS = "Call the model under torch.no_grad() or torch.inference_mode(): quantization has no gradient."
    DROPOUT = "Call model.eval(), or set the dropout to 0."
    SPELLING = (
        "If the call is softmax(scale * query @ key.mT + mask) @ value after all, say so with "
        "jkv_compile.register_attention; attention with windows, soft caps or its own score terms has no packed form."
    )
    SHARED_MEMORY = (
        "Give each cache a tensor with memory of its own, as torch.zeros makes it: packing it in place would change "
        "what else lives there."
    )
    WRITE = (
        "Write keys and values as whole tokens, of all batch entries, heads and channels, from a tensor of that shape."
    )
    READ = "Read whole heads over ranges of tokens; or jkv_compile.materialize(cache) where full precision is needed."
    POSITION = "Pass positions as Python ints, or read them with .item() before the compiled call."
    ORDER = "Attend to what was read before the cache is written again, or read it again after."
    LAYOUT = "Attention must take keys and values as [batch, head, token, channel], from one cache each."
    NOT_A_CACHE = "Nothing, where this is no cache; otherwise tell with jkv_compile.mark_cache(tensor)."
    SHARDED = (
        "Shard caches evenly on heads, and write and read them by slices along tokens; where the tokens of caches are "
        "parted, attend to one's own with jkv_compile.distributed.sharded_attention."
    )
    GRAPH_BREAK = (
        "Remove the graph break between the read of the cache and its attention; TORCH_LOGS=graph_breaks shows it. "
        "Often something that the first call computes is to be made before (tables of rotary embeddings)."
    )
    ELSEWHERE = (
        "Nothing, where these are no cached tokens (keys of a text, say). Otherwise compile what reads the cache with "
        "its attention (TORCH_LOGS=graph_breaks shows what parts them: positions in tensors, for one), or tell with "
        "jkv_compile.mark_cache(tensor)."
    )
    REMADE = (
        "Write new tokens into a tensor that stays, cache[:, start:end] = k, or return keys and values as two tensors, "
        "each the concatenation of the past and new tokens."
    )
    UNATTENDED = (
        "Nothing, where it holds no keys or values. Otherwise have its attention compiled: it may run in eager code, "
        "behind a graph break or torch.compiler.disable, or be spelled in a way that jkv_compile.register_attention "
        "can tell of."
    )
    CONFIGURATION = "Change the setting that the reason names."
    IGNORED = "Nothing: it was asked for with jkv_compile.ignore."
    OTHER = "No known way to change this."

    @property
    def advice(self) -> str:
        return self.value


BUDGET = "budget= is for caches that one graph writes in slices, and attends to in slices as they are, and {}"
PER_CHANNEL = "quantizer={!r} quantizes keys by channel, over blocks of tokens, and {}"
MEANS = "center_tokens={} stores tokens less means of so many of them, and {}"
CLUSTERS = "quantizer={!r} stores tokens less centroids that a block of them shares, and {}"

_PATTERNS: tuple[tuple[str, Reason], ...] = (
    (r"jkv_compile\.ignore", Reason.IGNORED),
    (r"attended in another graph, in eager code", Reason.UNATTENDED),
    (r"spelling of attention which is not known", Reason.SPELLING),
    (r"made anew in each call", Reason.REMADE),
    (r"which are not known to be of a cache", Reason.ELSEWHERE),
    (r"views of one tensor", Reason.SHARED_MEMORY),
    (r"in another graph|come so to this graph", Reason.GRAPH_BREAK),
    (r"gradients are required|requires grad", Reason.GRADIENTS),
    (r"^dropout of", Reason.DROPOUT),
    (r"group_size|head_dim=|quantizer=|center_tokens=|budget=", Reason.CONFIGURATION),
    (r"recent=", Reason.POSITION),
    (r"a DTensor", Reason.SHARDED),
    (r"only one of key and value", Reason.NOT_A_CACHE),
    (r"not known before the data|places that a tensor holds", Reason.POSITION),
    (r"overwritten between|writes to its scores|before they are used", Reason.ORDER),
    (r"shares? (its|their) memory|its memory is shared|view of a larger|storage holds more", Reason.SHARED_MEMORY),
    (r"not a plain tensor|two views of|is expanded or has gaps", Reason.SHARED_MEMORY),
    (r"^what it reads is written to", Reason.LAYOUT),
    (r"not known as a cache any more", Reason.NOT_A_CACHE),
    (r"beside caches that are packed", Reason.NOT_A_CACHE),
    (r"changes it in place|is written|are written|is edited|is broadcast", Reason.WRITE),
    (r"are used$|steps or merged|have been changed", Reason.READ),
    (r"which is not known$|called in a way that is not known", Reason.SPELLING),
    (r"scores|softmax|weights|its products|its query has|query heads|plain attention|sequences|causal|boolean|"
     r"packed into one dimension|beside the result|not only the attention's result|is used .* times|returns a",
     Reason.SPELLING),
    (r"tokens|keys|values|dimension|mask|stands between", Reason.LAYOUT),
)  # fmt: skip


def classify(reason: str) -> Reason:
    """The kind of a reason, by its words."""
    return next((kind for pattern, kind in _PATTERNS if re.search(pattern, reason)), Reason.OTHER)
