"""The command line: verbs, flags and exit codes; everything else is elsewhere.

Results go to stdout (`--json` for machines), narration and progress to stderr. Exit codes: 0 ok, 2 usage or
configuration, 3 data, 4 cluster, 5 quality gate failed, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml

import pu_ray
from pu_ray import config as settings_of
from pu_ray import serving_commands
from pu_ray.config import JobConfig, ResolvedConfig
from pu_ray.errors import INTERRUPTED_EXIT_STATUS, ConfigError, PuRayError
from pu_ray.options import Address, Job, Json, Quiet, Set, State, Verbose, print_json
from pu_ray.progress import Narrator

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=pu_ray.__doc__)
config_app = typer.Typer(no_args_is_help=True, help="Look at a job's settings.")
app.add_typer(config_app, name="config")
lake_app = typer.Typer(no_args_is_help=True, help="Look into a lake, or rebuild one in well-cut shards.")
app.add_typer(lake_app, name="lake")
serving_commands.add_to(app)

# Typer brings its own copy of click and names only the leaves of its exceptions: this is their root.
_UsageError: Any = typer.BadParameter.__mro__[2]


def _load(job: Path, overrides: list[str] | None) -> ResolvedConfig:
    resolved = settings_of.load(job, overrides or [])
    State.resume_hint = "run the same command again: what is finished is kept"
    return resolved


@contextmanager
def _session(job: JobConfig, address: str | None, verbose: bool, narrator: Narrator) -> Iterator[None]:
    from cluster import preflight
    from cluster.session import ray_session

    with ray_session(
        address=address, verbose=verbose, needed_cpus=max(requirement.cpus for requirement in preflight.required(job))
    ) as session:
        _quiet_ray_data(verbose)
        report = preflight.check(job, every_node=session.kind == "connected")
        for shortage in report.waiting_for:
            narrator.say(f"waiting for nodes: {shortage}")
        yield


def _quiet_ray_data(verbose: bool) -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = verbose


Prices = Annotated[
    Path | None,
    typer.Option(metavar="FILE.yaml", help="A table like cluster/prices.yaml: the report has money, now and later."),
]


def _pipeline(
    resolved: ResolvedConfig, address: str | None, verbose: bool, quiet: bool, prices: Path | None = None
) -> Any:
    from pu_ray.pipeline import Pipeline

    per_hour = None
    if prices is not None:
        from cluster import prices as table

        per_hour = table.load(prices).per_hour()
    # Ray's own logs come past the table.
    narrator = Narrator(quiet, live=not verbose)

    def session() -> AbstractContextManager[None]:
        return _session(resolved.job, address, verbose, narrator)

    return Pipeline(resolved.job, narrator, session, per_hour)


# -- the chain ---------------------------------------------------------------------------------------------


@app.command()
def run(
    job: Job,
    set_: Set = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    address: Address = None,
    prices: Prices = None,
) -> None:
    """The whole chain, resumable: run it again and it goes on."""
    State.verbose = verbose
    resolved = _load(job, set_)
    summary = _pipeline(resolved, address, verbose, quiet, prices).run()
    if as_json:
        print_json(summary)
    else:
        print(_achieved(summary, resolved.job))


def _stage_command(verb: str, help_text: str) -> None:
    def command(
        job: Job,
        set_: Set = None,
        as_json: Json = False,
        verbose: Verbose = False,
        quiet: Quiet = False,
        address: Address = None,
    ) -> None:
        State.verbose = verbose
        manifests = _pipeline(_load(job, set_), address, verbose, quiet).run_verb(verb)
        if as_json:
            print_json([document.model_dump(mode="json", exclude={"files"}) for document in manifests])
        else:
            for document in manifests:
                print(f"{document.stage}: " + ", ".join(f"{key} {value:,}" for key, value in document.counts.items()))

    app.command(verb, help=help_text)(command)


for _verb, _help in {
    "features": "Embed every image of the lake with the teacher, once.",
    "fit": "Learn the PU scorer from the labeled images and a sample of the lake.",
    "score": "Score every image of the lake.",
    "select": "Choose the images that teach the student, and copy them.",
    "distill": "Train the student on the chosen images.",
    "evaluate": "Judge teacher and student on the test images.",
    "export": "Write the portable student, each format checked.",
}.items():
    _stage_command(_verb, _help)


@app.command()
def report(job: Job, set_: Set = None, as_json: Json = False, verbose: Verbose = False, prices: Prices = None) -> None:
    """Write report.html and summary.json of what is there."""
    State.verbose = verbose
    resolved = _load(job, set_)
    summary = _pipeline(resolved, None, verbose, quiet=True, prices=prices).report()
    if as_json:
        print_json(summary)
    else:
        print(_achieved(summary, resolved.job))


@app.command()
def audit(
    job: Job,
    set_: Set = None,
    images: Annotated[
        int, typer.Option(min=1, help="Images to draw; with --answers those count that were drawn.")
    ] = 200,
    answers: Annotated[
        str | None, typer.Option(metavar="FILE.csv", help="The filled form: path or URI. Publishes the bound.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Have a person judge a sample of the selection: a bound on precision that holds."""
    State.verbose = verbose
    pipeline = _pipeline(_load(job, set_), None, verbose, quiet)
    if answers is None:
        drawn = pipeline.audit(images)
        if as_json:
            print_json(drawn)
        else:
            print(_to_judge(drawn, job))
        return
    from pu_ray import audit as auditor

    audited = pipeline.audited(answers)
    if as_json:
        print_json(audited.model_dump(mode="json", exclude={"files"}))
    else:
        print(auditor.render(audited))


def _to_judge(drawn: dict[str, Any], job: Path) -> str:
    return "\n".join(
        [
            f"{drawn['drawn']:,} of {drawn['selected']:,} selected images are drawn",
            "",
            "next:",
            f"  open {drawn['sheet']}",
            f"  fill in the column `correct` of {drawn['form']}",
            f"  pu-ray audit {job} --answers {drawn['form']}",
        ]
    )


# -- looking back ------------------------------------------------------------------------------------------

Runs = Annotated[
    list[str], typer.Argument(metavar="RUN", help="Outputs of jobs, or folders with such outputs below them.")
]


@app.command()
def trace(
    image: Annotated[
        str, typer.Argument(metavar="SAMPLE_ID|FILE", help="32 hexadecimal digits, or an image's path or URI.")
    ],
    runs: Runs,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Which runs saw an image, chose it, and taught a student with it."""
    State.verbose = verbose
    from pu_ray.lineage import ids, lookup
    from pu_ray.lineage import trace as tracing
    from pu_ray.storage import Storage

    sample = ids.sample_of(image)
    found = []
    with Narrator(quiet).stage("trace") as progress:
        for uri in dict.fromkeys(run for given in runs for run in lookup.runs_below(given)):
            found.append(tracing.trace(Storage(uri), sample, progress))
    if as_json:
        print_json([each.model_dump(mode="json") | {"found": each.found} for each in found])
    else:
        print(tracing.render(found))


@app.command()
def forget(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The output of a job.")],
    ids: Annotated[str, typer.Option("--list", metavar="FILE", help="Sample ids, one a line, or a CSV; path or URI.")],
    apply: Annotated[bool, typer.Option("--apply", help="Do it; without, only say what would happen.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Never choose these images again, and erase the run's copies of them."""
    State.verbose = verbose
    from pu_ray.lineage import forget as forgetting
    from pu_ray.lineage.ids import read_list
    from pu_ray.storage import Storage

    folder, name = Storage(ids).split()
    samples = read_list(folder.read_bytes(name), ids)
    narrator = Narrator(quiet)
    State.resume_hint = "run the same command again, and it goes on"
    with narrator.stage("forget") as progress:
        done = forgetting.forget(run, samples, progress, apply=apply, note=narrator.say)
    if as_json:
        print_json(done.model_dump(mode="json"))
    else:
        print(forgetting.render(done, f"pu-ray forget --list {ids} {run} --apply"))


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Outputs of jobs, two or more.")],
    page: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="Write one page as well, to this path or URI.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """The numbers of several runs side by side, and the settings that differ."""
    State.verbose = verbose
    from pu_ray import compare as comparer

    found = comparer.runs(runs)
    if page is not None:
        comparer.write_page(page, found)
    if as_json:
        settings, notes = comparer.differing(found), comparer.warnings(found)
        print_json({"runs": found, "differing_settings": settings, "warnings": notes})
    else:
        print(comparer.render(found))


@app.command()
def demo(
    folder: Annotated[str, typer.Argument(help="Where to build it.")] = "demo",
    rows: Annotated[int, typer.Option(help="Images in the lake.")] = 21_000,
    teacher_steps: Annotated[int, typer.Option(help="Training steps of the teacher.")] = 320,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Build a small, real task: MNIST digits hidden in a lake of letters, and a teacher."""
    State.verbose = verbose
    from pu_ray import demo as builder

    narrator = Narrator()
    State.resume_hint = "run the same command again"
    with narrator.stage("teacher") as progress:
        built = builder.build(folder, builder.DemoSize(lake_rows=rows, teacher_steps=teacher_steps), seed, progress)
    if as_json:
        print_json(built)
    else:
        narrator.say(f"{folder}: " + ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in built.items()))


# -- settings ----------------------------------------------------------------------------------------------


@config_app.command("show")
def config_show(job: Job, set_: Set = None, as_json: Json = False) -> None:
    """Every setting with its value and where it came from."""
    resolved = _load(job, set_)
    if as_json:
        print_json({path: {"value": value, "origin": origin} for path, value, origin in resolved.values()})
        return
    for path, value, origin in resolved.values():
        text = yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize).splitlines()[0]
        print(f"{path:<44} {text:<32} # {origin}")


@config_app.command("schema")
def config_schema() -> None:
    """The JSON Schema of a job file, for editors."""
    print_json(settings_of.json_schema())


# -- lakes -------------------------------------------------------------------------------------------------

LakeFormat = Annotated[
    str, typer.Option("--format", help="auto, parquet, tar, uris or folder: which of its files to take.")
]


def _lake(uri: str, kind: str) -> Any:
    from pydantic import ValidationError

    try:
        return settings_of.LakeConfig.model_validate({"uri": uri, "format": kind})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        allowed = str(first.get("ctx", {}).get("expected", first["msg"]))
        where = {"format": "--format"}.get(str(first["loc"][0]), "URI")
        raise ConfigError(
            "the lake cannot be named so",
            slug="invalid-lake-argument",
            where=where,
            allowed=allowed,
            got=str(first["input"]),
        ) from error


@lake_app.command("inspect")
def lake_inspect(
    uri: Annotated[str, typer.Argument(metavar="URI", help="The lake: a folder or URI, or one shard.")],
    kind: LakeFormat = "auto",
    sample: Annotated[int, typer.Option(min=1, help="Images to look at.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    sheet: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Write miniatures of the sample to this path or URI.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Shards, images, formats, sizes and what is broken, from a random sample."""
    State.verbose = verbose
    from pu_ray import lake_inspect as inspector

    with Narrator(quiet).stage("inspect") as progress:
        found, tiles = inspector.inspect(_lake(uri, kind), sample, seed, progress)
    if sheet is not None:
        inspector.write_sheet(sheet, tiles)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print(inspector.render(found))


@lake_app.command("build")
def lake_build(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder or URI, or one tar, list or Parquet file.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="An empty folder or URI.")],
    kind: LakeFormat = "auto",
    shard_mb: Annotated[int, typer.Option(min=1, help="Encoded megabytes per shard.")] = 256,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Copy images into well-cut Parquet shards, untouched; run it again and it goes on."""
    State.verbose = verbose
    from pu_ray import lake_build as builder

    config = _lake(source, kind)
    State.resume_hint = "run the same command again: finished shards are kept"
    with Narrator(quiet).stage("build") as progress:
        built = builder.build(config, destination, shard_mb, progress)
    if as_json:
        print_json(built.model_dump(mode="json"))
    else:
        print(builder.render(built))


# -- the cluster -------------------------------------------------------------------------------------------

JobsAddress = Annotated[
    str | None, typer.Option(help="The dashboard's URL, port 8265; default: RAY_API_SERVER_ADDRESS, else this machine.")
]
SubmissionId = Annotated[str, typer.Argument(metavar="SUBMISSION", help="As printed by `pu-ray submit`.")]


@app.command()
def plan(
    job: Job,
    set_: Set = None,
    deadline: Annotated[
        float | None, typer.Option(metavar="HOURS", help="Which pools end the whole plan in so many hours.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure decoding and the teacher on this machine, on a sample.")
    ] = False,
    prices: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="A price table of your own; default: cluster/prices.yaml.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Dry run: the lake's size, what the cluster needs, time and cost, refusals."""
    State.verbose = verbose
    from cluster import plan as planner
    from cluster import prices as table

    resolved = _load(job, set_)
    known = table.load(prices if prices is not None else table.PRICES_FILE)
    with Narrator(quiet).stage("plan") as progress:
        made = planner.make(resolved.job, known, progress, deadline_hours=deadline, calibrated=calibrate)
    if as_json:
        print_json(made.model_dump(mode="json"))
    else:
        print(planner.render(made))
    raise typer.Exit(made.exit_status)


@app.command()
def submit(
    job: Job,
    set_: Set = None,
    address: JobsAddress = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the job has ended.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Submit the job to a cluster; the same job is never started twice."""
    State.verbose = verbose
    from cluster import submit as jobs

    resolved = _load(job, set_)
    State.resume_hint = "a job that was accepted goes on: the same command finds it, and `pu-ray stop` ends it"
    made = jobs.submit(resolved.job, address, wait=wait, say=Narrator(quiet).say)
    _say_submission(made, as_json)


@app.command()
def status(
    submission: SubmissionId, address: JobsAddress = None, as_json: Json = False, verbose: Verbose = False
) -> None:
    """How a submitted job is doing."""
    State.verbose = verbose
    from cluster import submit as jobs

    _say_submission(jobs.status(submission, address), as_json)


@app.command()
def logs(
    submission: SubmissionId,
    address: JobsAddress = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job has ended.")] = False,
    verbose: Verbose = False,
) -> None:
    """What a submitted job has said."""
    State.verbose = verbose
    from cluster import submit as jobs

    for text in jobs.logs(submission, address, follow=follow):
        print(text, end="")


@app.command()
def stop(submission: SubmissionId, address: JobsAddress = None, verbose: Verbose = False) -> None:
    """Stop a submitted job; what is finished is kept."""
    State.verbose = verbose
    from cluster import submit as jobs

    print("stopped" if jobs.stop(submission, address) else "it was not running")


def _say_submission(result: Any, as_json: bool) -> NoReturn:
    if as_json:
        print_json({key: getattr(result, key) for key in ("submission_id", "action", "status", "message")})
    else:
        print(f"{result.submission_id}  {result.status}" + (f"  {result.message}" if result.message else ""))
    raise typer.Exit(result.exit_status)


# -- what is said at the end -------------------------------------------------------------------------------


def _achieved(summary: dict[str, Any], job: JobConfig) -> str:
    """What a person wants to know, and what to type next."""

    def percent(rate: dict[str, Any] | None) -> str:
        if rate is None:
            return "-"
        return f"{100 * rate['value']:.2f} %  ({100 * rate['low']:.2f} to {100 * rate['high']:.2f}, n = {rate['n']:,})"

    lines = [f"{job.name}: {summary['verdict']}"]
    if summary.get("student_accuracy"):
        smaller = summary["teacher_parameters"] / summary["student_parameters"]
        lines += [
            f"  teacher          {percent(summary['teacher_accuracy'])}, {summary['teacher_parameters']:,} parameters",
            f"  student          {percent(summary['student_accuracy'])}, {summary['student_parameters']:,} parameters"
            f" ({smaller:.1f} times smaller)",
        ]
    for name, control in summary.get("controls", {}).items():
        lines.append(f"  control: {name:<7} {percent(control['student_accuracy'])}, as many images, chosen otherwise")
    if summary.get("mined_rows"):
        lines.append(
            f"  mined            {summary['mined_rows']:,} of {summary['lake_rows']:,} images"
            f" ({summary['error_rows']:,} unusable, {summary['leaks_removed']:,} copies of test images kept out)"
        )
    if summary.get("mined_precision"):
        lines.append(f"  mined precision  {percent(summary['mined_precision'])}")
        lines.append(f"  mined recall     {percent(summary['mined_recall'])}")
    if summary.get("audit"):
        found = summary["audit"]["precision"]
        lines.append(f"  audited          {percent(found)}, at least {100 * found['bound']:.2f} % precision")
    output = job.output.rstrip("/")
    lines += ["", "next:", f"  open {output}/report.html"]
    if summary.get("exported"):
        lines += [
            f"  pu-ray serve {output}/exported",
            f"  pu-ray predict --url http://127.0.0.1:8000 {_example(summary)}",
        ]
    return "\n".join(lines)


def _example(summary: dict[str, Any]) -> str:
    if summary.get("example_image") is None:
        return "IMAGE"
    image = str(summary["example_image"])
    here = os.path.relpath(image)
    return image if here.startswith("..") else here


# -- the way out -------------------------------------------------------------------------------------------


def _version(show: bool) -> None:
    if show:
        print(pu_ray.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit status."""
    # Before torch loads OpenMP: endless spinning on a busy machine made training 20 times slower (docs/LOG.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    State.verbose, State.resume_hint = False, ""
    try:
        outcome = app(args=arguments, standalone_mode=False)
        # Typer turns Ctrl-C into this exit status by itself.
        if outcome != INTERRUPTED_EXIT_STATUS:
            return outcome if isinstance(outcome, int) else 0
    except PuRayError as error:
        if State.verbose:
            traceback.print_exc()
        _document(arguments, error.code, error.problem, **error.as_dict())
        print(f"error ({error.code}): {error}", file=sys.stderr)
        return error.exit_status
    except (typer.Abort, KeyboardInterrupt):
        pass
    except _UsageError as error:
        _document(arguments, "usage", error.format_message())
        error.show()
        return int(error.exit_code)
    except Exception as error:
        _document(arguments, "internal", f"{type(error).__name__}: {error}", hint="please report it")
        raise
    kept = State.resume_hint or "nothing was changed"
    _document(arguments, "interrupted", "interrupted", hint=kept)
    print(f"interrupted; {kept}", file=sys.stderr)
    return INTERRUPTED_EXIT_STATUS


def _document(
    arguments: list[str],
    code: str,
    problem: str,
    *,
    where: str | None = None,
    allowed: str | None = None,
    got: str | None = None,
    hint: str | None = None,
) -> None:
    """For machines, where they asked; its keys are always the same."""
    if "--json" in arguments:
        told = {"code": code, "kind": code.partition("/")[0], "problem": problem}
        print_json({"error": told | {"where": where, "allowed": allowed, "got": got, "hint": hint}})
