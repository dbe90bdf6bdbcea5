"""Published shapes of models' K/V caches, and vendors' figures for GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from .config import Config
from .kernels.quantizers import grid_of

GIB = 2**30
BYTES_FULL = 2  # bfloat16
DEFAULT = Config()


@dataclass(frozen=True)
class Model:
    """Published shape of a model's K/V cache.

    `tokens` is the full cache, `chunk` what one pass generates, `tokens_per_second` what a second of video takes;
    `passes` run over the cache for each chunk, the one that leaves final keys and values included.
    """

    name: str
    parameters: float  # billions
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    chunk: int
    tokens_per_second: float = 0.0
    passes: int = 5

    @property
    def full_bytes(self) -> int:
        """Bytes of the cache in bfloat16, keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.tokens * BYTES_FULL

    def cache_bytes(self, key_bits: int, value_bits: int, config: Config = DEFAULT) -> int:
        """Bytes of the packed cache as `config` stores it, but for its bits: codes, scales, means, what tells which
        tokens a budget keeps, and a copy in bfloat16 of those that are held in full precision."""
        sides = self.attended_bytes("keys", key_bits, config), self.attended_bytes("values", value_bits, config)
        beside = sum(self._means_bytes(side, config) + self._kept_bytes(config) for side in ("keys", "values"))
        return self.layers * (sum(sides) + beside) + self.held_bytes(*config.window)

    def attended_bytes(self, side: str, bits: int, config: Config = DEFAULT) -> int:
        """Bytes of codes and scales of one layer's "keys" or "values": of the rows of a budget; by channel, of whole
        blocks."""
        quantizer = config.key_quantizer if side == "keys" else config.value_quantizer
        shape = (1, self.kv_heads, self.rows(config), self.head_dim)
        return grid_of(quantizer).store_bytes(shape, bits, config.shares(quantizer))

    def rows(self, config: Config) -> int:
        """How many tokens are kept."""
        return self.tokens if config.budget is None else config.rows(self.tokens)

    def _means_bytes(self, side: str, config: Config) -> int:
        quantizer, tokens = config.key_quantizer if side == "keys" else config.value_quantizer, config.mean_tokens(side)
        if not tokens and not config.centers(side):
            return 0
        means = -(-self.tokens // tokens) * grid_of(quantizer).tables if tokens else 1
        return means * self.kv_heads * self.head_dim * BYTES_FULL

    def _kept_bytes(self, config: Config) -> int:
        """A byte for each token, and float32 for how salient each kept one is (`kernels.retention`)."""
        return 0 if config.budget is None else self.tokens + 4 * self.rows(config)

    def held_bytes(self, sink: int, recent: int) -> int:
        """Bytes of the first tokens and of the newest, in bfloat16; of the latter, for this chunk and the next."""
        rows = min(sink, self.tokens) + 2 * min(recent, self.tokens)
        return 2 * self.layers * self.kv_heads * self.head_dim * rows * BYTES_FULL

    def bytes_of(self, bits: int | None, config: Config = DEFAULT) -> int:
        """Bytes of the cache at so many bits for keys and values; None is bfloat16."""
        return self.full_bytes if bits is None else self.cache_bytes(bits, bits, config)


@dataclass(frozen=True)
class Gpu:
    """Vendor figures: memory, its bandwidth, dense bfloat16 matrix rate; and our kernels' static counts.

    `fused` and `unpack_once`: hot-loop instructions over plain flash attention's (`kernels.inspector`, triton 3.7.1).
    """

    name: str
    memory_gb: float
    bandwidth_tbs: float
    tflops: float
    fused: float
    unpack_once: float


# Tokens per second: tokens of a latent frame times latent frames per second (4 video frames each).
MODELS = {
    m.name: m
    for m in (
        Model("self-forcing", 1.3, 30, 12, 12, 128, 32760, 4680, 1560 * 16 / 4),
        Model("krea-14b", 14, 40, 40, 40, 128, 32760, 4680, 1560 * 16 / 4),
        Model("longcat-video", 13.6, 48, 32, 32, 128, 29640, 7800, 1560 * 15 / 4, passes=17),
        # 720 x 720 and 1280 x 720; four chunks of six latent frames are kept
        Model("magi-4.5b", 4.5, 34, 24, 8, 128, 48600, 12150, 2025 * 24 / 4, passes=32),
        Model("magi-24b", 24, 48, 48, 8, 128, 86400, 21600, 3600 * 24 / 4, passes=8),
        # a cached head is two parts of 128, one turned and one not; 16 and 20 latent frames are kept
        Model("hy-worldplay-5b", 5, 30, 24, 24, 256, 14080, 3520, 880 * 24 / 4),
        Model("hy-worldplay-8b", 8.3, 54, 16, 16, 256, 35200, 7040, 1760 * 24 / 4),
    )
}

GPUS = {
    g.name: g
    for g in (
        Gpu("a100-80gb", 80, 2.04, 312, 1.203, 1.071),
        Gpu("h100", 80, 3.35, 989, 1.322, 1.026),
        Gpu("h200", 141, 4.8, 989, 1.322, 1.026),
        Gpu("b200", 180, 8.0, 2250, 1.371, 1.077),
        Gpu("rtx-4090", 24, 1.01, 165, 1.203, 1.071),
        Gpu("rtx-5090", 32, 1.79, 210, 1.353, 1.057),
        Gpu("l40s", 48, 0.86, 362, 1.203, 1.071),
        Gpu("mi300x", 192, 5.3, 1307, 1.723, 1.0),
        Gpu("mi355x", 288, 8.0, 2300, 1.841, 1.034),
    )
}
