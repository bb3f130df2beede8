"""pu_ray/config.py: layers, origins, and one readable paragraph for everything that can be wrong."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pydantic
import pytest
import yaml
from artifacts import settings

from pu_ray import config
from pu_ray.config import JobConfig
from pu_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job_file(tmp_path):
    """Writes a job file: the smallest job with some sections replaced."""

    def write(**sections):
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(settings(**sections)))
        return path

    return write


def wrong(path, *overrides, environment=None) -> str:
    """The message of the error that loading raises."""
    with pytest.raises(ConfigError) as caught:
        config.load(path, overrides, environment or {})
    return str(caught.value)


def origins(resolved):
    return {path: origin for path, _, origin in resolved.values()}


# -- layers and origins ------------------------------------------------------------------------------------


def test_each_layer_wins_over_the_ones_below_and_is_named_as_the_origin(job_file):
    environment = {"PU_RAY__SCORER__EPOCHS": "40"}
    plain = job_file()
    seen = [(r.job.scorer.epochs, origins(r)["scorer.epochs"]) for r in [config.load(plain, [], {})]]
    recipe = job_file(recipe="paper")
    seen += [(r.job.scorer.epochs, origins(r)["scorer.epochs"]) for r in [config.load(recipe, [], {})]]
    full = job_file(recipe="paper", scorer={"epochs": 30})
    for overrides, variables in (([], {}), ([], environment), (["scorer.epochs=50"], environment)):
        resolved = config.load(full, overrides, variables)
        seen.append((resolved.job.scorer.epochs, origins(resolved)["scorer.epochs"]))
    assert seen == [
        (20, "default"),
        (170, "recipe paper"),
        (30, "file job.yaml"),
        (40, "environment PU_RAY__SCORER__EPOCHS"),
        (50, "--set"),
    ]


def test_the_last_of_two_overrides_of_one_key_wins(job_file):
    assert config.load(job_file(), ["seed=1", "seed=2"], {}).job.seed == 2


def test_a_layer_replaces_single_keys_and_leaves_their_neighbours(job_file):
    resolved = config.load(job_file(recipe="paper", distill={"losses": {"radius": 0.5}}), [], {})
    losses = resolved.job.distill.losses
    assert (losses.radius, losses.temperature, losses.robust) == (0.5, 1.0, "paper")
    assert origins(resolved)["distill.losses.temperature"] == "recipe paper"
    assert origins(resolved)["distill.losses.radius"] == "file job.yaml"


def test_a_list_is_replaced_as_a_whole_and_has_one_origin(job_file):
    resolved = config.load(job_file(), ["teacher.preprocessing.mean=[0.1, 0.2, 0.3]"], {})
    assert resolved.job.teacher.preprocessing.mean == (0.1, 0.2, 0.3)
    assert origins(resolved)["teacher.preprocessing.mean"] == "--set"
    assert origins(resolved)["teacher.preprocessing.std"] == "file job.yaml"


@pytest.mark.parametrize("source", ["environment", "override"])
def test_a_recipe_named_above_the_file_applies_below_the_file(job_file, source):
    path = job_file(scorer={"epochs": 30})
    if source == "environment":
        resolved = config.load(path, [], {"PU_RAY__RECIPE": "paper"})
    else:
        resolved = config.load(path, ["recipe=paper"], {})
    assert resolved.job.scorer.features == "finetuned"
    assert resolved.job.scorer.epochs == 30


def test_the_environment_of_the_process_is_read_unless_another_is_given(job_file, monkeypatch):
    monkeypatch.setenv("PU_RAY__SEED", "7")
    assert config.load(job_file()).job.seed == 7
    assert config.load(job_file(), [], {}).job.seed == 0


def test_only_variables_with_the_prefix_are_read(job_file):
    assert config.load(job_file(), [], {"SEED": "7", "PU_RAY_SEED": "7", "XPU_RAY__SEED": "7"}).job.seed == 0


def test_values_of_overrides_are_parsed_as_yaml(job_file):
    overrides = ["selection.budget=null", "evaluation.controls=[random]", "scorer.attention=false", "scorer.prior=1e-3"]
    job = config.load(job_file(), overrides, {}).job
    assert job.selection.budget is None
    assert job.evaluation.controls == ("random",)
    assert job.scorer.attention is False
    assert job.scorer.prior == 0.001


def test_an_override_may_hold_an_equals_sign_in_its_value(job_file):
    assert config.load(job_file(), ["lake.uri=s3://bucket/a=b"], {}).job.lake.uri == "s3://bucket/a=b"


def test_every_setting_is_listed_and_the_list_makes_the_same_job_again(job_file):
    resolved = config.load(job_file(recipe="paper"), ["scorer.split.train=0.4", "scorer.split.calibrate=0.45"], {})
    tree: dict = {}
    for path, value, _ in resolved.values():
        *parents, leaf = path.split(".")
        place = tree
        for key in parents:
            place = place.setdefault(key, {})
        place[leaf] = value
    assert JobConfig.model_validate(tree) == resolved.job
    assert "scorer.split.validate" in origins(resolved)  # the name a person types, not the one in the code


# -- the paper's recipe ------------------------------------------------------------------------------------


def test_the_paper_recipe_is_method_section_1(job_file):
    job = config.load(job_file(recipe="paper"), [], {}).job
    scorer, distill = job.scorer, job.distill
    assert (scorer.kind, scorer.features, scorer.attention, scorer.hidden) == ("nnpu", "finetuned", True, 0)
    assert (scorer.loss, scorer.positive_weight, scorer.beta, scorer.gamma) == ("sigmoid", "prior", 0.0, 1.0)
    assert (scorer.batch_size, scorer.epochs) == (4096, 170)
    assert (scorer.optimizer.kind, scorer.optimizer.lr) == ("sgd", 1e-3)
    assert (scorer.optimizer.momentum, scorer.optimizer.weight_decay) == (0.9, 5e-3)
    assert [round(share * 170) for share in scorer.optimizer.milestones] == [50, 100, 150]
    assert (job.selection.rule, job.selection.balance, job.selection.budget) == ("zero", "none", None)
    assert (distill.losses.robust, distill.losses.temperature, distill.losses.radius) == ("paper", 1.0, 0.1)
    assert distill.losses.class_weights
    assert (distill.batch_size, distill.epochs, distill.max_steps) == (2048, 200, None)
    assert (distill.optimizer.kind, distill.optimizer.lr, distill.optimizer.weight_decay) == ("sgd", 0.1, 5e-4)
    assert [round(share * 200) for share in distill.optimizer.milestones] == [50, 100, 150]
    assert {scorer.optimizer.schedule, distill.optimizer.schedule} == {"milestones"}


def test_every_recipe_has_a_name_the_job_accepts_and_the_other_way_round():
    names = JobConfig.model_json_schema()["properties"]["recipe"]["enum"]
    assert sorted(config.RECIPES) == sorted(names)


# -- unknown keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "place", "suggestion"),
    [
        ("sede=1", "sede (--set)", "seed"),
        ("scorer.pior=0.1", "scorer.pior (--set)", "prior"),
        ("scorer.split.validat=0.1", "scorer.split.validat (--set)", "validate"),
        ("teacher.preprocessing.size=8", "teacher.preprocessing.size (--set)", "size_px"),
        ("distill.losses.temprature=2", "distill.losses.temprature (--set)", "temperature"),
    ],
)
def test_an_unknown_key_is_named_with_its_place_and_the_nearest_key(job_file, override, place, suggestion):
    message = wrong(job_file(), override)
    assert message.startswith(f"{place}: unknown key\n")
    assert f"did you mean '{suggestion}'?" in message
    assert suggestion in message.split("allowed: ")[1].splitlines()[0].split(", ")


def test_an_unknown_key_like_no_other_lists_what_is_allowed_and_suggests_nothing(job_file):
    message = wrong(job_file(), "lake.zzzzz=1")
    assert "did you mean" not in message
    assert "max_error_share" in message
    assert "what to do: remove it, or correct its name" in message


def test_an_unknown_variable_of_the_environment_is_named_as_the_origin(job_file):
    message = wrong(job_file(), environment={"PU_RAY__LAKE__MAX_EROR_SHARE": "0.5"})
    assert "lake.max_eror_share (environment PU_RAY__LAKE__MAX_EROR_SHARE): unknown key" in message


@pytest.mark.parametrize("key", ["int", "none", "lake.str"])
def test_an_unknown_key_named_like_a_type_is_reported_as_such(job_file, key):
    message = wrong(job_file(), f"{key}=1")
    assert message.startswith(f"{key} (--set): unknown key")
    assert f"got: {key.rpartition('.')[2]}\n" in message


# -- wrong values ------------------------------------------------------------------------------------------

# One line per way to be wrong: the override, the place that is named, and what the message says besides.
WRONG_VALUES = [
    ("seed=-1", "seed (--set)", ["allowed: >= 0", "got: -1"]),
    ("seed=4294967296", "seed (--set)", ["allowed: < 4294967296", "got: 4294967296"]),
    ("seed=abc", "seed (--set)", ["integer", "got: 'abc'"]),
    ("name=a/b", "name (--set)", ["allowed: text matching", "got: 'a/b'"]),
    ("name=''", "name (--set)", ["got: ''"]),
    ("recipe=papr", "recipe (--set)", ["allowed: 'default' or 'paper'", "got: 'papr'"]),
    ("output=''", "output (--set)", ["got: ''"]),
    ("output=5", "output (--set)", ["string", "got: 5"]),
    ("lake=null", "lake (--set)", ["got: None"]),
    ("lake.uri=''", "lake.uri (--set)", ["got: ''"]),
    ("lake.format=zip", "lake.format (--set)", ["'auto', 'parquet', 'tar', 'uris' or 'folder'", "got: 'zip'"]),
    ("lake.max_error_share=1.5", "lake.max_error_share (--set)", ["allowed: <= 1.0", "got: 1.5"]),
    ("lake.max_error_share=.nan", "lake.max_error_share (--set)", ["got: nan"]),
    ("lake.chunk_rows=0", "lake.chunk_rows (--set)", ["allowed: >= 1", "got: 0"]),
    ("teacher.preprocessing.channels=2", "teacher.preprocessing.channels (--set)", ["allowed: 1 or 3", "got: 2"]),
    ("teacher.preprocessing.mean=[0.5]", "teacher.preprocessing", ["per channel (3), got 1 and 3"]),
    ("teacher.preprocessing.std=[0, 1, 1]", "teacher.preprocessing", ["above 0, got 0"]),
    ("teacher.preprocessing.resize_px=8", "teacher.preprocessing", ["resize_px (8)", "size_px (24)"]),
    ("features.engine=tf", "features.engine (--set)", ["'auto', 'torch' or 'onnx'", "got: 'tf'"]),
    ("scorer.split.train=0.9", "scorer.split", ["must be 1, got 1.4"]),
    ("scorer.hidden=-1", "scorer.hidden (--set)", ["allowed: >= 0", "got: -1"]),
    ("scorer.gamma=0", "scorer.gamma (--set)", ["allowed: > 0.0", "got: 0"]),
    ("scorer.batch_size=1", "scorer.batch_size (--set)", ["allowed: >= 2", "got: 1"]),
    ("scorer.optimizer.lr=0", "scorer.optimizer.lr (--set)", ["allowed: > 0", "got: 0"]),
    ("scorer.optimizer.lr=.inf", "scorer.optimizer.lr (--set)", ["got: inf"]),
    ("scorer.optimizer.schedule=milestones", "scorer.optimizer", ["milestones", "got schedule 'milestones'"]),
    ("scorer.optimizer.milestones=[0.5]", "scorer.optimizer", ["exactly when schedule is 'milestones'"]),
    ("selection.rule=budget", "selection", ["rule 'budget' needs selection.budget"]),
    ("selection.rule=random", "selection", ["rule 'random' needs selection.budget"]),
    ("selection.recall=1", "selection.recall (--set)", ["allowed: < 1", "got: 1"]),
    ("selection.budget=0", "selection.budget (--set)", ["allowed: >= 1", "got: 0"]),
    ("selection.near_copy_correlation=0", "selection.near_copy_correlation (--set)", ["allowed: > 0", "got: 0"]),
    ("distill.workers=[3, 1]", "distill", ["[fewest, most], got [3, 1]"]),
    ("distill.losses.class_weight_clip=0.5", "distill.losses.class_weight_clip (--set)", ["allowed: >= 1"]),
    ("evaluation.controls=[best]", "evaluation.controls (--set)", ["'random'", "got: 'best'"]),
    ("evaluation.controls=[oracle]", "job", ["the oracle needs lake.truth"]),
    ("selection.prefer=oldest", "selection.prefer (--set)", ["'purest', 'any', 'uncertain' or 'spread'"]),
    ("scorer.prior_folds=2", "scorer.prior_folds (--set)", ["allowed: >= 3"]),
    ("evaluation.gate.max_gap_to_teacher=-1", "evaluation.gate.max_gap_to_teacher (--set)", ["allowed: >= 0"]),
    ("evaluation.gate.min_accuracy=1.5", "evaluation.gate.min_accuracy (--set)", ["allowed: <= 1", "got: 1.5"]),
    ("evaluation.gate.max_calibration_error=-1", "evaluation.gate.max_calibration_error (--set)", ["allowed: >= 0"]),
    ("evaluation.slices=[site]", "evaluation", ["belong together", "got metadata None and slices ['site']"]),
    ("evaluation.metadata=about.csv", "evaluation", ["belong together", "got metadata 'about.csv' and slices []"]),
    ("evaluation={metadata: about.csv, slices: [a, a]}", "evaluation", ["sliced by once, got ['a', 'a']"]),
    ("evaluation={metadata: about.json, slices: [a]}", "evaluation", ["a .parquet or a .csv, got 'about.json'"]),
    ("export.formats=[onnx]", "export", ["must hold 'safetensors'", "got ['onnx']"]),
    ("export.formats=[safetensors, onnx, onnx]", "export", ["written once", "got ['safetensors', 'onnx', 'onnx']"]),
    ("export.formats=[safetensors, int4]", "export.formats (--set)", ["'onnx-int8'", "got: 'int4'"]),
    ("export.max_int8_accuracy_drop=-1", "export.max_int8_accuracy_drop (--set)", ["allowed: >= 0", "got: -1"]),
    ("export.opset=17", "export.opset (--set)", ["allowed: >= 18", "got: 17"]),
    ("resources.embed.min_actors=5", "resources.embed", ["min_actors (5) must not exceed max_actors (2)"]),
    ("resources.embed.cpus=0", "resources.embed", ["gpus or cpus above 0"]),
    ("resources.limits.cpus=2", "resources", ["room for 0 embedding actors beside one task", "min_actors asks for 1"]),
    (
        "resources={limits: {gpus: 1}, embed: {gpus: 0.5, min_actors: 3, max_actors: 4}}",
        "resources",
        ["room for 2 embedding actors", "min_actors asks for 3"],
    ),
    (
        "resources={limits: {gpus: 1}, train: {gpus: 2}}",
        "job",
        ["distill.workers (1) x resources.train.gpus (2) must not exceed resources.limits.gpus (1)"],
    ),
    ("resources.limits.gpus=-1", "resources.limits.gpus (--set)", ["allowed: >= 0", "got: -1"]),
    ("resources.train.cpus=0", "resources.train.cpus (--set)", ["allowed: > 0", "got: 0"]),
]


@pytest.mark.parametrize(("override", "place", "parts"), WRONG_VALUES, ids=[case[0] for case in WRONG_VALUES])
def test_a_wrong_value_is_answered_with_its_place_and_what_is_allowed(job_file, override, place, parts):
    message = wrong(job_file(), override)
    assert message.startswith(f"{place}: "), message
    for part in parts:
        assert part in message
    assert "pydantic" not in message


def test_a_missing_section_and_a_missing_key_are_named_and_asked_for(tmp_path):
    path = tmp_path / "job.yaml"
    content = settings()
    del content["lake"], content["teacher"]["weights"]
    path.write_text(yaml.safe_dump(content))
    message = wrong(path)
    assert message.startswith("2 settings are wrong\n")
    for name in ("lake", "teacher.weights"):
        assert f"{name}: a required key is missing\n  what to do: add {name} to the job file" in message


def test_a_refused_combination_has_a_code_of_its_own(job_file):
    with pytest.raises(ConfigError) as caught:
        config.load(job_file(), ["selection.rule=oracle"], environment={})
    assert caught.value.code == "config/oracle-without-truth"
    assert caught.value.problem == "the oracle needs lake.truth, the true class of every lake image"


def test_all_wrong_settings_are_reported_at_once(job_file):
    message = wrong(job_file(), "seed=-1", "lake.format=zip", "scorer.pior=1")
    assert message.startswith("3 settings are wrong\n")
    for place in (
        "(config/invalid-value) seed (--set)",
        "(config/invalid-value) lake.format (--set)",
        "(config/unknown-key) scorer.pior (--set)",
    ):
        assert f"\n{place}: " in message


@pytest.mark.parametrize(
    "override", ["scorer.prior=2", "distill.workers=[1, 2, 3]", "distill.labeled_share=often", "distill.workers=[0, 1]"]
)
def test_one_wrong_value_of_several_allowed_types_is_one_wrong_setting(job_file, override):
    message = wrong(job_file(), override)
    assert message.startswith(f"{override.partition('=')[0]} (--set): ")
    assert "settings are wrong" not in message


def test_a_huge_wrong_value_is_not_printed(job_file):
    message = wrong(job_file(), f"seed={'x' * 5000}")
    assert len(message) < 300
    assert "got: str" in message


@pytest.mark.parametrize("override", ["seed", "=1", ""])
def test_an_override_without_key_or_value_says_what_one_looks_like(job_file, override):
    message = wrong(job_file(), override)
    assert message.startswith("--set: ")
    assert "allowed: section.key=value" in message


def test_an_override_that_is_not_yaml_names_its_key(job_file):
    assert wrong(job_file(), "lake.uri=[a").startswith("lake.uri: the value is not valid YAML")


# -- the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a: [1", "the job file is not valid YAML"),
        (b"a: 1\n\tb: 2", "the job file is not valid YAML"),
        (b"!!python/object/apply:os.system [true]", "the job file is not valid YAML"),
        (b"", "the job file holds no settings"),
        (b"- a\n- b", "the job file holds no settings"),
        (b"text", "the job file holds no settings"),
        (b"\xff\xfe\x00", "the job file is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_job_is_refused_by_name(tmp_path, content, problem):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert wrong(path).startswith(f"{path}: {problem}")


def test_a_yaml_error_says_in_which_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("name: a\nlake: {uri: x\nseed: 1\n")
    assert "line 3" in wrong(path)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    assert wrong(tmp_path / name).startswith(f"{tmp_path / name}: the job file cannot be read")


# -- the models --------------------------------------------------------------------------------------------


def _models(model: type[pydantic.BaseModel] = JobConfig) -> list[type[pydantic.BaseModel]]:
    found = [model]
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            found += _models(field.annotation)
    return found


def test_every_section_is_closed_and_frozen():
    assert len(set(_models())) > 15
    for model in _models():
        assert model.model_config["extra"] == "forbid"
        assert model.model_config["frozen"] is True


def test_a_validated_job_cannot_be_changed(job_file):
    job = config.load(job_file(), [], {}).job
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        job.seed = 1
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        job.scorer.optimizer.lr = 1.0


def test_a_section_is_plain_json_under_the_names_a_person_types(job_file):
    job = config.load(job_file(), [], {}).job
    assert job.section("scorer.split") == {"train": 0.5, "validate": 0.15, "calibrate": 0.35}
    assert job.section("teacher.preprocessing.mean") == [0.5, 0.5, 0.5]
    assert json.loads(json.dumps(job.section("distill"))) == job.section("distill")
    with pytest.raises(KeyError):
        job.section("scorer.pior")


# -- digest ------------------------------------------------------------------------------------------------


def test_the_digest_does_not_depend_on_the_order_of_keys_at_any_depth():
    one = {"a": 1, "b": {"c": [1, 2], "d": None}}
    other = {"b": {"d": None, "c": [1, 2]}, "a": 1}
    assert list(one) != list(other)
    assert config.digest(one) == config.digest(other)


@pytest.mark.parametrize(
    "other", [{"a": [2, 1]}, {"a": [1, 2, 3]}, {"a": ["1", 2]}, {"b": [1, 2]}, {"a": [1, 2.5]}, [1, 2], None]
)
def test_the_digest_depends_on_every_value_and_on_the_order_of_lists(other):
    assert config.digest(other) != config.digest({"a": [1, 2]})


def test_the_digest_is_sha256_of_canonical_json():
    # Written out by hand: a change of this digest orphans every artifact there is.
    assert config.digest({"b": "é", "a": [1, 0.5]}) == hashlib.sha256(b'{"a":[1,0.5],"b":"\\u00e9"}').hexdigest()


def test_the_digest_refuses_what_json_does_not_have():
    with pytest.raises(ValueError, match="JSON"):
        config.digest(float("nan"))


# -- JSON Schema -------------------------------------------------------------------------------------------


def test_the_json_schema_is_a_valid_schema_of_the_draft_it_uses():
    jsonschema.Draft202012Validator.check_schema(config.json_schema())


def test_the_json_schema_accepts_the_smoke_job_and_refuses_a_misspelt_one():
    validator = jsonschema.Draft202012Validator(config.json_schema())
    content = yaml.safe_load((ROOT / "cluster/jobs/smoke.yaml").read_text())
    validator.validate(content)
    content["scorer"] = {"split": {"train": 0.5, "validate": 0.15, "calibrate": 0.35}}
    validator.validate(content)
    for broken in ({"sede": 1}, {"seed": "x"}, {"lake": {"uri": "x", "formt": "tar"}}):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({**content, **broken})


@pytest.mark.parametrize("path", sorted((ROOT / "cluster/jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_job_that_ships_is_valid(path):
    assert config.load(path, [], {}).job.name


# -- fast, before anything heavy ---------------------------------------------------------------------------

_STOPPER = """
import json, sys, time
from pu_ray import config
from pu_ray.errors import ConfigError

answers = {}
for override in json.load(sys.stdin):
    started = time.process_time()
    try:
        config.load(sys.argv[1], [override], {})
        stopped = False
    except ConfigError:
        stopped = True
    answers[override] = (stopped, time.process_time() - started)
heavy = [name for name in ("ray", "torch", "pyarrow", "numpy", "PIL") if name in sys.modules]
print(json.dumps({"answers": answers, "heavy": heavy, "in_all": time.process_time()}))
"""


def test_every_wrong_value_stops_in_under_a_second_without_ray_torch_or_arrow(job_file):
    done = subprocess.run(
        [sys.executable, "-c", _STOPPER, str(job_file())],
        input=json.dumps([override for override, _, _ in WRONG_VALUES]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        timeout=60,
    )
    outcome = json.loads(done.stdout)
    assert outcome["heavy"] == []
    slowest = max(seconds for _, seconds in outcome["answers"].values())
    assert all(stopped for stopped, _ in outcome["answers"].values())
    # CPU time, so that a busy machine does not fail the test; `in_all` holds the imports and forty loads.
    spent_before = outcome["in_all"] - sum(seconds for _, seconds in outcome["answers"].values())
    assert spent_before + slowest < 1.0


@pytest.mark.parametrize(
    ("resources", "most"),
    [
        ({"embed": {"max_actors": 9}}, 9),
        ({"embed": {"max_actors": 9}, "limits": {"cpus": 5}}, 3),
        ({"embed": {"max_actors": 9, "cpus": 0.5}, "limits": {"cpus": 5}}, 7),
        ({"embed": {"max_actors": 9, "gpus": 0.5}, "limits": {"gpus": 3.4}}, 6),
        ({"embed": {"max_actors": 9, "gpus": 1, "cpus": 0}, "limits": {"gpus": 20, "cpus": 2}}, 9),
        ({"embed": {"max_actors": 4}, "limits": {"gpus": 0}}, 4),
    ],
)
def test_the_pool_keeps_to_the_limits(resources, most):
    assert config.ResourcesConfig.model_validate(resources).most_actors == most
