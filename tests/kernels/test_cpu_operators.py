"""The operators on CPU tensors in C++: what they take without Python, what they pass on to it, and what is an error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jkv_compile.kernels import cpu, cpu_cpp, ops, quantizers, reference

HERE = Path(cpu_cpp.__file__).parent
jkv = torch.ops.jkv


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    try:
        cpu_cpp.load()
    except cpu_cpp.BuildError as error:
        pytest.skip(str(error))
    if cpu.kernels() is None:
        pytest.skip("JKV_CPU_KERNEL=torch")


def packed(
    tokens: int = 40, bits: int = 2, batch: int = 1, heads: int = 2, head_dim: int = 64, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    return reference.quantize(torch.randn(batch, heads, tokens, head_dim), bits, 32, symmetric=symmetric)


def python_functions(call) -> set[str]:
    """Functions of this package that run during a call."""
    seen = set()

    def note(frame, event, _):
        if event == "call" and Path(frame.f_code.co_filename).parent == HERE:
            seen.add(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def attention_arguments(dtype=torch.bfloat16, correction="taylor", length=3, strided=False) -> tuple:
    query, key, value = (torch.randn(1, h, length, 64).to(dtype) for h in (4, 2, 2))
    if strided:
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    return (query, *packed(), *packed(), [0, 5, 9, 30], key, value, None, False, 0.125, 2, 2, correction)


def active_arguments(
    written=(5, 8), values_written=None, *, mask=None, causal=False, dtype=torch.float32, batch=1, stop=9, current=4
) -> list:
    """Of `attention_active`, with a range that is held in full precision."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    held = written[1] - written[0]
    caches = (reference.quantize(randn(batch, 2, 12, 64), 3, 32), reference.quantize(randn(batch, 2, 12, 32), 2, 32))
    active = (
        randn(batch, 2, held, 64).to(dtype), torch.tensor(written),
        randn(batch, 2, held, 32).to(dtype), torch.tensor(values_written or written),
    )  # fmt: skip
    key, value = randn(batch, 2, current, 64).to(dtype), randn(batch, 2, current, 32).to(dtype)
    if mask == "boolean":
        mask = torch.rand(batch, 1, 3, stop - 1 + current, generator=generator) > 0.3
    elif mask == "one column":
        mask = randn(batch, 4, 3, 1)
    query = randn(batch, 4, 3, 64).to(dtype)
    return [query, *caches[0], *caches[1], *active, 1, stop, key, value, mask, causal, 0.125, 3, 2, "taylor"]


CALLS = {
    "append": (jkv.append, lambda: (*packed(), torch.randn(1, 2, 5, 64), 3, 2)),
    "append from [B, L, H, D]": (jkv.append, lambda: (*packed(), torch.randn(1, 5, 2, 64).transpose(1, 2), 3, 2)),
    "append_kv": (jkv.append_kv, lambda: (*packed(), *packed(), *torch.randn(2, 1, 2, 5, 64), 3, 2, 2)),
    "append, symmetric": (jkv.append, lambda: (*packed(symmetric=True), torch.randn(1, 2, 5, 64), 3, 2)),
    "move": (jkv.move, lambda: (*packed(), 2, 4, 6)),
    "fill": (jkv.fill, lambda: (*packed(), 2, 4, 0.0)),
    "fill, symmetric": (jkv.fill, lambda: (*packed(symmetric=True), 2, 4, 0.0)),
    "dequantize": (jkv.dequantize, lambda: (*packed(), 2, 9, 2, torch.bfloat16)),
    "rotate": (jkv.rotate, lambda: (torch.randn(1, 2, 5, 96),)),
    "rotate from [B, L, H, D]": (jkv.rotate, lambda: (torch.randn(1, 5, 2, 64).bfloat16().transpose(1, 2),)),
    "round_unbiased": (jkv.round_unbiased, lambda: (torch.randn(1, 2, 5, 64).bfloat16(), 2, 32)),
    "round_unbiased, symmetric": (jkv.round_unbiased, lambda: (torch.randn(1, 2, 5, 64), 2, 32, True)),
    "round_rotated from [B, L, H, D]": (jkv.round_rotated, lambda: (torch.randn(1, 5, 2, 64).transpose(1, 2), 3, 16)),
    "attention": (jkv.attention, attention_arguments),
    "attention from [B, L, H, D]": (jkv.attention, lambda: attention_arguments(strided=True)),
    "attention in float32": (jkv.attention, lambda: attention_arguments(torch.float32)),
    "attention_active": (jkv.attention_active, active_arguments),
    "attention_lse": (jkv.attention_lse, attention_arguments),
    "attention_active_lse": (jkv.attention_active_lse, active_arguments),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("under", ["eager", "inference_mode", "autocast"])
def test_no_python_runs(name, under):
    operator, make = CALLS[name]
    arguments = make()
    expected = operator(*arguments)
    with torch.inference_mode() if under == "inference_mode" else torch.autocast("cpu", enabled=under == "autocast"):
        assert python_functions(lambda: operator(*arguments)) == set()
        result = operator(*arguments)
    if expected is not None:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_what_the_kernels_do_not_take_goes_to_python():
    arguments = attention_arguments(torch.float32, correction="exact")
    assert "attention" in python_functions(lambda: jkv.attention(*arguments))
    torch.testing.assert_close(jkv.attention(*arguments), reference.attention(*arguments)[0], rtol=2e-4, atol=2e-4)


def test_inductor_calls_the_operators_without_python():
    store = (*packed(), *packed())
    query, key = torch.randn(1, 2, 3, 64), torch.randn(1, 2, 3, 64)

    @torch.compile(fullgraph=True)
    def step(query, key):
        output = jkv.attention(query + 1, *store, [0, 20], key, key, None, False, 0.125, 2, 2, "taylor")
        jkv.append_kv(*store, key, key, 20, 2, 2)
        return output * 2

    step(query, key)
    assert python_functions(lambda: step(query, key)) == set()


@pytest.mark.parametrize("value, symmetric", [(1.5, False), (0.0, True)], ids=["a number", "zero, symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fill_is_the_reference(bits, value, symmetric):
    codes, scales = packed(bits=bits, symmetric=symmetric)
    expected_codes, expected_scales = codes.clone(), scales.clone()
    ops.fill(expected_codes, expected_scales, 3, 30, value)
    for view in (lambda x, token: x, lambda x, token: x.transpose(1, token).contiguous().transpose(1, token)):
        mine, my_scales = view(codes.clone(), 2), view(scales.clone(), 3)
        jkv.fill(mine, my_scales, 3, 30, value)
        assert torch.equal(mine, expected_codes) and torch.equal(my_scales, expected_scales)
    assert (reference.dequantize(mine, my_scales, bits)[:, :, 3:30] == value).all()


ROUNDED = {
    "normal": lambda x: x,
    "with outliers": lambda x: torch.where(torch.rand_like(x) > 0.97, 40 * x, x),
    "constant": lambda x: torch.full_like(x, 3.0),
    "zero": torch.zeros_like,
    "strided": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels apart": lambda x: x.mT.contiguous().mT,
    "bfloat16": lambda x: x.bfloat16(),
    "float16": lambda x: x.half(),
    "no tokens": lambda x: x[:, :, :0],
    "a NaN": lambda x: x.index_fill(2, torch.tensor([1]), float("nan")),
    "an infinity": lambda x: x.index_fill(2, torch.tensor([1]), float("inf")),
}


@pytest.mark.parametrize("symmetric", [False, True], ids=["with zero points", "symmetric"])
@pytest.mark.parametrize("head_dim", [8, 64, 96, 256])
@pytest.mark.parametrize("make", ROUNDED.values(), ids=ROUNDED.keys())
def test_rotation_and_rounding_are_those_in_torch(make, head_dim, symmetric):
    x = make(torch.randn(2, 3, 17, head_dim, generator=torch.Generator().manual_seed(0)))
    last_place = 4e-2 if x.dtype == torch.bfloat16 else 4e-3 if x.dtype == torch.float16 else 1e-5
    rotated, expected = jkv.rotate(x), quantizers.rotate(x)
    assert rotated.stride() == expected.stride()
    torch.testing.assert_close(rotated, expected, rtol=last_place, atol=last_place, equal_nan=True)
    for bits in (2, 3, 4, 8):
        for operator, function in (
            (jkv.round_unbiased, quantizers.round_unbiased),
            (jkv.round_rotated, quantizers.round_rotated),
        ):
            got, want = (f(x, bits, min(head_dim, 32), symmetric) for f in (operator, function))
            assert got.dtype == torch.float32 and got.is_contiguous()
            if symmetric:  # zeros lie between two levels, and what is left of sums that cancel tells which
                basis = expected if operator is jkv.round_unbiased else x
                got, want = (torch.where(basis.abs() < 1e-5, t.abs(), t) for t in (got, want))
            away = (got - want).abs() > 1e-3 * want.abs() + 1e-4  # at a tie they may choose neighbouring levels
            assert torch.equal(got.isnan(), want.isnan()) and away.sum() <= 5e-3 * away.numel()


def test_heads_that_are_not_divided_by_groups_go_to_python():
    with pytest.raises(RuntimeError, match="groups of 48"):
        jkv.round_unbiased(torch.randn(1, 2, 3, 64), 2, 48)
    torch.testing.assert_close(jkv.rotate(torch.eye(4)), quantizers.rotate(torch.eye(4)))


ACTIVE = {
    "in the middle": {},
    "at the start": {"written": (1, 4)},
    "at the end": {"written": (6, 9)},
    "before the start": {"written": (0, 4)},
    "beyond the end": {"written": (7, 12)},
    "all of it": {"written": (1, 9)},
    "none of it": {"written": (9, 12)},
    "values written elsewhere": {"values_written": (2, 5)},
    "mask": {"mask": "boolean"},
    "mask, at the end": {"mask": "boolean", "written": (6, 9)},
    "mask of one column": {"mask": "one column"},
    "causal": {"causal": True},
    "causal with a mask": {"causal": True, "mask": "boolean"},
    "bfloat16": {"dtype": torch.bfloat16},
    "batch": {"batch": 3},
    "no current keys": {"current": 0},
}


@pytest.mark.parametrize("case", ACTIVE.values(), ids=ACTIVE.keys())
def test_attention_to_an_active_range_is_what_python_does(case):
    """`ops.attention_active` puts keys and mask together by copies."""
    arguments = active_arguments(**case)
    bound = 2e-4 if arguments[0].dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        jkv.attention_active(*arguments), ops.attention_active(*arguments), rtol=bound, atol=bound
    )


def test_active_range_of_another_dtype_goes_to_python():
    arguments = active_arguments()
    expected = jkv.attention_active(*arguments)
    arguments[5] = arguments[5].double()
    torch.testing.assert_close(jkv.attention_active(*arguments), expected, rtol=2e-4, atol=2e-4)


MISFITS = {
    "append of other heads": lambda: jkv.append(*packed(), torch.randn(1, 3, 5, 64), 3, 2),
    "append of another head_dim": lambda: jkv.append(*packed(), torch.randn(1, 2, 5, 32), 3, 2),
    "append to codes of another dtype": lambda: jkv.append(
        packed()[0].float(), packed()[1], torch.randn(1, 2, 5, 32), 3, 2
    ),
    "append at other bits": lambda: jkv.append(*packed(), torch.randn(1, 2, 5, 64), 3, 4),
    "attention with other heads": lambda: jkv.attention(
        torch.randn(1, 4, 3, 64), *packed(heads=3), *packed(heads=3), [0, 5], *torch.randn(2, 1, 2, 3, 64), None,
        False, 0.125, 2, 2, "taylor",
    ),
    "attention with another head_dim": lambda: jkv.attention(
        torch.randn(1, 4, 3, 32), *packed(), *packed(), [0, 5], *torch.randn(2, 1, 2, 3, 32), None, False, 0.125, 2, 2,
        "taylor",
    ),
    "attention with values cached for fewer tokens": lambda: jkv.attention(
        torch.randn(1, 2, 3, 64), *packed(), *packed(tokens=10), [0, 30], *torch.randn(2, 1, 2, 3, 64), None, False,
        0.125, 2, 2, "taylor",
    ),
    "attention with a mask of another length": lambda: jkv.attention(
        torch.randn(1, 2, 3, 64), *packed(), *packed(), [0, 30], *torch.randn(2, 1, 2, 3, 64), torch.zeros(3, 7), False,
        0.125, 2, 2, "taylor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", MISFITS.values(), ids=MISFITS.keys())
def test_shapes_and_dtypes_that_do_not_fit_are_errors(call):
    with pytest.raises((RuntimeError, IndexError)):
        call()
