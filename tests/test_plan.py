"""The planning page: sizes are exact and agree with the published ones, times are bounded sensibly."""

from __future__ import annotations

import re

import pytest
import torch

from jkv_compile import plan
from jkv_compile.kernels import reference


@pytest.mark.parametrize("name, gib", [("self-forcing", 5.6), ("krea-14b", 25.0), ("longcat-video", 21.8)])
def test_full_precision_sizes_are_the_published_ones(name, gib):
    assert plan.MODELS[name].full_bytes / plan.GIB == pytest.approx(gib, rel=0.01)


@pytest.mark.parametrize("bits, group_size", [(2, 32), (3, 64), (4, 128), (8, 32)])
def test_packed_sizes_are_those_of_real_tensors(bits, group_size):
    model = plan.Model("tiny", 0, 3, 4, 2, 128, 50, 10)
    codes, scales = reference.quantize(torch.randn(1, 2, 50, 128), bits, group_size)
    assert model.cache_bytes(bits, bits, group_size) == 3 * 2 * (codes.nbytes + scales.nbytes)


def test_two_bits_in_groups_of_32_are_three_effective_bits():
    model = plan.MODELS["self-forcing"]
    assert 16 * model.cache_bytes(2, 2, 32) / model.full_bytes == 3.0
    assert 16 * model.cache_bytes(4, 2, 64) / model.full_bytes == 3.5


@pytest.mark.parametrize("gpu", plan.GPUS)
@pytest.mark.parametrize("model", plan.MODELS)
def test_modelled_overheads_are_bounds_and_never_free(model, gpu):
    overhead = plan.attention_overhead(plan.MODELS[model], plan.GPUS[gpu], 2, 2, 32)
    for low, high in (overhead.fused, overhead.unpack_once):
        assert 1.0 < low <= high < 2.0
    assert overhead.plain_ms > 10 * overhead.append_ms > 0


def test_decode_is_modelled_as_reading_memory():
    model = plan.Model("decode", 8, 32, 32, 8, 128, 32768, 1)
    overhead = plan.attention_overhead(model, plan.GPUS["h100"], 2, 2, 32)
    assert overhead.fused[1] == pytest.approx(3 / 16, rel=0.01)
    assert overhead.unpack_once[0] > 1


def test_more_tokens_fit_in_fewer_bits_and_none_where_weights_do_not():
    model, gpu = plan.MODELS["krea-14b"], plan.GPUS["h100"]
    fits = [plan.tokens_that_fit(model, gpu, bits, 32) for bits in (None, 8, 4, 3, 2)]
    assert fits == sorted(fits) and fits[-1] / fits[0] == pytest.approx(16 / 3, rel=0.01)
    assert plan.tokens_that_fit(model, plan.GPUS["rtx-4090"], 2, 32) == 0


def test_command_line_reports_sizes_and_assumptions(capsys):
    assert plan.main(["--model", "self-forcing", "--gpu", "rtx-4090"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"2 bits +3\.00 +1\.05 +5\.33x +yes", text)
    assert "modelled" in text and "Nothing here was measured" in text
    assert plan.main(["--list"]) == 0
    assert "krea-14b" in capsys.readouterr().out


def test_command_line_takes_a_shape_of_ones_own(capsys):
    assert plan.main(["--layers", "2", "--heads", "8", "--kv-heads", "2", "--tokens", "100", "--chunk", "10"]) == 0
    assert "2 layers x 2 key/value heads" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--group-size", "48"], ["--chunk", "99999999"], ["--kv-heads", "5"]])
def test_command_line_refuses_shapes_that_cannot_be(wrong, capsys):
    with pytest.raises(SystemExit):
        plan.main(wrong)
    assert "error" in capsys.readouterr().err
