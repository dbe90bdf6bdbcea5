"""First tokens and newest ones in full precision, in every way of holding a cache, at 2 bits: what the simulation has.

That knows which tokens these are by their places alone (`simulated`), so that a token that is attended from its codes,
or as it was before it was overwritten, is off by more than a rounding.
"""

from __future__ import annotations

import pytest
import torch

from jkv_compile import NotRewrittenWarning, quantization_step

from ..caches import assert_held_exactly
from ..harness import fresh_backend, relative_error
from ..models import BrokenAttention, SelfAttention
from .cases import CASES, fixed_past, growing_past, masked_buffer
from .models import CHUNK
from .test_two_bits import run_beside_simulation

pytestmark = pytest.mark.filterwarnings("error::jkv_compile.NotRewrittenWarning")

# Attention comes after the write of a chunk, so that as many tokens are attended as are asked for. (Or a chunk is
# written between two calls, which the simulation notices a call later.)
WRITTEN_FIRST = (
    "eviction by rolling, with a sink",
    "keys beside values in one tensor",
    "keys and values stacked, written by another graph",
    "a buffer rolled and copied back",
    "a buffer shifted by cat and copied back",
    "buffers allocated in the first forward",
    "a copy edited and attended, written back in eager code",
)
# Attention comes before it: those that will be the newest before the next chunk are held already, too.
ATTENDED_FIRST = (
    "a concatenation that grows and is returned",
    "a copy edited and attended, written back in the graph",
    "a concatenation of sink, window and current chunk",
    "a concatenation of sink, pinned chunk, window and current, the sink turned",
)

# Two branches take turns, and write the same tokens: the second one's are known from a call before.
IN_TURNS = ("buffers of two guidance branches, chosen ranges",)


@pytest.mark.parametrize("name", CASES)
def test_a_sink_is_attended_as_it_was_written(name: str) -> None:
    """Half a chunk, or one and a half; and the last two calls compile nothing."""
    for sink in (4,) if "fixed past" in name else (12,):
        steps, stable_from = CASES[name]
        assert run_beside_simulation(steps, stable_from, held={"sink": sink}, sink=sink).error < 1e-5


@pytest.mark.parametrize("name", WRITTEN_FIRST + ATTENDED_FIRST + IN_TURNS)
def test_the_newest_tokens_are_attended_as_they_were_written(name: str) -> None:
    steps, stable_from = CASES[name]
    held = {"delay": 1 if name in WRITTEN_FIRST else 2 if name in ATTENDED_FIRST else 3}
    assert run_beside_simulation(steps, stable_from, held=held, recent=CHUNK).error < 1e-5


@pytest.mark.parametrize("name", ["eviction by rolling, with a sink", "a concatenation that grows and is returned"])
def test_both_are_attended_as_they_were_written(name: str) -> None:
    steps, stable_from = CASES[name]
    held = {"sink": 4, "delay": 1 if name in WRITTEN_FIRST else 2}
    assert run_beside_simulation(steps, stable_from, held=held, sink=4, recent=CHUNK).error < 1e-5


@pytest.mark.parametrize("quantizer, correction", [
    ("rtn", "exact"), ("quarot", "taylor"), ("unbiased", "taylor"), ("symmetric_unbiased", "taylor"),
])  # fmt: skip
@pytest.mark.parametrize("rope", ["", "half"], ids=["on packed keys", "on keys turned after the read"])
def test_whatever_the_quantizer(rope: str, quantizer: str, correction: str) -> None:
    steps = fixed_past(rope, False, 64)
    settings = {"quantizer": quantizer, "correction": correction, "sink": 3}
    assert run_beside_simulation(steps, 3, simulated=correction, held={"sink": 3}, **settings).error < 2e-5


def test_a_sink_that_was_not_held_would_be_seen() -> None:
    steps, stable_from = CASES["a copy edited and attended, written back in the graph"]
    assert run_beside_simulation(steps, stable_from, held={"sink": 4}).error > 1e-3
    assert run_beside_simulation(steps, stable_from, held={"delay": 2}).error > 1e-3


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("layout, kv_heads, window", [("bshd", None, 0), ("bhsd", 2, 14)], ids=["plain", "grouped"])
def test_chunks_that_are_written_again_and_again(layout: str, kv_heads: int | None, window: int, inner: str) -> None:
    """Self-Forcing: each chunk is denoised in a few calls, and nothing compiles from the third on; then a new video."""
    torch.manual_seed(0)
    backend = fresh_backend(bits=2, sink=6, recent=8, inner=inner)
    model = SelfAttention(kv_heads=kv_heads, layout=layout, window=window)
    compiled, cache = torch.compile(model, backend=backend), model.new_cache(2, 64)
    plain = model.new_cache(2, 64)
    with torch.no_grad():
        call = 0
        for start in (0, 8, 16, 24, 32, 0, 8):
            for _ in range(2):
                stance = "fail_on_recompile" if call > 4 else "default"  # the window opens at the third chunk
                x = torch.randn(2, 8, 256)
                with torch.compiler.set_stance(stance):
                    compiled(x, cache, start)
                model(x, plain, start)
                call += 1
                order = (0, 2, 1, 3) if layout == "bshd" else (0, 1, 2, 3)
                known = [assert_held_exactly(cache[name], plain[name].permute(order)) for name in ("k", "v")]
                assert known[0] == known[1]
                if start > 0:
                    assert set(range(6)) | set(range(start - 8, start)) <= set(known[0])


@pytest.mark.parametrize("kind", [SelfAttention, BrokenAttention])
def test_at_eight_bits_all_is_close_to_eager_and_what_is_held_is_exact(kind: type[SelfAttention]) -> None:
    """Also where the graph that writes does not attend."""
    torch.manual_seed(0)
    backend = fresh_backend(bits=2, sink=32, recent=0)
    model = kind()
    compiled, cache, plain = torch.compile(model, backend=backend), model.new_cache(1, 32), model.new_cache(1, 32)
    with torch.no_grad():
        for start in (0, 8, 8, 16):
            x = torch.randn(1, 8, 256)
            assert relative_error(compiled(x, cache, start), model(x, plain, start)) < 1e-5  # all of it is held
    assert not quantization_step(cache["k"]).any()


def test_a_mask_follows_tokens_that_are_held() -> None:
    """Queries of the masked buffer see a prefix: were its columns not moved with the keys, they would see others."""
    for additive in (False, True):
        steps = masked_buffer(additive=additive)
        assert run_beside_simulation(steps, 2, held={"sink": 20}, sink=20).error < 1e-5


def test_recent_is_refused_with_a_reason_where_positions_are_tensors() -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=2, sink=4, recent=8)
    with torch.no_grad(), pytest.warns(NotRewrittenWarning, match="recent=8 is not honoured"):
        next(masked_buffer()(backend))
    rejected = {r for report in backend.reports for r in report.rejections}
    assert len(rejected) == 2 and {r.kind.name for r in rejected} == {"POSITION"}  # keys and values


def test_a_growing_past_takes_what_it_holds_along() -> None:
    torch.manual_seed(0)
    backend = fresh_backend(bits=2, sink=12, recent=4)
    with torch.no_grad():
        generator = growing_past(backend)
        for _ in range(6):
            next(generator)
        past = generator.gi_frame.f_locals["past"]
        plain = generator.gi_frame.f_locals["reference_past"]
        for mine, reference in zip(past, plain):
            assert {*range(12), *range(44, 48)} <= set(assert_held_exactly(mine, reference))
            assert mine._store.held_tokens == (12, 4)
