"""pu_ray/cli.py: results on stdout, narration and errors on stderr, exit codes that mean something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from artifacts import rate, settings

import pu_ray
from pu_ray import cli
from pu_ray.errors import ClusterError, ConfigError, DataError, GateError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job_file(tmp_path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path)))
    return str(path)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    import os

    for name in [name for name in os.environ if name.startswith("PU_RAY__")]:
        monkeypatch.delenv(name)


@pytest.fixture
def call(capsys):
    """Runs the command line in this process: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli._run(list(arguments))
        seen = capsys.readouterr()
        return status, seen.out, seen.err

    return run


def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a person would."""
    return subprocess.run(
        [sys.executable, "-m", "pu_ray", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


class FakePipeline:
    """Answers without a stage; or raises."""

    outcome: Any = None

    def run(self):
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    report = run

    def run_verb(self, verb):
        return self.run()


@pytest.fixture
def pipeline(monkeypatch) -> type[FakePipeline]:
    """What `run`, `report` and the verbs meet."""
    fake = type("Fake", (FakePipeline,), {})
    monkeypatch.setattr(cli, "_pipeline", lambda *_, **__: fake())
    return fake


SUMMARY = {
    "verdict": "passed",
    "teacher_parameters": 1000,
    "student_parameters": 100,
    "teacher_accuracy": rate(0.9512, 1500),
    "student_accuracy": rate(0.9387, 1500),
    "controls": {"random": {"student_accuracy": rate(0.75)}},
    "lake_rows": 21_000,
    "mined_rows": 1_234,
    "error_rows": 25,
    "leaks_removed": 20,
    "mined_precision": rate(0.91),
    "mined_recall": rate(0.96),
    "exported": True,
    "example_image": None,
}

# -- a person's shell --------------------------------------------------------------------------------------


def test_the_version_is_printed():
    done = shell("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{pu_ray.__version__}\n", "")


def test_a_wrong_key_is_answered_on_stderr_without_a_traceback_and_before_anything_heavy(job_file):
    probe = (
        "import sys\nfrom pu_ray import cli\nstatus = cli._run(sys.argv[1:])\n"
        "heavy = [name for name in ('ray', 'torch', 'pyarrow', 'numpy') if name in sys.modules]\n"
        "assert not heavy, heavy\nsys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, "run", job_file, "--set", "scorer.pior=0.1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error (config/unknown-key): scorer.pior (--set): unknown key\n")
    assert "did you mean 'prior'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_data_exits_with_3_and_names_what_is_missing(job_file, tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    (tmp_path / "teacher.safetensors").write_bytes(b"weights")
    for folder in ("labeled", "test", "lake"):
        (tmp_path / folder).mkdir()
    done = shell("features", job_file)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith(f"error (data/lake-without-images): {tmp_path}/lake: the lake holds no images\n")
    assert "Traceback" not in done.stderr


def test_a_class_list_that_is_not_utf8_ends_without_a_traceback(job_file, tmp_path):
    (tmp_path / "labels.txt").write_bytes("café\nthé\n".encode("latin-1"))
    (tmp_path / "teacher.safetensors").write_bytes(b"weights")
    for folder in ("labeled", "test", "lake"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(b"")
    done = shell("features", job_file)
    assert "Traceback" not in done.stderr
    assert done.returncode == 3


def test_the_module_runs_as_the_command_does():
    assert shell("config", "schema").stdout == json.dumps(json.loads(shell("config", "schema").stdout), indent=2) + "\n"


# -- usage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rn", "job.yaml"], "No such command 'rn'"),
        (["run"], "Missing argument 'JOB.yaml'"),
        (["run", "job.yaml", "--sett", "a=b"], "No such option: --sett"),
        (["demo", "--rows", "many"], "Invalid value for '--rows'"),
        (["config", "shw"], "No such command 'shw'"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong_on_stderr(call, arguments, said):
    status, out, err = call(*arguments)
    assert status == 2
    assert out == ""
    assert said in err
    assert "Usage:" in err


def test_help_lists_every_verb_of_the_design(call):
    status, out, _ = call("--help")
    assert status == 0
    verbs = "run features fit score select distill evaluate export report audit demo plan submit status logs stop"
    for verb in [*verbs.split(), "serve", "predict", "config"]:
        assert f"\n  {verb} " in out


@pytest.mark.parametrize(
    "verb", ["run", "features", "report", "audit", "plan", "config show", "serve", "predict", "submit"]
)
def test_every_verb_explains_itself(call, verb):
    status, out, err = call(*verb.split(), "--help")
    assert status == 0
    assert err == ""
    assert "Usage:" in out


def test_a_job_file_that_is_not_there_is_a_configuration_error(call, tmp_path):
    status, out, err = call("run", str(tmp_path / "absent.yaml"))
    assert (status, out) == (2, "")
    assert "the job file cannot be read" in err


def test_an_image_that_is_not_there_is_a_configuration_error(call, tmp_path):
    status, out, err = call("predict", str(tmp_path / "absent.png"))
    assert (status, out) == (2, "")
    assert err.startswith(f"error (config/image-unreadable): {tmp_path}/absent.png: the image cannot be read")


# -- exit codes --------------------------------------------------------------------------------------------

ENDINGS = [
    (ConfigError("broken", slug="it-broke", where="lake.uri", hint="mend it"), 2),
    (DataError("broken", slug="it-broke", where="lake.uri", hint="mend it"), 3),
    (ClusterError("broken", slug="it-broke", where="lake.uri", hint="mend it"), 4),
    (GateError("broken", slug="it-broke", where="lake.uri", hint="mend it"), 5),
]


@pytest.mark.parametrize(("error", "expected"), ENDINGS, ids=[str(status) for _, status in ENDINGS])
@pytest.mark.parametrize("verb", ["run", "fit", "report"])
def test_each_kind_of_error_has_its_exit_status_and_no_traceback(call, pipeline, job_file, verb, error, expected):
    pipeline.outcome = error
    status, out, err = call(verb, job_file)
    assert status == expected
    assert out == ""
    assert err == f"error ({error.code}): lake.uri: broken\n  what to do: mend it\n"


@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_a_traceback_is_shown_to_who_asks_for_it(call, pipeline, job_file, flag):
    pipeline.outcome = DataError("broken", slug="it-broke")
    status, _, err = call("run", job_file, flag)
    assert status == 3
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("error (data/it-broke): broken\n")


def test_verbosity_does_not_outlive_its_command(call, pipeline, job_file):
    pipeline.outcome = DataError("broken", slug="it-broke")
    call("run", job_file, "-v")
    assert "Traceback" not in call("run", job_file)[2]


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(call, pipeline, job_file):
    pipeline.outcome = KeyboardInterrupt()
    status, out, err = call("run", job_file)
    assert (status, out) == (130, "")
    assert "interrupted; run the same command again: what is finished is kept" in err
    assert "Traceback" not in err


INTERRUPTED = {
    "features JOB": ("pu_ray.pipeline.Pipeline.run_verb", "finished is kept"),
    "submit JOB --wait": ("cluster.submit.submit", "`pu-ray stop` ends it"),
    "plan JOB": ("cluster.plan.make", "run the same command again"),
    "demo DIR": ("pu_ray.demo.build", "run the same command again"),
    "lake build DIR DIR2": ("pu_ray.lake_build.build", "finished shards are kept"),
    "lake inspect DIR": ("pu_ray.lake_inspect.inspect", "nothing was changed"),
    "compare DIR DIR2": ("pu_ray.compare.runs", "nothing was changed"),
    "predict FILE": ("serving.client.Client.classify", "nothing was changed"),
}


@pytest.mark.parametrize("command", INTERRUPTED)
def test_ctrl_c_in_any_verb_says_what_became_of_the_work(call, monkeypatch, job_file, tmp_path, command):
    interrupted, said = INTERRUPTED[command]

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(interrupted, stop)
    places = {"JOB": job_file, "DIR": str(tmp_path / "one"), "DIR2": str(tmp_path / "two"), "FILE": job_file}
    status, out, err = call(*(places.get(word, word) for word in command.split()))
    assert (status, out) == (130, "")
    assert err.splitlines()[-1].startswith("interrupted; ")
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err


def test_ctrl_c_in_a_shell_exits_with_130_and_no_traceback(job_file):
    stop = (
        "import os, signal, time\nfrom pu_ray import cli\n"
        "def pipeline(*_):\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
        "cli._pipeline = pipeline\ncli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", stop, "run", job_file], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; run the same command again: what is finished is kept\n"


def test_a_fault_of_ours_shows_its_traceback(call, pipeline, job_file):
    """It is to be reported, and no person has made a mistake."""
    pipeline.outcome = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        call("run", job_file)


def _ended_as(told: str) -> tuple[str, str, str, str | None]:
    error = json.loads(told)["error"]
    assert list(error) == ["code", "kind", "problem", "where", "allowed", "got", "hint"]
    return error["code"], error["kind"], error["problem"], error["hint"]


def test_what_is_no_error_of_a_kind_is_a_document_too(call, pipeline, job_file, capsys):
    _, out, err = call("run", job_file, "--json", "--sett", "a=b")
    assert _ended_as(out)[:2] == ("usage", "usage")
    assert _ended_as(out)[2] in err
    pipeline.outcome = KeyboardInterrupt()
    _, out, _ = call("run", job_file, "--json")
    assert _ended_as(out)[::3] == ("interrupted", "run the same command again: what is finished is kept")
    pipeline.outcome = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError):
        call("run", job_file, "--json")
    assert _ended_as(capsys.readouterr().out)[:3] == ("internal", "internal", "ZeroDivisionError: ours")


def test_main_leaves_with_the_exit_status(pipeline, job_file):
    pipeline.outcome = GateError("broken", slug="it-broke")
    with pytest.raises(SystemExit) as left:
        cli.main(["run", job_file])
    assert left.value.code == 5


# -- --json ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "expected"), ENDINGS, ids=[str(status) for _, status in ENDINGS])
def test_json_errors_are_documents_on_stdout_with_every_part(call, pipeline, job_file, error, expected):
    pipeline.outcome = error
    status, out, err = call("run", job_file, "--json")
    assert status == expected
    assert json.loads(out) == {
        "error": {
            "code": f"{error.kind}/it-broke",
            "kind": error.kind,
            "problem": "broken",
            "where": "lake.uri",
            "allowed": None,
            "got": None,
            "hint": "mend it",
        }
    }
    assert "broken" in err


def test_json_errors_of_the_configuration_are_documents_too(call, job_file):
    status, out, _ = call("config", "show", job_file, "--set", "sede=1", "--json")
    assert status == 2
    error = json.loads(out)["error"]
    assert (error["code"], error["kind"]) == ("config/unknown-key", "config")
    assert error["hint"] == "did you mean 'seed'?"


def test_json_results_are_the_summary(call, pipeline, job_file):
    pipeline.outcome = SUMMARY
    for verb in ("run", "report"):
        status, out, _ = call(verb, job_file, "--json")
        assert status == 0
        assert json.loads(out) == SUMMARY


# -- what a person reads at the end ------------------------------------------------------------------------


def test_the_result_says_what_was_achieved_and_what_to_type_next(call, pipeline, job_file, tmp_path):
    pipeline.outcome = SUMMARY
    status, out, err = call("run", job_file)
    assert (status, err) == (0, "")
    for part in (
        "job: passed",
        "95.12 %  (90.12 to 100.00, n = 1,500), 1,000 parameters",
        "93.87 %",
        "(10.0 times smaller)",
        "control: random  75.00 %",
        "1,234 of 21,000 images (25 unusable, 20 copies of test images kept out)",
        f"open {tmp_path}/run/report.html",
        f"pu-ray serve {tmp_path}/run/exported",
        "pu-ray predict --url http://127.0.0.1:8000 IMAGE",
    ):
        assert part in out


def test_a_run_that_has_not_come_far_says_so_and_does_not_offer_to_serve(call, pipeline, job_file):
    pipeline.outcome = {"verdict": "unfinished: 1 of 8 stages are done", "exported": False, "controls": {}}
    status, out, _ = call("report", job_file)
    assert status == 0
    assert "job: unfinished: 1 of 8 stages are done" in out
    assert "pu-ray serve" not in out


def test_the_example_is_an_image_that_is_there_by_its_shortest_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli._example({"example_image": f"{tmp_path}/test/1.png"}) == "test/1.png"
    assert cli._example({"example_image": "/elsewhere/1.png"}) == "/elsewhere/1.png"
    assert cli._example({"example_image": None}) == "IMAGE"


# -- config ------------------------------------------------------------------------------------------------


def test_config_show_lists_every_value_with_its_origin(call, job_file, monkeypatch):
    monkeypatch.setenv("PU_RAY__SCORER__HIDDEN", "5")
    status, out, err = call("config", "show", job_file, "--set", "seed=7", "--set", "recipe=paper")
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["seed"].split() == ["seed", "7", "#", "--set"]
    assert lines["scorer.hidden"].split("#")[1].strip() == "environment PU_RAY__SCORER__HIDDEN"
    assert lines["scorer.epochs"].split() == ["scorer.epochs", "170", "#", "recipe", "paper"]
    assert lines["lake.chunk_rows"].endswith("# default")
    assert lines["name"].endswith("# file job.yaml")


def test_config_show_as_json_holds_the_same(call, job_file):
    status, out, _ = call("config", "show", job_file, "--json")
    assert status == 0
    shown = json.loads(out)
    assert shown["seed"] == {"value": 0, "origin": "default"}
    assert shown["teacher.preprocessing.mean"] == {"value": [0.5, 0.5, 0.5], "origin": "file job.yaml"}
    text = call("config", "show", job_file)[1]
    assert [line.split()[0] for line in text.splitlines()] == list(shown)


def test_each_shown_value_reads_back_as_yaml(call, job_file):
    shown = json.loads(call("config", "show", job_file, "--json")[1])
    for line in call("config", "show", job_file)[1].splitlines():
        path, rest = line.split(maxsplit=1)
        assert yaml.safe_load(rest.rpartition(" # ")[0]) == shown[path]["value"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("teacher.stages", [f"backbone.blocks.{k}.output" for k in range(12)]),
        ("lake.uri", "s3://bucket/" + "a folder with spaces/" * 8),
    ],
)
def test_long_values_are_shown_whole(call, job_file, path, value):
    out = call("config", "show", job_file, "--set", f"{path}={json.dumps(value)}")[1]
    (line,) = [line for line in out.splitlines() if line.startswith(path)]
    assert yaml.safe_load(line.split(maxsplit=1)[1].rpartition(" # ")[0]) == value


def test_config_schema_is_the_json_schema(call):
    from pu_ray import config

    status, out, err = call("config", "schema")
    assert (status, err) == (0, "")
    assert json.loads(out) == config.json_schema()


# -- audit -------------------------------------------------------------------------------------------------

DRAWN = {"drawn": 200, "selected": 1336, "sheet": "/run/audit/sheet.html", "form": "/run/audit/audit.csv"}


def test_an_audit_says_what_to_look_at_and_what_to_type_next(call, pipeline, job_file):
    asked = []
    pipeline.audit = lambda _, images: asked.append(images) or DRAWN
    status, out, err = call("audit", job_file)
    assert (status, err) == (0, "")
    for part in (
        "200 of 1,336 selected images are drawn",
        "open /run/audit/sheet.html",
        "fill in the column `correct` of /run/audit/audit.csv",
        f"pu-ray audit {job_file} --answers /run/audit/audit.csv",
    ):
        assert part in out
    assert json.loads(call("audit", job_file, "--images", "50", "--json")[1]) == DRAWN
    assert asked == [200, 50]
    assert call("audit", job_file, "--images", "0")[0] == 2


def test_answers_are_printed_as_the_bound_they_give(call, pipeline, job_file):
    from pu_ray.manifest import Manifest

    counts = {"drawn": 200, "judged": 150, "correct": 147, "unjudged": 50}
    precision = {"value": 0.98, "bound": 0.95, "low": 0.94, "high": 0.99, "confidence": 0.95, "n": 150}
    common = {"stage": "audit", "identity": "x", "inputs": {}, "seed": 0, "seconds": 1.0, "finished_at": "now"}
    facts = {"precision": precision, "in_order": True}
    pipeline.audited = lambda _, answers: Manifest(**common, counts=counts, facts=facts, files={answers: 1})
    status, out, err = call("audit", job_file, "--answers", "a.csv")
    assert (status, err) == (0, "")
    assert out.startswith("precision: at least 95.00 %, with confidence 95 %\n  147 of 150 judged images are right")
    assert "50 of 200 are not judged" in out
    document = json.loads(call("audit", job_file, "--answers", "a.csv", "--json")[1])
    assert (document["counts"], document["facts"]) == (counts, facts)


def test_an_audited_run_says_so(call, pipeline, job_file):
    pipeline.outcome = SUMMARY | {"audit": {"precision": {**rate(0.97), "bound": 0.945}}}
    assert (
        "audited          97.00 %  (92.00 to 100.00, n = 100), at least 94.50 % precision" in call("run", job_file)[1]
    )


# -- demo --------------------------------------------------------------------------------------------------


def test_the_demo_is_built_as_asked(call, monkeypatch, tmp_path):
    from pu_ray import demo

    asked = []

    def build(folder, size, seed, progress):
        asked.append((folder, size.lake_rows, size.teacher_steps, seed))
        return {"lake_rows": size.lake_rows}

    monkeypatch.setattr(demo, "build", build)
    target = str(tmp_path / "demo")
    status, out, _ = call("demo", target, "--rows", "9000", "--teacher-steps", "5", "--seed", "3", "--json")
    assert status == 0
    assert asked == [(target, 9000, 5, 3)]
    assert json.loads(out) == {"lake_rows": 9000}
    status, out, err = call("demo", target)
    assert (status, out) == (0, "")
    assert "lake rows 21,000" in err


@pytest.mark.parametrize("verb", ["run", "report"])
def test_prices_go_from_their_table_to_the_pipeline(call, job_file, monkeypatch, verb):
    given = []

    class Told(FakePipeline):
        outcome = SUMMARY

        def __init__(self, job, narrator, session, prices):
            given.append(prices)

    monkeypatch.setattr("pu_ray.pipeline.Pipeline", Told)
    assert call(verb, job_file)[0] == 0
    assert call(verb, job_file, "--prices", str(ROOT / "cluster/prices.yaml"))[0] == 0
    none, some = given
    assert none is None
    assert (some.currency, some.cpu_hour, some.gpu_hour) == ("USD", 0.5 / 16, 1.0)


def test_a_price_table_that_is_not_there_stops_a_run_before_it_starts(call, job_file):
    status, _, said = call("run", job_file, "--prices", "absent.yaml")
    assert status == 2
    assert "the price table cannot be read" in said
