"""Saved caches come from anywhere: loading one runs no code of its own, and a broken file is an error, never a crash."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path

import pytest
import torch

import jkv_compile
from jkv_compile import PackedCacheError, is_packed, materialize
from jkv_compile.packed_save import rebuild_window

from ..caches import new_cache


def saved(bits: int = 2) -> bytes:
    cache, _ = new_cache(bits=bits, tokens=8, batch=1, heads=1)
    cache[:, 2:4] = torch.randn(1, 2, 1, 64)
    file = io.BytesIO()
    torch.save({"k": cache, "slice": cache[:, 2:6]}, file)
    return file.getvalue()


def load(data: bytes) -> dict[str, torch.Tensor]:
    return torch.load(io.BytesIO(data), weights_only=True)


def test_a_saved_cache_loads_with_weights_only() -> None:
    loaded = load(saved())
    assert is_packed(loaded["k"]) and loaded["slice"]._store is loaded["k"]._store


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99, 0.999])
def test_a_truncated_file_is_an_error(share: float) -> None:
    data = saved()
    with pytest.raises((RuntimeError, EOFError, ValueError, pickle.UnpicklingError)):
        load(data[: int(share * len(data))])


def test_a_file_with_changed_bytes_gives_an_error_or_a_cache_that_can_be_read() -> None:
    data, rng = saved(), random.Random(0)
    errors = 0
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(rng.choice((1, 1, 4, 32))):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            for tensor in load(bytes(broken)).values():
                materialize(tensor)
        except Exception:
            errors += 1
    assert 0 < errors < 150


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_beside_or_inside_a_cache_is_not_run(tmp_path: Path) -> None:
    cache, _ = new_cache()
    cache.note = Malicious(tmp_path / "ran")
    file = io.BytesIO()
    torch.save(cache, file)
    with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):
        load(file.getvalue())
    assert not (tmp_path / "ran").exists()


WINDOWS = {
    "negative offset": {"offset": -1},
    "beyond the end": {"offset": 10**6},
    "too large": {"size": (2, 10**6, 2, 64)},
    "negative stride": {"stride": (2048, -128, 64, 1)},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_outside_of_its_cache_is_refused(name: str) -> None:
    cache, _ = new_cache()
    place = {"size": tuple(cache.shape), "stride": cache.stride(), "offset": 0} | WINDOWS[name]
    with pytest.raises(PackedCacheError, match="does not lie within its cache"):
        rebuild_window(cache._store, place["size"], place["stride"], place["offset"], cache.dtype, {})  # type: ignore[arg-type]


def test_attributes_of_a_file_replace_nothing_of_the_packed_data() -> None:
    cache, _ = new_cache()
    place = tuple(cache.shape), cache.stride(), 0
    window = rebuild_window(cache._store, *place, cache.dtype, {"_store": 1, "offset": 10**9, "layer": 7})
    assert window._store is cache._store and window.offset == 0 and window.layer == 7


def test_no_shell_and_no_unrestricted_pickle_in_the_package() -> None:
    root = Path(jkv_compile.__file__).parents[1]
    sources = [p for folder in ("jkv_compile", "passes", "kernels") for p in (root / folder).glob("*.py")]
    assert len(sources) > 50
    for source in sources:
        text = source.read_text()
        for forbidden in ("shell=True", "os.system", "pickle.load", "weights_only=False"):
            assert forbidden not in text, source
