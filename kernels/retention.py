"""Caches that keep the most salient of their tokens and drop the others (`budget=`; PaFu-KV, arXiv 2601.21896).

The model goes on counting positions over its own S tokens. Codes and scales have R = budget rows, those of the tokens
that are kept, in the order of their positions: a range of positions is a range of rows, and the other operators work on
rows as they are.

places: uint8 `[S]` on the CPU, so that reading it waits for no device: of each position whether its token is kept
(`KEPT`); whether it is known (`KNOWN`), that is, was written and has not been set to zero since, as the others are
zeros, which need no rows; and whether it has been attended from the cache (`ATTENDED`), where that tells its salience.
Of tokens a … b - 1 the first kept one is in the row that so many tokens before a are kept.

salience: float32 `[R]` on the device. What it tells is the *policy*'s:

- "attention": the attention that a token's row has received, mean over batch entries, heads and a block of queries, the
  greatest of the blocks of a call, averaged over chunks with weights that decay (`DECAY`): it is looked at in the first
  call that attends to a chunk as cached tokens, not in all calls that denoise the next one. Infinite before.
- "recent": nothing; the oldest are dropped.
- "random": a hash of the position that it was written to. "even": multiples of the golden ratio, less their whole
  part, by that position, of which the greatest so many always lie in about even distances.
- "head:…": what a learned head (`HEADS`) makes of its key and value, infinite where it was not asked.

Rows are dropped when others are written that have no room: never those that are being written, and those of as many
tokens just before them, the chunk before as a rule, only where there are no others. Keys and values of a cache have a
state each; as they are written and attended alike, they are always the same, which attention checks.

Tokens that are kept "even" or at "random", whatever they hold, are a sample of all: each also stands for those around
it that were dropped, so that the past keeps its part of the attention. Where k of n tokens are kept, of those of a
block of `SAMPLE` that are attended, log(n / k) is added to the scores of these. Of tokens that are kept because they
matter, none stands for others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PackedCacheError
from . import ops

KEPT, KNOWN, ATTENDED = 1, 2, 4
DECAY = 0.8  # the weight of earlier chunks in the attention that a token has received
ONE_IN = 64  # rows of queries: so many attention is sampled at,
LEAST, MOST = 16, 64  # but at least and at most as many
AT_A_TIME = 1024  # cached tokens that are dequantized
SAMPLE = 64  # positions that share what a kept token of them stands for
BLOCKS = 8  # of neighbouring rows among these; the greatest of their means counts

HEADS: dict[str, nn.Module] = {}  # learned heads by their name, which tells their weights
_on_device: dict[tuple[str, torch.device], nn.Module] = {}


def no_places(tokens: int) -> Tensor:
    """`places` of a cache that holds nothing."""
    return torch.zeros(tokens, dtype=torch.uint8)


def kept(places: Tensor) -> Tensor:
    """Which tokens are kept, bool `[S]`."""
    return places & KEPT > 0


def known(places: Tensor) -> Tensor:
    """Which tokens have been written, and not been set to zero since, bool `[S]`."""
    return places & KNOWN > 0


def attended(places: Tensor) -> Tensor:
    """Which of the kept tokens have been attended from the cache, bool `[S]`."""
    return places & ATTENDED > 0


def tell(places: Tensor, kept: Tensor, known: Tensor, attended: Tensor) -> None:
    """Write which tokens are kept, known and attended, each bool `[S]`."""
    places.copy_(kept * KEPT + known * KNOWN + attended * ATTENDED)


def rows_of(places: Tensor, start: int, stop: int) -> tuple[int, int]:
    """The rows of the kept ones of tokens start … stop - 1: the first, and that after the last."""
    first = int(kept(places[:start]).sum())
    return first, first + int(kept(places[start:stop]).sum())


def rows_at(places: Tensor, positions: Tensor) -> Tensor:
    """How many tokens before each of `positions` are kept, int64: the rows of those that are."""
    here = kept(places)
    return (here.cumsum(0) - here.long())[positions]


def is_head(policy: str) -> bool:
    return policy.startswith("head:")


def head_of(policy: str, device: torch.device) -> nn.Module:
    """A learned head on a device.

    Raises:
        PackedCacheError: it is not known in this process.
    """
    if policy not in HEADS:
        raise PackedCacheError(
            f"the salience of a packed cache is told by the learned head {policy!r}, which this process does not have: "
            "make a backend with salience= of the same weights first"
        )
    if (policy, device) not in _on_device:
        import copy

        _on_device[policy, device] = copy.deepcopy(HEADS[policy]).to(device)
    return _on_device[policy, device]


def random_order(start: int, stop: int) -> Tensor:
    """A number in [0, 1) for each of positions start … stop - 1, float32: a hash (MurmurHash3's finalizer)."""
    x = torch.arange(start, stop) + 0x9E3779B9
    for factor in (-0xAE502812AA7333, -0x3B314601E57A13AD):
        x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * factor
    return (((x >> 33) & 0xFFFFFF).double() / 2**24).float()


def even_order(start: int, stop: int) -> Tensor:
    """A number in [0, 1) for each of positions start … stop - 1, float32: i · (√5 - 1) / 2, less its whole part."""
    return (torch.arange(start, stop).double() * 0.6180339887498949 % 1).float()


SAMPLES = {"random": random_order, "even": even_order}  # policies that do not look at what tokens hold


def stand_for(places: Tensor, start: int, stop: int) -> Tensor:
    """The logarithm of how many of tokens start … stop - 1 each of a sample stands for, float32 `[stop - start]`: 0
    where none was dropped."""
    before, after = start % SAMPLE, -stop % SAMPLE
    written, left = (
        torch.nn.functional.pad(flags[start:stop].float(), (before, after)).view(-1, SAMPLE).sum(-1)
        for flags in (known(places), kept(places))
    )
    told = (written / left).nan_to_num(1.0, posinf=1.0).log()
    return told.repeat_interleave(SAMPLE)[before : before + stop - start]


def with_weights(mask: Tensor | None, weights: Tensor, query: Tensor) -> Tensor | None:
    """An additive mask `[…, S]` in the query's dtype, of one of any kind and what is added to scores, float32 `[S]`."""
    if not weights.any():
        return mask
    added = weights.to(query)
    if mask is None:
        return added[None, None, None]
    return torch.where(mask, added, -torch.inf) if mask.dtype == torch.bool else mask + added


def make_room(
    codes: Tensor, scales: Tensor, places: Tensor, salience: Tensor, start: int, stop: int, policy: str,
    wanted: Tensor | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Have rows for tokens start … stop - 1, and for no others among these; what they hold is to be written.

    Args:
        wanted: which of the tokens are to have rows, bool `[stop - start]`; all, where it is not given.

    Returns:
        The rows: the first, and that after the last.

    Raises:
        PackedCacheError: they are more than there are rows; nothing has been changed.
    """
    tokens, rows = len(places), codes.shape[2]
    if not 0 <= start <= stop <= tokens:
        raise RuntimeError(f"jkv::append_kept: tokens {start}:{stop} do not lie within the cache's {tokens} tokens")
    first, last = rows_of(places, start, stop)
    if wanted is None and last - first == stop - start:
        return first, last
    new = torch.ones(stop - start, dtype=torch.bool) if wanted is None else wanted
    if (length := int(new.sum())) > rows:
        raise PackedCacheError(
            f"{length} tokens, {start}:{stop}, are written to a packed cache that keeps {rows} (budget=); nothing was "
            "written. Expected no more at a time: write fewer, or set a larger budget"
        )
    chosen, seen, scored = kept(places), known(places), attended(places)
    chosen[start:stop] = new
    seen[start:stop] = True
    _drop(places, salience, chosen, start, stop, int(chosen.sum()) - rows, policy)
    _rearrange(codes, scales, places, salience, chosen, seen, scored)
    return rows_of(places, start, stop)


def _drop(places: Tensor, salience: Tensor, chosen: Tensor, start: int, stop: int, excess: int, policy: str) -> None:
    """Take the `excess` least salient tokens out of `chosen`, but for start … stop - 1, and if need be for as many
    before those; of equal ones the oldest."""
    if excess <= 0:
        return
    outside = chosen.clone()
    outside[start:stop] = False
    positions = outside.nonzero().flatten()
    if policy != "recent":  # there the newest go last anyway
        worth = salience.cpu()[rows_at(places, positions)].double()
        if is_head(policy):
            worth += float(getattr(head_of(policy, salience.device), "recency", 0.0)) * positions
        worth[(positions < start) & (positions >= 2 * start - stop)] = torch.inf
        positions = positions[worth.sort(stable=True).indices]
    chosen[positions[:excess]] = False


def _rearrange(
    codes: Tensor, scales: Tensor, places: Tensor, salience: Tensor, chosen: Tensor, seen: Tensor, scored: Tensor,
    origin: Tensor | None = None,
) -> None:  # fmt: skip
    """Have the rows of `chosen` tokens in order; those that had none get any.

    origin: where each token was before, int64 `[S]`.
    """
    positions = chosen.nonzero().flatten()
    rows = rows_at(places, positions if origin is None else origin[positions]).clamp(max=codes.shape[2] - 1)
    moved = (rows != torch.arange(len(rows))).nonzero()
    if len(moved):
        first, last = int(moved[0]), len(rows)
        index = rows[first:].to(codes.device)
        codes[:, :, first:last] = codes.index_select(2, index)
        scales[:, :, :, first:last] = scales.index_select(3, index)
        salience[first:last] = salience.index_select(0, index)
    tell(places, chosen, seen, scored & chosen)


def append_kept(
    codes: Tensor, scales: Tensor, places: Tensor, salience: Tensor, source: Tensor, start: int, bits: int, policy: str
) -> None:
    """`ops.append` to tokens start … of a cache with a budget, for which others are dropped as need be.

    A range that has its rows already, as a chunk that is denoised again, costs nothing more, and drops nothing.

    Args:
        codes: uint8 `[B, H, R, D · bits / 8]`, mutated; scales: float16 `[B, H, G, R, 2 or 1]`, mutated.
        places, salience: see above; mutated.
        source: `[B, H, n, D]`.

    Raises:
        PackedCacheError: n > R; nothing has been changed.
    """
    if source.shape[2] == 0:
        return
    stop = start + source.shape[2]
    first, last = make_room(codes, scales, places, salience, start, stop, policy)
    torch.ops.jkv.append(codes, scales, source, first, bits)
    if policy in SAMPLES:
        salience[first:last] = SAMPLES[policy](start, stop).to(salience.device)
    elif policy != "recent":
        salience[first:last] = torch.inf
        places[start:stop] &= ~ATTENDED & 0xFF


def move_kept(
    codes: Tensor, scales: Tensor, places: Tensor, salience: Tensor, source: int, destination: int, length: int,
    policy: str,
) -> None:  # fmt: skip
    """`ops.move`: tokens destination … become copies of tokens source …, as far as those are kept.

    Copies need rows too. Where there are none, those of tokens source … go first that are not overwritten: what a
    rolling cache leaves behind, and writes next.
    """
    tokens = len(places)
    for begin in (source, destination):
        if begin < 0 or length < 0 or begin + length > tokens:
            raise RuntimeError(
                f"jkv::move_kept: tokens {begin}:{begin + length} do not lie within the cache's {tokens} tokens"
            )
    if length == 0 or source == destination:
        return
    stop = destination + length
    chosen, seen, scored, origin = kept(places), known(places), attended(places), torch.arange(tokens)
    left = chosen.clone()  # in its old place, though its copy is elsewhere
    left[:source], left[source + length :], left[destination:stop] = False, False, False
    for flags in (chosen, seen, scored):
        flags[destination:stop] = flags[source : source + length].clone()
    origin[destination:stop] = torch.arange(source, source + length)
    if (excess := int(chosen.sum()) - codes.shape[2]) > 0:
        chosen[left.nonzero().flatten()[-excess:]] = False
    _drop(places, salience, chosen, destination, stop, int(chosen.sum()) - codes.shape[2], policy)
    _rearrange(codes, scales, places, salience, chosen, seen, scored, origin)


def forget_kept(codes: Tensor, scales: Tensor, places: Tensor, salience: Tensor, start: int, stop: int) -> None:
    """Tokens start … stop - 1 are set to zero: they are kept no more, and read as zeros."""
    tokens = len(places)
    if not 0 <= start <= stop <= tokens:
        raise RuntimeError(f"jkv::forget_kept: tokens {start}:{stop} do not lie within the cache's {tokens} tokens")
    chosen, seen, scored = kept(places), known(places), attended(places)
    chosen[start:stop] = seen[start:stop] = False
    _rearrange(codes, scales, places, salience, chosen, seen, scored)


def score_kept(
    key_places: Tensor, key_salience: Tensor, value_places: Tensor, value_salience: Tensor, key: Tensor,
    value: Tensor, start: int, policy: str,
) -> None:  # fmt: skip
    """Tokens start … have been written: what a learned head makes of them is their salience.

    Args:
        key, value: `[B, H, n, D]`, `[B, H, n, Dv]`, as the model has written them. The head gets both in float32, and
            returns `[B, n]` or `[n]`; batch entries share their rows, and the mean over them counts.
    """
    with torch.no_grad():
        score = head_of(policy, key.device)(key.detach().float(), value.detach().float()).float()
    score = score.reshape(-1, key.shape[2]).mean(0).nan_to_num()
    for places, salience in ((key_places, key_salience), (value_places, value_salience)):
        first, last = rows_of(places, start, start + key.shape[2])
        if last - first == key.shape[2]:
            salience[first:last] = score


def attention_kept(
    query: Tensor, key_codes: Tensor, key_scales: Tensor, value_codes: Tensor, value_scales: Tensor,
    key_places: Tensor, value_places: Tensor, key_salience: Tensor, value_salience: Tensor, ranges: Sequence[int],
    key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, key_bits: int, value_bits: int,
    correction: str, policy: str,
) -> Tensor:  # fmt: skip
    """As `ops.attention` over the kept ones of tokens in `ranges`, and what attention these receive.

    Those of a sample (`SAMPLES`) also stand for tokens that were dropped, see above.

    Zeros among them, which have no rows, are attended as that: they are keys and values in full precision.

    Args (beside those of `ops.attention`):
        key_places, value_places: uint8 `[S]` on the CPU, which come to tell what has been attended.
        key_salience, value_salience: float32 `[R]`, mutated where the policy is "attention", and something is attended
            from the cache for the first time.
        ranges: positions, as the model counts them; mask: with a column for each of them, whether kept or not.

    Raises:
        PackedCacheError: keys and values keep other tokens.
    """
    if not torch.equal(key_places, value_places):
        raise PackedCacheError(
            "keys and values of a packed cache keep other tokens (budget=): expected both to be written, moved and "
            "reset alike between two calls of attention; reset both, or use no budget for this model"
        )
    pairs = list(zip(ranges[::2], ranges[1::2]))
    rows = [row for start, stop in pairs for row in rows_of(key_places, start, stop)]
    if zeros := sum(_unknown(key_places, start, stop) for start, stop in pairs):
        key, value = (torch.cat((x.new_zeros(*x.shape[:2], zeros, x.shape[3]), x), 2) for x in (key, value))
    if mask is not None and mask.shape[-1] > 1:
        mask = _columns(mask, key_places, pairs)
    if policy in SAMPLES and pairs:
        of_rows = torch.cat([stand_for(key_places, a, b)[kept(key_places)[a:b]] for a, b in pairs])
        mask = with_weights(mask, torch.nn.functional.pad(of_rows, (0, key.shape[2])), query)
    store = key_codes, key_scales, value_codes, value_scales
    settings = scale, key_bits, value_bits, correction
    result = torch.ops.jkv.attention(query, *store, rows, key, value, mask, causal, *settings)
    if policy == "attention" and any(_is_new(key_places, start, stop) for start, stop in pairs):
        spans = [(a, b) for a, b in zip(rows[::2], rows[1::2]) if a < b]
        if spans:
            blocks = [(c, min(c + AT_A_TIME, b)) for a, b in spans for c in range(a, b, AT_A_TIME)]
            cached = (torch.ops.jkv.dequantize(key_codes, key_scales, a, b, key_bits, query.dtype) for a, b in blocks)
            received = attention_received(query, cached, key, mask, scale).split([b - a for a, b in spans])
            for salience in (key_salience, value_salience):
                for (a, b), new in zip(spans, received):
                    old = salience[a:b]
                    salience[a:b] = torch.where(old.isinf(), new, DECAY * old + (1 - DECAY) * new)
            for places, (start, stop) in itertools.product((key_places, value_places), pairs):
                places[start:stop] |= kept(places[start:stop]) * ATTENDED
    return result


def _is_new(places: Tensor, start: int, stop: int) -> bool:
    """Whether some of the kept tokens start … stop - 1 have not been attended from the cache."""
    return bool((places[start:stop] & (KEPT | ATTENDED) == KEPT).any())


def _unknown(places: Tensor, start: int, stop: int) -> int:
    """How many of tokens start … stop - 1 are zeros."""
    return int((~known(places[start:stop])).sum())


def _columns(mask: Tensor, places: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """A mask's columns of tokens that are kept, of those that are zeros, and those after all of `pairs`."""
    chosen, zero = (torch.cat([flags[a:b] for a, b in pairs]) for flags in (kept(places), ~known(places)))
    if chosen.all():
        return mask
    after = torch.arange(len(chosen), mask.shape[-1])
    columns = torch.cat((chosen.nonzero().flatten(), zero.nonzero().flatten(), after))
    return mask.index_select(-1, columns.to(mask.device))


def attention_received(
    query: Tensor, cached: Iterable[Tensor], key: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention that cached keys receive from a sample of queries, float32 `[n]`.

    The mean over batch entries, heads and neighbouring rows, and of these blocks the greatest.

    Args:
        query: `[B, H, L, D]`; cached: keys `[B, H_kv, n_i, D]` of the same dtype, n tokens together; key:
            `[B, H_kv, N, D]`, attended beside them.
        mask: of all L rows, or of one, broadcastable to `[B, H, L, n + N]`.
    """
    length, heads = query.shape[2], key.shape[1]
    sampled = min(length, max(LEAST, min(MOST, length // ONE_IN)))
    index = ((torch.arange(sampled) * length + length // 2) // sampled).to(query.device)
    grouped = query.index_select(2, index).unflatten(1, (heads, -1)).flatten(2, 3)  # [B, H_kv, heads of each · rows, D]
    products = [grouped @ keys.mT for keys in itertools.chain(cached, [key.to(query.dtype)])]
    n = sum(product.shape[-1] for product in products[:-1])
    scores = torch.cat(products, -1).float().mul_(scale)
    scores = scores.unflatten(2, (-1, sampled)).flatten(1, 2)  # [B, H, rows, n + N]
    if mask is not None:
        rows = mask.index_select(-2, index) if mask.dim() > 1 and mask.shape[-2] > 1 else mask
        scores = scores.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else scores + rows
    weights = scores.softmax(-1)[..., :n].nan_to_num().mean((0, 1))  # [rows, n]
    return torch.stack([block.mean(0) for block in weights.tensor_split(min(BLOCKS, sampled))]).amax(0)


# ---- operators ----

_KEPT = "Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) places, Tensor(d!) salience"
for _schema in (
    f"append_kept({_KEPT}, Tensor source, SymInt start, int bits, str policy) -> ()",
    f"move_kept({_KEPT}, SymInt source, SymInt destination, SymInt length, str policy) -> ()",
    f"forget_kept({_KEPT}, SymInt start, SymInt stop) -> ()",
    "score_kept(Tensor key_places, Tensor(a!) key_salience, Tensor value_places, Tensor(b!) value_salience, "
    "Tensor key, Tensor value, SymInt start, str policy) -> ()",
    "attention_kept(Tensor query, Tensor key_codes, Tensor key_scales, Tensor value_codes, Tensor value_scales, "
    "Tensor(a!) key_places, Tensor(b!) value_places, Tensor(c!) key_salience, Tensor(d!) value_salience, "
    "SymInt[] ranges, "
    "Tensor key, Tensor value, Tensor? mask, bool causal, float scale, int key_bits, int value_bits, str correction, "
    "str policy) -> Tensor",
):
    ops.library.define(_schema, tags=ops._HOST_TAGS)


def _nothing(*_: Any) -> None:
    return None


def _attention_kept_fake(query: Tensor, *others: Any) -> Tensor:
    return ops._empty_attention_output(query, others[10].shape[-1])


_kernels: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    ("append_kept", append_kept, _nothing),
    ("move_kept", move_kept, _nothing),
    ("forget_kept", forget_kept, _nothing),
    ("score_kept", score_kept, _nothing),
    ("attention_kept", attention_kept, _attention_kept_fake),
)
for _name, _kernel, _fake in _kernels:
    ops.library.impl(_name, ops._without_autocast(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"jkv::{_name}", _fake, lib=ops.library)
