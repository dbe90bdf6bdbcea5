"""A packed cache as one flat run of bytes, and back: what goes over a wire, and what safetensors can hold.

Little-endian, version 1; 2 where there is a mean, 3 where blocks of tokens have means, which readers of less do not
know. The first `HEADER` bytes are

    magic (8 bytes), version and length of the description (uint16), CRC-32 of the header without what it and the two
    checksums take (uint32), number of bytes in all (uint64), two checksums of what follows the header (int64), the
    description (JSON), zeros;

then codes, scales and, where there is one, the range held in full precision (see `kernels.layout` and `store`); and of
the first tokens and the newest, where these are, rows and ranges (`kernels.held`); the mean that tokens are stored less
(`kernels.centers`), or means and extents of blocks (`kernels.block_means`); each padded with zeros to
`ALIGNMENT` bytes. The header has one length, so that caches of one shape take the same number of
bytes on every rank.
"""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import torch
from torch import Tensor

from .errors import PackedCacheError
from .kernels.quantizers import grid_of
from .packed import PackedKV
from .packed_copies import clone
from .packed_save import rebuild_window
from .store import CHANNEL, rebuild_store

MAGIC, VERSION, HEADER, ALIGNMENT = b"JKVCACHE", 1, 1024, 64
_CENTERED, _MEANS = 2, 3  # the version of caches that are stored less a mean, or means of blocks of tokens
_FIXED = struct.Struct("<8sHHIQqq")
_CRC, _SUMS = 12, 24  # where the header's checksum and those of the rest lie in it
_BLOCK = 2**20  # words that a checksum takes at a time
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}


def pack_bytes(cache: Tensor) -> Tensor:
    """A packed cache, or a window on whole heads of one, as flat bytes.

    Args:
        cache: a packed tensor. Of a window only what it shows is taken, all of it bit for bit.

    Returns:
        uint8 `[n]` on the cache's device, describing itself: `unpack_bytes` needs nothing else.

    Raises:
        PackedCacheError: the tensor is not packed, or the window splits heads or is no box.
    """
    if not isinstance(cache, PackedKV):
        raise PackedCacheError(
            f"pack_bytes of a {type(cache).__name__} of shape {tuple(cache.shape)}: expected a packed cache; a plain "
            "tensor becomes one when a compiled model first attends to it"
        )
    window = cache.window()
    if not all(window.covers(cache._store.shape, axis) for axis in range(CHANNEL)):
        copied = clone(cache)
        if not isinstance(copied, PackedKV):
            raise PackedCacheError(
                f"pack_bytes of a view of size {tuple(cache.shape)} of a packed cache of quantizer "
                f"{cache._store.quantizer!r}: expected whole heads of tokens, the first of them a multiple of "
                f"{cache._store.unit}, as so many share their steps or a mean"
            )
        cache = copied
    store = cache._store
    sections = [*store.data()] + ([store.active.data] if store.active else [])
    sections += [store.held.data, store.held.ranges.to(store.device)] if store.held else []
    sections += [] if store.center is None else [store.center]
    sections += [] if store.means is None else [store.means.data, store.means.extents.to(store.device)]
    sections = [t.contiguous().reshape(-1).view(torch.uint8) for t in sections]
    total = HEADER + sum(_padded(t.numel()) for t in sections)
    with torch.inference_mode(False):
        buffer = torch.zeros(total, dtype=torch.uint8, device=store.device)
    at = HEADER
    for section in sections:
        buffer[at : at + section.numel()] = section
        at += _padded(section.numel())
    header = _header(cache, total)
    buffer[:HEADER] = torch.frombuffer(header, dtype=torch.uint8).to(buffer.device)
    buffer[_SUMS : _SUMS + 16] = _checksums(buffer[HEADER:]).view(torch.uint8)
    return buffer


def unpack_bytes(buffer: Tensor, device: torch.device | str | None = None) -> Tensor:
    """The packed cache that `pack_bytes` made `buffer` of.

    Args:
        buffer: uint8 `[n]`.
        device: where the cache is to lie; where the buffer does, unless given.

    Returns:
        A packed tensor of the size, strides and dtype that the original had; it shares no memory with the buffer.

    Raises:
        PackedCacheError: the buffer is none, is of another version, cut short, or damaged.
    """
    header, description = _described(buffer)
    payload = buffer[HEADER:]
    if payload.storage_offset() % 8:
        payload = payload.clone()
    if tuple(_checksums(payload).tolist()) != header[-2:]:
        raise _refused("is damaged: codes, steps or values are not those that were packed", buffer)
    payload = payload if device is None else payload.to(device)
    try:
        return _rebuilt(payload, description)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _refused(f"describes no packed cache ({error})", buffer) from error


def _header(cache: PackedKV, total: int) -> bytearray:
    store = cache._store
    description: dict[str, Any] = {
        "shape": store.shape, "strides": store.strides, "dtype": _name(store.dtype), "bits": store.bits,
        "group_size": store.group_size, "quantizer": store.quantizer, "grows": store.grows,
        "active": None if store.active is None else [store.active.start, store.active.stop],
        **({"window": store.window, "held": store.held_tokens} if store.held else {}),
        **({"center": True} if store.center is not None else {}),
        **({"mean_tokens": store.mean_tokens} if store.means is not None else {}),
        "size": tuple(cache.size()), "stride": cache.stride(), "offset": cache.offset, "reads_as": _name(cache.dtype),
    }  # fmt: skip
    text = json.dumps(description, separators=(",", ":")).encode()
    header = bytearray(HEADER)
    version = _MEANS if store.means is not None else VERSION if store.center is None else _CENTERED
    _FIXED.pack_into(header, 0, MAGIC, version, len(text), 0, total, 0, 0)
    header[_FIXED.size : _FIXED.size + len(text)] = text
    struct.pack_into("<I", header, _CRC, _crc(header))
    return header


def _described(buffer: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The header's fields, and what its text says."""
    if not isinstance(buffer, Tensor) or buffer.dtype != torch.uint8 or buffer.dim() != 1:
        what = f"{buffer.dtype} {list(buffer.shape)}" if isinstance(buffer, Tensor) else type(buffer).__name__
        raise PackedCacheError(f"unpack_bytes of {what}: expected the bytes of a packed cache, uint8 of one dimension")
    if buffer.numel() < HEADER:
        raise _refused(f"is cut short: its header alone takes {HEADER}", buffer)
    header = bytes(buffer[:HEADER].cpu().tolist())
    fields = _FIXED.unpack_from(header)
    magic, version, length, crc, total = fields[:5]
    if magic != MAGIC:
        raise _refused(f"is no packed cache: it begins with {magic!r}, not {MAGIC!r}", buffer)
    if version not in (VERSION, _CENTERED, _MEANS):
        raise _refused(f"is of version {version}, and this release reads version {VERSION}", buffer)
    if _crc(bytearray(header)) != crc or length > HEADER - _FIXED.size:
        raise _refused("is damaged: its header is not the one that was packed", buffer)
    if total != buffer.numel():
        raise _refused(f"should have {total}: it was cut short, or is not one cache alone", buffer)
    return fields, json.loads(header[_FIXED.size : _FIXED.size + length])


def _rebuilt(payload: Tensor, given: dict[str, Any]) -> Tensor:
    batch, heads, _, head_dim = given["shape"]
    active, dtype = given["active"], _DTYPES[given["dtype"]]
    grid = grid_of(given["quantizer"])
    shapes = grid.store_shapes(given["shape"], given["bits"], given["group_size"])
    parts: list[tuple[torch.dtype, tuple[int, ...]]] = [*zip((torch.uint8, grid.scale_dtype), shapes)]
    if active is not None:
        parts.append((dtype, (batch, heads, active[1] - active[0], head_dim)))
    if "held" in given:
        sink, recent = given["held"]
        parts.append((dtype, (batch, heads, sink + 2 * recent, head_dim)))
        parts.append((torch.int64, (batch, 3 if recent else 1, 4)))
    if given.get("center"):
        parts.append((dtype, (batch, heads, 1, head_dim)))
    if mean_tokens := given.get("mean_tokens"):
        blocks = -(-given["shape"][2] // mean_tokens)
        parts += [(dtype, (batch, heads, blocks, head_dim * grid.tables)), (torch.float64, (batch, heads, blocks, 3))]
    tensors, at = [], 0
    with torch.inference_mode(False):
        for kind, shape in parts:
            tensor = torch.empty(shape, dtype=kind, device=payload.device)
            tensor.view(-1).view(torch.uint8).copy_(payload[at : at + tensor.nbytes])
            tensors.append(tensor)
            at += _padded(tensor.nbytes)
    means = None
    if mean_tokens:
        extents, data = tensors.pop(), tensors.pop()
        means = data, extents.cpu(), mean_tokens
    center = tensors.pop() if given.get("center") else None
    last = None if active is None else (tensors[2], *active)
    held = (tensors[-2], tensors[-1].cpu(), tuple(given["window"])) if "held" in given else None
    shape, strides, (codes, scales) = tuple(given["shape"]), tuple(given["strides"]), tensors[:2]
    less = center, means
    store = rebuild_store(shape, strides, dtype, given["bits"], codes, scales, last, given["quantizer"], held, *less)
    store.grows = given["grows"]
    place = tuple(given["size"]), tuple(given["stride"]), given["offset"]
    return rebuild_window(store, *place, _DTYPES[given["reads_as"]], {})


def _checksums(data: Tensor) -> Tensor:
    """int64 `[2]`: the sum of all 8-byte words, and of each times its place, both modulo 2^64."""
    words = data.view(torch.int64)
    places = torch.arange(1, min(_BLOCK, len(words)) + 1, device=data.device)
    sums = torch.zeros(2, dtype=torch.int64, device=data.device)
    for first in range(0, len(words), _BLOCK):
        block = words[first : first + _BLOCK]
        total = block.sum()
        sums[0] += total
        sums[1] += (block * places[: len(block)]).sum() + first * total
    return sums


def _crc(header: bytearray) -> int:
    """Of all of a header but itself and the checksums of what follows it, which are put in on the device."""
    return zlib.crc32(header[:_CRC] + header[_CRC + 4 : _SUMS] + header[_SUMS + 16 :])


def _padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refused(why: str, buffer: Tensor) -> PackedCacheError:
    return PackedCacheError(f"a buffer of {buffer.numel()} bytes {why}; send or save the cache again with pack_bytes")
