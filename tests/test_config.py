"""Every setting is checked when it is made; a bad one is told with its value, what is allowed, and a way out."""

from __future__ import annotations

import dataclasses

import pytest

from jkv_compile import Config, ConfigurationError, JKVError, jkv_backend
from jkv_compile.config import PRESETS
from jkv_compile.kernels.quantizers import grid_of

BAD = {
    "width that is not packed": ({"bits": 5}, r"bits=5: expected one of \(2, 3, 4, 8\), or a pair"),
    "one bit": ({"bits": 1}, r"bits=1: expected one of \(2, 3, 4, 8\).*bits=\(4, 2\)"),
    "width as a float": ({"bits": 2.5}, r"bits=2\.5: expected"),
    "width as a string": ({"bits": "2"}, r"bits='2': expected"),
    "width as a bool": ({"bits": True}, r"bits=True: expected"),
    "no width": ({"bits": None}, r"bits=None: expected"),
    "three widths": ({"bits": (2, 2, 2)}, r"bits=\(2, 2, 2\): expected .* or a pair"),
    "pair with one bad width": ({"bits": (4, 6)}, r"bits=\(4, 6\): expected"),
    "group of nothing": ({"group_size": 0}, r"group_size=0: expected an int of at least 8"),
    "negative group": ({"group_size": -32}, r"group_size=-32: expected an int of at least 8"),
    "group that splits bytes": (
        {"group_size": 20},
        r"group_size=20: expected a multiple of 8; 32, 64 and 128 are usual",
    ),
    "group as a float": ({"group_size": 32.0}, r"group_size=32\.0: expected an int"),
    "group as a bool": ({"group_size": True}, r"group_size=True: expected an int"),
    "unknown correction": (
        {"correction": "tailor"},
        r"correction='tailor': expected one of \('taylor', 'clamped', 'exact', 'none'\)",
    ),
    "no correction by None": ({"correction": None}, r"correction=None: expected one of .*'none'"),
    "unknown inner compiler": ({"inner": "nvfuser"}, r"inner='nvfuser': expected one of .*'inductor'"),
    "unknown quantizer": (
        {"quantizer": "quarrot"},
        r"quantizer='quarrot': expected one of \('rtn', 'quarot', 'unbiased', 'symmetric', .*\)",
    ),
    "offload to where there is no memory": ({"offload": "disk"}, r"offload=.disk.: expected one of .None, .cpu.."),
    "a negative sink": ({"sink": -1}, r"sink=-1: expected a number of tokens of at least 0, .* a chunk"),
    "a sink of bytes": ({"sink": 1.5e6}, r"sink=1500000.0: expected a number of tokens"),
    "recent as a flag": ({"recent": True}, r"recent=True: expected a number of tokens"),
    "blocks that are too small": (
        {"quantizer": "kivi", "block_tokens": 4},
        r"block_tokens=4: expected a number of tokens of at least 8.*or None",
    ),
    "blocks as a flag": (
        {"quantizer": "kivi", "block_tokens": True},
        r"block_tokens=True: expected a number of tokens",
    ),
    "blocks as a float": ({"quantizer": "kivi", "block_tokens": 40.0}, r"block_tokens=40.0: expected a number"),
    "blocks of tokens with steps of their own": (
        {"block_tokens": 40},
        r"block_tokens=40 with quantizer='rtn'.*expected block_tokens=None, or quantizer='kivi'",
    ),
    "keys by channel in host memory": (
        {"quantizer": "kivi", "offload": "cpu"},
        r"offload=.cpu. with quantizer=.kivi.: .* expected offload=None",
    ),
    "keys by channel less a mean": (
        {"quantizer": "kivi", "center": True},
        r"center=True with quantizer=.kivi.: expected False or .values.",
    ),
    "strict as a string": ({"strict": "yes"}, r"strict='yes': expected one of \(True, False\)"),
}


@pytest.mark.parametrize("settings, message", BAD.values(), ids=BAD.keys())
def test_bad_value_is_refused_with_its_value_and_what_is_expected(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        Config(**settings)
    with pytest.raises(ValueError, match=message):  # what a caller would catch anyway
        jkv_backend(**settings)


def test_errors_have_one_base():
    assert issubclass(ConfigurationError, JKVError)


@pytest.mark.parametrize(
    "bits, keys, values", [(2, 2, 2), (8, 8, 8), ((4, 2), 4, 2), ([3, 2], 3, 2)], ids=["2", "8", "pair", "list"]
)
def test_bits_of_keys_and_values(bits, keys, values):
    config = Config(bits=bits)
    assert (config.key_bits, config.value_bits) == (keys, values)
    assert hash(config) == hash(Config(bits=(keys, values) if isinstance(bits, (tuple, list)) else bits))


@pytest.mark.parametrize("head_dim, group_size", [(64, 32), (128, 128), (96, 48), (80, 16)])
def test_groups_that_tile_a_head_pass(head_dim, group_size):
    Config(group_size=group_size).check_head_dim(head_dim)


@pytest.mark.parametrize("head_dim, group_size, way_out", [(96, 64, "32, 48, 96"), (80, 32, "16"), (40, 32, "8")])
def test_groups_that_do_not_tile_a_head_name_those_that_would(head_dim, group_size, way_out):
    message = rf"group_size={group_size} does not divide this model's head_dim={head_dim}; use one of \[.*{way_out}"
    with pytest.raises(ConfigurationError, match=message):
        Config(group_size=group_size).check_head_dim(head_dim)


def test_configuration_cannot_be_changed_behind_the_compiler():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().bits = 4  # type: ignore[misc]


# ---- presets ----


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_sets_what_is_not_given(preset):
    config = jkv_backend(preset=preset).config
    assert config == Config(**PRESETS[preset])
    assert jkv_backend(preset=preset, correction="none").config == dataclasses.replace(config, correction="none")
    assert jkv_backend(4, preset=preset, group_size=32).config == dataclasses.replace(config, bits=4, group_size=32)


def test_presets_are_ordered_by_what_they_cost():
    def bits(preset):
        config = jkv_backend(preset=preset).config
        scales = 8 * grid_of(config.key_quantizer).scale_bytes / config.group_size
        return (config.key_bits + config.value_bits) / 2 + scales

    ours = [name for name in PRESETS if not name.startswith("qvg")]
    assert [bits(name) for name in ours] == [4.0, 3.0, 2.5, 2.125]


def test_without_a_preset_nothing_changes():
    assert jkv_backend().config == Config()
    assert jkv_backend(4).config == Config(bits=4)


def test_sink_and_recent_make_a_configuration_of_their_own():
    backend = jkv_backend(preset="memory", sink=4680, recent=1560)
    assert (backend.config.sink, backend.config.recent) == (4680, 1560)
    assert backend != jkv_backend(preset="memory") and backend == jkv_backend(preset="memory", sink=4680, recent=1560)


def test_unknown_preset_is_named():
    with pytest.raises(
        ConfigurationError,
        match=r"preset='best': expected one of \('quality', 'balanced', 'memory', 'smallest', 'qvg', 'qvg_pro'\)",
    ):
        jkv_backend(preset="best")
