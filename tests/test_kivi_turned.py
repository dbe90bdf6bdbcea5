"""Keys quantized by channel that a model turns, repeats or joins after it has read them from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor

from jkv_compile import NotRewrittenWarning, is_packed
from jkv_compile.kernels import reference

from .caches import assert_held_exactly
from .harness import fresh_backend, relative_error, rewritten
from .idioms.models import RollingCache, rope
from .models import SelfAttention
from .test_kivi import BLOCK, canonical, chunks, read

Turn = Callable[[Tensor, int], Tensor]  # of `[B, n, H, D]` at positions start …


def complex_rope(x: Tensor, start: int) -> Tensor:
    d = x.shape[-1]
    angle = torch.outer(torch.arange(x.shape[1]) + start, 1.0 / 100 ** (torch.arange(0, d, 2) / d))
    turned = (
        torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def axial(x: Tensor, start: int) -> Tensor:
    """Runs of channels of two sizes, each turned in halves, as frames and places in them are."""
    split = x.shape[-1] // 4
    return torch.cat([rope(x[..., :split], start, False), rope(x[..., split:], start, False)], -1)


TURNS: dict[str, Turn] = {
    "interleaved": rope,
    "halves": lambda x, start: rope(x, start, False),
    "rotate_half": lambda x, start: rope(x, start, False, "rotate_half"),
    "assigned": lambda x, start: rope(x, start, False, "assigned halves"),
    "complex": complex_rope,
    "axial": axial,
    "scaled": lambda x, _: 1.25 * x,
}


class Turned(SelfAttention):
    """Keys are cached as they are projected, and turned when they are read."""

    def __init__(self, turn: Turn, repeat: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.turn, self.repeat = turn, repeat

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        q, k, v = self.project(x)
        end = start + x.shape[1]
        if self.layout == "bshd":
            cache["k"][:, start:end], cache["v"][:, start:end] = k, v
            keys, values = cache["k"][:, :end], cache["v"][:, :end]
        else:
            cache["k"][:, :, start:end], cache["v"][:, :, start:end] = k.transpose(1, 2), v.transpose(1, 2)
            keys, values = (cache[name][:, :, :end].transpose(1, 2) for name in ("k", "v"))
        keys, q = self.turn(keys, 0), self.turn(q, start)
        if self.repeat:
            keys, values = (t.repeat_interleave(self.heads // self.kv_heads, 2) for t in (keys, values))
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        o = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, enable_gqa=keys.shape[1] != self.heads
        )
        return self.out(o.transpose(1, 2).flatten(2))


def bias_of(q: Tensor, delta: Tensor, turn: Turn, scale: float, correction: str) -> Tensor:
    """Channel by channel of the cache, what an error of ±Δ/2 there does to scores; `delta` `[B, H, S, D]`."""
    bias = torch.zeros(*q.shape[:3], delta.shape[2])
    for channel in range(delta.shape[-1]) if correction != "none" else ():
        alone = torch.zeros_like(delta)
        alone[..., channel] = delta[..., channel]
        turned = turn(alone.transpose(1, 2), 0).transpose(1, 2)
        alpha = scale / 2 * q @ turned.mT
        bias += reference.log_sinhc(alpha) if correction == "exact" else alpha.square() / 6
    return bias.clamp_max(1) if correction == "clamped" else bias


def simulated(
    model: Turned, x: Tensor, plain: dict[str, Tensor], start: int, bits: int, correction: str, recent: int, block: int
) -> Tensor:
    """The model's output by brute force, as `test_kivi.simulated` has it of keys that are not turned."""
    q, _, _ = model.project(x)
    stop = start + x.shape[1]
    k, v = (canonical(plain[name], model.layout)[:, :, :stop].float() for name in ("k", "v"))
    quantized, delta = read(k, bits, block)
    exact = (torch.arange(stop) >= start - recent)[:, None]
    values = reference.dequantize(*reference.quantize(v, bits, BLOCK), bits)
    k, v, delta = torch.where(exact, k, quantized), torch.where(exact, v, values), delta.masked_fill(exact, 0)
    repeats = model.heads // model.kv_heads
    k, v, delta = (t.repeat_interleave(repeats, 1) for t in (k, v, delta))
    q, k = model.turn(q.float(), start).transpose(1, 2), model.turn(k.transpose(1, 2), 0).transpose(1, 2)
    scale = model.head_dim**-0.5
    scores = scale * q @ k.mT - bias_of(q, delta, model.turn, scale, correction)
    return model.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2).to(x.dtype))


def run(
    model: Turned, length: int, repeats: int = 1, batch: int = 1, block: int = BLOCK, tokens: int = 0, **settings: Any
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What is computed, what brute force computes, and what is in full precision, chunk by chunk.

    Keys have channels of very different range, so that pairs have two steps that are far apart.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        wide = torch.exp(1.2 * torch.randn(model.head_dim)).repeat(model.kv_heads)
        model.kv.weight[: model.kv_heads * model.head_dim] *= wide[:, None] / wide.square().mean().sqrt()
    backend = fresh_backend(bits=2, quantizer="kivi", **settings)
    compiled, correction = torch.compile(model, backend=backend), settings.get("correction", "taylor")
    tokens = tokens or max(6 * length, 4 * block)
    cache, plain = model.new_cache(batch, tokens), model.new_cache(batch, tokens)
    with torch.no_grad():
        for call, (start, stop) in enumerate(chunks(tokens - tokens % length, length, repeats)):
            x = 3 * torch.randn(batch, stop - start, model.heads * model.head_dim)
            with torch.compiler.set_stance("fail_on_recompile" if call > 2 * repeats else "default"):
                got = compiled(x, cache, start)
            full = model(x, plain, start)
            recent = max(settings.get("recent", 0), block - 1)
            yield got, simulated(model, x, plain, start, 2, correction, recent, block), full
    assert is_packed(cache["k"]) and cache["k"]._store.quantizer == "kivi"
    lowerings = {match.lowering for report in backend.reports for match in report.matches}
    assert all(lowering.startswith("reconstructed") for lowering in lowerings)
    assert_held_exactly(cache["k"], canonical(plain["k"], model.layout))


@pytest.mark.parametrize("correction", ["taylor", "clamped", "exact", "none"])
@pytest.mark.parametrize("name", TURNS)
def test_two_bits_are_what_brute_force_computes(name: str, correction: str) -> None:
    errors = []
    for got, want, full in run(Turned(TURNS[name], heads=2, head_dim=32), 24, correction=correction):
        assert relative_error(got, want) < 1e-5
        errors.append(relative_error(got, full))
    assert max(errors) > 1e-2


@pytest.mark.parametrize("model, batch, settings", [
    (Turned(rope, layout="bhsd", heads=2, head_dim=32), 3, {}),
    (Turned(rope, kv_heads=2, head_dim=32), 2, {}),
    (Turned(rope, repeat=True, kv_heads=2, head_dim=32), 2, {"correction": "clamped"}),
    (Turned(TURNS["halves"], kv_heads=1, head_dim=32), 1, {"correction": "exact"}),
    (Turned(TURNS["halves"], heads=2, head_dim=32), 1, {"recent": 40}),
    (Turned(TURNS["scaled"], repeat=True, kv_heads=2, head_dim=32), 2, {}),
    (Turned(rope, heads=2, head_dim=32), 1, {"inner": "inductor"}),
], ids=["heads first, batch", "grouped", "repeated, clamped", "one head, exact", "window", "not turned", "inductor"])  # fmt: skip
@pytest.mark.parametrize("length, repeats", [(7, 1), (12, 3), (32, 2), (40, 1)])
def test_chunks_of_any_length(model: Turned, batch: int, settings: dict[str, Any], length: int, repeats: int) -> None:
    for got, want, _ in run(model, length, repeats, batch, **settings):
        assert relative_error(got, want) < 1e-5


def test_half_precision_stays_close() -> None:
    torch.manual_seed(0)
    model = Turned(rope, heads=2, head_dim=32).bfloat16()
    compiled = torch.compile(model, backend=fresh_backend(bits=2, quantizer="kivi"))
    cache, plain = model.new_cache(1, 128, torch.bfloat16), model.new_cache(1, 128, torch.bfloat16)
    with torch.no_grad():
        for start in range(0, 128, 16):
            x = 3 * torch.randn(1, 16, 64).bfloat16()
            got, _ = compiled(x, cache, start), model(x, plain, start)
            assert relative_error(got, simulated(model, x, plain, start, 2, "taylor", 31, 32)) < 0.02


class Rolling(RollingCache):
    """Self-Forcing's eviction, of keys that are turned when they are read."""

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
        q, k, v = self.project(x)
        n = q.shape[1]
        last = min(start, self.tokens - n)
        if start > last:
            for name in ("k", "v"):
                old = cache[name][:, self.sink + n :].clone()
                cache[name][:, self.sink : self.tokens - n] = old
        cache["k"][:, last : last + n], cache["v"][:, last : last + n] = k, v
        return self.sdpa(rope(q, last), rope(cache["k"][:, : last + n]), cache["v"][:, : last + n])


def test_eviction_by_whole_blocks() -> None:
    """Turned by where a token is in the cache: blocks move bit for bit, and stay corrected."""
    torch.manual_seed(0)
    model = Rolling(sink=8, tokens=48)
    backend = fresh_backend(bits=8, quantizer="kivi", group_size=8)
    compiled, cache, plain = torch.compile(model, backend=backend), model.new_cache(), model.new_cache()
    errors = []
    with torch.no_grad():
        for call in range(14):
            x = torch.randn(1, 8, 64)
            with torch.compiler.set_stance("fail_on_recompile" if call > 7 else "default"):
                got = compiled(x, cache, 8 * call)
            errors.append(relative_error(got, model(x, plain, 8 * call)))
            stop, store = min(48, 8 * call + 8), cache["k"]._store
            codes, scales = reference.quantize(plain["k"].transpose(1, 2), 8, 1, 8)
            assert torch.equal(store.codes[:, :, :stop], codes[:, :, :stop])
            assert torch.equal(store.scales[:, :, :, : stop // 8], scales[:, :, :, : stop // 8])
    assert 0 < max(errors) < 0.01


class TestGraph(expecttest.TestCase):
    def graph(self, turn: str) -> str:
        torch.manual_seed(0)
        backend = fresh_backend(bits=2, quantizer="kivi", group_size=8)
        model = Turned(TURNS[turn], heads=1, head_dim=8)
        compiled, cache = torch.compile(model, backend=backend), model.new_cache(1, 40)
        with torch.no_grad():
            for start in (0, 8, 16):
                compiled(torch.randn(1, 8, 8), cache, start)
        return rewritten(backend)

    def test_steps_of_two_kinds_of_channels_are_turned_as_the_keys_are(self) -> None:
        self.assertExpectedInline(
            self.graph("complex"),
            """\
q = linear.view(1, 8, 1, 8)
view_1 = linear_1.view(1, 8, 2, 1, 8)
unbind = view_1.unbind(2)
k = unbind[0]
v = unbind[1]
add = add(l_start_, 8)
permute = k.permute([0, 2, 1, 3])
jkv::append_blocks(l_cache_k__codes, l_cache_k__scales, [l_cache_k__held], [l_cache_k__held_ranges], permute, l_start_, 40, 2)
permute_1 = k.permute([0, 2, 1, 3])
jkv::hold(l_cache_k__held, l_cache_k__held_ranges, permute_1, l_start_)
permute_2 = v.permute([0, 2, 1, 3])
jkv::append(l_cache_v__codes, l_cache_v__scales, permute_2, l_start_, 2)
permute_3 = v.permute([0, 2, 1, 3])
jkv::hold(l_cache_v__held, l_cache_v__held_ranges, permute_3, l_start_)
arange = arange(add)
add_1 = add(arange, 0)
arange_1 = arange(0, 8, 2)
truediv = truediv(arange_1, 8)
pow_1 = pow(100, truediv)
truediv_1 = truediv(1.0, pow_1)
angle = outer(add_1, truediv_1)
select = l_cache_k__scales.select(-1, 0)
repeat_interleave = select.repeat_interleave(8, 3)
narrow = narrow(repeat_interleave, 3, 0, l_start_)
float_1 = narrow.float()
transpose = float_1.transpose(2, 3)
mul = mul(transpose, 0.25)
_outside_held = _outside_held(mul, l_cache_k__held_ranges, 0)
only = only(_outside_held, [0, 2, 4, 6], 0)
to = only.to(torch.float32)
permute_4 = k.permute([0, 2, 1, 3])
zeros_like = zeros_like(permute_4)
cat = cat([to, zeros_like], 2)
permute_5 = cat.permute([0, 2, 1, 3])
double_2 = permute_5.double()
select_1 = l_cache_k__scales.select(-1, 0)
repeat_interleave_1 = select_1.repeat_interleave(8, 3)
narrow_1 = narrow(repeat_interleave_1, 3, 0, l_start_)
float_2 = narrow_1.float()
transpose_4 = float_2.transpose(2, 3)
mul_1 = mul(transpose_4, 0.25)
_outside_held_1 = _outside_held(mul_1, l_cache_k__held_ranges, 0)
only_1 = only(_outside_held_1, [0, 2, 4, 6], 1)
to_1 = only_1.to(torch.float32)
permute_6 = k.permute([0, 2, 1, 3])
zeros_like_1 = zeros_like(permute_6)
cat_1 = cat([to_1, zeros_like_1], 2)
permute_7 = cat_1.permute([0, 2, 1, 3])
double_3 = permute_7.double()
dequantize_held_default = jkv::dequantize_held(l_cache_k__codes, l_cache_k__scales, [l_cache_k__held], [l_cache_k__held_ranges], 0, l_start_, 2, 8, 'kivi', torch.float32)
permute_8 = k.permute([0, 2, 1, 3])
cat_2 = cat([dequantize_held_default, permute_8], 2)
permute_9 = cat_2.permute([0, 2, 1, 3])
double = permute_9.double()
unflatten_2 = double_2.unflatten(-1, (-1, 2))
unflatten_3 = double_3.unflatten(-1, (-1, 2))
unflatten = double.unflatten(-1, (-1, 2))
view_as_complex_2 = view_as_complex(unflatten_2)
view_as_complex_3 = view_as_complex(unflatten_3)
view_as_complex = view_as_complex(unflatten)
ones_like = ones_like(angle)
polar = polar(ones_like, angle)
getitem_12 = polar[:, None]
turned_2 = mul(view_as_complex_2, getitem_12)
turned_3 = mul(view_as_complex_3, getitem_12)
turned = mul(view_as_complex, getitem_12)
view_as_real_2 = view_as_real(turned_2)
view_as_real_3 = view_as_real(turned_3)
view_as_real = view_as_real(turned)
flatten_3 = view_as_real_2.flatten(-2)
flatten_4 = view_as_real_3.flatten(-2)
flatten = view_as_real.flatten(-2)
keys_3 = flatten_3.to(torch.float32)
keys_4 = flatten_4.to(torch.float32)
keys_1 = flatten.to(torch.float32)
arange_2 = arange(8)
add_2 = add(arange_2, l_start_)
arange_3 = arange(0, 8, 2)
truediv_2 = truediv(arange_3, 8)
pow_2 = pow(100, truediv_2)
truediv_3 = truediv(1.0, pow_2)
angle_1 = outer(add_2, truediv_3)
double_1 = q.double()
unflatten_1 = double_1.unflatten(-1, (-1, 2))
view_as_complex_1 = view_as_complex(unflatten_1)
ones_like_1 = ones_like(angle_1)
polar_1 = polar(ones_like_1, angle_1)
getitem_13 = polar_1[:, None]
turned_1 = mul(view_as_complex_1, getitem_13)
view_as_real_1 = view_as_real(turned_1)
flatten_1 = view_as_real_1.flatten(-2)
q_1 = flatten_1.to(torch.float32)
keys_5 = keys_3.transpose(1, 2)
keys_6 = keys_4.transpose(1, 2)
keys_2 = keys_1.transpose(1, 2)
transpose_2 = q_1.transpose(1, 2)
dequantize_held_default_1 = jkv::dequantize_held(l_cache_v__codes, l_cache_v__scales, [l_cache_v__held], [l_cache_v__held_ranges], 0, l_start_, 2, 8, 'rtn', torch.float32)
permute_10 = v.permute([0, 2, 1, 3])
cat_3 = cat([dequantize_held_default_1, permute_10], 2)
attention_turned_default = jkv::attention_turned(transpose_2, keys_2, cat_3, keys_5, keys_6, [0, 1, 2, 3, 4, 5, 6, 7], None, False, 0.35355339059327373, 'taylor')
transpose_3 = attention_turned_default.transpose(1, 2)
flatten_2 = transpose_3.flatten(2)
return (linear_2)
""",
        )

    def test_channels_that_are_not_mixed_have_a_group_each(self) -> None:
        self.assertExpectedInline(
            self.graph("scaled"),
            """\
q = linear.view(1, 8, 1, 8)
view_1 = linear_1.view(1, 8, 2, 1, 8)
unbind = view_1.unbind(2)
k = unbind[0]
v = unbind[1]
add = add(l_start_, 8)
permute = k.permute([0, 2, 1, 3])
jkv::append_blocks(l_cache_k__codes, l_cache_k__scales, [l_cache_k__held], [l_cache_k__held_ranges], permute, l_start_, 40, 2)
permute_1 = k.permute([0, 2, 1, 3])
jkv::hold(l_cache_k__held, l_cache_k__held_ranges, permute_1, l_start_)
permute_2 = v.permute([0, 2, 1, 3])
jkv::append(l_cache_v__codes, l_cache_v__scales, permute_2, l_start_, 2)
permute_3 = v.permute([0, 2, 1, 3])
jkv::hold(l_cache_v__held, l_cache_v__held_ranges, permute_3, l_start_)
select = l_cache_k__scales.select(-1, 0)
repeat_interleave = select.repeat_interleave(8, 3)
narrow = narrow(repeat_interleave, 3, 0, l_start_)
float_1 = narrow.float()
transpose = float_1.transpose(2, 3)
mul = mul(transpose, 0.25)
_outside_held = _outside_held(mul, l_cache_k__held_ranges, 0)
to = _outside_held.to(torch.float32)
permute_4 = k.permute([0, 2, 1, 3])
zeros_like = zeros_like(permute_4)
cat = cat([to, zeros_like], 2)
permute_5 = cat.permute([0, 2, 1, 3])
keys_3 = mul(1.25, permute_5)
dequantize_held_default = jkv::dequantize_held(l_cache_k__codes, l_cache_k__scales, [l_cache_k__held], [l_cache_k__held_ranges], 0, l_start_, 2, 8, 'kivi', torch.float32)
permute_6 = k.permute([0, 2, 1, 3])
cat_1 = cat([dequantize_held_default, permute_6], 2)
permute_7 = cat_1.permute([0, 2, 1, 3])
keys_1 = mul(1.25, permute_7)
q_1 = mul(1.25, q)
keys_4 = keys_3.transpose(1, 2)
keys_2 = keys_1.transpose(1, 2)
transpose_2 = q_1.transpose(1, 2)
float_2 = keys_4.float()
square = float_2.square()
unflatten = square.unflatten(-1, (8, -1))
mean = unflatten.mean(-1)
dequantize_held_default_1 = jkv::dequantize_held(l_cache_v__codes, l_cache_v__scales, [l_cache_v__held], [l_cache_v__held_ranges], 0, l_start_, 2, 8, 'rtn', torch.float32)
permute_8 = v.permute([0, 2, 1, 3])
cat_2 = cat([dequantize_held_default_1, permute_8], 2)
attention_dense_default = jkv::attention_dense(transpose_2, keys_2, cat_2, mean, None, False, 0.35355339059327373, 0, 'taylor')
transpose_3 = attention_dense_default.transpose(1, 2)
flatten = transpose_3.flatten(2)
return (linear_2)
""",
        )


class Parted(Turned):
    """Attends in the graph that reads, or in another one: turns keys after the break between the two, or before it."""

    def forward(self, x: Tensor, cache: dict[str, Tensor], start: int, how: str = "") -> Tensor:  # type: ignore[override]
        if not how:
            return SelfAttention.forward(self, x, cache, start)
        q, k, v = self.project(x)
        end = start + x.shape[1]
        cache["k"][:, start:end], cache["v"][:, start:end] = k, v
        keys, values = cache["k"][:, :end] * 1.0, cache["v"][:, :end] * 1.0
        keys = self.turn(keys, 0) if how == "before" else keys
        torch._dynamo.graph_break()
        keys = self.turn(keys, 0) if how == "after" else keys
        q = self.turn(q, start).transpose(1, 2)
        return self.attend(q, keys.transpose(1, 2), values.transpose(1, 2))


@pytest.mark.parametrize("name", ["interleaved", "halves", "scaled"])
@pytest.mark.parametrize("how", ["after", "before"])
@pytest.mark.filterwarnings("ignore::jkv_compile.NotRewrittenWarning")
def test_packed_keys_that_are_turned_in_another_graph_than_they_are_read_in(how: str, name: str) -> None:
    """What Δ of a channel is can be told from graph to graph, what two of them have in common cannot."""
    torch.manual_seed(0)
    model = Parted(TURNS[name], heads=2, head_dim=32)
    backend = fresh_backend(bits=2, quantizer="kivi")
    compiled, cache, plain = torch.compile(model, backend=backend), model.new_cache(1, 240), model.new_cache(1, 240)
    with torch.no_grad():
        for call, start in enumerate(range(0, 240, 24)):
            x, own = 2 * torch.randn(1, 24, 64), () if call < 3 else (how,)
            got, _ = compiled(x, cache, start, *own), model(x, plain, start, *own)
        assert is_packed(cache["k"])
        want, without = (simulated(model, x, plain, start, 2, form, 31, 32) for form in ("taylor", "none"))
    corrected = how == "after" or name == "scaled"
    assert relative_error(got, want if corrected else without) < 1e-5
    assert relative_error(want, without) > 1e-3


UNCORRECTED: dict[str, tuple[Turn, str]] = {
    "norms": (lambda x, _: x / x.norm(dim=-1, keepdim=True), "`norm` stands between cache and attention"),
    "a matrix": (lambda x, _: x @ torch.eye(x.shape[-1]), "`matmul` stands between cache and attention"),
    "three channels": (
        lambda x, _: x + x.roll(1, -1) + x.roll(2, -1), "channels of keys are mixed in other ways than two by two",
    ),
    "a power": (lambda x, _: x.pow(3), "`pow` stands between cache and attention"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCORRECTED)
def test_what_is_not_followed_is_packed_and_not_corrected_and_says_so(name: str) -> None:
    torch.manual_seed(0)
    turn, reason = UNCORRECTED[name]
    model = Turned(turn, heads=2, head_dim=32)
    backend = fresh_backend(bits=8, quantizer="kivi", group_size=16)
    compiled, cache, plain = torch.compile(model, backend=backend), model.new_cache(1, 64), model.new_cache(1, 64)
    with torch.no_grad():
        for start in range(0, 64, 8):
            x = torch.randn(1, 8, 64)
            assert relative_error(compiled(x, cache, start), model(x, plain, start)) < 0.02
    lowerings = {match.lowering for report in backend.reports for match in report.matches}
    assert any("not corrected" in lowering and reason in lowering for lowering in lowerings), lowerings


def test_flex_attention_is_refused_and_says_why() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    class Flex(SelfAttention):
        def forward(self, x: Tensor, cache: dict[str, Tensor], start: int) -> Tensor:
            q, k, v = self.project(x)
            end = start + x.shape[1]
            cache["k"][:, start:end], cache["v"][:, start:end] = k, v
            o = flex_attention(*(t.transpose(1, 2) for t in (q, cache["k"][:, :end], cache["v"][:, :end])))
            return self.out(o.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = Flex()
    compiled = torch.compile(model, backend=fresh_backend(bits=2, quantizer="kivi"))
    cache, plain = model.new_cache(1, 64), model.new_cache(1, 64)
    with (
        torch.no_grad(),
        pytest.warns(NotRewrittenWarning, match="flex_attention, whose score function takes steps of"),
    ):
        for start in range(0, 64, 32):
            x = torch.randn(1, 32, 256)
            assert relative_error(compiled(x, cache, start), model(x, plain, start)) < 1e-5
    assert not is_packed(cache["k"])
