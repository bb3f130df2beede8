"""One finished run for the tests of lineage."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from pu_ray import schema
from pu_ray.storage import Storage
from tests.unit.artifacts import write_shards
from tests.unit.lineage.runs import (
    BROKEN,
    CHOSEN,
    CUT,
    GATED,
    JUDGE,
    LABELED,
    LEAK,
    LOW,
    choose,
    id_of,
    publish,
    rows,
    teach,
)


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    """A finished run with one control; five of the lake's eleven images are not chosen, each for another reason."""
    made = Storage(f"{tmp_path}/runs/one")
    ids = pa.array([id_of(LABELED), id_of(JUDGE)], schema.SAMPLE_ID_TYPE)
    roles = {schema.SAMPLE_ID: ids, "role": pa.array(["train", "validate"])}
    made.child("scorer").write_table("labeled.parquet", pa.table(roles))
    publish(made.child("scorer"), "fit", "scorer", {})
    first = rows(CHOSEN, [3.0, 2.5, 2.0, 1.5, 1.0, 0.5], "a.parquet", [None] * 6)
    scores = [-1.0, 4.0, None, -float("inf"), 0.4, 2.9]
    # The first image lies in the lake twice.
    second = rows(
        [LOW, LEAK, BROKEN, GATED, CUT, CHOSEN[0]], scores, "b.parquet", [None, None, "truncated", *[None] * 3]
    )
    write_shards(made.child("scores"), {"a.parquet": first, "b.parquet": second})
    publish(made.child("scores"), "score", "scores", {"fit": "scorer"})
    choose(made, CHOSEN, "choice", {"score": "scores", "fit": "scorer"})
    teach(made, "choice", "student")
    control = made.child("controls/random")
    choose(control, [CHOSEN[0], LOW], "random choice", {"score": "scores"}, rule="random")
    teach(control, "random choice", "random student")
    return made
