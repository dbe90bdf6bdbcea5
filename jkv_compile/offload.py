"""Packed caches that live in host memory, and come to the device for the calls that use them (`offload="cpu"`).

Before a call its caches are brought to slots, codes and scales as `kernels.layout` has them, and after it the tokens
that it has written go back to host memory. The caches of the call before are evicted when a call begins, and those that
came after this call the last time are brought while it runs: slots for two calls are all the device memory that is
taken, however many layers there are.

Copies run on a stream of their own. Computation waits for them by events, and they for it; the host waits for neither,
but where it copies rows itself (a growing cache that has outgrown its memory; the memory of two caches that part). On
CPUs the same code runs without streams, and "the device" is memory as well. Not run on a GPU yet.

Dynamo sees codes and scales of an offloaded cache as tensors on the device that have sizes and strides, but no memory.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .host_memory import HostMemory, Lane

if TYPE_CHECKING:
    from .store import Store

Ranges = Sequence[tuple[int, int]]  # tokens [start, stop)


@dataclass
class Traffic:
    """Bytes of caches that went between host memory and a device (`offload="cpu"`), so far.

    Attributes:
        to_device, from_device: codes, steps and zero points, and ranges held in full precision.
        full_to_device, full_from_device: what the same tokens take in full precision.
    """

    to_device: int = 0
    from_device: int = 0
    full_to_device: int = 0
    full_from_device: int = 0

    @property
    def ratio(self) -> float:
        """How many times less was moved than in full precision; 1.0 where nothing was."""
        moved = self.to_device + self.from_device
        return (self.full_to_device + self.full_from_device) / moved if moved else 1.0

    def add(self, to_device: bool, moved: int, full: int) -> None:
        if to_device:
            self.to_device, self.full_to_device = self.to_device + moved, self.full_to_device + full
        else:
            self.from_device, self.full_from_device = self.from_device + moved, self.full_from_device + full


@dataclass
class Slot:
    """Device memory for one cache; what lies behind its first `filled` tokens is zero."""

    codes: Tensor
    scales: Tensor
    filled: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


class Offload:
    """What the offloaded caches of one configuration share: slots on devices, and an account of what was moved."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.traffic = Traffic()
        self.peak_bytes = 0  # of the slots that were held at a time
        self._lanes: dict[torch.device, Lane] = {}
        self._staged: weakref.WeakSet[HostMemory] = weakref.WeakSet()
        self._free: dict[tuple[Any, ...], list[Slot]] = {}
        self._thread = threading.local()

    def lane(self, device: torch.device) -> Lane:
        if device not in self._lanes:
            self._lanes[device] = Lane(device)
        return self._lanes[device]

    def count(self, to_device: bool, moved: int, full: int = 0) -> None:
        """Bytes that are moved, and what they would have been in full precision."""
        with self.lock:
            self.traffic.add(to_device, moved, full)

    def begin(self, hosts: Sequence[HostMemory]) -> None:
        """Bring caches for a call, and those that are expected after it."""
        with self.lock:
            expected, thread = self._expect(hosts), threading.get_ident()
            for host in list(self._staged):
                if host.brought_by == thread and not host.users and host not in (*hosts, *expected):
                    self.evict(host)
            for host in hosts:
                self._bring(host, thread)
            with contextlib.suppress(torch.OutOfMemoryError):  # what is only expected can wait until it is called for
                for host in expected:
                    self._bring(host, thread)
            for host in hosts:
                host.users += 1
            for host in hosts:
                assert host.slot is not None
                host.lane.hand_over(host.ready, host.slot.codes, host.slot.scales)

    def end(self, hosts: Sequence[HostMemory], changed: dict[HostMemory, Ranges] | None) -> None:
        """A call is over, and has changed these tokens; None, it has failed."""
        with self.lock:
            for host in hosts:
                host.users -= 1
                host.stale = host.stale or changed is None
                if host.slot is not None and changed is not None and host in changed:
                    self._save(host, host.slot, changed[host])
                if host.slot is not None and not host.users and host.stale:
                    self.evict(host)

    def evict(self, host: HostMemory) -> None:
        """Give a slot back, with all that it is known for to be in host memory."""
        assert host.slot is not None
        for store in host.stores:
            if store.active is not None:
                store.active.park(host)
            if store.held is not None:
                store.held.park(host)
        host.lane.run(lambda: None)  # whatever copies use the slot next wait for what was computed on it
        self._free.setdefault(_kind(host), []).append(host.slot)
        host.slot, host.stale = None, False
        self._staged.discard(host)

    def _expect(self, hosts: Sequence[HostMemory]) -> list[HostMemory]:
        """The caches that came after these the last time; remembers that these came after the ones before."""
        before = [host for ref in getattr(self._thread, "last", ()) if (host := ref()) is not None]
        if before and set(before) != set(hosts):
            before[0].next = tuple(weakref.ref(host) for host in hosts)
        self._thread.last = tuple(weakref.ref(host) for host in hosts)
        return [host for ref in hosts[0].next if (host := ref()) is not None and host not in hosts]

    def _bring(self, host: HostMemory, thread: int) -> None:
        host.brought_by = thread
        if host.slot is not None:
            return
        slot = self._slot(host)
        filled, before = host.filled, slot.filled

        def bring() -> None:
            host.copy_in(slot.codes, slot.scales, 0, filled)
            slot.codes[:, :, filled:before] = 0
            slot.scales[:, :, :, filled:before] = 0

        host.count(filled, to_device=True)
        host.ready, host.slot, slot.filled = host.lane.run(bring), slot, filled
        self._staged.add(host)

    def _save(self, host: HostMemory, slot: Slot, ranges: Ranges) -> None:
        for start, stop in _merged(ranges):
            host.count(stop - start, to_device=False)
            host.ready = host.lane.run(partial(host.copy_out, slot.codes, slot.scales, start, start, stop))
            host.filled, slot.filled = max(host.filled, stop), max(slot.filled, stop)

    def _slot(self, host: HostMemory) -> Slot:
        free = self._free.get(_kind(host))
        if free:
            return free.pop()
        self._free.clear()  # of caches that have grown, or are gone
        codes, scales = (host.lane.empty(t.shape, t.dtype) for t in (host.codes, host.scales))
        slot = Slot(codes, scales, host.codes.shape[2])
        held = sum(h.slot.nbytes for h in self._staged if h.slot is not None)
        self.peak_bytes = max(self.peak_bytes, held + slot.nbytes)
        return slot


def stage(stores: Sequence[Store]) -> list[HostMemory]:
    """Bring the offloaded ones among caches to the device; returns where their data lives, for `release`."""
    hosts = list(dict.fromkeys(store.host for store in stores if store.host is not None))
    for offload in dict.fromkeys(host.offload for host in hosts):
        offload.begin([host for host in hosts if host.offload is offload])
    return hosts


def release(hosts: Sequence[HostMemory], changed: dict[HostMemory, Ranges] | None) -> None:
    """After the call that `stage` was for: what it has changed goes back, and nothing where it has failed (None)."""
    for offload in dict.fromkeys(host.offload for host in hosts):
        offload.end([host for host in hosts if host.offload is offload], changed)


def _merged(ranges: Ranges) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        elif start < stop:
            merged.append((start, stop))
    return merged


def _kind(host: HostMemory) -> tuple[Any, ...]:
    return host.codes.device, host.codes.shape, host.scales.shape
