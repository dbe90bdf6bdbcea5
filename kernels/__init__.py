"""Operators on packed caches: `ops` defines them, `layout` says where bits lie, `reference` what is computed."""

from . import ops as ops
