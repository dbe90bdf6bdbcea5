"""Ranks of one job pack their caches alike: told by the job's own key-value store, without a collective.

Nothing here waits for another rank: whoever comes first leaves its configuration, and whoever comes later compares. So
ranks that never use the backend hang nobody, and ranks may compile at different times.
"""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

import torch.distributed as dist

from .compat import default_store
from .config import Config
from .errors import ConfigurationError

logger = logging.getLogger(__name__)

_KEY = "jkv_compile/configuration"
_CONFLICT = "jkv_compile/conflict"
_lock = threading.Lock()
_used: list[Config] = []  # in the order of their first use, where there are other ranks
_allowed = False


def allow_different_configurations() -> None:
    """Let ranks of one job use different configurations, or the same ones in a different order, from here on."""
    global _allowed
    _allowed = True


def check_agreement(config: Config) -> None:
    """Compare a configuration with the other ranks', at its first use in this process.

    The n-th configuration that a rank uses must be the n-th of all ranks of the default process group.

    Raises:
        ConfigurationError: it is another one; also on other ranks, when they next compile a graph.
    """
    if _allowed or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    try:
        conflict = _compare(default_store(), config)
    except (RuntimeError, NotImplementedError) as error:  # a store that cannot compare, or that is gone
        logger.warning("configurations of the ranks were not compared: %s", error)
        return
    if conflict:
        raise ConfigurationError(conflict)


def _compare(store: Any, config: Config) -> str | None:
    """What is wrong, for people; None where nothing is known to be."""
    with _lock:
        if config not in _used:
            place = len(_used)
            mine = {"rank": dist.get_rank(), "configuration": str(config)}
            first = json.loads(store.compare_set(f"{_KEY}/{place}", "", json.dumps(mine)))
            _used.append(config)
            if first["configuration"] != mine["configuration"]:
                message = (
                    f"ranks use different configurations: rank {mine['rank']} has {mine['configuration']}, rank "
                    f"{first['rank']} has {first['configuration']}; give jkv_backend the same settings on all of them, "
                    "or call jkv_compile.distributed.allow_different_configurations() where this is intended"
                )
                store.set(_CONFLICT, message)
                return message
    return store.get(_CONFLICT).decode() if store.check([_CONFLICT]) else None
