"""The quality study's simulations and statistics; skipped where the demo's packages are not installed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from examples.quality_layers import jensen_shannon
from examples.quality_report import interval, statements
from examples.quality_settings import Setting, corrections, full, quick
from examples.simulated import CORRECTIONS, Clustered, MinMax, Quantized, Ternary, bias
from jkv_compile import Config, materialize, quantization_step
from jkv_compile.adopt import adopt
from jkv_compile.kernels.quantizers import rotate


def chunk(tokens: int = 48) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(1, 2, tokens, 64)


@pytest.mark.parametrize(
    "quantizer, how", [("rtn", {}), ("quarot", {"rotated": True}), ("unbiased", {"rotated": True, "unbiased": True})]
)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits, group_size, step_bits", [(2, 32, 16), (3, 64, 16), (4, 64, 16), (2, 64, 8)])
def test_the_simulation_is_what_the_package_stores(quantizer, how, symmetric, bits, group_size, step_bits):
    if symmetric:
        quantizer = {"rtn": "symmetric"}.get(quantizer, f"symmetric_{quantizer}")
    x = chunk()
    cache = x.clone()
    store = adopt(cache, (0, 1, 2, 3), bits, Config(bits, group_size, quantizer=quantizer, step_bits=step_bits))
    quantized = MinMax(bits, group_size, symmetric=symmetric, step_bits=step_bits, **how)(x)
    torch.testing.assert_close(quantized.values, materialize(cache))
    torch.testing.assert_close(quantized.step[..., ::group_size], quantization_step(cache))
    assert quantized.bits == 8 * store.packed_bytes


@pytest.mark.parametrize("stages, centroids, asymmetric", [(1, 1, False), (1, 4, False), (3, 2, False), (2, 2, True)])
def test_the_simulation_of_quant_videogen_is_what_the_package_stores(stages, centroids, asymmetric):
    x = chunk().half()
    cache, quantizer = x.clone(), "qvg_asymmetric" if asymmetric else "qvg"
    settings = {"stages": stages, "centroids": centroids, "step_bits": 16, "center_tokens": 48}
    config = Config(2, 32, quantizer=quantizer, **settings)
    store = adopt(cache, (0, 1, 2, 3), 2, config)
    quantized = Clustered(MinMax(2, 32) if asymmetric else Ternary(32), centroids, stages)(x)
    torch.testing.assert_close(quantized.values, materialize(cache).float(), rtol=2e-3, atol=5e-3)
    torch.testing.assert_close(quantized.step[..., ::32], quantization_step(cache), rtol=2e-3, atol=0)
    assert quantized.bits == 8 * store.packed_bytes


@pytest.mark.parametrize("setting", dict.fromkeys(s.storage for s in full()), ids=lambda s: s.name)
def test_every_setting_comes_closer_than_its_mean_and_counts_its_bits(setting):
    for quantize in setting.quantizers():
        quantized = quantize(chunk())
        assert quantized.values.shape == quantized.step.shape == quantized.excess.shape == chunk().shape
        assert (quantized.values - chunk()).norm() < 0.85 * chunk().norm()
        assert quantized.effective_bits > min(setting.bits_k, setting.bits_v)


def test_bits_by_hand():
    assert MinMax(2, 64)(chunk()).effective_bits == 2.5
    assert MinMax(2, 1, block=48)(chunk()).effective_bits == pytest.approx(2 + 32 / 48)
    assert MinMax(2, 64, symmetric=True)(chunk()).effective_bits == 2.25
    # two centroids of 16-bit channels for 48 tokens, an index of 8 bits for each token's 64 channels, an FP8 step
    qvg = Clustered(Ternary(64, scale_bits=8), centroids=2)
    assert qvg(chunk()).effective_bits == pytest.approx(2 + 2 * 16 / 48 + 8 / 64 + 8 / 64)


def test_grids_by_hand():
    x = torch.tensor([-1.0, -0.2, 0.1, 0.7]).view(1, 1, 1, 4)
    ternary = Ternary(4)(x).values.flatten()
    torch.testing.assert_close(ternary, torch.tensor([-1.0, 0.0, 0.0, 1.0]))
    symmetric = MinMax(2, 4, symmetric=True)(x).values.flatten()  # ±1/3, ±1
    torch.testing.assert_close(symmetric, torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]), rtol=1e-3, atol=0)


def test_per_channel_steps_are_those_of_a_block_of_tokens():
    quantized = MinMax(2, 1, block=24)(chunk())
    extent = chunk()[0, 0, :24, 5].max() - chunk()[0, 0, :24, 5].min()
    torch.testing.assert_close(quantized.step[0, 0, :24, 5], (extent / 3).expand(24), rtol=1e-3, atol=0)


@pytest.mark.parametrize("rotated", [False, True])
def test_corrections_undo_the_bias_of_their_noise_model(rotated):
    """Scores with errors uniform within a step: the mean weight, corrected, is the true one."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 3, 64), torch.randn(1, 1, 1, 64)
    step = torch.full((1, 1, 4000, 64), 1.5)
    stored = (rotate(key) if rotated else key) + (torch.rand(step.shape) - 0.5) * step
    excess = (step**2 / 12).expand_as(step)
    quantized = Quantized(rotate(stored) if rotated else stored, step, excess, rotated, 0.0)
    scale = 0.25
    true = (scale * query @ key.mT).exp()

    def error(correction: str) -> float:
        scores = scale * query @ quantized.values.mT - bias(query, quantized, scale, correction)
        return (scores.exp().mean(-1, keepdim=True) / true - 1).abs().max().item()

    assert error("none") > 0.1
    for correction in CORRECTIONS:
        assert correction == "none" or error(correction) < 0.05


def test_jensen_shannon_divergence_is_between_zero_and_one_bit():
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert jensen_shannon(p, p) == 0 and jensen_shannon(p, q) == 1


def test_interval_holds_the_mean_and_widens_with_the_spread():
    low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert 1 < low < 2.5 < high < 4
    assert interval([2.0] * 4) == (2.0, 2.0)


def test_statements_pair_runs_of_the_same_clip_and_noise():
    def run(setting: Setting, clip: str, seed: int, psnr: float) -> dict:
        name = {f: getattr(setting, f) for f in ("quantizer", "bits_k", "bits_v", "group_size", "correction")}
        return {**name, "clip": clip, "seed": seed, "psnr": psnr}

    one, other = Setting("unbiased", 2, 2, 64), Setting("qvg", 2, 2, 64)
    records = [run(s, c, i, base + 10 * i) for s, base in ((one, 22.0), (other, 20.0)) for c in "ab" for i in (0, 1)]
    assert "| unbiased (6.4×) against QVG (6.8×) | +2.00 [+2.00, +2.00] | a +2.00, b +2.00 |" in statements(
        records[::-1]
    )


def test_settings_differ_and_the_quick_ones_are_among_them():
    every = full() + corrections()
    assert len(set(every)) == len(every)
    assert set(quick()) <= set(full())
