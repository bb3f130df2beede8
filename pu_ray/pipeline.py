"""The order of the stages: the only file that knows it.

Every stage's identity is the digest of what determines its result: its part of the configuration, the identities of
the stages before it, fingerprints of the outside sources it reads, seed and code version. A stage whose artifact
carries that identity is done; any other is run. So running a job again does nothing, going on after a crash repeats
only what was unfinished, and changing a setting redoes what depends on it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pu_ray import config as settings_of
from pu_ray import gate, lease, manifest
from pu_ray.config import JobConfig, NetworkConfig
from pu_ray.errors import ConfigError, DataError
from pu_ray.lineage import forgotten_list
from pu_ray.manifest import Manifest
from pu_ray.progress import Narrator
from pu_ray.storage import Storage, sha256_of
from pu_ray.usage import HourPrices

SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
_BASE_FILE = "_lake.parquet"  # hidden from listings: the pipeline's own memory
NOTHING = "none"  # the fingerprint of a source that there is not


@dataclass(frozen=True)
class Step:
    """One stage.

    Attributes:
        name: Under which it appears in manifests and summaries.
        verb: Command that runs it.
        folder: Its artifact below the job's output.
        module: Where its `run` is.
        upstream: Steps whose results it reads.
        outside: Outside sources it reads, see `Sources`.
        outside_if: One more of those, a dotted setting, and the value with which it is read.
        sections: Dotted parts of the configuration it reads.
        needs_ray: Whether `run` needs a running Ray.
        needs_ray_if: A dotted setting and the value with which it needs one all the same.
        only_if: Dotted setting and the value without which the step does not exist.
        growing: Steps it reads whose result may grow with the lake without outdating its own: `lake_base` tells.
        forgets: Whether it must not choose what is on the run's list of forgotten images.
    """

    name: str
    verb: str
    folder: str
    module: str
    upstream: tuple[str, ...]
    outside: tuple[str, ...]
    sections: tuple[str, ...]
    needs_ray: bool = False
    needs_ray_if: tuple[str, str] | None = None
    outside_if: tuple[str, str, str] | None = None
    only_if: tuple[str, Any] | None = None
    growing: tuple[str, ...] = ()
    forgets: bool = False

    def sources(self, job: JobConfig) -> tuple[str, ...]:
        """The outside sources that this job's step reads."""
        if self.outside_if is not None and job.section(self.outside_if[1]) == self.outside_if[2]:
            return (*self.outside, self.outside_if[0])
        return self.outside

    def on_ray(self, job: JobConfig) -> bool:
        """Whether this job's step needs a running Ray."""
        return self.needs_ray or (
            self.needs_ray_if is not None and job.section(self.needs_ray_if[0]) == self.needs_ray_if[1]
        )


_NETWORKS = ("teacher.architecture", "teacher.options", "teacher.preprocessing", "teacher.stages")

# What determines the pixels that a network sees.
_IMAGES = ("lake.max_image_bytes", "lake.max_image_px", "lake.scaled_decode")
# What determines a feature row; where runs share rows (features.cache_uri) is no part of it.
_FEATURES = tuple(f"features.{name}" for name in ("engine", "batch_size", "compile", "cache", "cascade"))

STEPS = (
    Step(
        "cascade",
        "features",
        "cascade",
        "pu_ray.pu.cascade",
        upstream=(),
        outside=("teacher", "labeled", "lake_base"),
        sections=(
            *_NETWORKS,
            *_IMAGES,
            "scorer.split",
            "scorer.unlabeled_sample",
            "features.cascade_stages",
            "features.cascade_recall",
            "features.cascade_margin",
            "features.cascade_sample",
        ),
        only_if=("features.cascade", True),
    ),
    Step(
        "features",
        "features",
        "features",
        "pu_ray.features",
        upstream=("cascade",),
        outside=("teacher", "lake"),
        sections=(
            *_NETWORKS,
            *_IMAGES,
            *_FEATURES,
            "lake.max_error_share",
            "lake.min_scaled_agreement",
            "scorer.unlabeled_sample",
            "resources.embed.gpus",
        ),
        needs_ray=True,
    ),
    Step(
        "fit",
        "fit",
        "scorer",
        "pu_ray.pu.fit",
        upstream=("cascade", "features"),
        outside=("teacher", "labeled", "lake_base"),
        sections=(
            *_NETWORKS,
            *_IMAGES,
            *_FEATURES,
            "resources.embed.gpus",
            "scorer",
            "selection.rule",
            "selection.recall",
            "selection.confidence",
        ),
        growing=("features",),
        needs_ray_if=("scorer.features", "finetuned"),
    ),
    Step(
        "score",
        "score",
        "scores",
        "pu_ray.score",
        upstream=("cascade", "features", "fit"),
        outside=("teacher", "lake"),
        sections=("scorer.features", "features.cache"),
        needs_ray=True,
    ),
    Step(
        "select",
        "select",
        "selection",
        "pu_ray.select",
        upstream=("features", "fit", "score"),
        outside=("test",),
        forgets=True,
        outside_if=("truth", "selection.rule", "oracle"),
        sections=("selection",),
    ),
    Step(
        "materialise",
        "select",
        "mined",
        "pu_ray.materialise",
        upstream=("select",),
        outside=("lake",),
        sections=(),
        needs_ray=True,
    ),
    Step(
        "soft_labels",
        "distill",
        "soft_labels",
        "pu_ray.distill.soft_labels",
        upstream=("fit", "materialise"),
        outside=("teacher", "labeled"),
        sections=(*_NETWORKS, *_IMAGES, "distill.crops", "distill.augment", "features.engine", "resources.embed.gpus"),
        needs_ray=True,
        only_if=("distill.soft_labels", "cached"),
    ),
    Step(
        "distill",
        "distill",
        "student",
        "pu_ray.distill.fit",
        upstream=("fit", "materialise", "soft_labels"),
        outside=("teacher", "labeled"),
        sections=(*_NETWORKS, "student", "distill", "resources.train.gpus"),
        needs_ray=True,
    ),
    Step(
        "evaluate",
        "evaluate",
        "evaluation",
        "pu_ray.evaluate",
        upstream=("select", "distill"),
        outside=("teacher", "test", "truth", "metadata"),
        sections=("evaluation.gate", "evaluation.slices"),
    ),
    Step(
        "export",
        "export",
        "exported",
        "pu_ray.export",
        upstream=("fit", "materialise", "distill", "evaluate"),
        outside=("teacher", "labeled"),
        sections=("name", "export"),
    ),
)
VERBS = tuple(dict.fromkeys(step.verb for step in STEPS))

# A control is the same job with another choice of images: it shares what comes before the choice.
_SHARED_WITH_CONTROLS = ("cascade", "features", "scorer", "scores")
_SHARED_STEPS = ("cascade", "features", "fit", "score")
_CONTROL_STEPS = ("select", "materialise", "soft_labels", "distill", "evaluate")


@dataclass(frozen=True)
class ControlStorage(Storage):
    """A control's own folder, which sees the job's artifacts where it has none of its own."""

    shared: Storage = field(kw_only=True)

    def child(self, name: str) -> Storage:
        """The job's own artifact where controls share it."""
        return self.shared.child(name) if name in _SHARED_WITH_CONTROLS else super().child(name)


class Sources:
    """Fingerprints of what lies outside the run's folder; each is taken once.

    Args:
        job: The job.
        found: Is told how many files of the lake have been listed, now and then.
    """

    def __init__(self, job: JobConfig, found: Callable[[int], None] | None = None) -> None:
        self._job = job
        self._found = found

    def __getitem__(self, name: str) -> str:
        value: str = getattr(self, name)
        return value

    @cached_property
    def teacher(self) -> str:
        """Content of weights and class list."""
        contents = []
        for uri in (self._job.teacher.weights, self._job.teacher.classes):
            folder, name = Storage(uri).split()
            contents.append(sha256_of(folder.read_bytes(name)))
        return settings_of.digest(contents)

    @cached_property
    def _shards(self) -> dict[str, str]:
        from pu_ray import lake

        return {shard.path: shard.fingerprint for shard in lake.list_shards(self._job.lake, self._found)}

    @property
    def lake(self) -> str:
        """Listing of the lake's shards."""
        return settings_of.digest(sorted(self._shards.items()))

    @cached_property
    def lake_base(self) -> str:
        """Listing of the lake that scorer and gate were fitted on.

        It stays what it was while all of it is still there: a lake that only grew needs no new fit. One that lost or
        changed a shard is another lake.
        """
        base = self._remembered
        if self._job.scorer.on_new_shards == "keep" and base is not None and base.items() <= self._shards.items():
            return settings_of.digest(sorted(base.items()))
        return self.lake

    @cached_property
    def _remembered(self) -> dict[str, str] | None:
        storage = Storage(self._job.output)
        if storage.kind(_BASE_FILE) != "file":
            return None
        table = storage.read_table(_BASE_FILE)
        return dict(zip(table["shard"].to_pylist(), table["fingerprint"].to_pylist(), strict=True))

    def remember_lake(self) -> None:
        """Keep today's listing as the base of what is fitted now, unless an earlier one still is it."""
        if self.lake_base == self.lake and self._remembered != self._shards:
            import pyarrow as pa

            listing = {"shard": list(self._shards), "fingerprint": list(self._shards.values())}
            Storage(self._job.output).write_table(_BASE_FILE, pa.table(listing))

    @cached_property
    def labeled(self) -> str:
        """Listing of the labeled images."""
        from pu_ray import lake

        return lake.labeled_fingerprint(self._job.labeled.uri)

    @cached_property
    def test(self) -> str:
        """Listing of the test images."""
        from pu_ray import lake

        return lake.labeled_fingerprint(self._job.test.uri)

    @cached_property
    def truth(self) -> str:
        """Content of the truth table, or nothing."""
        return self._content(self._job.lake.truth)

    @cached_property
    def metadata(self) -> str:
        """Content of the test images' metadata, or nothing."""
        return self._content(self._job.evaluation.metadata)

    @cached_property
    def forgotten(self) -> str:
        """Which of the lake's images this run must not choose, or nothing."""
        return forgotten_list.digest(Storage(self._job.output)) or NOTHING

    @staticmethod
    def _content(uri: str | None) -> str:
        if uri is None:
            return NOTHING
        folder, name = Storage(uri).split()
        return sha256_of(folder.read_bytes(name))


Known = Mapping[str, tuple[str, dict[str, str]]]


def steps_of(job: JobConfig) -> tuple[Step, ...]:
    """The steps that this job has, in their order."""
    return tuple(step for step in STEPS if step.only_if is None or job.section(step.only_if[0]) == step.only_if[1])


def identities(job: JobConfig, sources: Sources, shared: Known | None = None) -> Known:
    """Identity and inputs of every step, by name.

    Args:
        job: The job.
        sources: Fingerprints of outside sources.
        shared: Steps whose results another job provides.
    """
    result = dict(shared or {})
    for step in steps_of(job):
        if step.name not in result:
            # Without a cache the features are a sample for the fit, and as good as ever when the lake grows.
            sampled = step.name == "features" and not job.features.cache
            inputs = {name: sources["lake_base" if sampled and name == "lake" else name] for name in step.sources(job)}
            if step.forgets and sources["forgotten"] != NOTHING:
                # Only then: what was chosen before anybody asked is as good as ever.
                inputs["forgotten"] = sources["forgotten"]
            inputs |= {name: result[name][0] for name in step.upstream if name in result and name not in step.growing}
            settings = {path: job.section(path) for path in step.sections}
            result[step.name] = (manifest.identity(step.name, settings, inputs, job.seed), inputs)
    return result


# Starts Ray when the first step needs it; the caller decides how.
SessionFactory = Callable[[], AbstractContextManager[Any]]


class Pipeline:
    """Runs a job's stages.

    Args:
        job: The job.
        narrator: Where progress goes.
        session: Brings up Ray, at most once, and only if a step needs it.
        prices: What an hour costs, for the report; None: what an earlier report was told.
    """

    def __init__(
        self, job: JobConfig, narrator: Narrator, session: SessionFactory, prices: HourPrices | None = None
    ) -> None:
        self.job = job = with_absolute_paths(job)
        self.storage = Storage(job.output)
        self._steps = steps_of(job)
        self._narrator = narrator
        self._session = session
        self._prices = prices
        self._sources = Sources(job, lambda files: narrator.say(f"  listing the lake: {files:,} files so far"))
        self._stack = ExitStack()
        self._ray_is_up = False
        self._lease: lease.Lease | None = None

    def run(self) -> dict[str, Any]:
        """The whole chain; finished stages are skipped.

        Returns:
            The summary, also published as summary.json.

        Raises:
            GateError: The student failed its gate; the report is there, an export is not.
            ClusterError: Another run is at work on this output.
        """
        with self._stack:
            check_paths(self.job)
            self._begin("run")
            known = identities(self.job, self._sources)
            self._sources.remember_lake()
            worked = False
            if not self._all_current(known):
                check_networks(self.job)
            verdict: Manifest | None = None
            with self._narrator.stages(self._shown()):
                for step in self._steps:
                    if step.name == "export":
                        worked |= self._run_controls()
                        verdict = manifest.require(self.storage.child("evaluation"), "evaluate")
                        if not verdict.facts["gate"]["passed"]:
                            break
                    worked |= self._run_step(step, self.job, self.storage, known)
                with self._narrator.stage("report"):
                    summary = self._report(known)
            assert verdict is not None
            gate.require(verdict, str(self.storage.child("evaluation")))
            if not worked:
                self._narrator.say("nothing to do: every stage is done, with the same inputs")
            return summary

    def run_verb(self, verb: str) -> list[Manifest]:
        """One stage alone; what it needs must be there and up to date.

        Raises:
            DataError: An earlier stage is missing or out of date; names the command that mends it.
            ClusterError: Another run is at work on this output.
        """
        with self._stack:
            check_paths(self.job)
            self._begin(verb)
            known = identities(self.job, self._sources)
            self._sources.remember_lake()
            steps = [step for step in self._steps if step.verb == verb]
            sections = {section.partition(".")[0] for step in steps for section in step.sections}
            check_networks(self.job, [name for name in ("teacher", "student") if name in sections])
            own = {step.name for step in steps}
            for step in steps:
                self._require_current(verb, [name for name in step.upstream if name not in own], known)
            with self._narrator.stages([(None, step.name) for step in steps]):
                for step in steps:
                    if not self._run_step(step, self.job, self.storage, known):
                        self._narrator.say(f"{step.name}: nothing to do, it is done with the same inputs")
            return [manifest.require(self.storage.child(step.folder), step.verb) for step in steps]

    def audit(self, images: int) -> dict[str, Any]:
        """Draw a sample of the selection for a person to judge.

        Raises:
            DataError: There is no current selection, or an earlier audit would be overwritten.
            ClusterError: Another run is at work on this output.
        """
        from pu_ray import audit

        with self._stack:
            self._begin_audit()
            return audit.draw(self.job, self.storage, images)

    def audited(self, answers: str) -> Manifest:
        """Count what a person answered, and show it in the report.

        Raises:
            DataError: The sample is not of the current selection, or the answers cannot be used.
            ClusterError: Another run is at work on this output.
        """
        from pu_ray import audit

        with self._stack:
            known = self._begin_audit()
            published = audit.publish(self.job, self.storage, answers)
            self._report(known)
            return published

    def report(self) -> dict[str, Any]:
        """Summary and report of what is there."""
        with self._stack:
            check_paths(self.job)
            return self._report(identities(self.job, self._sources))

    # -- inside --------------------------------------------------------------------------------------------

    def _begin(self, what: str) -> None:
        """Keep other runs away from the output until the end."""
        held = lease.hold(self.storage, f"{what} of job {self.job.name}", note=self._narrator.say)
        self._lease = self._stack.enter_context(held)

    def _begin_audit(self) -> Known:
        check_paths(self.job)
        self._begin("audit")
        known = identities(self.job, self._sources)
        self._require_current("audit", ["select", "materialise"], known)
        return known

    def _require_current(self, verb: str, names: Sequence[str], known: Known) -> None:
        for needed in self._steps:
            if needed.name in names and not manifest.is_current(
                self.storage.child(needed.folder), known[needed.name][0]
            ):
                raise DataError(
                    f"`{verb}` needs the result of `{needed.verb}`, which is missing or out of date",
                    slug="earlier-stage-missing",
                    where=str(self.storage.child(needed.folder)),
                    hint=f"run `pu-ray {needed.verb} JOB.yaml`, or `pu-ray run JOB.yaml` for everything",
                )

    def _all_current(self, known: Known) -> bool:
        return all(manifest.is_current(self.storage.child(step.folder), known[step.name][0]) for step in self._steps)

    def _shown(self) -> list[tuple[str | None, str]]:
        """What a run has to do, in its order: group, or nothing, and name of each stage."""
        controls: list[tuple[str | None, str]] = [
            (f"control {control}", f"{control}: {step.name}")
            for control in self.job.evaluation.controls
            for step in self._steps
            if step.name in _CONTROL_STEPS
        ]
        before = [(None, step.name) for step in self._steps if step.name != "export"]
        return [*before, *controls, (None, "export"), (None, "report")]

    def _run_step(
        self,
        step: Step,
        job: JobConfig,
        storage: Storage,
        known: Known,
        label: str = "",
    ) -> bool:
        """Run a step unless its artifact is current; says whether it ran."""
        identity, inputs = known[step.name]
        name = f"{label}{step.name}"
        if manifest.is_current(storage.child(step.folder), identity):
            self._narrator.done_before(name)
            return False
        if step.name == "export":
            # Before anything is touched: an earlier, better student stays exported.
            gate.require(manifest.require(storage.child("evaluation"), "evaluate"), str(storage.child("evaluation")))
        if self._lease is not None:
            self._lease.check()
        if step.on_ray(job) and not self._ray_is_up:
            self._narrator.say("starting Ray")
            self._stack.enter_context(self._session())
            self._ray_is_up = True
        with self._narrator.stage(name) as progress:
            # Until the new result is complete, the old manifest must not vouch for a mixture.
            storage.child(step.folder).delete(manifest.FILE_NAME)
            run: Callable[..., Manifest] = importlib.import_module(step.module).run
            published = run(job, storage, inputs, identity, progress)
        self._narrator.done(name, published.seconds, published.counts)
        return True

    def _control(self, control: str) -> tuple[JobConfig, Storage, Known]:
        """A control's job, its storage and the identities of its steps."""
        chosen = manifest.require(self.storage.child("selection"), "select").counts["selected"]
        job = control_job(self.job, control, chosen)
        storage = ControlStorage(f"{self.storage.uri}/controls/{control}", shared=self.storage)
        main = identities(self.job, self._sources)
        shared = {name: main[name] for name in _SHARED_STEPS if name in main}
        return job, storage, identities(job, self._sources, shared)

    def _run_controls(self) -> bool:
        worked = False
        for control in self.job.evaluation.controls:
            job, storage, known = self._control(control)
            for step in steps_of(job):
                if step.name in _CONTROL_STEPS:
                    worked |= self._run_step(step, job, storage, known, label=f"{control}: ")
        return worked

    def _finished_controls(self) -> dict[str, list[str]]:
        """Identity and time of the evaluation of each control that belongs to this job."""
        finished: dict[str, list[str]] = {}
        for control in self.job.evaluation.controls:
            _, storage, known = self._control(control)
            document = manifest.read(storage.child("evaluation"))
            if document is not None and document.identity == known["evaluate"][0]:
                finished[control] = [document.identity, document.finished_at]
        return finished

    def _report(self, known: Known) -> dict[str, Any]:
        from pu_ray import report

        # What an earlier configuration made is not reported as this one's.
        found = {step.name: manifest.read(self.storage.child(step.folder)) for step in self._steps}
        current = {
            name: document for name, document in found.items() if document and document.identity == known[name][0]
        }
        state = {name: [document.identity, document.finished_at] for name, document in current.items()}
        controls = self._finished_controls() if "select" in current else {}
        audited = manifest.read(self.storage.child("audit"))
        audit = [audited.identity, audited.finished_at] if audited else None
        present: dict[str, Any] = (
            self.storage.read_json(SUMMARY_FILE) if self.storage.kind(SUMMARY_FILE) == "file" else {}
        )
        prices = self._prices or _prices_of(present)
        priced = prices and prices.model_dump()
        identity = settings_of.digest({"steps": state, "controls": controls, "audit": audit, "prices": priced})
        complete = {"written", "settings", "usage"} <= set(present) and self.storage.kind(REPORT_FILE) == "file"
        if complete and present.get("identity") == identity:
            return present
        evaluation = self.job.evaluation.model_copy(update={"controls": tuple(controls)})
        job = self.job.model_copy(update={"evaluation": evaluation})
        summary = report.summarise(job, self.storage, current, len(self._steps), prices)
        summary |= {"settings": _settings(self.job), "identity": identity}
        self.storage.write_bytes(REPORT_FILE, report.render(self.job, self.storage, summary).encode())
        self.storage.write_json(SUMMARY_FILE, summary)
        return summary


def control_job(job: JobConfig, control: str, budget: int) -> JobConfig:
    """The same job with another choice of as many images."""
    chosen = {"rule": control, "budget": None if control == "everything" else budget, "prefer": "purest", "per": "lake"}
    selection = job.selection.model_copy(update=chosen)
    evaluation = job.evaluation.model_copy(update={"controls": ()})
    return job.model_copy(update={"selection": selection, "evaluation": evaluation})


def with_absolute_paths(job: JobConfig) -> JobConfig:
    """The same job with local paths made absolute: Ray's workers have other current directories."""
    teacher = {name: Storage(getattr(job.teacher, name)).absolute() for name in ("weights", "classes")}
    lake: dict[str, str] = {"uri": Storage(job.lake.uri).absolute()}
    if job.lake.truth is not None:
        lake["truth"] = Storage(job.lake.truth).absolute()
    evaluation = {}
    if job.evaluation.metadata is not None:
        evaluation["metadata"] = Storage(job.evaluation.metadata).absolute()
    return job.model_copy(
        update={
            "output": Storage(job.output).absolute(),
            "teacher": job.teacher.model_copy(update=teacher),
            "labeled": job.labeled.model_copy(update={"uri": Storage(job.labeled.uri).absolute()}),
            "test": job.test.model_copy(update={"uri": Storage(job.test.uri).absolute()}),
            "lake": job.lake.model_copy(update=lake),
            "evaluation": job.evaluation.model_copy(update=evaluation),
        }
    )


def check_paths(job: JobConfig) -> None:
    """Stop on a wrong path before anything is read.

    Raises:
        ConfigError: Names the field.
    """
    places = {
        "teacher.weights": (job.teacher.weights, "file"),
        "teacher.classes": (job.teacher.classes, "file"),
        "labeled.uri": (job.labeled.uri, "folder"),
        "test.uri": (job.test.uri, "folder"),
        "lake.uri": (job.lake.uri, "folder or file"),
    }
    if job.lake.truth is not None:
        places["lake.truth"] = (job.lake.truth, "file")
    if job.evaluation.metadata is not None:
        places["evaluation.metadata"] = (job.evaluation.metadata, "file")
    for setting, (uri, wanted) in places.items():
        found = Storage(uri).kind()
        if found not in wanted.split(" or "):
            raise ConfigError(
                f"there is no such {wanted}",
                slug="no-such-input",
                where=setting,
                allowed=f"the path or URI of a {wanted}",
                got=f"{uri} ({found})",
                hint="relative paths start at the current directory",
            )


def check_networks(job: JobConfig, roles: Sequence[str] = ("teacher", "student")) -> None:
    """Stop on a wrong network before a cluster is touched; torch is imported only if there is one to check.

    Raises:
        ConfigError: Names the field.
        DataError: The class list cannot be used.
    """
    if not roles:
        return
    from pu_ray import models

    classes = models.read_classes(job.teacher.classes)
    for setting in roles:
        network: NetworkConfig = getattr(job, setting)
        preprocessing = job.student_preprocessing if setting == "student" else job.teacher.preprocessing
        try:
            built = models.build(network, len(classes), preprocessing.channels)
            models.require_logits(built, preprocessing, len(classes))
            if setting == "teacher":
                models.TappedNetwork(built, job.teacher.stages)
        except ConfigError as error:
            where = str(error.where) if str(error.where).startswith("teacher.") else f"{setting}.{error.where}"
            raise error.at(where) from error


def _settings(job: JobConfig) -> dict[str, Any]:
    """Every setting by its dotted path, for `pu-ray compare`; a tracking server's URI may hold a password."""
    values = settings_of.ResolvedConfig(job, {}).values()
    return {path: value for path, value, _ in values if not path.startswith("tracking.")}


def _prices_of(summary: Mapping[str, Any]) -> HourPrices | None:
    """What an earlier report was told, so that one made by another command does not lose its money."""
    return HourPrices.model_validate(summary["prices"]) if summary.get("prices") else None
