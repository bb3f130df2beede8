"""pu_ray/lineage/forgotten_list.py: what a run must never choose."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pu_ray import schema
from pu_ray.errors import DataError
from pu_ray.lineage import forgotten_list, ids
from tests.unit.lineage.runs import CHOSEN, CUT, LEAK, LOW, ONE, STRANGER, forget, id_of


def test_the_list_grows_and_keeps_what_somebody_wrote(run):
    forget(run, CHOSEN[0])
    run.write_bytes(
        forgotten_list.LIST_FILE, run.read_bytes(forgotten_list.LIST_FILE) + f"{id_of(LOW).hex()} # by hand".encode()
    )
    done = forget(run, CHOSEN[0], CHOSEN[1])
    assert (done.asked, done.already) == (2, 1)
    assert set(forgotten_list.read(run)) == {id_of(one) for one in (CHOSEN[0], LOW, CHOSEN[1])}
    assert "# by hand" in run.read_text(forgotten_list.LIST_FILE)
    assert ids.read_list(run.read_bytes(forgotten_list.LIST_FILE), "x") == list(forgotten_list.read(run))
    before = run.read_bytes(forgotten_list.LIST_FILE)
    assert forget(run, CHOSEN[0], CHOSEN[1]).already == 2
    assert run.read_bytes(forgotten_list.LIST_FILE) == before


def test_images_that_the_lake_does_not_hold_outdate_nothing(run):
    done = forget(run, STRANGER)
    assert (done.outdated, done.erased, done.students) == ([], [], {})
    assert forgotten_list.digest(run) is None
    assert set(forgotten_list.read(run)) == {id_of(STRANGER)}
    forget(run, LOW)
    one = forgotten_list.digest(run)
    assert one is not None
    forget(run, CUT)
    assert forgotten_list.digest(run) not in (None, one)


def test_what_nearly_equals_a_forgotten_image_is_not_shown_either(run):
    assert forgotten_list.not_to_be_shown(run) == set()
    forget(run, CHOSEN[0])
    ids = pa.array([id_of(LEAK), id_of(CHOSEN[1])], schema.SAMPLE_ID_TYPE)
    left_out = pa.table({schema.SAMPLE_ID: ids, schema.WHY: pa.array(["leak", "near_forgotten"])})
    run.child("selection").write_table("left_out.parquet", left_out)
    assert forgotten_list.not_to_be_shown(run) == {id_of(CHOSEN[0]), id_of(CHOSEN[1])}


@pytest.mark.parametrize("line", ["not-an-id selected", f"{ONE} elsewhere", ONE[:-2]])
def test_a_damaged_list_stops_whoever_reads_it(run, line):
    run.write_bytes(forgotten_list.LIST_FILE, f"# list\n{line}\n".encode())
    with pytest.raises(DataError) as caught:
        forgotten_list.read(run)
    assert (caught.value.where, caught.value.got) == (f"{run.uri}/forgotten.txt, line 2", line)
