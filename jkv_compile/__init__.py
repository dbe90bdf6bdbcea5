"""Unmodified autoregressive video models keep their K/V cache in 2 bits, with corrected attention (arXiv 2605.26266)."""

from .compat import check_torch_version

check_torch_version()

from .backend import JKVBackend, jkv_backend
from .config import Config
from .enable import enable
from .errors import (
    ConfigurationError,
    JKVError,
    NoCachedAttentionError,
    NotRewrittenWarning,
    PackedCacheError,
    PackedReadWarning,
)
from .packed import PackedKV, is_packed, materialize, quantization_step
from .report import GraphReport, MemoryReport

__all__ = [
    "Config",
    "ConfigurationError",
    "GraphReport",
    "JKVBackend",
    "JKVError",
    "MemoryReport",
    "NoCachedAttentionError",
    "NotRewrittenWarning",
    "PackedCacheError",
    "PackedKV",
    "PackedReadWarning",
    "enable",
    "is_packed",
    "jkv_backend",
    "materialize",
    "quantization_step",
]
