"""The planning page: sizes are exact and agree with the published ones, times are bounded sensibly."""

from __future__ import annotations

import re

import pytest
import torch

from jkv_compile import Config, plan
from jkv_compile.adopt import adopt
from jkv_compile.kernels import reference

SIXTY_FOUR = Config(group_size=64)

PUBLISHED = [
    ("self-forcing", 5.6), ("krea-14b", 25.0), ("longcat-video", 21.8), ("magi-4.5b", 6.3), ("magi-24b", 15.8),
    ("hy-worldplay-5b", 9.7), ("hy-worldplay-8b", 29.0),
]  # fmt: skip


@pytest.mark.parametrize("name, gib", PUBLISHED)
def test_full_precision_sizes_are_the_published_ones(name, gib):
    assert plan.MODELS[name].full_bytes / plan.GIB == pytest.approx(gib, rel=0.01)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits, group_size", [(2, 32), (3, 64), (4, 128), (8, 32)])
def test_packed_sizes_are_those_of_real_tensors(bits, group_size, symmetric):
    model = plan.Model("tiny", 0, 3, 4, 2, 128, 50, 10)
    codes, scales = reference.quantize(torch.randn(1, 2, 50, 128), bits, group_size, symmetric=symmetric)
    config = Config(group_size=group_size, quantizer="symmetric" if symmetric else "rtn")
    assert model.cache_bytes(bits, bits, config) == 3 * 2 * (codes.nbytes + scales.nbytes)


STORED = {
    "keys by channel": {"quantizer": "kivi"},
    "keys by channel, blocks of 40": {"quantizer": "kivi", "block_tokens": 40, "group_size": 64},
    "keys by channel, blocks of 120, a window": {"quantizer": "kivi", "block_tokens": 120, "sink": 9, "recent": 70},
    "keys by channel, means of values": {"quantizer": "kivi", "center": "values", "group_size": 64},
    "a mean of all": {"center": True},
    "a mean of keys, 8-bit steps": {"center": "keys", "quantizer": "symmetric_unbiased", "step_bits": 8, "group_size": 64},
    "a mean for every 48": {"center": True, "center_tokens": 48},
    "a mean for every 48 of values": {"center": "values", "center_tokens": 48, "sink": 10},
    "three of four centroids": {"quantizer": "qvg", "center_tokens": 48, "stages": 3, "centroids": 4, "recent": 5},
    "as many centroids as there are": {"quantizer": "qvg_asymmetric", "center_tokens": 120, "group_size": 64},
    "half of the tokens": {"budget": 0.5},
    "67 tokens, 8-bit steps": {"budget": 67, "quantizer": "unbiased", "step_bits": 8},
    "all that there are": {"budget": 9999, "salience": "recent"},
}  # fmt: skip


@pytest.mark.parametrize("tokens", [145, 240])
@pytest.mark.parametrize("name", STORED)
def test_every_byte_of_a_store_is_planned(name, tokens):
    """Two caches as they are adopted, keys and values of one layer, batch 1."""
    config = Config(2, **STORED[name])
    model = plan.Model("tiny", 0, 3, 4, 2, 64, tokens, 10)
    stored = 0
    for side in ("keys", "values"):
        cache = torch.randn(1, 2, tokens, 64).bfloat16()
        quantizer = config.key_quantizer if side == "keys" else config.value_quantizer
        settings = {"quantizer": quantizer, "centered": config.centers(side)}
        stored += adopt(cache, (0, 1, 2, 3), 2, config, **settings).packed_bytes
    assert model.cache_bytes(2, 2, config) == 3 * stored
    assert model.bytes_of(2, config) == 3 * stored


def test_more_tokens_fit_where_fewer_are_kept_and_one_more_does_not():
    model, gpu = plan.MODELS["krea-14b"], plan.GPUS["h100"]
    room = plan.room_for_cache(model, gpu)
    for settings in (
        {},
        {"quantizer": "kivi", "block_tokens": 40},
        {"budget": 0.5},
        {"center": True, "center_tokens": 480},
    ):
        config = Config(**settings)
        fits = plan.tokens_that_fit(model, gpu, 2, config)
        sizes = [plan.replace(model, tokens=n).bytes_of(2, config) for n in (fits, fits + 1)]
        assert sizes[0] <= room < sizes[1]
    half, all_of_them = (plan.tokens_that_fit(model, gpu, 2, Config(budget=budget)) for budget in (0.5, None))
    assert half == pytest.approx(2 * all_of_them, rel=0.01)


def test_attention_over_half_of_the_tokens_takes_half_as_long():
    model, gpu = plan.MODELS["self-forcing"], plan.GPUS["h100"]
    whole, half = (plan.attention_overhead(model, gpu, 2, 2, Config(budget=budget)) for budget in (None, 0.5))
    assert whole.plain_ms == half.plain_ms
    for one, other in zip((*whole.fused, *whole.unpack_once), (*half.fused, *half.unpack_once)):
        assert other == pytest.approx(one / 2, rel=0.1)


@pytest.mark.parametrize("options, told", [
    (["--quantizer", "kivi", "--block-tokens", "40", "--group-size", "64"],
     r"keys by channel in blocks of 40 tokens, values in groups of 64\n.* 39 before the chunk at hand"),
    (["--center"], r"groups of 32, less a mean\n"),
    (["--center", "keys", "--center-tokens", "4680"], r"keys less a mean of every 4,680 tokens"),
    (["--quantizer", "qvg", "--group-size", "64"], r"less 1 of 41 centroids that 4,680 tokens share"),
    (["--quantizer", "qvg", "--stages", "4", "--centroids", "9", "--center-tokens", "1560"], r"less 4 of 9 .* 1,560 tok"),
    (["--budget", "0.5"], r"50% of tokens kept"),
    (["--budget", "16380"], r"16,380 tokens kept"),
])  # fmt: skip
def test_command_line_tells_how_caches_are_stored(options, told, capsys):
    assert plan.main(options) == 0
    text = capsys.readouterr().out
    assert re.search(told, text)
    assert ("offload" in text) == (options == ["--center"])


@pytest.mark.parametrize("options, why", [
    (["--block-tokens", "40"], "block_tokens=40 with quantizer='rtn'"),
    (["--quantizer", "kivi", "--center"], "center=True with quantizer='kivi'"),
    (["--center-tokens", "480"], "center_tokens=480 with center=False"),
    (["--stages", "2"], "stages=2 with quantizer='rtn'"),
    (["--budget", "1.5"], "budget=1.5: expected a number of tokens"),
    (["--budget", "half"], "argument --budget: invalid"),
    (["--budget", "0.5", "--sink", "9"], "sink=9 with budget=0.5"),
])  # fmt: skip
def test_command_line_refuses_what_a_backend_would(options, why, capsys):
    with pytest.raises(SystemExit):
        plan.main(options)
    assert why in capsys.readouterr().err


def test_two_bits_in_groups_of_32_are_three_effective_bits():
    model = plan.MODELS["self-forcing"]
    assert 16 * model.cache_bytes(2, 2) / model.full_bytes == 3.0
    assert 16 * model.cache_bytes(4, 2, SIXTY_FOUR) / model.full_bytes == 3.5
    for quantizer, step_bits, bits in (("symmetric", 16, 2.25), ("symmetric", 8, 2.125), ("rtn", 8, 2.375)):
        config = Config(group_size=64, quantizer=quantizer, step_bits=step_bits)
        assert 16 * model.cache_bytes(2, 2, config) / model.full_bytes == bits


def test_first_and_newest_tokens_are_counted_beside_the_packed_ones(capsys):
    model = plan.Model("tiny", 0, 3, 4, 2, 128, 50, 10)
    held = 3 * 2 * 2 * (7 + 2 * 5) * 128 * 2  # layers, keys and values, heads
    assert model.cache_bytes(2, 2, Config(sink=7, recent=5)) == model.cache_bytes(2, 2) + held
    assert model.held_bytes(60, 0) == model.full_bytes
    model, gpu = plan.MODELS["self-forcing"], plan.GPUS["h100"]
    windows = ((0, 0), (4680, 0), (4680, 4680))
    fits = [plan.tokens_that_fit(model, gpu, 2, Config(sink=sink, recent=recent)) for sink, recent in windows]
    assert fits == sorted(fits, reverse=True) and len(set(fits)) == 3
    assert plan.main(["--sink", "4680", "--recent", "1560"]) == 0
    assert "first 4,680 tokens, and 1,560 before" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plan.main(["--sink", "-1"])


@pytest.mark.parametrize("gpu", plan.GPUS)
@pytest.mark.parametrize("model", plan.MODELS)
def test_modelled_overheads_are_bounds_and_never_free(model, gpu):
    overhead = plan.attention_overhead(plan.MODELS[model], plan.GPUS[gpu], 2, 2)
    for low, high in (overhead.fused, overhead.unpack_once):
        assert 1.0 < low <= high < 2.0
    assert overhead.plain_ms > 10 * overhead.append_ms > 0


def test_decode_is_modelled_as_reading_memory():
    model = plan.Model("decode", 8, 32, 32, 8, 128, 32768, 1)
    overhead = plan.attention_overhead(model, plan.GPUS["h100"], 2, 2)
    assert overhead.fused[1] == pytest.approx(3 / 16, rel=0.01)
    assert overhead.unpack_once[0] > 1


def test_more_tokens_fit_in_fewer_bits_and_none_where_weights_do_not():
    model, gpu = plan.MODELS["krea-14b"], plan.GPUS["h100"]
    fits = [plan.tokens_that_fit(model, gpu, bits) for bits in (None, 8, 4, 3, 2)]
    assert fits == sorted(fits) and fits[-1] / fits[0] == pytest.approx(16 / 3, rel=0.01)
    assert plan.tokens_that_fit(model, plan.GPUS["rtx-4090"], 2) == 0


def test_command_line_reports_sizes_and_assumptions(capsys):
    assert plan.main(["--model", "self-forcing", "--gpu", "rtx-4090"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"2 bits +3\.00 +1\.05 +5\.33x +yes", text)
    assert "modelled" in text and "Nothing here was measured" in text
    assert re.search(r"to the device, a chunk +28\.12 +5\.27 +5\.33x", text)
    assert plan.main(["--group-size", "64", "--quantizer", "symmetric_unbiased"]) == 0
    text = capsys.readouterr().out
    assert "groups of 64 without zero points" in text
    assert re.search(r"2 bits +2\.25 +0\.79 +7\.11x", text)
    assert re.search(r"to the device, a chunk +28\.12 +3\.95 +7\.11x", text)
    assert plan.main(["--group-size", "64", "--quantizer", "kivi", "--recent", "9"]) == 0
    text = capsys.readouterr().out
    assert "the first 0 tokens, and 63 before the chunk at hand" in text and "offload" not in text
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


# ---- several devices ----


@pytest.mark.parametrize("model", plan.MODELS.values(), ids=lambda m: m.name)
@pytest.mark.parametrize("sharding, shares", [("heads", 4), ("tokens", 4), ("none", 1)])
def test_devices_share_a_cache(model, sharding, shares):
    share = plan.share_of(model, 4, sharding)
    assert share.full_bytes * shares == pytest.approx(model.full_bytes, rel=1e-3)
    assert share.cache_bytes(2, 2, SIXTY_FOUR) * shares == pytest.approx(model.cache_bytes(2, 2, SIXTY_FOUR), rel=1e-3)
    assert share.heads / share.kv_heads == model.heads / model.kv_heads


def test_traffic_by_hand():
    """Two devices, 2 layers, 3 passes, 4 query heads and 2 of keys, of 32 channels, 100 tokens, a chunk of 10."""
    model = plan.Model("tiny", 0, 2, 4, 2, 32, 100, 10, passes=3)
    share = 2 * 2 * 2 * 32 * 50 * 2  # bytes: keys and values, layers, heads, channels, half of the tokens, bfloat16
    heads, moved = plan.traffic(model, 2, "heads", 2)
    # Of its own 5 tokens a device has half of the heads already: 2.5 tokens' worth, rounded down, per layer and pass.
    assert heads.full == heads.packed == 6 * 2 * (2 * 4 + 2 * 2) * 32 * 2
    assert (moved.full, moved.packed) == (share, share * 3 / 16)
    partial, queries, ring, moved = plan.traffic(model, 2, "tokens", 2)
    assert queries.full == queries.packed == 6 * 5 * 4 * (2 * 32 * 2 + 4)
    assert partial.full == partial.packed == 6 * 10 * 4 * (32 * 2 + 4)
    assert (ring.full, ring.packed) == (3 * share, 3 * share * 3 / 16)
    assert (moved.full, moved.packed) == (share, share * 3 / 16)
    (whole,) = plan.traffic(model, 2, "none", 2)
    assert whole.full == 2 * share


def test_offloaded_caches_by_hand():
    """Two layers of 2 heads x 32 channels, 16 tokens, 4 of them a chunk, in 3 passes."""
    model = plan.Model("", 1, 2, 2, 2, 32, 16, 4, passes=3)
    there, back = plan.offload_traffic(model, 2)
    assert (there.full, there.packed) == (3 * 2 * 2 * 2 * 32 * 16 * 2, 3 * 2 * 2 * 2 * 16 * (8 + 4))
    assert (back.full, back.packed) == (there.full / 4, there.packed / 4)


def test_more_tokens_fit_on_more_devices():
    model, gpu = plan.MODELS["krea-14b"], plan.GPUS["h100"]
    alone = plan.tokens_that_fit(model, gpu, 2)
    assert plan.tokens_that_fit(plan.share_of(model, 8, "heads"), gpu, 2) == pytest.approx(8 * alone, rel=1e-3)
    assert plan.tokens_that_fit(model, gpu, 2, weights_on=8) > alone


def test_command_line_plans_several_devices(capsys):
    assert plan.main(["--model", "magi-24b", "--devices", "8", "--sharding", "tokens"]) == 0
    text = capsys.readouterr().out
    assert "8 x h100" in text and "10,800 tokens, all weights" in text
    assert re.search(r"caches passed round instead +[\d.]+ +[\d.]+ +5\.33x", text)
    assert re.search(r"partial results, a chunk +[\d.]+ +[\d.]+ +same", text)
    assert re.search(r"queries passed round instead +[\d.]+ +[\d.]+ +same", text)
    assert re.search(r"1 h +77,760,000 +1,779\.8 +no +333\.7 +no", text)
    assert "8 passes per chunk" in text
    assert plan.main(["--model", "self-forcing", "--seconds", "3600", "--devices", "4", "--shard-weights"]) == 0
    text = capsys.readouterr().out
    assert "22,464,000 tokens cached" in text and "3 heads, its part of weights" in text


@pytest.mark.parametrize("wrong, why", [
    (["--devices", "0"], "expected at least 1"), (["--model", "magi-24b", "--devices", "16"], "8 key/value heads"),
    (["--sharding", "channels"], "invalid choice"),
])  # fmt: skip
def test_command_line_refuses_devices_that_cannot_share(wrong, why, capsys):
    with pytest.raises(SystemExit):
        plan.main(wrong)
    assert why in capsys.readouterr().err
