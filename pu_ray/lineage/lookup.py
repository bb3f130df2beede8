"""What the artifacts of a run know of some images.

Images are known by their content (`images.sample_id`), so that one question finds them in every run, whatever they were
called there. What was published is looked at, and what a killed pass left as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pu_ray import lake, ledger, manifest, schema
from pu_ray.errors import DataError
from pu_ray.manifest import Manifest
from pu_ray.progress import Progress
from pu_ray.storage import Storage

CONTROLS = "controls"
SELECTION_FILE, LEFT_OUT_FILE = "selection.parquet", "left_out.parquet"
ARTIFACTS = (
    "cascade",
    "features",
    "scorer",
    "scores",
    "selection",
    "mined",
    "soft_labels",
    "student",
    "evaluation",
    "exported",
)
_THREADS = 16


# -- runs --------------------------------------------------------------------------------------------------


def runs_below(uri: str) -> list[str]:
    """The run at this place; or the runs below it, which takes a listing of everything there.

    Raises:
        DataError: There is none.
    """
    storage = Storage(uri)
    if any(storage.child(name).kind(manifest.FILE_NAME) == "file" for name in ARTIFACTS):
        return [storage.uri]
    found = set()
    for file in storage.list_files():
        parent, _, name = file.path.rpartition("/")
        run, _, artifact = parent.rpartition("/")
        if name == manifest.FILE_NAME and run and artifact in ARTIFACTS and CONTROLS not in run.split("/"):
            found.add(run)
    if not found:
        raise DataError(
            "there is no run here",
            slug="no-run",
            where=storage.uri,
            allowed="the output of a job, or a folder with such outputs below it",
            got="no manifest of any stage" if storage.exists() else "nothing",
            hint="give the folder that `output` names in the job file",
        )
    return [f"{storage.uri}/{run}" for run in sorted(found)]


def choices_of(run: Storage) -> dict[str, Storage]:
    """The run itself under the name "", and its controls under theirs."""
    found = {"": run}
    for file in run.list_files(CONTROLS):
        name, _, rest = file.path.removeprefix(f"{CONTROLS}/").partition("/")
        if rest:
            found[name] = run.child(f"{CONTROLS}/{name}")
    return found


def selection_behind(folder: Storage, made: Manifest) -> str | None:
    """Identity of the choice that a student was made from, as far as what is there can tell."""
    mined, evaluated = manifest.read(folder.child("mined")), manifest.read(folder.child("evaluation"))
    if mined is not None and made.inputs.get("materialise") == mined.identity:
        return mined.inputs.get("select")
    # The mined images are another generation, or were erased: the evaluation names both, student and choice.
    student = made.inputs.get("distill", made.identity)
    if evaluated is not None and evaluated.inputs.get("distill") == student:
        return evaluated.inputs.get("select")
    return None


# -- rows --------------------------------------------------------------------------------------------------


def find(
    artifact: Storage,
    files: Sequence[str],
    samples: Iterable[bytes],
    columns: Sequence[str],
    progress: Progress | None = None,
) -> Iterator[tuple[str, pa.Table]]:
    """Rows of some contents, with the file they are in.

    Ids are read a row group at a time, and other columns only of groups that hold one of them: memory grows neither
    with the artifact nor with its images.

    Args:
        artifact: The folder.
        files: Parquet files in it.
        samples: The contents.
        columns: What to read of them.
        progress: Advanced by files.
    """
    wanted = pa.array(list(samples), schema.SAMPLE_ID_TYPE)
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(partial(_rows_in, artifact, wanted=wanted, columns=list(columns)), files)
        for file, table in zip(files, parts, strict=True):
            if progress is not None:
                progress.advance(1)
            if table is not None:
                yield file, table


def _rows_in(artifact: Storage, file: str, wanted: pa.Array, columns: list[str]) -> pa.Table | None:
    def read() -> list[pa.Table]:
        with artifact.filesystem().open_input_file(artifact.path(file)) as source:
            parquet = pq.ParquetFile(source)
            found = []
            for group in range(parquet.num_row_groups):
                here = parquet.read_row_group(group, [schema.SAMPLE_ID])[schema.SAMPLE_ID]
                places = np.flatnonzero(pc.is_in(here, value_set=wanted).to_numpy(zero_copy_only=False))
                if len(places):
                    found.append(parquet.read_row_group(group, [schema.SAMPLE_ID, *columns]).take(pa.array(places)))
            return found

    try:
        found = artifact.attempt("reading", file, read)
    except pa.ArrowInvalid as error:
        raise DataError(
            "not a readable Parquet file",
            slug="not-parquet",
            where=f"{artifact}/{file}",
            got=str(error),
            hint="delete that folder of the run and run the job again, then give this command again",
        ) from error
    return pa.concat_tables(found) if found else None


def rows_of(
    artifact: Storage, file: str, samples: Iterable[bytes], columns: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Rows of these contents in one table; none where there is no such table."""
    if not artifact.exists(file):
        return []
    return [row for _, part in find(artifact, [file], samples, columns) for row in part.to_pylist()]


def thumbnails_of(samples: Iterable[bytes], artifact: Storage) -> Any:
    """Stored thumbnails of some contents, uint8 [M, 144]; of those that have none there is none.

    Args:
        samples: The contents.
        artifact: Where thumbnails are: the features, or without a cache the scores.
    """
    found = [np.empty((0, schema.THUMBNAIL_PX), np.uint8)]
    for _, table in find(artifact, ledger.data_files(artifact), samples, [schema.THUMBNAIL]):
        there = table.filter(pc.is_valid(table[schema.THUMBNAIL]))
        if there.num_rows:
            found.append(lake.to_matrix(there[schema.THUMBNAIL]))
    return np.concatenate(found)


# -- images ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnownLake:
    """The artifact that holds a row for each image of the lake."""

    artifact: Storage
    name: str
    files: list[str]


def known_lake(run: Storage) -> KnownLake | None:
    """Where to look for an image of the lake; None where the run has not looked at its lake yet."""
    # Without a feature cache the features are a sample; the scores know every row.
    for name in ("scores", "features"):
        if files := data_files(run.child(name)):
            return KnownLake(run.child(name), name, files)
    return None


def data_files(artifact: Storage) -> list[str]:
    """Parquet files of an artifact, whole or not."""
    # By listing and not by index: a pass that was killed has no index, and what it wrote is there all the same.
    return [file.path for file in artifact.list_files(ledger.DATA_FOLDER) if file.path.endswith(".parquet")]


def among(artifact: Storage, file: str, samples: Iterable[bytes]) -> set[bytes]:
    """Which of these contents a table names."""
    return {row[schema.SAMPLE_ID] for row in rows_of(artifact, file, samples)}


def roles_of(run: Storage, samples: Iterable[bytes]) -> dict[bytes, str]:
    """Roles of those that are labeled images."""
    rows = rows_of(run.child("scorer"), "labeled.parquet", samples, ["role"])
    return {row[schema.SAMPLE_ID]: row["role"] for row in rows}
