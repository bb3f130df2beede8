"""What a run must never choose: a list in its folder, to which `pu-ray forget` adds and which the stage `select` reads.

Whatever the rule, what is on the list, and what nearly looks like it, is never chosen. The list belongs to the identity
of the choice: the next `pu-ray run` redoes the choice and all that came of it, and neither features nor scores.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import pyarrow.compute as pc

from pu_ray import config as settings_of
from pu_ray import schema
from pu_ray.errors import DataError
from pu_ray.lineage import ids
from pu_ray.lineage.lookup import LEFT_OUT_FILE
from pu_ray.storage import Storage

LIST_FILE = "forgotten.txt"


def read(run: Storage) -> dict[bytes, str]:
    """What a run must never choose: where each image was when it was forgotten (selected, lake, unknown), by id.

    Args:
        run: The run's folder; a control's images are forgotten by its job.

    Raises:
        DataError: A line of the list cannot be understood.
    """
    content = run.read_if_there(LIST_FILE)
    found: dict[bytes, str] = {}
    for number, line in enumerate((content or b"").decode("utf-8", "replace").splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        sample = ids.parse(words[0])
        # Who wrote an id by hand meant that it counts.
        state = words[1] if len(words) > 1 else "lake"
        if sample is None or state not in ("selected", "lake", "unknown"):
            raise DataError(
                "the list of forgotten images is damaged",
                slug="forgotten-list-damaged",
                where=f"{run}/{LIST_FILE}, line {number}",
                allowed="a sample id in hexadecimal, and selected, lake or unknown",
                got=line.strip(),
                hint="mend that line; do not delete it, or the image may be chosen again",
            )
        found[sample] = state
    return found


def digest(run: Storage) -> str | None:
    """What the list adds to the identity of a choice; None where it changes nothing.

    Images that the lake did not hold do not count: a list that goes to many runs must not have them all taught anew. If
    the lake grows by one of them later, the scores have another identity anyway.
    """
    return digest_of(read(run))


def digest_of(states: Mapping[bytes, str]) -> str | None:
    """`digest` of a list that is not written yet.

    Args:
        states: Where each image was, by id, as `read` tells.
    """
    counted = sorted(sample.hex() for sample, state in states.items() if state != "unknown")
    return settings_of.digest(counted) if counted else None


def not_to_be_shown(run: Storage) -> set[bytes]:
    """Images that no page may show: those of the list, and those left out because they nearly equal one."""
    hidden = set(read(run))
    if hidden and run.child("selection").exists(LEFT_OUT_FILE):
        table = run.child("selection").read_table(LEFT_OUT_FILE)
        alike = table.filter(pc.equal(table[schema.WHY], "near_forgotten"))
        hidden.update(alike[schema.SAMPLE_ID].to_pylist())
    return hidden


def add(run: Storage, new: Mapping[bytes, str], students: Mapping[str, str]) -> None:
    """Put images at the end of the list, under a line that says when, and which students knew them.

    Args:
        run: The run's folder.
        new: Where each image was, by id.
        students: Identities of the students that were taught with one of them, by folder.
    """
    text = (run.read_if_there(LIST_FILE) or b"").decode()
    if not text:
        text = "# Images that this run never chooses again: `pu-ray forget` adds to it, the stage `select` reads it.\n"
    elif not text.endswith("\n"):
        text += "\n"
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    named = ", ".join(f"{folder} {identity}" for folder, identity in students.items())
    knew = f"; taught with some of them: {named}" if named else ""
    lines = [f"# {now}: {len(new):,} images{knew}", *(f"{sample.hex()} {state}" for sample, state in new.items())]
    run.write_bytes(LIST_FILE, (text + "\n".join(lines) + "\n").encode())
