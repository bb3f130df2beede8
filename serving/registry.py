"""Exported folders become students: checked once, then immutable.

Nothing is served that the export stage did not finish, that changed since, or that failed its quality gate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from pu_ray import manifest
from pu_ray.config import NetworkConfig, PreprocessingConfig
from pu_ray.errors import DataError, GateError
from pu_ray.storage import Storage, sha256_of

# Files that can be served, by the names of export.formats.
ENGINES = {"onnx": "model.onnx", "onnx-int8": "model.int8.onnx", "torch": "model.safetensors"}
_BY_SPEED = ("onnx", "onnx-int8")  # which an export has timed, on a CPU
LABELS = "labels.txt"
PREPROCESSING = "preprocess.json"

# The names a job may have (config.JobConfig.name); anything else would break URLs and log lines.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Student:
    """What there is to know about a student apart from its weights.

    Attributes:
        uri: The exported folder; absolute where it is local, because replicas have another working directory.
        name: The job's name; unique within a server.
        version: The export's identity: the digest of everything that made it.
        labels: Class names in the order of the logits; K of them.
        preprocessing: How images become the network's input.
        engine: Which of `ENGINES` answers.
        confidence_deciles: The nine inner deciles of its largest probability on mined images; empty: not known.
    """

    uri: str
    name: str
    version: str
    labels: tuple[str, ...]
    preprocessing: PreprocessingConfig
    engine: str = "onnx"
    confidence_deciles: tuple[float, ...] = ()


@dataclass(frozen=True)
class LoadedStudent:
    """A student with its network.

    Attributes:
        student: What there is to know about it.
        model: The ONNX graph, `pixels` float32 [N, C, H, W] to `logits` float32 [N, K]; weights for the engine `torch`.
        network: What the weights belong to; None: the export does not say.
    """

    student: Student
    model: bytes
    network: NetworkConfig | None = None


def load(uri: str, engine: str = "auto") -> LoadedStudent:
    """Open and check one exported folder.

    Args:
        uri: Folder that the export stage published.
        engine: One of `ENGINES`; auto: the fastest, as the export measured them. All of them passed its parity checks.

    Raises:
        DataError: Not an export, incomplete, a file differs from what was published, or it has no such engine.
        GateError: The student failed its quality gate.
    """
    storage = Storage(uri)
    if storage.is_local:
        storage = Storage(str(storage.local_path))
    published = manifest.require(storage, made_by="export")
    where = f"{storage}/{manifest.FILE_NAME}"
    if published.stage != "export":
        raise DataError(
            "only exported students can be served",
            slug="not-an-export",
            where=where,
            allowed="an artifact of stage 'export'",
            got=f"stage {published.stage!r}",
            hint="serve the run's folder `exported`",
        )
    if published.facts.get("gate_passed") is not True:
        raise GateError(
            "this student did not pass its quality gate",
            slug="not-passed",
            where=where,
            got=f"gate_passed {published.facts.get('gate_passed')!r}",
            hint="look into the run's report.html; nothing below the gate is served",
        )
    name = published.facts.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise DataError(
            "the student's name cannot be used in URLs",
            slug="invalid-student-name",
            where=where,
            allowed=NAME.pattern,
            got=repr(name),
            hint="export again",
        )
    chosen = _engine(published, engine, where)
    contents = _checked_files(storage, published, ENGINES[chosen])
    student = Student(
        uri=storage.uri,
        name=name,
        version=published.identity,
        labels=_labels(contents[LABELS], f"{storage}/{LABELS}"),
        preprocessing=_preprocessing(contents[PREPROCESSING], f"{storage}/{PREPROCESSING}"),
        engine=chosen,
        confidence_deciles=tuple(published.facts.get("confidence_deciles", ())),
    )
    return LoadedStudent(student, contents[ENGINES[chosen]], _network(published))


def _engine(published: manifest.Manifest, wanted: str, where: str) -> str:
    there = [name for name, file in ENGINES.items() if file in published.files]
    timed = [name for name in there if name in _BY_SPEED]
    if not (timed if wanted == "auto" else wanted in there):
        raise DataError(
            "this export holds no ONNX network, the format that is served" if wanted == "auto" else "no such engine",
            slug="export-without-onnx" if wanted == "auto" else "export-without-engine",
            where=where,
            allowed=", ".join((*(["auto"] if timed else []), *there)),
            got=", ".join(sorted(published.files)) if wanted == "auto" else wanted,
            hint=f"add `{'onnx' if wanted == 'auto' else wanted}` to export.formats and export again",
        )
    if wanted != "auto":
        return wanted
    formats = published.facts.get("formats", {})
    # In this order where nothing was measured.
    return min(timed, key=lambda name: formats.get(name, {}).get("cpu_latency_ms", float("inf")))


def _network(published: manifest.Manifest) -> NetworkConfig | None:
    try:
        return NetworkConfig(architecture=published.facts["architecture"], options=published.facts["options"])
    except (KeyError, ValidationError):
        return None  # only the engine `torch` asks, and says so


def _checked_files(storage: Storage, published: manifest.Manifest, model: str) -> dict[str, bytes]:
    """The contents that serving needs, by name; every published file is compared with its digest."""
    digests = published.facts.get("sha256")
    if not isinstance(digests, Mapping):
        raise DataError(
            "the export lists no digests, so its files cannot be checked",
            slug="export-without-digests",
            where=f"{storage}/{manifest.FILE_NAME}",
            hint="export again",
        )
    needed = {model, LABELS, PREPROCESSING}
    contents = {}
    for path in sorted(needed | set(published.files)):
        content = storage.read_bytes(path)
        if digests.get(path) != sha256_of(content):
            raise DataError(
                "the file differs from the one that was published",
                slug="exported-file-differs",
                where=f"{storage}/{path}",
                allowed=f"sha256 {digests.get(path, 'in the manifest')}",
                got=f"sha256 {sha256_of(content)}, {len(content)} bytes",
                hint="delete the exported folder and export again",
            )
        if path in needed:
            contents[path] = content
    return contents


def _labels(content: bytes, where: str) -> tuple[str, ...]:
    try:
        labels = tuple(content.decode("utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8 text", slug="not-utf8", where=where, got=str(error), hint="export again") from error
    if not labels or not all(label.strip() for label in labels) or len(set(labels)) < len(labels):
        raise DataError(
            "class names must be there, not empty, and different",
            slug="invalid-class-names",
            where=where,
            got=f"{len(labels)} lines",
            hint="mend teacher.classes and export again",
        )
    return labels


def _preprocessing(content: bytes, where: str) -> PreprocessingConfig:
    try:
        return PreprocessingConfig.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise DataError(
            "not a preprocessing description",
            slug="invalid-preprocessing",
            where=where,
            got=f"{place}: {problem['msg']}",
            hint="export again",
        ) from error
