"""Caches with a budget: rows are those of the tokens that are kept, whatever is written, moved, reset and dropped."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from jkv_compile import PackedCacheError
from jkv_compile.kernels import retention as rules
from jkv_compile.kernels.retention import HEADS
from jkv_compile.salience import SalienceHead, policy_of

jkv = torch.ops.jkv
BATCH, HEADS_, HEAD_DIM, TOKENS = 2, 2, 32, 40


class Beside:
    """A cache of 8 bits that keeps `budget` tokens, beside the plain tensor of all tokens, and what salience is due."""

    def __init__(self, budget: int, policy: str = "attention") -> None:
        self.policy, self.budget = policy, budget
        self.codes = torch.zeros(BATCH, HEADS_, budget, HEAD_DIM, dtype=torch.uint8)
        self.scales = torch.zeros(BATCH, HEADS_, 1, budget, 2, dtype=torch.float16)
        self.places, self.salience = rules.no_places(TOKENS), torch.zeros(budget)
        self.plain = torch.zeros(BATCH, HEADS_, TOKENS, HEAD_DIM)
        self.due: dict[int, float] = {}  # salience by position

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.codes, self.scales, self.places, self.salience

    @property
    def kept(self) -> list[int]:
        return rules.kept(self.places).nonzero().flatten().tolist()

    def score(self, rng: random.Random) -> None:
        """All get a salience, as attention gives it."""
        for row, position in enumerate(self.kept):
            self.due[position] = self.salience[row] = rng.random()
        self.due = {p: float(s) for p, s in zip(self.kept, self.salience)}
        rules.tell(self.places, *(f(self.places) for f in (rules.kept, rules.known, rules.kept)))

    def write(self, start: int, n: int) -> None:
        source = torch.randn(BATCH, HEADS_, n, HEAD_DIM)
        self.plain[:, :, start : start + n] = source
        jkv.append_kept(*self.state, source, start, 8, self.policy)
        first = {"attention": torch.inf, "recent": 0.0}.get(self.policy)
        told = rules.SAMPLES[self.policy](start, start + n) if first is None else torch.full((n,), first)
        self.due.update(zip(range(start, start + n), told.tolist()))

    def move(self, source: int, destination: int, n: int) -> None:
        self.plain[:, :, destination : destination + n] = self.plain[:, :, source : source + n].clone()
        jkv.move_kept(*self.state, source, destination, n, self.policy)
        moved = {p - source + destination: s for p, s in self.due.items() if source <= p < source + n}
        others = {p: s for p, s in self.due.items() if not destination <= p < destination + n}
        self.due = {**others, **moved}

    def forget(self, start: int, stop: int) -> None:
        self.plain[:, :, start:stop] = 0
        jkv.forget_kept(*self.state, start, stop)

    def check(self) -> None:
        kept = self.kept
        assert len(kept) <= self.budget
        assert not (rules.kept(self.places) & ~rules.known(self.places)).any()
        assert not (rules.attended(self.places) & ~rules.kept(self.places)).any()
        rows = jkv.dequantize(self.codes, self.scales, 0, len(kept), 8, torch.float32)
        want = self.plain[:, :, kept]
        assert not len(kept) or (rows - want).abs().max() < 0.03
        assert self.salience[: len(kept)].tolist() == pytest.approx([self.due[p] for p in kept])
        if self.policy == "attention":  # what has been attended is what is finite
            assert torch.equal(rules.attended(self.places)[kept], self.salience[: len(kept)].isfinite())


@pytest.mark.parametrize("policy", ["attention", "recent", "random", "even"])
@pytest.mark.parametrize("budget", [9, 20, 40])
def test_rows_are_those_of_the_kept_tokens_whatever_happens(budget: int, policy: str) -> None:
    rng = random.Random(budget)
    for _ in range(12):
        beside = Beside(budget, policy)
        for _ in range(25):
            n = rng.randint(1, 9)
            start, other = (rng.choice((0, 4, rng.randint(0, TOKENS - n))) for _ in range(2))
            kind = rng.choice(("write", "write", "move", "forget", "again"))
            if kind == "move":
                beside.move(start, other, n)
            elif kind == "forget":
                beside.forget(start, start + n)
            else:
                before = set(beside.kept)
                beside.write(start, n)
                assert set(range(start, start + n)) <= set(beside.kept)  # what is written is never dropped
                if before >= set(range(start, start + n)):
                    assert set(beside.kept) == before  # and nothing is, where it had its rows
            if policy == "attention" and rng.random() < 0.5:
                beside.score(rng)
            beside.check()


def test_the_least_salient_go_and_of_equal_ones_the_oldest() -> None:
    beside = Beside(6)
    beside.write(0, 6)
    beside.salience[:] = torch.tensor([0.5, 0.1, 0.3, 0.1, 0.4, 0.9])
    beside.write(6, 2)
    assert beside.kept == [0, 2, 4, 5, 6, 7]
    beside.salience[:] = torch.tensor([0.2, 0.2, 0.2, 0.2, torch.inf, torch.inf])
    beside.write(10, 3)
    assert beside.kept == [5, 6, 7, 10, 11, 12]
    beside.write(20, 4)  # of tokens that were never attended too
    assert beside.kept == [11, 12, 20, 21, 22, 23]
    beside.salience[:] = torch.arange(6.0, 0.0, -1.0)
    beside.write(24, 2)  # just before which are the least salient
    assert beside.kept == [11, 12, 22, 23, 24, 25]
    beside.write(26, 3)
    assert beside.kept == [23, 24, 25, 26, 27, 28]
    beside.write(29, 4)  # there are no others
    assert beside.kept == [27, 28, 29, 30, 31, 32]


def test_recent_drops_the_oldest_and_random_is_the_same_in_every_run() -> None:
    beside = Beside(6, "recent")
    for start in range(0, 12, 2):
        beside.write(start, 2)
    assert beside.kept == [6, 7, 8, 9, 10, 11]
    kept = []
    for _ in range(2):
        beside = Beside(20, "random")
        torch.manual_seed(len(kept))
        for start in range(0, 40, 4):
            beside.write(start, 4)
        kept.append(beside.kept)
    assert kept[0] == kept[1] and kept[0][-8:] == list(range(32, 40)) and kept[0][:12] != list(range(20, 32))
    order = rules.random_order(0, 32)
    assert kept[0][:12] == sorted(order.argsort(descending=True)[:12].tolist())
    order = rules.random_order(0, 5000)
    assert abs(order.mean() - 0.5) < 0.02 and abs(torch.corrcoef(torch.stack((order[1:], order[:-1])))[0, 1]) < 0.04


def test_what_is_rolled_takes_its_rows_along_and_its_old_places_go_first() -> None:
    beside = Beside(12)
    for start in range(0, 12, 4):
        beside.write(start, 4)
    beside.salience[:] = torch.arange(12.0)
    beside.due = dict(enumerate(range(12)))
    beside.places |= rules.kept(beside.places) * rules.ATTENDED
    beside.move(8, 4, 4)  # token 8 … 11 stand twice
    assert beside.kept == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    beside.write(8, 4)
    beside.check()
    full = Beside(8)
    full.write(0, 8)
    full.salience[:] = torch.arange(8.0)
    full.move(4, 10, 4)  # nothing is overwritten: there are no rows for both
    assert full.kept == [0, 1, 2, 3, 10, 11, 12, 13]


def test_more_tokens_than_there_are_rows_are_refused_before_anything_changes() -> None:
    beside = Beside(6)
    beside.write(0, 5)
    before = [x.clone() for x in beside.state]
    with pytest.raises(PackedCacheError, match=r"7 tokens, 3:10, .* keeps 6 \(budget=\); nothing was written"):
        beside.write(3, 7)
    assert all(torch.equal(a, b) for a, b in zip(before, beside.state))
    source = torch.randn(BATCH, HEADS_, 3, HEAD_DIM)
    for call in (
        lambda: jkv.append_kept(*beside.state, source, 38, 8, "attention"),
        lambda: jkv.move_kept(*beside.state, 38, 0, 3, "attention"),
        lambda: jkv.forget_kept(*beside.state, 4, 41),
    ):
        with pytest.raises(RuntimeError, match="do not lie within the cache's 40 tokens"):
            call()


# ---- attention ----


def filled(budget: int, bits: int = 8, policy: str = "attention") -> tuple[Beside, Beside]:
    """Keys and values of 24 tokens, of which a random half is kept."""
    torch.manual_seed(0)
    sides = Beside(budget, policy), Beside(budget, policy)
    salience = torch.rand(24)
    for side in sides:
        for start in range(0, 24, 4):
            side.write(start, 4)
            side.salience[: len(side.kept)] = salience[side.kept]
    assert sides[0].kept == sides[1].kept
    return sides


def attend(keys: Beside, values: Beside, query: Tensor, ranges: list[int], key: Tensor, value: Tensor, mask=None):
    state = keys.codes, keys.scales, values.codes, values.scales, keys.places, values.places
    others = ranges, key, value, mask, False, 0.2, 8, 8, "taylor", keys.policy
    return jkv.attention_kept(query, *state, keys.salience, values.salience, *others)


@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "one column"])
@pytest.mark.parametrize("ranges", [[0, 24], [0, 8, 12, 22], [2, 3, 5, 5], [20, 27, 3, 9, 36, 40]], ids=str)
def test_attention_is_that_over_the_kept_tokens_alone(ranges: list[int], mask: str) -> None:
    keys, values = filled(13)
    query = torch.randn(BATCH, 4, 20, HEAD_DIM)
    key, value = torch.randn(2, BATCH, HEADS_, 5, HEAD_DIM).unbind()
    tokens = [p for a, b in zip(ranges[::2], ranges[1::2]) for p in range(a, b)]
    here = [p for p in tokens if p in keys.kept or p >= 24]  # the last ones have never been written
    columns = [tokens.index(p) for p in here] + [len(tokens) + i for i in range(5)]
    full = None
    if mask != "none":
        full = torch.rand(BATCH, 1, 20, 1 if mask == "one column" else len(tokens) + 5)
        full = full - 0.5 if mask == "additive" else full < 0.9
    chosen = full if full is None or full.shape[-1] == 1 else full[..., columns]
    got = attend(keys, values, query, ranges, key, value, full)
    k, v = (
        torch.cat((x.plain[:, :, here], new), 2).repeat_interleave(2, 1) for x, new in ((keys, key), (values, value))
    )
    want = torch.nn.functional.scaled_dot_product_attention(query, k, v, chosen, scale=0.2).nan_to_num()
    assert (got - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("share", [0.7, 0.5, 0.3, 0.05])
def test_even_ones_lie_in_about_even_distances_whatever_their_share(share: float) -> None:
    order = rules.even_order(1000, 3000)
    kept = order.argsort(descending=True)[: int(share * 2000)].sort().values
    gaps = kept.diff()
    assert len(gaps.unique()) <= 3 and gaps.max() <= 2.7 / share  # three distances (Steinhaus)


@pytest.mark.parametrize("policy", ["random", "even"])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "one column"])
def test_a_sample_stands_for_what_was_dropped(policy: str, mask: str) -> None:
    """Of tokens that are all alike, which ones are kept makes no difference: attention is that over all of them."""
    torch.manual_seed(0)
    keys, values = Beside(30, policy), Beside(30, policy)
    for side in (keys, values):
        token = torch.randn(BATCH, HEADS_, 1, HEAD_DIM).expand(-1, -1, 4, -1)
        for start in range(0, 40, 4):
            jkv.append_kept(*side.state, token, start, 8, policy)
            side.plain[:, :, start : start + 4] = token
    query = torch.randn(BATCH, 4, 20, HEAD_DIM)
    key, value = torch.randn(2, BATCH, HEADS_, 5, HEAD_DIM).unbind()
    full = None
    if mask != "none":
        full = torch.rand(BATCH, 1, 20, 1)
        full = full - 0.5 if mask == "additive" else full < 0.9
        if mask != "one column":
            full = torch.cat((full.expand(-1, -1, -1, 40), full.flip(2).expand(-1, -1, -1, 5)), -1)
    got = attend(keys, values, query, [0, 40], key, value, full)
    k, v = (torch.cat((x.plain, new), 2).repeat_interleave(2, 1) for x, new in ((keys, key), (values, value)))
    want = torch.nn.functional.scaled_dot_product_attention(query, k, v, full, scale=0.2).nan_to_num()
    assert (got - want).norm() < 0.01 * want.norm()
    assert len(keys.kept) == 30 and keys.kept == values.kept


def test_of_a_sample_only_what_has_been_written_is_stood_for() -> None:
    places = rules.no_places(200)
    chosen, seen = torch.zeros(200, dtype=torch.bool), torch.zeros(200, dtype=torch.bool)
    seen[10:150], chosen[10:64], chosen[100:108] = True, True, True
    rules.tell(places, chosen, seen, chosen)
    told = rules.stand_for(places, 0, 200).exp()
    assert torch.allclose(told[:64], torch.ones(64)) and torch.allclose(told[64:128], torch.tensor(8.0))
    assert torch.equal(told[128:], torch.ones(72))  # of which none is kept, or none was written
    assert torch.allclose(rules.stand_for(places, 92, 116).exp(), torch.tensor(3.0))  # of those alone
    assert len(rules.stand_for(places, 70, 70)) == 0
    assert rules.with_weights(None, torch.zeros(4), torch.zeros(1)) is None


def test_salience_is_the_attention_received_averaged_over_chunks() -> None:
    keys, values = filled(13)
    keys.salience.fill_(torch.inf), values.salience.fill_(torch.inf)
    key, value = torch.randn(2, BATCH, HEADS_, 5, HEAD_DIM).unbind()
    due = torch.full((13,), torch.inf)
    for call in range(3):
        query = torch.randn(BATCH, HEADS_, 8, HEAD_DIM)  # all of them are sampled, one to a block
        for side in (keys, values):
            side.places &= rules.KEPT | rules.KNOWN  # as if a chunk were new
        attend(keys, values, query, [0, 10, 10, 24], key, value)
        attend(keys, values, torch.randn_like(query), [0, 10, 10, 24], key, value)  # denoised again: not looked at
        assert torch.equal(rules.attended(keys.places), rules.kept(keys.places))
        k = torch.cat((keys.plain[:, :, keys.kept], key), 2)
        new = (query @ k.mT * 0.2).softmax(-1)[..., :13].mean((0, 1)).amax(0)
        due = new if call == 0 else rules.DECAY * due + (1 - rules.DECAY) * new
        assert torch.allclose(keys.salience, due, rtol=0.02)
        assert torch.equal(keys.salience, values.salience)
    before = keys.salience.clone()
    for side in (keys, values):
        side.places &= rules.KEPT | rules.KNOWN
    attend(keys, values, query, [0, 4], key, value)  # others are not looked at
    row = rules.rows_of(keys.places, 0, 4)[1]
    assert torch.equal(keys.salience[row:], before[row:]) and not torch.equal(keys.salience[:row], before[:row])
    assert int(rules.attended(values.places).sum()) == row


def test_long_queries_are_sampled_and_masks_with_them() -> None:
    query, cached, key = torch.randn(1, 2, 1280, 16), torch.randn(1, 2, 6, 16), torch.randn(1, 2, 3, 16)
    mask = torch.rand(1280, 9) < 0.7
    got = rules.attention_received(query, cached.split(4, 2), key, mask, 0.25)
    rows = [(2 * i + 1) * 1280 // (2 * 20) for i in range(20)]
    scores = (query[:, :, rows] @ torch.cat((cached, key), 2).mT * 0.25).masked_fill(~mask[rows], -torch.inf)
    weights = scores.softmax(-1)[..., :6].mean((0, 1))
    assert torch.allclose(got, torch.stack([b.mean(0) for b in weights.tensor_split(8)]).amax(0), atol=1e-5)


def test_attention_of_nan_makes_no_salience_of_nan() -> None:
    keys, values = filled(13)
    query = torch.full((BATCH, HEADS_, 4, HEAD_DIM), torch.nan)
    key = torch.randn(BATCH, HEADS_, 5, HEAD_DIM)
    attend(keys, values, query, [0, 24], key, key)
    assert keys.salience.isfinite().all()


def test_keys_and_values_that_keep_other_tokens_are_refused() -> None:
    keys, values = filled(13)
    values.write(30, 2)
    query = key = torch.randn(BATCH, HEADS_, 4, HEAD_DIM)
    with pytest.raises(PackedCacheError, match="keys and values of a packed cache keep other tokens"):
        attend(keys, values, query, [0, 24], key, key)


# ---- learned heads ----


def test_a_head_scores_what_was_written_and_age_takes_off() -> None:
    torch.manual_seed(0)
    head = SalienceHead(HEAD_DIM, HEAD_DIM, 8)
    policy = policy_of(head)
    assert policy == policy_of(head) and policy in HEADS and policy != policy_of(SalienceHead(HEAD_DIM, HEAD_DIM, 8))
    keys, values = Beside(10, policy), Beside(10, policy)
    scores: dict[int, float] = {}
    before: list[int] = []
    for start in range(0, 20, 4):
        for side in (keys, values):
            jkv.append_kept(*side.state, torch.zeros(BATCH, HEADS_, 4, HEAD_DIM), start, 8, policy)
        key, value = torch.randn(2, BATCH, HEADS_, 4, HEAD_DIM).unbind()
        jkv.score_kept(keys.places, keys.salience, values.places, values.salience, key, value, start, policy)
        scores.update(zip(range(start, start + 4), head(key, value).mean(0).tolist()))
        left = sorted(p for p in scores if p in before)
        least = sorted(left, key=lambda p: (p >= start - 4, scores[p], p))[: max(0, len(left) + 4 - 10)]
        before = [p for p in scores if p not in least and (p in left or p >= start)]
        assert keys.kept == before == values.kept
        assert torch.allclose(keys.salience[: len(before)], torch.tensor([scores[p] for p in before]), atol=1e-5)
    with torch.no_grad():
        head.recency.fill_(100.0)
    aging = policy_of(head)
    jkv.append_kept(*keys.state, torch.zeros(BATCH, HEADS_, 4, HEAD_DIM), 30, 8, aging)
    assert keys.kept == [*before[4:], 30, 31, 32, 33]


def test_a_head_that_this_process_does_not_have_is_told() -> None:
    keys, key = Beside(4, "head:none"), torch.randn(BATCH, HEADS_, 4, HEAD_DIM)
    with pytest.raises(PackedCacheError, match="learned head 'head:none', which this process does not have"):
        jkv.score_kept(keys.places, keys.salience, keys.places, keys.salience.clone(), key, key, 0, "head:none")


def _arguments() -> dict[str, tuple]:
    side = Beside(8)
    side.write(0, 8)
    store = side.codes, side.scales
    query = torch.randn(BATCH, 4, 3, HEAD_DIM)
    key = torch.randn(BATCH, HEADS_, 3, HEAD_DIM)
    state = *store, *(x.clone() for x in store), side.places, side.places.clone(), torch.rand(8), torch.rand(8)
    policy = policy_of(SalienceHead(HEAD_DIM, HEAD_DIM, 8))
    return {
        "append_kept": (*side.state, torch.randn(BATCH, HEADS_, 4, HEAD_DIM), 10, 8, "attention"),
        "move_kept": (*side.state, 4, 20, 4, "attention"),
        "forget_kept": (*side.state, 2, 5),
        "score_kept": (side.places, torch.rand(8), side.places.clone(), torch.rand(8), key, key, 2, policy),
        "attention_kept": (query, *state, [0, 8], key, key, None, False, 0.2, 8, 8, "taylor", "attention"),
    }


@pytest.mark.parametrize("name", ["append_kept", "move_kept", "forget_kept", "score_kept", "attention_kept"])
def test_operators_are_sound(name: str) -> None:
    torch.library.opcheck(getattr(jkv, name).default, _arguments()[name])
