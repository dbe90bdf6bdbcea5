"""Operators on packed caches: `ops` defines them, `layout` says where bits lie, `reference` what is computed."""

from . import ops as ops  # isort: skip  (defines the library that the others add to)
from . import block_means as block_means
from . import blocks as blocks
from . import clusters as clusters
from . import dense as dense
from . import grids as grids
from . import held as held
from . import indexed as indexed
from . import retention as retention
from . import turned as turned
