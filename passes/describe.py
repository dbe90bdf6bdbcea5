"""What was found, for people: where an attention stands, how its cache is held, how it is lowered, what that saves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

from ..kernels.quantizers import grid_of
from ..report import CacheUse, Match, Rejected
from .actions import Append, Attend, Dense, Holder, Move, Scatter, Tracking
from .nodes import CONCATENATIONS, copied, example
from .pieces import CachePlan
from .segments import Fresh

_TORCH = str(Path(torch.__file__).parent)  # functions of torch that Dynamo looks into are not the model's


def describe(
    tracking: Tracking, plans: dict[Holder, CachePlan], ignored: set[Holder]
) -> tuple[dict[Node, Match], list[Rejected]]:
    """The account of each attention that reads caches in `plans`, by its node, and of those that read `ignored` ones.

    To be asked before the graph changes.
    """
    matches, rejections = {}, []
    actions: list[Attend | Dense] = [*tracking.attends, *tracking.dense]
    for action in actions:
        caches = [h for h in _caches(action) if h in plans]
        handed = action.handed if isinstance(action, Dense) else ()
        if not caches and not handed:
            continue
        call = action.call
        if not ignored.isdisjoint(caches):
            names = ", ".join(h.node.name for h in caches if h in ignored)
            rejections.append(Rejected(source_line(call.node), f"{names}: jkv_compile.ignore was called for it"))
            continue
        if isinstance(action, Attend):
            cached = [s for s in action.key if not isinstance(s.content, Fresh)]
            ranges = ", ".join(f"[{s.content.first}, {s.content.first + s.length})" for s in cached) or "none yet"
            current = " + ".join(str(s.length) for s in action.key if isinstance(s.content, Fresh)) or "0"
            lowering, keys = "fused", [action.key_cache]
        else:
            ranges = ", ".join([*(h.node.name for h in caches), *(node.name for node in handed)])
            current = "some" if action.gathers else "0"
            lowering, keys = f"reconstructed: {action.reason}", action.key_caches
        matches[call.node] = Match(
            source_line(call.node), lowering, ranges, current, idiom_of(action, tracking),
            _shape(call.query), _shape(call.key), [_use(h, plans[h], h in keys) for h in caches],
        )  # fmt: skip
    return matches, rejections


def _caches(action: Attend | Dense) -> list[Holder]:
    if isinstance(action, Dense):
        return action.caches
    return list(dict.fromkeys([action.key_cache, action.value_cache]))


def idiom_of(action: Attend | Dense, tracking: Tracking) -> str:
    """How a model holds the cache that an attention reads, as the graph shows it."""
    caches = _caches(action)
    writes = [w for w in tracking.writes if w.holder in caches]
    joined = _copy_behind(action.call.key)
    cached = [s for s in action.key if not isinstance(s.content, Fresh)] if isinstance(action, Attend) else []
    if isinstance(action, Dense) and action.handed:
        held = "read in one graph and attended in another"
    elif isinstance(action, Dense) and set(action.key_caches) & set(action.value_caches):
        held = "keys and values in one tensor"
    elif any(isinstance(w, Scatter) for w in writes):
        held = "written at positions that a tensor holds"
    elif any(isinstance(w, Move) for w in writes):
        held = "evicted by moving tokens, written and read in slices"
    elif joined is not None and joined.target in CONCATENATIONS:
        if len(cached) > 1:
            held = "several slices and the current chunk concatenated"
        elif any(r.grows and r.copy.cache in caches for r in tracking.returned):
            held = "a past that grows by concatenation and is returned"
        else:
            held = "a past, concatenated with the current chunk at each read"
    elif joined is not None and any(w for w in joined.users if w.op != "output" and _edits(w, joined)):
        held = "a copy edited and attended"
    elif any(isinstance(w, Append) for w in writes):
        held = "written in slices, read in slices"
    else:
        held = "written elsewhere, read in slices"
    return held


def _copy_behind(node: Node) -> Node | None:
    """The concatenation or clone that keys are a view of, if they are."""
    seen: Any = node
    while isinstance(seen, Node) and seen.op in ("call_function", "call_method"):
        if seen.target in CONCATENATIONS or seen.target == "clone":
            return seen
        arguments = copied(seen) or seen.all_input_nodes
        seen = arguments[0] if arguments else None
    return None


def _edits(user: Node, copy: Node) -> bool:
    return getattr(user.target, "__name__", "") == "setitem" and user.args[0] is copy


def _use(holder: Holder, plan: CachePlan, is_key: bool) -> CacheUse:
    shape = holder.shape
    numbers = [int(n.node.hint) if isinstance(n, torch.SymInt) else n for n in shape]
    head_dim = numbers[plan.axes[3]]
    tokens, length = math.prod(numbers) // head_dim, numbers[plan.axes[2]]
    sink, recent = (min(n, length) for n in plan.held)
    held_bytes = tokens // max(1, length) * (sink + 2 * recent) * head_dim * holder.dtype.itemsize
    grid = grid_of(plan.quantizer)
    means = -(-length // plan.mean_tokens) * grid.tables if plan.mean_tokens else int(plan.centered)
    lines = tokens // max(1, length)
    center_bytes = means * lines * head_dim * holder.dtype.itemsize
    retained_bytes = 4 * plan.rows + length if plan.keeps else 0
    shape_of_rows = lines, 1, plan.rows or length, head_dim
    packed = grid.store_bytes(shape_of_rows, plan.bits, plan.group_size)
    return CacheUse(
        name=input_name(holder.node),
        role="keys" if is_key else "values",
        shape=f"[{', '.join(map(str, shape))}]",
        dtype=str(holder.dtype).removeprefix("torch."),
        bits=plan.bits,
        group_size=plan.group_size,
        by_channel=plan.block > 1,
        full_precision_bytes=math.prod(numbers) * holder.dtype.itemsize,
        packed_bytes=packed + held_bytes + center_bytes + retained_bytes,
        sink=sink,
        recent=recent,
        kept=plan.rows,
    )


def input_name(node: Node) -> str:
    """How the model's own code reaches an input, as far as Dynamo tells: `cache['k']`, `self.blocks[0].k_cache`."""
    source = getattr(node, "_dynamo_source", None)
    return node.name if source is None else source.name.replace("L['", "", 1).replace("']", "", 1)


def _shape(node: Node) -> str:
    return f"[{', '.join(map(str, example(node).shape))}]"


def source_line(node: Node) -> str:
    """Where a node stands in the model's own code: `file:line in function`, as far as Dynamo recorded it."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    frames = [frame for frame in frames if _TORCH not in frame] or frames
    if not frames:
        return node.name
    file, line, function = (part.strip() for part in frames[-1].removeprefix("File ").split(",")[:3])
    return f"{file.strip(chr(34))}:{line.removeprefix('line ')} {function}"
