"""The command line with a scorer that works slowly and keeps count: what the chaos trials run and kill.

The counter is a file next to the lake; every block appends one line, so that work done twice shows.
"""

from __future__ import annotations

import os
import sys
import time

import pyarrow as pa

from pu_ray import cli, score

COUNTER = "CHAOS_COUNTER"
_BLOCK_S = 0.15
_counter = os.environ.get(COUNTER, "")


class CountingScorer(score.ImageScorer):
    """Writes down how many rows it scored."""

    def __call__(self, block: pa.Table) -> pa.Table:
        time.sleep(_BLOCK_S)
        rows = super().__call__(block)
        descriptor = os.open(_counter, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, f"{rows.num_rows}\n".encode())
        finally:
            os.close(descriptor)
        return rows


if __name__ == "__main__":
    # A class of the main module travels to the workers by value, the counter's path with it.
    score.ImageScorer = CountingScorer  # type: ignore[misc]
    cli.main(sys.argv[1:])
