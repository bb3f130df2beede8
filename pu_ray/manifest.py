"""Artifact identity: what a folder holds, and with which inputs it was made.

A stage writes its data first and `manifest.json` last. A folder without a manifest is not an artifact, and one
whose identity differs from what the job would make now is out of date and made anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

import pu_ray
from pu_ray import config
from pu_ray.errors import DataError
from pu_ray.storage import Storage
from pu_ray.usage import Usage, Workers, take_peak_bytes

FILE_NAME = "manifest.json"
FORMAT = 1


class Manifest(BaseModel):
    """What a stage published.

    Attributes:
        stage: The stage's verb.
        identity: Digest of everything that determines the content: config, inputs, seed, code version.
        inputs: Identity of each upstream artifact, or fingerprint of each outside source.
        counts: Rows, images, files; integers only.
        facts: Everything else a reader wants to know; plain JSON.
        files: Size in bytes of every data file, by path inside the artifact.
        seconds: Wall-clock time of the attempt that published it; finished shards of earlier attempts cost it nothing.
        usage: What that attempt took; None in manifests from before it was recorded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    stage: str
    identity: str
    inputs: dict[str, str]
    seed: int
    code_version: str = pu_ray.__version__
    counts: dict[str, int] = {}
    facts: dict[str, Any] = {}
    files: dict[str, int] = {}
    seconds: float
    usage: Usage | None = None
    finished_at: str


def identity(stage: str, settings: Any, inputs: Mapping[str, str], seed: int) -> str:
    """Digest under which a stage's result can be reused.

    Args:
        stage: The stage's verb.
        settings: The part of the configuration the stage reads, as plain JSON data.
        inputs: Identities of upstream artifacts and fingerprints of outside sources.
        seed: The job's seed.
    """
    return config.digest(
        {
            "format": FORMAT,
            "stage": stage,
            "settings": settings,
            "inputs": dict(inputs),
            "seed": seed,
            "code": pu_ray.__version__,
        }
    )


def read(storage: Storage) -> Manifest | None:
    """The artifact's manifest, or None where nothing was published.

    Raises:
        DataError: A manifest is there but cannot be understood.
    """
    if storage.kind(FILE_NAME) != "file":
        return None
    try:
        manifest = Manifest.model_validate(storage.read_json(FILE_NAME))
    except ValidationError as error:
        raise DataError(
            "the manifest is damaged or of another version",
            slug="manifest-damaged",
            where=f"{storage}/{FILE_NAME}",
            got=str(error.errors(include_url=False)[0]["msg"]),
            hint="delete the artifact's folder and run again",
        ) from error
    return manifest


def require(storage: Storage, made_by: str) -> Manifest:
    """The manifest of an artifact that must be there.

    Raises:
        DataError: It is missing; names the command that makes it.
    """
    manifest = read(storage)
    if manifest is None:
        raise DataError(
            "this artifact does not exist yet",
            slug="artifact-missing",
            where=str(storage),
            hint=f"run `pu-ray {made_by} JOB.yaml` first",
        )
    return manifest


def is_current(storage: Storage, wanted_identity: str) -> bool:
    """Whether the artifact is there, made with the wanted inputs, and none of its files is missing or cut."""
    manifest = read(storage)
    if manifest is None or manifest.identity != wanted_identity:
        return False
    sizes = {file.path: file.size_bytes for file in storage.list_files()}
    return all(sizes.get(path) == size for path, size in manifest.files.items())


class Publication:
    """Collects what a stage made and publishes it at the end."""

    def __init__(self, stage: str, wanted_identity: str, inputs: Mapping[str, str], seed: int) -> None:
        self._stage = stage
        self._identity = wanted_identity
        self._inputs = dict(inputs)
        self._seed = seed
        self._started = time.monotonic()
        take_peak_bytes()  # of earlier stages

    def publish(
        self, storage: Storage, *, counts: Mapping[str, int], facts: Mapping[str, Any], workers: Workers | None = None
    ) -> Manifest:
        """Write the manifest, the last file of the artifact.

        Args:
            storage: The artifact's folder; every visible file in it becomes part of the manifest.
            counts: Rows, images, files.
            facts: Plain JSON data.
            workers: The processes that worked for the stage, if this one did not do everything itself.
        """
        json.dumps(dict(facts), allow_nan=False)  # pydantic would write a NaN as null, and a number would be lost
        files = {file.path: file.size_bytes for file in storage.list_files() if file.path != FILE_NAME}
        manifest = Manifest(
            stage=self._stage,
            identity=self._identity,
            inputs=self._inputs,
            seed=self._seed,
            counts=dict(counts),
            facts=dict(facts),
            files=files,
            seconds=round(time.monotonic() - self._started, 3),
            usage=Usage(driver_peak_bytes=take_peak_bytes(), workers=workers),
            finished_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        storage.write_json(FILE_NAME, manifest.model_dump(mode="json"))
        return manifest
