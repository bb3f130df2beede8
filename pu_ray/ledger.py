"""Which shards are finished: what makes a lake pass restartable.

A pass writes data files first and one small ledger entry per shard when all its rows are there. An entry counts
only while the shard's fingerprint and the pass's settings are what they were, so a changed shard is redone, a
new one is added, and an interrupted one leaves nothing that a reader could take for data. At the end the entries
are folded into `index.parquet`, which is what readers use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa

from pu_ray.errors import DataError
from pu_ray.lake import Shard
from pu_ray.storage import Storage

INDEX_FILE = "index.parquet"
DATA_FOLDER = "data"
_LEDGER_FOLDER = "ledger"
_THREADS = 16


@dataclass
class ShardEntry:
    """What a finished shard left behind.

    Attributes:
        shard: The shard's path below the lake's root.
        fingerprint: Of the shard when it was read.
        files: Rows of each data file, by path inside the artifact.
        errors: Rows by error code.
    """

    shard: str
    fingerprint: str
    files: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """All rows, error rows included."""
        return sum(self.files.values())


class Ledger:
    """The finished shards of one artifact folder, under one set of settings.

    Args:
        storage: The artifact's folder.
        settings: Digest of all that determines a row's content, the lake's listing excluded.
    """

    def __init__(self, storage: Storage, settings: str) -> None:
        self._storage = storage
        self._settings = settings

    def finished(self, shards: Iterable[Shard]) -> dict[str, ShardEntry]:
        """Entries that still hold, by shard path; stale entries and orphaned data files are removed."""
        files = self._storage.list_files()
        sizes = {file.path: file.size_bytes for file in files}
        wanted = {f"{_LEDGER_FOLDER}/{shard.key}.json": shard for shard in shards}
        with ThreadPoolExecutor(_THREADS) as pool:
            present = [path for path in sizes if path in wanted]
            documents = dict(zip(present, pool.map(self._storage.read_json, present), strict=True))
            entries = {}
            for path, document in documents.items():
                shard = wanted[path]
                valid = (
                    document["settings"] == self._settings
                    and document["fingerprint"] == shard.fingerprint
                    and all(sizes.get(name) == size for name, size in document["sizes"].items())
                )
                if valid:
                    entries[shard.path] = ShardEntry(
                        shard.path, shard.fingerprint, document["files"], document["errors"]
                    )
            kept = {name for entry in entries.values() for name in entry.files}
            kept |= {path for path, shard in wanted.items() if shard.path in entries}
            stale = [
                path
                for path in sizes
                if path not in kept and path.startswith((f"{_LEDGER_FOLDER}/", f"{DATA_FOLDER}/"))
            ]
            list(pool.map(self._storage.delete, stale))
        return entries

    def commit(self, shard: Shard, entry: ShardEntry, sizes: Mapping[str, int]) -> None:
        """Declare a shard finished; its data files are already there."""
        self._storage.write_json(
            f"{_LEDGER_FOLDER}/{shard.key}.json",
            {
                "shard": shard.path,
                "settings": self._settings,
                "fingerprint": shard.fingerprint,
                "files": entry.files,
                "sizes": {name: sizes[name] for name in entry.files},
                "errors": entry.errors,
            },
        )


def write_index(storage: Storage, entries: Mapping[str, ShardEntry]) -> Counter[str]:
    """Fold the entries into `index.parquet`, sorted by file.

    Returns:
        Rows by error code over the whole artifact.
    """
    rows = sorted(
        (file, entry.shard, entry.fingerprint, count)
        for entry in entries.values()
        for file, count in entry.files.items()
    )
    names = ("file", "shard", "fingerprint", "rows")
    index = pa.schema([*[pa.field(name, pa.string()) for name in names[:3]], pa.field(names[3], pa.int64())])
    table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=index)
    storage.write_table(INDEX_FILE, table)
    errors: Counter[str] = Counter()
    for entry in entries.values():
        errors.update(entry.errors)
    return errors


def read_index(storage: Storage) -> pa.Table:
    """Columns file, shard, fingerprint, rows; one line per data file."""
    return storage.read_table(INDEX_FILE)


def data_files(storage: Storage) -> list[str]:
    """Paths of an artifact's data files, sorted."""
    files: list[str] = read_index(storage)["file"].to_pylist()
    return files


def check_error_share(errors: Mapping[str, int], rows: int, allowed: float, lake_uri: str) -> None:
    """Stop a run whose lake is mostly unusable.

    Raises:
        DataError: Naming each reason and its count.
    """
    bad = sum(errors.values())
    if bad > allowed * rows:
        reasons = ", ".join(f"{code} {count}" for code, count in sorted(errors.items()))
        raise DataError(
            "too many images of the lake cannot be used",
            slug="too-many-unusable-images",
            where=lake_uri,
            allowed=f"a share of {allowed:g} (lake.max_error_share)",
            got=f"{bad} of {rows} images ({bad / rows:.3f}): {reasons}",
            hint="look at the error rows in features/, mend the lake, or raise lake.max_error_share",
        )
