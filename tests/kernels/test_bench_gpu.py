"""The GPU benchmark where there is no GPU."""

from __future__ import annotations

import json

import pytest
import torch

from jkv_compile.kernels import bench_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys, tmp_path):
    assert bench_gpu.main(["--output", str(tmp_path / "bench")]) == 0
    assert capsys.readouterr().out.splitlines() == ["bench_gpu: no GPU here; nothing was measured."]
    assert not list(tmp_path.iterdir())


def test_plot_draws_a_bar_for_every_ratio(tmp_path):
    pytest.importorskip("matplotlib")
    results = [
        bench_gpu.Result(shape, kind, 1.0, ratio, None)
        for shape in ("krea", "decode")
        for kind, ratio in (("flash", 1.0), ("jkv", 1.1), ("cudnn", None))
    ]
    bench_gpu._plot(results, tmp_path / "plot.png", "a title")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_shapes_are_valid_and_serialise():
    for shape in bench_gpu.SHAPES.values():
        assert shape.heads % shape.kv_heads == 0 and shape.queries > 0
    assert json.loads(json.dumps(bench_gpu.Result("a", "b", 1.0, None, None).__dict__))
