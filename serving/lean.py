"""Ray Serve without pandas, for processes that never see a data frame.

`ray.serve` imports pandas where it finds it, to be able to encode data frames as JSON. With Ray Data pandas is always
there, and costs every process of a server, Ray's own controller and proxies included, a third of a second and memory:
50 MiB of a process alone, 134 MiB of a server of seven, which share what they read from files (docs/LOG.md).
"""

from __future__ import annotations

import sys
from typing import Any

HOOK = "serving.lean.import_serve"  # what Ray lets each of its processes call first


def import_serve() -> None:
    """Import `ray.serve` as if pandas were not installed; whoever wants pandas afterwards gets it."""
    modules: dict[str, Any] = sys.modules
    if "pandas" in modules or "ray.serve" in modules:
        return
    modules["pandas"] = None
    try:
        import ray.serve  # noqa: F401
    finally:
        del modules["pandas"]
