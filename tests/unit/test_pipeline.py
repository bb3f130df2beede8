"""pu_ray/pipeline.py: what must be done again after a change, and nothing else."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from artifacts import COUNTS, FACTS, job, png, settings
from rich.console import Console

from pu_ray import config, lease, manifest, pipeline, report
from pu_ray.config import JobConfig
from pu_ray.errors import ClusterError, ConfigError, DataError, GateError
from pu_ray.manifest import Publication
from pu_ray.pipeline import STEPS, Pipeline
from pu_ray.progress import Narrator
from pu_ray.storage import Storage
from pu_ray.usage import HourPrices

# A job without a cascade has no such step, and one whose teacher answers in the loop stores no answers.
ALL = [step.name for step in STEPS if step.only_if is None]
SOURCES = {
    name: f"{name} as it is" for name in ("teacher", "lake", "lake_base", "labeled", "test", "truth", "metadata")
} | {"forgotten": pipeline.NOTHING}


def identities(made: JobConfig, sources: dict[str, str] | None = None) -> dict[str, str]:
    return {name: pair[0] for name, pair in pipeline.identities(made, sources or SOURCES).items()}


def changed(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [name for name in ALL if one[name] != other[name]]


# -- the order ---------------------------------------------------------------------------------------------


def test_every_step_comes_after_the_steps_it_reads():
    seen: set[str] = set()
    for step in STEPS:
        assert set(step.upstream) <= seen
        seen.add(step.name)


def test_folders_are_those_of_the_design():
    folders = "cascade features scorer scores selection mined soft_labels student evaluation exported"
    assert [step.folder for step in STEPS] == folders.split()


def test_every_section_a_step_reads_exists():
    made = job()
    for step in STEPS:
        for path in step.sections:
            made.section(path)


# -- identities --------------------------------------------------------------------------------------------

DEPENDENTS = {
    "features": ALL,
    "fit": ALL[1:],
    "select": ALL[3:],
    "materialise": ALL[4:],
    "distill": ALL[5:],
    "evaluate": ALL[6:],
    "export": ALL[7:],
    "nothing": [],
}


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("seed=1", "features"),
        ("teacher.preprocessing.size_px=8", "features"),
        ("teacher.architecture=cifar/resnet14-w4", "features"),
        ("teacher.options={a: 1}", "features"),
        ("teacher.stages=[layer1]", "features"),
        ("lake.max_image_bytes=1000", "features"),
        ("lake.max_image_px=1000", "features"),
        ("features.batch_size=7", "features"),
        ("features.engine=torch", "features"),
        ("features.cache=false", "features"),
        ("features.compile=true", "features"),
        ("scorer.unlabeled_sample=500", "features"),
        ("features.cache_uri=s3://shared/features", "nothing"),
        ("features.cascade_recall=0.9", "nothing"),  # there is no cascade
        ("resources.embed.gpus=1", "features"),
        ("scorer.epochs=3", "fit"),
        ("scorer.prior=0.2", "fit"),
        ("scorer.split.train=0.4 scorer.split.validate=0.25", "fit"),
        ("scorer.features=finetuned", "fit"),
        ("selection.recall=0.9", "fit"),  # a scorer whose calibration set is too small for the promise must be refitted
        ("selection.rule=zero", "fit"),
        ("selection.budget=7", "select"),
        ("selection.balance=none", "select"),
        ("selection.near_copy_correlation=0.9", "select"),
        ("student.architecture=cifar/resnet14-w2", "distill"),
        ("student.options={a: 1}", "distill"),
        ("distill.epochs=3", "distill"),
        ("distill.losses.radius=0.3", "distill"),
        ("distill.augment.horizontal_flip=false", "distill"),
        ("resources.train.gpus=1", "distill"),
        ("evaluation.gate.max_gap_to_teacher=1", "evaluate"),
        ("evaluation.gate.min_accuracy=0.9", "evaluate"),
        ("evaluation.metadata=s3://moved/metadata.csv evaluation.slices=[site]", "evaluate"),
        ("student.preprocessing.size_px=8", "distill"),
        ("export.max_int8_accuracy_drop=1", "export"),
        ("export.opset=19", "export"),
        ("export.formats=[safetensors]", "export"),
        ("name=other", "export"),
        ("evaluation.controls=[random]", "nothing"),
        ("evaluation.batch_size=7", "nothing"),
        ("lake.chunk_rows=7", "nothing"),
        ("lake.uri=s3://moved/lake", "nothing"),
        ("lake.format=parquet", "nothing"),
        ("teacher.weights=s3://moved/teacher.safetensors", "nothing"),
        ("labeled.uri=s3://moved/labeled", "nothing"),
        ("output=s3://moved/run", "nothing"),
        ("resources.embed.max_actors=9", "nothing"),
        ("resources.embed.memory_gib=9", "nothing"),
        ("resources.decode.cpus=2", "nothing"),
        ("resources.train.cpus=2", "nothing"),
    ],
)
def test_changing_a_setting_changes_exactly_the_steps_that_depend_on_it(tmp_path, override, first):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(settings()))
    overrides = re.split(r" (?=scorer|evaluation)", override)
    before = identities(config.load(path, [], {}).job)
    after = identities(config.load(path, overrides, {}).job)
    assert changed(before, after) == DEPENDENTS[first]


@pytest.mark.parametrize(
    ("source", "first"),
    [
        ("teacher", "features"),
        ("lake_base", "fit"),
        ("labeled", "fit"),
        ("test", "select"),
        ("truth", "evaluate"),
        ("metadata", "evaluate"),
    ],
)
def test_changing_a_source_changes_exactly_the_steps_that_depend_on_it(source, first):
    after = identities(job(), {**SOURCES, source: "changed"})
    assert changed(identities(job()), after) == DEPENDENTS[first]


def test_forgetting_redoes_the_choice_and_what_came_of_it_in_the_job_and_its_controls():
    after = {**SOURCES, "forgotten": "a list"}
    assert changed(identities(job()), identities(job(), after)) == DEPENDENTS["select"]
    assert pipeline.identities(job(), after)["select"][1]["forgotten"] == "a list"
    made = pipeline.control_job(job(), "random", 8)
    assert changed(identities(made), identities(made, after)) == DEPENDENTS["select"]


def test_a_run_forgets_what_its_list_says_and_remembers_when_it_is_gone(tmp_path):
    made, storage = job(tmp_path), Storage(f"{tmp_path}/run")
    assert pipeline.Sources(made).forgotten == pipeline.NOTHING
    storage.write_bytes("forgotten.txt", b"0123456789abcdef0123456789abcdef lake\n")
    assert pipeline.Sources(made).forgotten != pipeline.NOTHING
    storage.delete("forgotten.txt")
    assert pipeline.Sources(made).forgotten == pipeline.NOTHING


def test_a_looser_limit_on_broken_images_needs_no_new_fit():
    after = identities(job(lake={"max_error_share": 0.5}))
    assert changed(identities(job()), after) == [name for name in ALL if name != "fit"]


def test_a_lake_that_only_grew_is_embedded_and_scored_but_not_fitted_anew():
    after = identities(job(), {**SOURCES, "lake": "grown"})
    assert changed(identities(job()), after) == [name for name in ALL if name != "fit"]
    # Without a cache the features are the fit's sample.
    uncached = job(features={"cache": False})
    after = identities(uncached, {**SOURCES, "lake": "grown"})
    assert changed(identities(uncached), after) == [name for name in ALL if name not in ("features", "fit")]


def test_a_cascade_comes_first_and_everything_on_the_lake_depends_on_it():
    made = job(features={"cascade": True})
    before, after = identities(made), identities(job(features={"cascade": True, "cascade_recall": 0.9}))
    assert list(before) == ["cascade", *ALL]
    assert all(before[name] != after[name] for name in before)
    assert "cascade" not in identities(job())


def test_each_step_has_its_own_identity_and_names_its_inputs():
    known = pipeline.identities(job(), SOURCES)
    assert len({identity for identity, _ in known.values()}) == len(ALL)
    for step in pipeline.steps_of(job()):
        inputs = known[step.name][1]
        determining = (set(step.upstream) & set(ALL)) - set(step.growing)
        assert set(inputs) == {*determining, *step.outside}
        for name in determining:
            assert inputs[name] == known[name][0]
        for name in step.outside:
            assert inputs[name] == SOURCES[name]


def test_stored_soft_labels_are_a_step_of_their_own_that_the_students_training_does_not_outdate():
    made = job(distill={"soft_labels": "cached"})
    names = [step.name for step in pipeline.steps_of(made)]
    assert names[names.index("distill") - 1] == "soft_labels"
    before = identities(made)
    for change, outdated in (({"epochs": 7}, False), ({"crops": 3}, True), ({"augment": {"crop_padding_px": 1}}, True)):
        after = identities(job(distill={"soft_labels": "cached"} | change))
        assert (after["soft_labels"] != before["soft_labels"]) is outdated
        assert after["distill"] != before["distill"]
        assert after["materialise"] == before["materialise"]


def test_a_control_shares_features_scorer_and_scores_and_nothing_else():
    made = job(evaluation={"controls": ["random"]})
    main = pipeline.identities(made, SOURCES)
    control = pipeline.control_job(made, "random", 123)
    shared = {name: main[name] for name in ("features", "fit", "score")}
    known = pipeline.identities(control, SOURCES, shared)
    assert [name for name in ALL if known[name] == main[name]] == ["features", "fit", "score"]
    assert (control.selection.rule, control.selection.budget) == ("random", 123)
    assert control.evaluation.controls == ()  # a control has no controls
    assert control.distill == made.distill
    assert control.student == made.student


def test_a_control_of_another_size_is_another_control():
    one, other = (identities(pipeline.control_job(job(), "random", budget)) for budget in (1, 2))
    assert changed(one, other) == DEPENDENTS["select"]


def test_a_control_sees_the_jobs_artifacts_and_keeps_its_own():
    storage = pipeline.ControlStorage("/run/controls/random", shared=Storage("/run"))
    assert [storage.child(name).uri for name in ("features", "scorer", "scores")] == [
        "/run/features",
        "/run/scorer",
        "/run/scores",
    ]
    assert storage.child("selection").uri == "/run/controls/random/selection"


# -- sources -----------------------------------------------------------------------------------------------


def make_inputs(root: Path) -> None:
    """Everything a job brings, as small as it can be."""
    (root / "teacher.safetensors").write_bytes(b"weights")
    (root / "labels.txt").write_text("cat\ndog\n")
    for folder in ("labeled/cat", "test/dog", "lake"):
        (root / folder).mkdir(parents=True)
        (root / folder / "1.png").write_bytes(png(1))
    (root / "truth.parquet").write_bytes(b"truth")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("teacher.safetensors", "teacher"),
        ("labels.txt", "teacher"),
        ("lake/1.png", "lake"),
        ("labeled/cat/1.png", "labeled"),
        ("test/dog/1.png", "test"),
        ("truth.parquet", "truth"),
    ],
)
def test_a_changed_file_changes_its_source_alone(tmp_path, file, source):
    make_inputs(tmp_path)
    made = job(tmp_path, lake={"truth": f"{tmp_path}/truth.parquet"})
    before = pipeline.Sources(made)
    fingerprints = {name: before[name] for name in SOURCES}
    (tmp_path / file).write_bytes(b"changed")
    after = pipeline.Sources(made)
    # A lake of which nothing is remembered is its own base.
    expected = ["lake", "lake_base"] if source == "lake" else [source]
    assert [name for name in SOURCES if after[name] != fingerprints[name]] == expected


@pytest.mark.parametrize(
    ("policy", "event", "kept"),
    [
        ("keep", "nothing", True),
        ("keep", "grown", True),
        ("keep", "changed", False),
        ("keep", "shrunk", False),
        ("refit", "grown", False),
    ],
)
def test_the_lake_that_was_fitted_on_stays_the_base_while_all_of_it_is_there(tmp_path, policy, event, kept):
    make_inputs(tmp_path)
    made = job(tmp_path, scorer={"on_new_shards": policy})
    first = pipeline.Sources(made)
    first.remember_lake()
    # Another folder of images is another shard; a changed or lost file is a changed shard.
    (tmp_path / "lake/new").mkdir()
    if event == "grown":
        (tmp_path / "lake/new/9.png").write_bytes(png(9))
    elif event == "changed":
        (tmp_path / "lake/1.png").write_bytes(b"changed")
    elif event == "shrunk":
        (tmp_path / "lake/1.png").unlink()
        (tmp_path / "lake/2.png").write_bytes(png(2))
    second = pipeline.Sources(made)
    assert (second.lake_base == first.lake_base) is kept
    assert (second.lake == first.lake) is (event == "nothing")
    # Nothing is written twice.
    if event == "nothing":
        written = (tmp_path / "run/_lake.parquet").stat().st_mtime_ns
        second.remember_lake()
        assert (tmp_path / "run/_lake.parquet").stat().st_mtime_ns == written
    # What was remembered holds for the run after the next, too.
    second.remember_lake()
    assert pipeline.Sources(made).lake_base == second.lake_base


def test_a_source_is_read_once(tmp_path, monkeypatch):
    make_inputs(tmp_path)
    sources = pipeline.Sources(job(tmp_path))
    first = sources["teacher"]
    monkeypatch.setattr(Storage, "read_bytes", lambda *_: pytest.fail("read again"))
    assert sources["teacher"] == first
    assert sources["truth"] == sources["metadata"] == "none"


def test_metadata_counts_by_its_content(tmp_path):
    about = tmp_path / "about.csv"
    made = job(tmp_path, evaluation={"metadata": str(about), "slices": ["site"]})
    about.write_text("name,site\ncat/0.png,south\n")
    before = pipeline.Sources(made)["metadata"]
    assert pipeline.Sources(made)["metadata"] == before
    about.write_text("name,site\ncat/0.png,north\n")
    assert pipeline.Sources(made)["metadata"] != before


def test_a_teacher_that_was_moved_is_the_same_teacher(tmp_path):
    make_inputs(tmp_path)
    before = pipeline.Sources(job(tmp_path))["teacher"]
    (tmp_path / "teacher.safetensors").rename(tmp_path / "other.safetensors")
    moved = job(tmp_path, teacher={"weights": f"{tmp_path}/other.safetensors"})
    assert pipeline.Sources(moved)["teacher"] == before


# -- paths -------------------------------------------------------------------------------------------------


def test_local_paths_become_absolute_and_remote_ones_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluation = {"metadata": "about.csv", "slices": ["site"]}
    made = job(".", test={"uri": "s3://bucket/test"}, lake={"truth": "truth.parquet"}, evaluation=evaluation)
    absolute = pipeline.with_absolute_paths(made)
    assert absolute.output == f"{tmp_path}/run"
    assert absolute.teacher.weights == f"{tmp_path}/teacher.safetensors"
    assert absolute.teacher.classes == f"{tmp_path}/labels.txt"
    assert absolute.labeled.uri == f"{tmp_path}/labeled"
    assert absolute.test.uri == "s3://bucket/test"
    assert absolute.lake.uri == f"{tmp_path}/lake"
    assert absolute.lake.truth == f"{tmp_path}/truth.parquet"
    assert absolute.evaluation.metadata == f"{tmp_path}/about.csv"
    assert pipeline.with_absolute_paths(absolute) == absolute
    assert pipeline.with_absolute_paths(job(".")).lake.truth is None


def test_absolute_paths_change_no_identity(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert identities(pipeline.with_absolute_paths(job("."))) == identities(job("."))


# -- checks before anything starts -------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path) -> Path:
    make_inputs(tmp_path)
    return tmp_path


def test_good_inputs_pass(inputs):
    good = job(inputs, lake={"truth": f"{inputs}/truth.parquet"})
    pipeline.check_paths(good)
    pipeline.check_networks(good)


@pytest.mark.parametrize(
    ("sections", "field", "wanted", "found"),
    [
        ({"teacher": {"weights": "absent.safetensors"}}, "teacher.weights", "file", "missing"),
        ({"teacher": {"weights": "lake"}}, "teacher.weights", "file", "folder"),
        ({"teacher": {"classes": "absent.txt"}}, "teacher.classes", "file", "missing"),
        ({"labeled": {"uri": "absent"}}, "labeled.uri", "folder", "missing"),
        ({"labeled": {"uri": "labels.txt"}}, "labeled.uri", "folder", "file"),
        ({"test": {"uri": "absent"}}, "test.uri", "folder", "missing"),
        ({"lake": {"uri": "absent"}}, "lake.uri", "folder or file", "missing"),
        ({"lake": {"truth": "absent.parquet"}}, "lake.truth", "file", "missing"),
        (
            {"evaluation": {"metadata": "absent.csv", "slices": ["site"]}},
            "evaluation.metadata",
            "file",
            "missing",
        ),
    ],
)
def test_a_wrong_path_names_the_field_what_is_wanted_and_what_is_there(
    inputs, monkeypatch, sections, field, wanted, found
):
    monkeypatch.chdir(inputs)
    with pytest.raises(ConfigError, match=f"there is no such {wanted}") as caught:
        pipeline.check_paths(job(".", **sections))
    assert caught.value.where == field
    assert caught.value.got.endswith(f"({found})")


@pytest.mark.parametrize(
    ("sections", "field", "code"),
    [
        ({"teacher": {"architecture": "resnet999"}}, "teacher.architecture", "config/unknown-network"),
        ({"student": {"architecture": "cifar/resnet9-w2"}}, "student.architecture", "config/no-such-depth"),
        ({"teacher": {"stages": ["layer9"]}}, "teacher.stages", "config/no-such-stage"),
    ],
)
def test_a_wrong_network_names_the_field_and_keeps_its_code(inputs, sections, field, code):
    with pytest.raises(ConfigError) as caught:
        pipeline.check_networks(job(inputs, **sections))
    assert (caught.value.where, caught.value.code) == (field, code)
    assert caught.value.allowed


GREY = {"size_px": 12, "channels": 1, "mean": [0.5], "std": [0.5]}


def own_network(inputs, monkeypatch, name, body):
    (inputs / f"{name}.py").write_text(f"from torch import nn\n\ndef build(num_classes, in_chans):\n    {body}\n")
    monkeypatch.syspath_prepend(inputs)


def test_a_network_of_ones_own_passes(inputs, monkeypatch):
    body = "return nn.Sequential(nn.Conv2d(in_chans, num_classes, 12), nn.Flatten())"
    own_network(inputs, monkeypatch, "own_good", body)
    good = {"architecture": "own_good:build", "preprocessing": GREY}
    pipeline.check_networks(job(inputs, student=good), ["student"])


def test_the_student_is_checked_with_its_own_images(inputs):
    student = {"architecture": "torchvision/resnet18", "preprocessing": GREY}
    with pytest.raises(ConfigError, match="torchvision's networks take colour images") as caught:
        pipeline.check_networks(job(inputs, student=student), ["student"])
    assert caught.value.where == "student.preprocessing.channels"


@pytest.mark.parametrize(
    ("architecture", "field"),
    [("absent_nets:build", "architecture"), ("own_raises:build", "options"), ("own_deaf:build", "architecture")],
)
def test_a_wrong_network_of_ones_own_stops_before_a_cluster_starts(world, monkeypatch, architecture, field):
    own_network(world.root, monkeypatch, "own_raises", "raise OSError('no weights')")
    # It ignores the number of classes.
    own_network(world.root, monkeypatch, "own_deaf", "return nn.Sequential(nn.Flatten(), nn.LazyLinear(77))")
    with pytest.raises(ConfigError) as caught:
        world.run(student={"architecture": architecture})
    assert caught.value.where == f"student.{field}"
    assert (world.sessions, world.ran) == (0, [])


# -- running: the stages are stubs -------------------------------------------------------------------------


class World:
    """Stages that only publish, a Ray that only counts, and what happened."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ran: list[str] = []
        self.sessions = 0
        self.fail_in: str | None = None
        self.gate_passed = True

    def module(self, name: str) -> Any:
        step = next(step for step in STEPS if step.module == name)

        def run(made, storage, inputs, identity, progress):
            self.ran.append(step.name if "/controls/" not in storage.uri else f"control {step.name}")
            target = storage.child(step.folder)
            target.write_bytes("data.bin", b"data")
            if self.fail_in == step.name:
                raise KeyboardInterrupt
            facts = dict(FACTS[step.name])
            if step.name == "evaluate":
                violated = {"setting": "max_gap_to_teacher", "bound": 1.0, "got": 2.0}
                facts["gate"] = {
                    "passed": self.gate_passed,
                    "gap_to_teacher": 2.0,
                    "bounds": {"max_gap_to_teacher": 1.0},
                    "violated": [] if self.gate_passed else [violated],
                }
            return Publication(step.name, identity, inputs, made.seed).publish(
                target, counts=COUNTS[step.name], facts=facts
            )

        return SimpleNamespace(run=run)

    @contextlib.contextmanager
    def session(self):
        self.sessions += 1
        yield

    def pipeline(self, **sections: Any) -> Pipeline:
        self.ran.clear()
        return Pipeline(job(self.root, **sections), Narrator(quiet=True), self.session)

    def run(self, **sections: Any) -> tuple[list[str], dict[str, Any]]:
        """Run the whole chain; says which stages worked."""
        summary = self.pipeline(**sections).run()
        return list(self.ran), summary

    @property
    def storage(self) -> Storage:
        return Storage(f"{self.root}/run")


@pytest.fixture
def world(inputs, monkeypatch) -> World:
    made = World(inputs)
    monkeypatch.setattr(pipeline, "importlib", SimpleNamespace(import_module=made.module))
    monkeypatch.setattr(report, "render", lambda job, storage, summary: f"<p>{summary['verdict']}</p>")
    summarise = report.summarise
    monkeypatch.setattr(report, "summarise", lambda *arguments: _in_no_time(summarise, *arguments))
    return made


def _in_no_time(summarise, *arguments):
    # The stubs are quicker than a clock tick, which the summary does not survive; that has its own test.
    rates, report._images_done = report._images_done, lambda done: {}
    try:
        return summarise(*arguments)
    finally:
        report._images_done = rates


def test_the_whole_chain_runs_in_order_with_one_ray(world):
    ran, summary = world.run()
    assert ran == ALL
    assert world.sessions == 1
    assert summary["stages_done"] == ALL
    assert world.storage.read_json("summary.json") == summary
    assert world.storage.read_bytes("report.html").startswith(b"<p>")


def test_running_again_does_nothing_and_starts_no_ray(world):
    _, first = world.run()
    ran, second = world.run()
    assert ran == []
    assert second == first
    assert world.sessions == 1


def test_a_changed_setting_redoes_what_depends_on_it_and_only_the_ray_that_needs(world):
    world.run()
    assert world.run(export={"opset": 19})[0] == ["export"]
    assert world.sessions == 1
    assert world.run(distill={"epochs": 3}, export={"opset": 19})[0] == ["distill", "evaluate", "export"]
    assert world.sessions == 2


@pytest.mark.parametrize("damage", ["data.bin", "manifest.json"])
def test_a_lost_file_redoes_its_stage_and_those_whose_results_are_then_another(world, damage):
    world.run()
    world.storage.child("scores").delete(damage)
    assert world.run()[0] == ["score"]  # the same identity, so what was made from it stays


@pytest.mark.parametrize("stage", ALL)
def test_after_an_interruption_only_the_unfinished_is_repeated(world, stage):
    world.fail_in = stage
    with pytest.raises(KeyboardInterrupt):
        world.run()
    assert world.ran == ALL[: ALL.index(stage) + 1]
    world.fail_in = None
    ran, summary = world.run()
    assert ran == ALL[ALL.index(stage) :]
    assert summary["stages_done"] == ALL


def test_while_a_stage_is_redone_its_old_manifest_does_not_vouch(world):
    world.run()
    world.fail_in = "fit"
    with pytest.raises(KeyboardInterrupt):
        world.run(scorer={"epochs": 3})
    assert manifest.read(world.storage.child("scorer")) is None
    # Back at the old settings, the mixture is not taken for the old result.
    world.fail_in = None
    assert world.run()[0] == ["fit"]


def test_a_student_that_fails_its_gate_is_reported_but_not_exported(world):
    world.gate_passed = False
    with pytest.raises(GateError):
        world.run()
    assert world.ran == ALL[:-1]
    assert world.storage.child("exported").kind() == "missing"
    assert world.storage.read_json("summary.json")["verdict"].startswith("failed the quality gate")
    with pytest.raises(GateError):
        world.run()
    assert world.ran == []


def test_a_control_runs_its_own_part_and_is_reported(world):
    ran, summary = world.run(evaluation={"controls": ["random"]})
    own = ["control select", "control materialise", "control distill", "control evaluate"]
    assert ran == [*ALL[:-1], *own, "export"]
    assert summary["controls"]["random"]["mined_rows"] == 8
    assert world.run(evaluation={"controls": ["random"]})[0] == []
    assert world.sessions == 1


def test_a_control_that_is_asked_for_later_redoes_nothing_of_the_job(world):
    world.run()
    ran, summary = world.run(evaluation={"controls": ["random"]})
    assert ran == ["control select", "control materialise", "control distill", "control evaluate"]
    assert "random" in summary["controls"]


# -- one verb ----------------------------------------------------------------------------------------------


def test_a_verb_runs_its_own_stages_alone(world):
    world.run()
    again = world.pipeline(selection={"budget": 5}).run_verb("select")
    assert [document.stage for document in again] == ["select", "materialise"]
    assert world.ran == ["select", "materialise"]


@pytest.mark.parametrize(
    ("verb", "needed"),
    [("fit", "features"), ("score", "features"), ("select", "features"), ("distill", "fit"), ("export", "fit")],
)
def test_a_verb_whose_input_is_missing_names_the_command_that_makes_it(world, verb, needed):
    with pytest.raises(DataError, match="missing or out of date") as caught:
        world.pipeline().run_verb(verb)
    assert f"`pu-ray {needed} JOB.yaml`" in caught.value.hint
    assert world.ran == []


def test_a_verb_whose_input_is_out_of_date_names_it(world):
    world.run()
    with pytest.raises(DataError, match="`score` needs the result of `fit`"):
        world.pipeline(scorer={"epochs": 3}).run_verb("score")
    assert world.ran == []


# -- reports on the way ------------------------------------------------------------------------------------


def test_a_report_on_the_way_says_how_far_the_run_is(world):
    world.pipeline().run_verb("features")
    assert world.pipeline().report()["verdict"] == "unfinished: 1 of 8 stages are done"


def test_the_summary_records_the_settings_but_not_where_curves_are_tracked(world):
    _, summary = world.run(tracking={"mlflow_uri": "https://user:secret@tracking"}, distill={"epochs": 3})
    assert (summary["settings"]["distill.epochs"], summary["settings"]["selection.rule"]) == (3, "recall")
    assert "secret" not in world.storage.read_text("summary.json")
    # A summary from before they were recorded gets them, although nothing else is new.
    world.storage.write_json("summary.json", {name: summary[name] for name in summary if name != "settings"})
    assert world.run(distill={"epochs": 3})[1]["settings"]["distill.epochs"] == 3


def test_a_report_made_on_the_way_does_not_outlive_the_run(world):
    world.pipeline().run_verb("features")
    world.pipeline().report()
    _, summary = world.run()
    assert summary["stages_done"] == ALL
    assert world.storage.read_json("summary.json")["stages_done"] == ALL
    assert b"unfinished" not in world.storage.read_bytes("report.html")


def test_a_report_made_before_a_control_has_run_does_not_outlive_it(world):
    world.run()
    with_control = {"evaluation": {"controls": ["random"]}}
    assert world.pipeline(**with_control).report()["controls"] == {}
    _, summary = world.run(**with_control)
    assert "random" in summary["controls"]


def test_a_report_after_a_change_does_not_pass_an_old_control_off_as_new(world):
    with_control = {"evaluation": {"controls": ["random"]}}
    world.run(**with_control)
    assert world.pipeline(**with_control, distill={"epochs": 3}).report()["controls"] == {}


def test_a_report_after_a_change_does_not_pass_old_results_off_as_new(world):
    world.run()
    summary = world.pipeline(distill={"epochs": 3}).report()
    assert "distill" not in summary["stages_done"]


@pytest.mark.parametrize("verb", [None, "features"])
@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"teacher": {"weights": "/absent.safetensors"}}, "teacher.weights"),
        ({"lake": {"uri": "/absent"}}, "lake.uri"),
    ],
)
def test_a_wrong_path_stops_a_run_with_the_name_of_its_field(world, verb, sections, field):
    made = world.pipeline(**sections)
    with pytest.raises(ConfigError) as caught:
        made.run() if verb is None else made.run_verb(verb)
    assert caught.value.where == field


# -- what is shown, and what it took -----------------------------------------------------------------------


@pytest.fixture
def terminal(world, monkeypatch) -> io.StringIO:
    """A terminal that a test can read."""
    screen = io.StringIO()
    narrator = Narrator()
    narrator._console = Console(file=screen, force_terminal=True, width=120, height=60, color_system=None)
    monkeypatch.setattr(world, "pipeline", lambda **sections: _on(narrator, world, **sections))
    return screen


def _on(narrator, world, **sections):
    world.ran.clear()
    return Pipeline(job(world.root, **sections), narrator, world.session)


def states(screen: io.StringIO) -> dict[str, str]:
    """The last thing on the screen: how each stage stands."""
    last = screen.getvalue()[screen.getvalue().rindex("features  ") :]
    rows = [re.split(r"\s{2,}", line.strip()) for line in last.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) > 1}


def test_a_terminal_shows_every_stage_controls_and_the_report(world, terminal):
    world.run(evaluation={"controls": ["random"]})
    names = [*ALL[:-1], "control random", "export", "report"]
    assert states(terminal) == dict.fromkeys(names, "done")
    terminal.truncate(0)
    world.run(evaluation={"controls": ["random"]}, export={"opset": 19})
    expected = dict.fromkeys(names, "done before") | {"export": "done", "report": "done"}
    assert states(terminal) == expected


def test_a_terminal_shows_where_a_run_was_stopped(world, terminal):
    world.fail_in = "score"
    with pytest.raises(KeyboardInterrupt):
        world.run()
    found = states(terminal)
    assert [found[name] for name in ("features", "fit", "score", "select", "report")] == [
        "done",
        "done",
        "stopped",
        "not run",
        "not run",
    ]


def test_a_verb_shows_its_own_stages(world, terminal):
    world.run()
    terminal.truncate(0)
    world.pipeline(selection={"budget": 5}).run_verb("select")
    last = terminal.getvalue()[terminal.getvalue().rindex("select  ") :]
    assert [line.split()[0] for line in last.splitlines() if "done" in line] == ["select", "materialise"]
    assert "features" not in last


PRICES = HourPrices(currency="EUR", cpu_hour=0.25, gpu_hour=3.0, cores_with_gpu=8.0)


def test_prices_are_remembered_by_later_reports_until_there_are_others(world):
    assert world.run()[1]["prices"] is None

    def report(prices):
        return Pipeline(job(world.root), Narrator(quiet=True), world.session, prices).report()["prices"]

    assert report(PRICES) == PRICES.model_dump()
    assert report(None) == PRICES.model_dump()
    assert world.run()[1]["prices"] == PRICES.model_dump()
    other = PRICES.model_copy(update={"cpu_hour": 1.0})
    assert report(other) == other.model_dump()


# -- one run at a time -------------------------------------------------------------------------------------


def test_a_second_run_on_the_same_output_is_refused_and_touches_nothing(world):
    with lease.hold(world.storage, "another run"), pytest.raises(ClusterError, match="another run") as caught:
        world.run()
    assert world.ran == []
    assert caught.value.hint
    assert world.run()[0] == ALL


def test_a_run_that_lost_its_output_stops_before_the_next_stage(world):
    made = world.pipeline()
    module = world.module

    def stolen(name):
        stage = module(name)

        def run(job, storage, *arguments):
            published = stage.run(job, storage, *arguments)
            if published.stage == "fit":
                (Path(world.root) / "run" / lease.FILE_NAME).unlink()
            return published

        return SimpleNamespace(run=run)

    pipeline.importlib.import_module = stolen
    with pytest.raises(ClusterError):
        made.run()
    assert world.ran == ["features", "fit"]


# -- audit -------------------------------------------------------------------------------------------------


class Auditor:
    """An audit that only publishes."""

    def draw(self, made, storage, images):
        return {"drawn": images}

    def publish(self, made, storage, answers):
        selected = manifest.require(storage.child("selection"), "select")
        inputs = {"select": selected.identity, "answers": answers}
        facts = {"precision": {"value": 0.9, "bound": 0.8, "low": 0.7, "high": 1.0, "n": 9}, "in_order": True}
        return Publication("audit", "audited", inputs, 0).publish(storage.child("audit"), counts={}, facts=facts)


@pytest.fixture
def auditor(monkeypatch) -> None:
    import pu_ray

    monkeypatch.setattr(pu_ray, "audit", Auditor(), raising=False)


@pytest.mark.parametrize("ask", [lambda made: made.audit(5), lambda made: made.audited("a.csv")])
def test_an_audit_needs_a_current_selection_and_its_images(world, auditor, ask):
    with pytest.raises(DataError, match="run `pu-ray select JOB"):
        ask(world.pipeline())
    world.run()
    ask(world.pipeline())
    assert world.sessions == 1, "an audit needs no Ray"
    with pytest.raises(DataError, match="`audit` needs the result of `select`, which is missing or out of date"):
        ask(world.pipeline(selection={"recall": 0.5}))


def test_an_audit_appears_in_the_report_at_once_and_goes_with_its_selection(world, auditor):
    assert "audit" not in world.run()[1]
    world.pipeline().audited("a.csv")
    assert world.storage.read_json("summary.json")["audit"]["precision"]["bound"] == 0.8
    ran, summary = world.run()
    assert ran == []
    assert "audit" in summary
    assert "audit" not in world.run(selection={"recall": 0.5})[1]


def test_no_audit_while_a_run_is_at_work(world, auditor):
    world.run()
    with lease.hold(world.storage, "run of job job"), pytest.raises(ClusterError):
        world.pipeline().audit(5)
