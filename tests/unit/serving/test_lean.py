"""serving/lean.py: Ray Serve without pandas, and pandas for whoever wants it afterwards."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from serving import lean
lean.import_serve()
assert "ray.serve" in sys.modules and "pandas" not in sys.modules and "pyarrow" not in sys.modules
import pandas
assert pandas.DataFrame({"a": [1]}).shape == (1, 1)
lean.import_serve()
assert sys.modules["pandas"] is pandas
"""


def test_serve_comes_without_pandas() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)


def test_the_hook_is_the_function() -> None:
    from serving import lean

    module, _, name = lean.HOOK.rpartition(".")
    assert getattr(sys.modules[module], name) is lean.import_serve
