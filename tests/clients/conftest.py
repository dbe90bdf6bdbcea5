"""Models of installed packages: what has to be in place before they are imported."""

from __future__ import annotations

import sys

# transformers looks for a package called `kernels`, and takes the folder of that name at this repository's root for it.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
