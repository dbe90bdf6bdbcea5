"""What can go wrong, as types. Each derives from what a caller would catch anyway."""

from __future__ import annotations


class JKVError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigurationError(JKVError, ValueError):
    """A setting has a value that cannot work; the message names it, what is allowed, and a way out."""


class NoCachedAttentionError(JKVError, RuntimeError):
    """`strict=True`, and no attention over a cache was found; the message lists near misses with their reasons."""


class PackedCacheError(JKVError, RuntimeError):
    """An operation on a packed cache has no packed meaning. Nothing has been written."""


class PackedReadWarning(UserWarning):
    """A packed cache was read as a whole by an operation that needs full precision, and was dequantized for it."""


class OffloadWarning(UserWarning):
    """Caches are kept in host memory in a way that saves no device memory, or next to none."""


class NotRewrittenWarning(UserWarning):
    """Attention over something that looks like a cache was left in full precision."""
