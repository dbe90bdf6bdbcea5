"""The one configuration object: frozen, validated, hashable, part of what a compiled graph is keyed on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from .errors import ConfigurationError
from .kernels.clusters import centroids_of
from .kernels.layout import SUPPORTED_BITS
from .kernels.quantizers import CLUSTERED, QUANTIZERS, Grid, grid_of
from .salience import policy_of

Correction = Literal["taylor", "clamped", "exact", "none"]
Quantizer = Literal[
    "rtn", "quarot", "unbiased", "symmetric", "symmetric_quarot", "symmetric_unbiased", "kivi", "qvg", "qvg_asymmetric"
]
Inner = Literal["inductor", "aot_eager", "eager"]
Offload = Literal["cpu"]
Center = Literal["keys", "values"]


# What measured best at four sizes, against 16 bits and at any head_dim that 64 divides: 4.0x, 5.3x, 6.4x and 7.5x
# smaller (`examples/README.md`, "Quality"). The last two are published settings, to compare with (arXiv 2602.02958),
# without a correction, as that takes more off scores than such grids' errors put on (as above).
PRESETS: dict[str, dict[str, Any]] = {
    "quality": {"quantizer": "unbiased", "bits": (3, 4), "group_size": 64},
    "balanced": {"quantizer": "unbiased", "bits": (2, 3), "group_size": 64},
    "memory": {"quantizer": "unbiased", "bits": 2, "group_size": 64},
    "smallest": {"quantizer": "symmetric_unbiased", "bits": 2, "group_size": 64, "step_bits": 8},
    "qvg": {"quantizer": "qvg", "bits": 2, "group_size": 64, "correction": "none"},
    "qvg_pro": {"quantizer": "qvg", "bits": 2, "group_size": 16, "stages": 4, "correction": "none"},
}


@dataclass(frozen=True)
class Config:
    """How caches are stored and attended.

    Args:
        bits: bits of a stored channel: one of 2, 3, 4, 8, or a pair `(key_bits, value_bits)`.
        group_size: channels that share a step, and a zero point unless the quantizer is symmetric; a multiple of 8 that
            divides head_dim. With "kivi", as many tokens of a channel of keys do, unless `block_tokens` says how many.
        correction: how the Jensen bias of quantized keys is removed from their scores (arXiv 2605.26266):
            "taylor" (s²/24 · Σ_g ‖q_g‖² Δ_g²), "clamped" (the same, at most 1: it cuts no weight to less than 1/e,
            which guards heads whose queries are so large that their cache would be deleted), "exact"
            (Σ_c log(sinh α_c / α_c); slower), or "none".
        quantizer: "rtn" rounds keys and values as they are, to the grid between a group's least and greatest channel;
            "quarot" rotates them by a Hadamard matrix first, and queries and results with them (arXiv 2404.00456);
            "unbiased" does too, then rounds to the best grid for normal numbers, and rescales each group so that its
            error is orthogonal to it (`kernels.quantizers`). "symmetric", "symmetric_quarot" and "symmetric_unbiased"
            do the same on grids around zero, without zero points, which takes half as many bytes beside the codes.
            "kivi" quantizes keys by channel, over blocks of `block_tokens` tokens (arXiv 2402.02750), and values as
            "rtn" does; the last `block_tokens` - 1 tokens before the chunk at hand are then held in full precision, as
            with `recent` (`kernels.blocks`). It is for caches that are written in slices: others stay in full
            precision, and tokens can be moved by whole blocks only. Keys may be turned, repeated or joined after they
            are read. "qvg" is Quant VideoGen (arXiv 2602.02958): tokens less the nearest of `centroids`, `stages`
            times, what is left on an odd number of levels around zero, with steps of 8 bits; "qvg_asymmetric" between a
            group's extremes. Tokens are dequantized for each attention (`kernels.clusters`).
        inner: what compiles the rewritten graph.
        strict: raise `NoCachedAttentionError` where a graph has attention but none over a cache that can be packed.
        offload: "cpu" keeps packed caches in (pinned) host memory, and brings each to its device for the calls that use
            it (`offload`); None keeps them where the model has them.
        sink: how many of a cache's first tokens are held in full precision beside the packed ones, and attended so.
        recent: how many of the tokens that come before the chunk at hand are; they take twice their bytes, as those of
            the chunk that will come before the next one are held meanwhile (`kernels.held`).
        center: quantize tokens less each channel's mean, which is taken once, of the tokens that a cache holds when it
            is packed, and kept beside the packed data: True, or "keys" or "values" alone (a tensor of both is of
            either). Scores of keys that are all shifted alike shift alike, which softmax does not see; results over
            values are shifted back (`kernels.centers`).
        step_bits: bits of a group's step: 16, or 8, which takes 2.125 bits a channel at 2 bits in groups of 64 without
            zero points, and 2.375 with these, which keep 16 (`kernels.byte_steps`). Not for codes of 8 bits. None is 8
            with "qvg" and codes of fewer bits, and 16 otherwise.
        center_tokens: with `center`, every so many tokens of a cache have a mean of their own, which is that of what is
            written to them: the number of tokens of a chunk, as a rule, or of a frame. Attention is then computed for
            each such block, and put together (`kernels.block_means`). 0, one mean for a whole cache. Tokens of such
            caches can be moved by whole blocks only. With "qvg", so many tokens share their centroids; 0, as many as
            the model writes at a time.
        stages: with "qvg", how many centroids a token is stored less (S in its paper; `group_size` is its B).
        centroids: with "qvg", of how many each is one, at most 256; None, one for 112 tokens that share them, which is
            256 for 28,672 of them and more, as in its paper.
        budget: how many tokens of a cache are kept, those of the chunk at hand among them; a fraction is one of the
            cache's length. The least salient others are dropped (`kernels.retention`). It is for caches that are
            written and read in slices, and attended in the same graph: others stay in full precision.
        block_tokens: with "kivi", how many tokens of a channel of keys share a step: any number of at least 8; None,
            `group_size`. Models that evict do so by a multiple of it, or not at all: 40 and 120 divide the 4,680 tokens
            of a chunk of Self-Forcing's, which 32 and 64 do not.
        salience: what tells which tokens to keep: "attention" (that they have received), "recent" (the newest),
            "random" or "even", of which each kept token also stands for those around it that were dropped, or a learned
            head: a module that makes `[B, n]` of keys and values `[B, H, n, D]`, or the path of
            a `salience.SalienceHead`'s weights. It is copied, and told by its weights.

    Raises:
        ConfigurationError: a value is not among those named above.
    """

    bits: int | tuple[int, int] = 2
    group_size: int = 32
    correction: Correction = "taylor"
    inner: Inner = "inductor"
    strict: bool = False
    quantizer: Quantizer = "rtn"
    offload: Offload | None = None
    sink: int = 0
    recent: int = 0
    center: bool | Center = False
    step_bits: Literal[8, 16] | None = None
    center_tokens: int = 0
    stages: int = 1
    centroids: int | None = None
    budget: int | float | None = None
    salience: Any = "attention"
    block_tokens: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, list):
            object.__setattr__(self, "bits", tuple(self.bits))
        pair = self.bits if isinstance(self.bits, tuple) else (self.bits, self.bits)
        if self.step_bits is None:
            object.__setattr__(self, "step_bits", 8 if self.clustered and 8 not in pair else 16)
        if len(pair) != 2 or any(isinstance(b, bool) or b not in SUPPORTED_BITS for b in pair):
            raise ConfigurationError(
                f"bits={self.bits!r}: expected one of {SUPPORTED_BITS}, or a pair of them for keys and values, "
                "as in bits=(4, 2)"
            )
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 8:
            raise ConfigurationError(
                f"group_size={self.group_size!r}: expected an int of at least 8 that divides head_dim"
            )
        if self.group_size % 8:
            raise ConfigurationError(
                f"group_size={self.group_size}: expected a multiple of 8; 32, 64 and 128 are usual"
            )
        for name, value, allowed in (
            ("correction", self.correction, get_args(Correction)),
            ("quantizer", self.quantizer, QUANTIZERS),
            ("inner", self.inner, get_args(Inner)),
            ("strict", self.strict, (True, False)),
            ("center", self.center, (True, False, *get_args(Center))),
            ("offload", self.offload, (None, *get_args(Offload))),
            ("step_bits", self.step_bits, (8, 16)),
        ):
            if value not in allowed:
                raise ConfigurationError(f"{name}={value!r}: expected one of {allowed}")
        for name, tokens in (("sink", self.sink), ("recent", self.recent)):
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
                raise ConfigurationError(
                    f"{name}={tokens!r}: expected a number of tokens of at least 0, which are held in full precision; "
                    "a chunk of the model's is usual"
                )
        if self.step_bits == 8 and 8 in pair:
            raise ConfigurationError(
                f"step_bits=8 with bits={self.bits!r}: codes of 8 bits tell levels apart that lie closer than such "
                "steps are rounded; expected step_bits=16, or 2, 3 or 4 bits"
            )
        if self.step_bits == 8 and self.offload is not None and not grid_of(self.quantizer).symmetric:
            raise ConfigurationError(
                f"offload={self.offload!r} with step_bits=8 and quantizer={self.quantizer!r}: a group's step and zero "
                "point take 3 bytes, which caches in host memory are not laid out for; expected step_bits=16, or a "
                "symmetric quantizer"
            )
        self._check_clusters()
        self._check_center_tokens()
        self._check_block_tokens()
        if self.quantizer == "kivi" and self.offload is not None:
            raise ConfigurationError(
                f"offload={self.offload!r} with quantizer='kivi': caches go to host memory token by token, and the "
                "tokens of a block share their steps; expected offload=None, or another quantizer"
            )
        if self.quantizer == "kivi" and self.centers("keys"):
            raise ConfigurationError(
                f"center={self.center!r} with quantizer='kivi': expected False or 'values', as each channel of keys "
                "has a zero point of its own, which any mean goes into"
            )
        self._check_budget()

    @property
    def clustered(self) -> bool:
        """Whether tokens are stored less centroids."""
        return self.quantizer in CLUSTERED

    def _check_clusters(self) -> None:
        for name, value, most in (("stages", self.stages, 16), ("centroids", self.centroids, 256)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ConfigurationError(f"{name}={value!r}: expected a number from 1 to {most}")
            if not self.clustered and value != type(self).__dataclass_fields__[name].default:
                raise ConfigurationError(
                    f"{name}={value} with quantizer={self.quantizer!r}: expected one of {CLUSTERED}, which store "
                    "tokens less centroids"
                )
        for name, given in (("center", self.center), ("offload", self.offload)) if self.clustered else ():
            if given:
                raise ConfigurationError(
                    f"{name}={given!r} with quantizer={self.quantizer!r}, whose tokens are stored less centroids that "
                    f"others share: expected no {name}, or another quantizer"
                )

    def _check_budget(self) -> None:
        budget = self.budget
        object.__setattr__(self, "salience", policy_of(self.salience))
        if budget is None:
            if self.salience != "attention":
                raise ConfigurationError(
                    f"salience={self.salience!r} without budget=: expected a budget, as salience tells which tokens it "
                    "keeps; budget=0.5 keeps half of them"
                )
            return
        whole = isinstance(budget, int) and not isinstance(budget, bool) and budget > 0
        if not whole and not (isinstance(budget, float) and 0 < budget < 1):
            raise ConfigurationError(
                f"budget={budget!r}: expected a number of tokens of at least 1, a fraction of a cache's length as a "
                "float between 0 and 1, or None, which keeps all"
            )
        for name, value, none in (
            ("offload", self.offload, None), ("sink", self.sink, 0), ("recent", self.recent, 0),
            ("center", self.center, False),
            ("quantizer", (self.clustered or self.quantizer == "kivi") and self.quantizer, False),
        ):  # fmt: skip
            if value != none:
                raise ConfigurationError(
                    f"{name}={value!r} with budget={budget!r}: the tokens that a budget keeps move as others are "
                    "dropped, which this does not follow; expected one of the two"
                )

    def rows(self, tokens: int) -> int:
        """How many tokens of a cache of so many are kept."""
        assert self.budget is not None
        wanted = round(self.budget * tokens) if isinstance(self.budget, float) else self.budget
        return max(1, min(wanted, tokens))

    @property
    def policy(self) -> str:
        """What tells which tokens a budget keeps; empty where there is none."""
        return self.salience if self.budget is not None else ""

    def _check_center_tokens(self) -> None:
        n = self.center_tokens
        if isinstance(n, bool) or not isinstance(n, int) or n < 0 or 0 < n < 8:
            raise ConfigurationError(
                f"center_tokens={n!r}: expected a number of tokens of at least 8 that share a mean, as a chunk of the "
                "model's or a frame has; or 0, one mean for a whole cache"
            )
        if n and not self.center and not self.clustered:
            raise ConfigurationError(
                f"center_tokens={n} with center={self.center!r}: expected center=True, 'keys' or 'values', of which "
                "so many tokens are to share a mean"
            )
        if n and self.offload is not None:
            raise ConfigurationError(
                f"center_tokens={n} with offload={self.offload!r}: caches go to host memory token by token, and so "
                "many tokens share a mean; expected offload=None, or center_tokens=0"
            )

    def _check_block_tokens(self) -> None:
        n = self.block_tokens
        if n is None:
            return
        if isinstance(n, bool) or not isinstance(n, int) or n < 8:
            raise ConfigurationError(
                f"block_tokens={n!r}: expected a number of tokens of at least 8 that share the steps of a channel of "
                "keys, one that divides the tokens by which the model evicts; or None, which takes group_size"
            )
        if self.quantizer != "kivi":
            raise ConfigurationError(
                f"block_tokens={n} with quantizer={self.quantizer!r}, whose steps are those of single tokens; expected "
                "block_tokens=None, or quantizer='kivi'"
            )

    def shares(self, quantizer: str) -> int:
        """How many channels of a token share a step; of a quantizer by channel, how many tokens."""
        return (self.block_tokens or self.group_size) if grid_of(quantizer).per_channel else self.group_size

    @property
    def key_quantizer(self) -> str:
        """That of keys, as `kernels.quantizers.Grid` spells it."""
        return str(self._grid_of(self.quantizer))

    @property
    def value_quantizer(self) -> str:
        """That of values, which KIVI quantizes by token."""
        return str(self._grid_of("rtn" if self.quantizer == "kivi" else self.quantizer))

    def _grid_of(self, quantizer: str) -> Grid:
        assert self.step_bits is not None
        grid = Grid(quantizer, step_bits=self.step_bits)
        if not self.clustered or not self.center_tokens:
            return grid
        return replace(grid, stages=self.stages, centroids=self.centroids or centroids_of(self.center_tokens))

    def in_blocks_of(self, tokens: int) -> Config:
        """The same, of a cache where so many tokens share their centroids."""
        return replace(self, center_tokens=tokens)

    @property
    def window(self) -> tuple[int, int]:
        """How many of a cache's first tokens are held in full precision, and of the newest before a chunk."""
        return self.sink, max(self.recent, grid_of(self.quantizer).open_tokens(self.shares(self.quantizer)))

    def mean_tokens(self, *sides: str) -> int:
        """How many tokens of these sides, "keys" or "values", share a mean or centroids; 0, none do."""
        return self.center_tokens if self.clustered or self.centers(*sides) else 0

    def centers(self, *sides: str) -> bool:
        """Whether what is of these sides, "keys" or "values", is stored less a mean."""
        return self.center is True or self.center in sides

    @property
    def key_bits(self) -> int:
        return self.bits[0] if isinstance(self.bits, tuple) else self.bits

    @property
    def value_bits(self) -> int:
        return self.bits[1] if isinstance(self.bits, tuple) else self.bits

    def check_head_dim(self, head_dim: int) -> None:
        """Raise `ConfigurationError` unless groups tile a head of `head_dim` channels."""
        if head_dim % self.group_size:
            fitting = [g for g in (16, 32, 48, 64, 96, 128, 256) if head_dim % g == 0]
            raise ConfigurationError(
                f"group_size={self.group_size} does not divide this model's head_dim={head_dim}; "
                f"use one of {fitting or [8]}"
            )


def configure(preset: str | None, settings: dict[str, Any]) -> Config:
    """`Config` of the settings given, and of a preset's for the others.

    Raises:
        ConfigurationError: there is no such preset, or a setting has a value that cannot work.
    """
    if preset is None:
        return Config(**settings)
    if preset not in PRESETS:
        raise ConfigurationError(f"preset={preset!r}: expected one of {tuple(PRESETS)}")
    return Config(**{**PRESETS[preset], **settings})
