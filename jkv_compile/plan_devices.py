"""What several devices share of a cache, and what goes between them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .config import Config
from .errors import ConfigurationError
from .plan_tables import BYTES_FULL, DEFAULT, Model

Sharding = Literal["none", "heads", "tokens"]
BYTES_LSE = 4  # float32


def share_of(model: Model, devices: int, sharding: Sharding) -> Model:
    """The model as one device has its cache: part of the heads, part of the tokens, or all of both.

    Raises:
        ConfigurationError: the number of devices does not divide the key/value heads.
    """
    if sharding == "heads" and model.kv_heads % devices:
        raise ConfigurationError(
            f"{devices} devices for {model.kv_heads} key/value heads of {model.name}: expected a number that divides "
            "them, or sharding by tokens"
        )
    if sharding == "heads":
        return replace(model, heads=model.heads // devices, kv_heads=model.kv_heads // devices)
    if sharding == "tokens":
        return replace(model, tokens=-(-model.tokens // devices))
    return model


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device receives: with the cache in bfloat16, and packed."""

    what: str
    full: int
    packed: int


def traffic(model: Model, devices: int, sharding: Sharding, bits: int, config: Config = DEFAULT) -> list[Traffic]:
    """What a chunk costs between devices, over all layers and passes; and what moving one device's cache costs, once.

    heads: the all-to-alls of queries, keys, values and results of the chunk, which are in full precision anyhow.
    tokens: results and log-sum-exps of every other device (`jkv_compile.distributed.sharded_attention`); where queries
    are parted too, other devices' queries, and its share of their results (`context_parallel_attention`); or, where
    caches are passed round instead (ring attention), those of every other device.
    """
    share, rounds = share_of(model, devices, sharding), model.layers * model.passes
    sizes = share.full_bytes, share.bytes_of(bits, config)
    others, result = devices - 1, []
    if sharding == "heads":
        rows = -(-model.chunk // devices) * others // devices  # of a device's tokens, what it gets from others
        channels = (2 * model.heads + 2 * model.kv_heads) * model.head_dim * BYTES_FULL
        activations = rounds * rows * channels
        result.append(Traffic("all-to-alls, a chunk", activations, activations))
    if sharding == "tokens":
        partial = model.chunk * model.heads * (model.head_dim * BYTES_FULL + BYTES_LSE)
        result.append(Traffic("partial results, a chunk", rounds * others * partial, rounds * others * partial))
        own = -(-model.chunk // devices) * model.heads * (2 * model.head_dim * BYTES_FULL + BYTES_LSE)
        result.append(Traffic("queries passed round instead", rounds * others * own, rounds * others * own))
        ring = (others * model.passes * size for size in sizes)
        result.append(Traffic("caches passed round instead", *ring))
    result.append(Traffic("its cache moved, once", *sizes))
    return result


def offload_traffic(share: Model, bits: int, config: Config = DEFAULT) -> list[Traffic]:
    """What a chunk costs between host memory and a device, over all layers and passes, with caches in the former.

    Every pass brings the full cache of each layer, and what it writes of it, the chunk, goes back; so do the tokens
    that are held in full precision. Means stay on the device.
    """
    written = replace(share, tokens=min(share.chunk, share.tokens))
    parts = (("to the device, a chunk", share), ("back, a chunk", written))
    return [
        Traffic(
            what,
            share.passes * part.full_bytes,
            share.passes * (_moved_bytes(part, bits, config) + share.held_bytes(*config.window)),
        )
        for what, part in parts
    ]


def _moved_bytes(part: Model, bits: int, config: Config) -> int:
    """Codes and scales of all layers."""
    return part.layers * sum(part.attended_bytes(side, bits, config) for side in ("keys", "values"))
