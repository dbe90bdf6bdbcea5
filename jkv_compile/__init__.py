"""Unmodified autoregressive video models keep their K/V cache in 2 bits, attention corrected (arXiv 2605.26266)."""

from . import packed_flex as packed_flex
from .backend import JKVBackend, jkv_backend
from .compat import check_torch_version
from .config import Config
from .enable import enable
from .errors import (
    ConfigurationError,
    JKVError,
    NoCachedAttentionError,
    NotRewrittenWarning,
    OffloadWarning,
    PackedCacheError,
    PackedReadWarning,
)
from .explain import Explanation, explain
from .hints import ignore, mark_cache
from .packed import PackedKV, is_packed, materialize, quantization_step
from .passes.attention_forms import AttentionArguments
from .passes.spelled_by_users import register_attention
from .report import GraphReport, MemoryReport
from .salience import SalienceHead

__all__ = [
    "AttentionArguments",
    "Config",
    "ConfigurationError",
    "Explanation",
    "GraphReport",
    "JKVBackend",
    "JKVError",
    "MemoryReport",
    "NoCachedAttentionError",
    "NotRewrittenWarning",
    "OffloadWarning",
    "PackedCacheError",
    "PackedKV",
    "PackedReadWarning",
    "SalienceHead",
    "enable",
    "explain",
    "ignore",
    "is_packed",
    "jkv_backend",
    "mark_cache",
    "materialize",
    "quantization_step",
    "register_attention",
]

check_torch_version()
