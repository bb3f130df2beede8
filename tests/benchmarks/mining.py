"""Measure mining, features and scores over a lake, against others and against itself: `make bench NAME=mining`.

Without a mode: images/s, CPU time and memory of `pu-ray score` beside what others do for the same work (baselines.py),
on the lakes L1 and L2 (lakes.py), in one interleaved run. Every contestant runs on the lake and on a quarter of it, so
that start-up drops out of the marginal figures: (images of the lake - of the quarter) / (difference of the times).
Ratios are taken within a round, then the median over the rounds. Every contestant's rows are counted and its answers
compared with a computation apart from all.

--memory-scaling   peak memory on a lake and on a tenth of it
--cascade          features + score with the cascade and without it, and what it kept of the mined positives
--incremental      what two new shards cost after twenty old ones

Not measured: building the lakes, and for ours the sample for the fit and the fit. What a measured second contains is
said in processes.py. Figures of a shared machine compare only within one run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import resource
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from tests.benchmarks import lakes, processes
from tests.benchmarks.processes import CommandError, Usage

ROOT = Path(__file__).parents[2]
OURS = str(ROOT / ".venv/bin/python")
THEIRS = sys.executable
_MIB = 2**20

_SAMPLE = {"unlabeled_sample": 4_000}
_UNCACHED: Mapping[str, Any] = {"features": {"cache": False}, "scorer": _SAMPLE}
_CACHED: Mapping[str, Any] = {"features": {"cache": True}, "scorer": _SAMPLE}

# Largest difference to the reference, in standard deviations of the scores. Cached features are float16.
_MOST_DIFFERENCE = {"ours": 1e-3, "ours-cached": 0.05}
_LEAST_AGREEMENT = 0.99

LIMITS = ("limit-onnx", "limit-torch")
CONTESTANTS: Mapping[str, str] = {
    "ours": "`pu-ray score`, no feature cache: images to scores in one pass",
    "ours-cached": "`pu-ray features` + `pu-ray score`",
    "limit-onnx": "model only, the ONNX graphs we run, 2 processes x 1 thread, pixels in memory",
    "limit-torch": "model only, eager torch, 2 processes x 1 thread, pixels in memory",
    "loop": "plain PyTorch loop, 1 process, 2 threads",
    "dataloader": "PyTorch DataLoader, 2 workers, 1 thread",
    "hugging-face": "Hugging Face datasets.map, num_proc=2, 1 thread each",
    "daft": "Daft, 2 UDF processes, 1 thread each",
    "ray-data": "naive Ray Data, 2 actors, 1 thread each",
}


@dataclass(frozen=True)
class Target:
    """A ratio the issue asks for.

    Attributes:
        lake: For which lake.
        what: Column of `Figures`.
        ours: Numerator.
        theirs: Denominator; `limit` is the faster of the two limits.
        bound: The ratio.
        at_least: Whether it is the least, not the most.
    """

    lake: str
    what: str
    ours: str
    theirs: str
    bound: float
    at_least: bool = True


TARGETS = (
    Target("L1", "images_per_s", "ours", "hugging-face", 1.1),
    Target("L1", "images_per_s", "ours", "ray-data", 3.0),
    Target("L1", "images_per_s", "ours", "limit", 0.7),
    Target("L1", "peak_bytes", "ours", "ray-data", 0.5, at_least=False),
    Target("L2", "images_per_s", "ours", "hugging-face", 1.5),
    Target("L2", "images_per_s", "ours", "ray-data", 4.2),
    Target("L2", "peak_bytes", "ours", "ray-data", 0.5, at_least=False),
)
_MOST_MEMORY_GROWTH = 1.15
_LEAST_CASCADE_SPEEDUP = 2.0
_LEAST_CASCADE_KEPT = 0.99
_NAMES = {"images_per_s": "images/s", "peak_bytes": "peak memory"}


@dataclass(frozen=True)
class Figures:
    """One contestant in one round.

    Attributes:
        images_per_s: Marginal: start-up excluded.
        whole_per_s: Of the whole command on the full lake.
        cpu_ms: Marginal CPU milliseconds per image.
        whole_cpu_ms: Of the whole command on the full lake.
        peak_bytes: On the full lake.
    """

    images_per_s: float
    whole_per_s: float
    cpu_ms: float
    whole_cpu_ms: float
    peak_bytes: float


# -- running -----------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Where things lie and how long they may take.

    Attributes:
        work: Lakes, runs and logs.
        timeout_s: Of one command.
        measuring_s: CPU seconds of the measuring itself, and the wall clock of all measured commands.
    """

    work: Path
    timeout_s: float
    measuring_s: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _runs: int = 0

    def run(self, command: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> Usage:
        """Measure a command."""
        self._runs += 1
        log = self.work / "logs" / f"{self._runs:03d}-{re.sub('[^A-Za-z0-9]+', '-', what)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        before = _own_cpu_s()
        usage = processes.measure(
            command,
            log=log,
            environment=_environment() | dict(environment or {}),
            folder=ROOT,
            timeout_s=self.timeout_s,
        )
        self.measuring_s[0] += _own_cpu_s() - before
        self.measuring_s[1] += usage.wall_s
        say(f"{what:<36} {usage.wall_s:7.1f} s  {usage.cpu_s:7.1f} CPU s  {usage.peak_bytes / _MIB:7.0f} MiB")
        return usage

    def pu_ray(self, verb: str, job: Path, what: str) -> Usage:
        """Measure one of our own stages."""
        return self.run([OURS, "-m", "pu_ray", verb, str(job)], f"{what} {verb}")

    def lake(self, kind: str, images: int, shards: int = lakes.SHARDS) -> Path:
        """Build a lake, in a process of its own: this one stays small, its pages are nobody's."""
        folder = self.work / f"{kind}-{images}-{shards}"
        arguments = [kind, "--images", str(images), "--shards", str(shards), "--out", str(folder)]
        self.run([OURS, "-m", "tests.benchmarks.lakes", *arguments], f"{kind} building {images} images")
        return folder

    def fitted(self, kind: str, data: Path, lake: Path, name: str, sections: Mapping[str, Any]) -> Path:
        """A job with a finished fit; returns its file."""
        job = lakes.job(kind, data, lake, data / "runs" / name, sections)
        for verb in ("features", "fit"):
            self.pu_ray(verb, job, f"{kind} {name}: preparing")
        return job


def _environment() -> dict[str, str]:
    # Without bytecode every process that imports torch pays for compiling it.
    dropped = ("PYTHONDONTWRITEBYTECODE", "RAY_ADDRESS")
    return {name: value for name, value in os.environ.items() if name not in dropped}


def _their_environment() -> dict[str, str]:
    return {
        # As ours: idle OpenMP threads must not spin on cores that others need.
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "DAFT_PROGRESS_BAR": "0",
        "DAFT_ANALYTICS_ENABLED": "0",
        "DO_NOT_TRACK": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Else Ray leaves a token in the home of whoever measures.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def say(text: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def output_of(job: Path) -> Path:
    """The run's folder."""
    return job.with_suffix("")


def forget(job: Path, *artifacts: str) -> None:
    """Delete artifacts, so that they are made anew."""
    for name in artifacts:
        shutil.rmtree(output_of(job) / name, ignore_errors=True)


# -- the comparison ----------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """All contestants on one lake.

    Attributes:
        kind: The lake's name.
        images: Rows of the lake.
        figures: By contestant, one per round.
        checks: By contestant, how its answers differ from the reference.
        problems: What went wrong.
    """

    kind: str
    images: int
    figures: dict[str, list[Figures]] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Check:
    """Answers beside the reference's.

    Attributes:
        rows: How many were written.
        difference: Largest of a score, in standard deviations of the scores.
        agreement: Share of images with the same class.
        classes: How many different classes were predicted.
    """

    rows: int
    difference: float
    agreement: float
    classes: int


def compare(bench: Bench, kind: str, images: int, names: Sequence[str], rounds: int) -> Comparison:
    """Run the contestants on one lake and on a quarter of it, round after round."""
    data = bench.lake(kind, images)
    parts = {
        "quarter": lakes.part_of(data / "lake", slice(lakes.SHARDS // 4), data / "quarter"),
        "full": data / "lake",
    }
    jobs = {}
    for size, lake in parts.items():
        jobs["ours", size] = bench.fitted(kind, data, lake, f"uncached-{size}", _UNCACHED)
        if "ours-cached" in names:
            jobs["ours-cached", size] = bench.fitted(kind, data, lake, f"cached-{size}", _CACHED)
    # Answers of an earlier run may belong to another head.
    shutil.rmtree(data / "runs/theirs", ignore_errors=True)
    rows = {size: lakes.rows_of(lake) for size, lake in parts.items()}
    result = Comparison(kind, rows["full"])
    for turn in range(rounds):
        for name in names:
            if any(problem.startswith(f"{name}:") for problem in result.problems):
                continue
            try:
                figures = _one_turn(bench, kind, name, parts, jobs, rows, f"{kind} {turn + 1}/{rounds} {name}")
            except CommandError as error:
                say(str(error))
                result.problems.append(f"{name}: {error}")
                continue
            result.figures.setdefault(name, []).append(figures)
    for name in result.figures:
        job = jobs["ours-cached" if name == "ours-cached" else "ours", "full"]
        check = result.checks[name] = _check(bench, data, job, name)
        result.problems += _objections(name, check, rows["full"])
    return result


def _one_turn(
    bench: Bench,
    kind: str,
    name: str,
    parts: Mapping[str, Path],
    jobs: Mapping[tuple[str, str], Path],
    rows: Mapping[str, int],
    what: str,
) -> Figures:
    def once(size: str) -> Usage:
        if name == "ours":
            forget(jobs[name, size], "scores")
            return bench.pu_ray("score", jobs[name, size], f"{what} {size}")
        if name == "ours-cached":
            forget(jobs[name, size], "features", "scores")
            usage = bench.pu_ray("features", jobs[name, size], f"{what} {size}")
            return usage + bench.pu_ray("score", jobs[name, size], f"{what} {size}")
        # Everybody uses the head that was fitted for the full lake.
        command = _their_command(name, jobs["ours", "full"], parts[size], size)
        return bench.run(command, f"{what} {size}", _their_environment())

    full = rows["full"]
    if name in LIMITS:
        once("full")
        inner_s = json.loads((_their_out(name, jobs["ours", "full"], "full") / "seconds.json").read_text())
        nan = math.nan
        return Figures(full / inner_s, nan, nan, nan, nan)
    small, big = once("quarter"), once("full")
    more = full - rows["quarter"]
    longer = big.wall_s - small.wall_s
    return Figures(
        images_per_s=more / longer if longer > 0 else math.nan,
        whole_per_s=full / big.wall_s,
        cpu_ms=1000 * (big.cpu_s - small.cpu_s) / more,
        whole_cpu_ms=1000 * big.cpu_s / full,
        peak_bytes=big.peak_bytes,
    )


def _their_out(name: str, job: Path, size: str) -> Path:
    return output_of(job).parent / "theirs" / f"{name}-{size}"


def _their_command(name: str, job: Path, lake: Path, size: str) -> list[str]:
    out = _their_out(name, job, size)
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    return [THEIRS, "-m", "tests.benchmarks.baselines", name, str(job), "--lake", str(lake), "--out", str(out)]


def _check(bench: Bench, data: Path, job: Path, name: str) -> Check:
    """Compare what a contestant wrote last for the full lake with the reference for the head it used."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = output_of(job).name
    reference = _their_out("reference", job, size)
    if not reference.exists():
        bench.run(_their_command("reference", job, data / "lake", size), "reference", _their_environment())
    expected = pq.read_table(reference / "rows.parquet")
    if name.startswith("ours"):
        files, key = (output_of(job) / "scores/data").glob("*.parquet"), "name"
    else:
        files, key = _their_out(name, job, "full").glob("*.parquet"), "path"
    columns = [key, "score", "predicted"]
    rows = pa.concat_tables([pq.read_table(file, columns=columns) for file in files])
    places = {path: place for place, path in enumerate(rows[key].to_pylist())}
    found = rows.take([places[path] for path in expected["path"].to_pylist()])
    scores, wanted = found["score"].to_numpy(), expected["score"].to_numpy()
    same = found["predicted"].to_numpy() == expected["predicted"].to_numpy()
    distinct = len(places)
    return Check(
        rows=rows.num_rows if distinct == rows.num_rows else distinct,
        difference=float(np.abs(scores - wanted).max() / wanted.std()),
        agreement=float(same.mean()),
        classes=len(set(expected["predicted"].to_pylist())),
    )


def _objections(name: str, check: Check, rows: int) -> Iterator[str]:
    most = _MOST_DIFFERENCE.get(name, _MOST_DIFFERENCE["ours"])
    if check.rows != rows:
        yield f"{name}: {check.rows} different rows instead of {rows}"
    if check.difference > most or check.agreement < _LEAST_AGREEMENT:
        yield f"{name}: answers differ by {check.difference:.2g} deviations, {check.agreement:.1%} same classes"
    if check.classes < 3:
        yield f"{name}: the reference knows {check.classes} classes only, so agreement proves nothing"


# -- telling the comparison --------------------------------------------------------------------------------


def median(values: Sequence[float]) -> float:
    """The median of what is a number."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def number(value: float, digits: int = 0) -> str:
    """A figure for the table; a dash where there is none, or where it drowns in the noise."""
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"


def verdict(value: float, bound: float, at_least: bool) -> str:
    """Whether a target is met."""
    if math.isnan(value):
        return "unknown"
    return "met" if (value >= bound if at_least else value <= bound) else "NOT MET"


def ratios(comparison: Comparison, target: Target) -> list[float]:
    """Ours over theirs, round by round."""

    def column(name: str) -> list[float]:
        return [getattr(figures, target.what) for figures in comparison.figures.get(name, [])]

    theirs = column(target.theirs)
    if target.theirs == "limit":
        theirs = [max(pair) for pair in zip(*(column(name) for name in LIMITS), strict=False)]
    return [ours / other for ours, other in zip(column(target.ours), theirs, strict=False)]


def tell_comparison(comparison: Comparison) -> Iterator[str]:
    """Markdown of one lake."""
    yield f"### {comparison.kind}: {comparison.images:,} images"
    yield ""
    yield (
        "| contestant | images/s, marginal (range) | images/s, whole process | CPU ms per image, marginal | whole "
        "| peak MiB | max. score difference, SD | same class |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name, rounds in comparison.figures.items():
        column = {key: [asdict(figures)[key] for figures in rounds] for key in asdict(rounds[0])}
        rates = column["images_per_s"]
        check = comparison.checks[name]
        cells = [
            f"{name}: {CONTESTANTS[name]}",
            f"{number(median(rates))} ({number(min(rates))} to {number(max(rates))})",
            number(median(column["whole_per_s"])),
            number(median(column["cpu_ms"]), 2),
            number(median(column["whole_cpu_ms"]), 2),
            number(median(column["peak_bytes"]) / _MIB),
            f"{check.difference:.1e}",
            f"{check.agreement:.1%}",
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "| target | wanted | measured (rounds) | |"
    yield "|---|---|---|---|"
    for target in TARGETS:
        found = ratios(comparison, target)
        if target.lake != comparison.kind or not found:
            continue
        sign = ">=" if target.at_least else "<="
        each = ", ".join(number(ratio, 2) for ratio in found)
        what = f"{_NAMES[target.what]}, {target.ours} / {target.theirs}"
        state = verdict(median(found), target.bound, target.at_least)
        yield f"| {what} | {sign} {target.bound} | {number(median(found), 2)} ({each}) | {state} |"
    yield ""
    yield from (f"- PROBLEM: {problem.splitlines()[0]}" for problem in comparison.problems)


def machine(bench: Bench, arguments: argparse.Namespace) -> Iterator[str]:
    """Where and with what it was measured."""
    model = next(
        (line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    names = ("ray", "torch", "torchvision", "onnxruntime", "pillow", "pyarrow", "daft", "datasets")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    own, walls = bench.measuring_s
    yield f"{os.cpu_count()} CPUs ({model}), {memory_gib:.0f} GiB, Linux {platform.release()}, "
    yield f"Python {platform.python_version()}; {versions}; ours with pyarrow {_our_version('pyarrow')}."
    yield f"Command: `python -m tests.benchmarks.mining {' '.join(sys.argv[1:])}`; {arguments.rounds} rounds, medians."
    yield f"The measuring itself took {own / max(walls, 1e-9):.1%} of one CPU."
    yield ""


def _our_version(package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([OURS, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


# -- against itself ----------------------------------------------------------------------------------------


def memory_scaling(bench: Bench, kind: str, images: int, rounds: int) -> dict[str, Any]:
    """Peak memory of `score` without a cache and of `features`, on a lake and on a tenth of it."""
    data = bench.lake(kind, images)
    parts = {"tenth": lakes.part_of(data / "lake", slice(lakes.SHARDS // 10), data / "tenth"), "full": data / "lake"}
    scoring = {size: bench.fitted(kind, data, lake, f"uncached-{size}", _UNCACHED) for size, lake in parts.items()}
    embedding = {
        size: lakes.job(kind, data, lake, data / "runs" / f"memory-{size}", _CACHED) for size, lake in parts.items()
    }
    peaks: dict[str, list[int]] = {f"{verb} {size}": [] for verb in ("score", "features") for size in parts}
    for turn in range(rounds):
        for verb, jobs, artifact in (("score", scoring, "scores"), ("features", embedding, "features")):
            for size, job in jobs.items():
                forget(job, artifact)
                usage = bench.pu_ray(verb, job, f"{kind} {turn + 1}/{rounds} {size}")
                peaks[f"{verb} {size}"].append(usage.peak_bytes)
    return {"kind": kind, "images": {size: lakes.rows_of(lake) for size, lake in parts.items()}, "peaks": peaks}


def tell_memory_scaling(found: Mapping[str, Any]) -> Iterator[str]:
    """Markdown of one lake."""
    small, big = found["images"]["tenth"], found["images"]["full"]
    yield f"### Peak memory, {found['kind']}: {small:,} and {big:,} images"
    yield ""
    yield f"| stage | MiB, {small:,} | MiB, {big:,} | ratio (rounds) | wanted | |"
    yield "|---|---|---|---|---|---|"
    for verb in ("score", "features"):
        pairs = list(zip(found["peaks"][f"{verb} tenth"], found["peaks"][f"{verb} full"], strict=True))
        growth = [large / little for little, large in pairs]
        each = ", ".join(number(value, 2) for value in growth)
        cells = [number(median([pair[which] / _MIB for pair in pairs])) for which in (0, 1)]
        state = verdict(median(growth), _MOST_MEMORY_GROWTH, at_least=False)
        ratio = f"{number(median(growth), 2)} ({each})"
        yield f"| {verb} | {' | '.join(cells)} | {ratio} | <= {_MOST_MEMORY_GROWTH} | {state} |"
    yield ""


def cascade(bench: Bench, images: int, rounds: int) -> dict[str, Any]:
    """Features + score with and without the cascade; then what is selected.

    The gate is fitted beforehand, as the head is.
    """
    data = bench.lake("far", images)
    parts = {
        "quarter": lakes.part_of(data / "lake", slice(lakes.SHARDS // 4), data / "quarter"),
        "full": data / "lake",
    }
    rows = {size: lakes.rows_of(lake) for size, lake in parts.items()}
    jobs = {}
    for cascaded in (False, True):
        for size, lake in parts.items():
            sections = {"features": {"cascade": cascaded}, "scorer": _SAMPLE}
            jobs[cascaded, size] = bench.fitted("far", data, lake, f"cascade-{cascaded}-{size}".lower(), sections)
    rates: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(rounds):
        for cascaded in (False, True):
            usages = {}
            for size in parts:
                job, what = jobs[cascaded, size], f"far {turn + 1}/{rounds} cascade {cascaded} {size}"
                forget(job, "features", "scores")
                usages[size] = bench.pu_ray("features", job, what) + bench.pu_ray("score", job, what)
            longer = usages["full"].wall_s - usages["quarter"].wall_s
            rates[cascaded].append((rows["full"] - rows["quarter"]) / longer if longer > 0 else math.nan)
    positives = _positives(data)
    mined = {}
    for cascaded in (False, True):
        bench.pu_ray("select", jobs[cascaded, "full"], f"far cascade {cascaded}")
        mined[cascaded] = positives & _selected(jobs[cascaded, "full"])
    ungated = positives & _selected_without_gate(jobs[True, "full"], jobs[False, "full"])
    manifest = json.loads((output_of(jobs[True, "full"]) / "features/manifest.json").read_text())
    return {
        "images": rows["full"],
        "without": rates[False],
        "with": rates[True],
        "spared": manifest["counts"].get("spared", 0) / rows["full"],
        "mined_without": len(mined[False]),
        "mined_with": len(mined[True]),
        "positives": len(positives),
        "kept": len(mined[True] & ungated) / max(1, len(ungated)),
        "kept_other_fit": len(mined[True] & mined[False]) / max(1, len(mined[False])),
    }


def _positives(data: Path) -> set[bytes]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    truth = pq.read_table(data / "truth.parquet")
    return set(truth.filter(pc.greater_equal(truth["class"], 0))["sample_id"].to_pylist())


def _selected(job: Path) -> set[bytes]:
    import pyarrow.parquet as pq

    return set(pq.read_table(output_of(job) / "selection/selection.parquet")["sample_id"].to_pylist())


def _selected_without_gate(gated: Path, whole: Path) -> set[bytes]:
    """What the gated job's own scorer and threshold would choose if every image had its features.

    A second fit would choose a little differently by itself; this way only the gate makes a difference.
    """
    import numpy as np
    import onnxruntime
    import pyarrow.parquet as pq

    scorer = onnxruntime.InferenceSession((output_of(gated) / "scorer/scorer.onnx").read_bytes())
    selection = output_of(gated) / "selection"
    threshold = json.loads((selection / "manifest.json").read_text())["facts"]["threshold"]
    chosen: set[bytes] = set()
    for file in sorted((output_of(whole) / "features/data").glob("*.parquet")):
        table = pq.read_table(file, columns=["sample_id", "features", "error"])
        table = table.filter(table["error"].is_null())
        width = table["features"].type.list_size
        features = table["features"].combine_chunks().flatten().to_numpy().reshape(-1, width).astype(np.float32)
        (scores,) = scorer.run(None, {"features": features})
        chosen.update(np.array(table["sample_id"].to_pylist(), object)[scores >= threshold])
    return chosen - set(pq.read_table(selection / "left_out.parquet")["sample_id"].to_pylist())


def tell_cascade(found: Mapping[str, Any]) -> Iterator[str]:
    """Markdown."""
    speedup = [with_gate / without for with_gate, without in zip(found["with"], found["without"], strict=True)]
    each = ", ".join(number(value, 2) for value in speedup)
    teacher = lakes.KINDS["far"].teacher["architecture"]
    yield f"### Cascade: {found['images']:,} images, one digit in ten among letters, {teacher}"
    yield ""
    yield "| what | measured | wanted | |"
    yield "|---|---|---|---|"
    yield f"| images/s without, marginal | {number(median(found['without']))} | | |"
    yield f"| images/s with, marginal | {number(median(found['with']))} | | |"
    state = verdict(median(speedup), _LEAST_CASCADE_SPEEDUP, at_least=True)
    yield f"| ratio (rounds) | {number(median(speedup), 2)} ({each}) | >= {_LEAST_CASCADE_SPEEDUP} | {state} |"
    yield f"| images spared the late stages | {found['spared']:.1%} | | |"
    mined = f"{found['mined_without']:,} / {found['mined_with']:,}"
    yield f"| mined positives without / with, of {found['positives']:,} | {mined} | | |"
    what, state = "mined positives kept, same scorer", verdict(found["kept"], _LEAST_CASCADE_KEPT, at_least=True)
    yield f"| {what} | {found['kept']:.4f} | >= {_LEAST_CASCADE_KEPT} | {state} |"
    yield f"| also chosen by the job without cascade, fitted by itself | {found['kept_other_fit']:.4f} | | |"
    yield ""


def incremental(bench: Bench, images: int, rounds: int) -> dict[str, Any]:
    """What two new shards cost after twenty.

    A run with nothing new does not even start Ray. What start-up costs is therefore measured by a run whose only news
    is a shard of ten images; it is subtracted from both sides of the ratio.
    """
    import pyarrow.parquet as pq

    old, new = lakes.SHARDS, lakes.SHARDS // 10
    data = bench.lake("L1", images, old + new)
    found: dict[str, Any] = {"old": old, "new": new, "usages": []}
    for turn in range(rounds):
        folder = data / "growing"
        shutil.rmtree(folder, ignore_errors=True)
        lake = lakes.part_of(data / "lake", slice(old), folder)
        job = lakes.job("L1", data, lake, data / "runs/growing", _CACHED)
        shutil.rmtree(output_of(job), ignore_errors=True)

        def run(what: str, turn: int = turn, job: Path = job) -> Usage:
            label = f"incremental {turn + 1}/{rounds} {what}"
            embedded = bench.pu_ray("features", job, label)
            if what == "first":
                bench.pu_ray("fit", job, label)
            return embedded + bench.pu_ray("score", job, label)

        usages = {"first": run("first"), "nothing": run("nothing")}
        tiny = pq.read_table(data / f"lake/part-{old:03d}.parquet").slice(0, 10)
        pq.write_table(tiny, folder / "part-tiny.parquet")
        usages["tiny"] = run("tiny")
        lakes.part_of(data / "lake", slice(old, old + new), folder)
        usages["more"] = run("more")
        counts = json.loads((output_of(job) / "scores/manifest.json").read_text())["counts"]
        found |= {"rows": counts["rows"], "rows_done": counts["rows_done_now"]}
        found["usages"].append({what: asdict(usage) for what, usage in usages.items()})
    return found


def tell_incremental(found: Mapping[str, Any]) -> Iterator[str]:
    """Markdown."""

    def share(column: str) -> list[float]:
        return [
            (usages["more"][column] - usages["tiny"][column]) / (usages["first"][column] - usages["tiny"][column])
            for usages in found["usages"]
        ]

    yield f"### Incremental: {found['new']} new shards after {found['old']}, features + score"
    yield ""
    yield "| run | wall s | CPU s |"
    yield "|---|---|---|"
    for what, label in (
        ("first", f"{found['old']} shards"),
        ("nothing", "nothing new"),
        ("tiny", "a new shard of 10 images: start-up"),
        ("more", f"{found['new']} new shards"),
    ):
        cells = [
            number(median([usages[what][column] for usages in found["usages"]]), 1) for column in ("wall_s", "cpu_s")
        ]
        yield f"| {label} | {' | '.join(cells)} |"
    yield ""
    yield f"Rows worked on: {found['rows_done']:,} of {found['rows']:,} ({found['rows_done'] / found['rows']:.1%})."
    for column, name in (("wall_s", "Wall clock"), ("cpu_s", "CPU time")):
        each = ", ".join(number(value, 3) for value in share(column))
        ratio = f"{number(median(share(column)), 3)} ({each})"
        yield f"{name} beside the first run's, start-up excluded from both: {ratio}."
    yield ""


# -- the command -------------------------------------------------------------------------------------------


def main() -> NoReturn:
    """Measure and print; exit status 1 if something failed or answered differently."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    modes = parser.add_mutually_exclusive_group()
    for mode in ("memory-scaling", "cascade", "incremental"):
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode)
    parser.add_argument("--lake", choices=("L1", "L2"), action="append", help="default: both")
    parser.add_argument("--images", type=int, help="rows of each lake; default: the issue's")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", help=f"contestants, of {','.join(CONTESTANTS)}")
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="for one command")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    parser.add_argument("--work", type=Path, help="keep lakes, runs and logs there; default: a temporary folder")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(CONTESTANTS)
    if unknown := set(names) - set(CONTESTANTS):
        parser.error(f"no such contestant: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    processes.adopt_orphans()
    temporary = None if arguments.work else tempfile.mkdtemp(prefix="pu-ray-bench-")
    bench = Bench((arguments.work or Path(str(temporary))).absolute(), arguments.timeout)
    try:
        text, raw, sound = measure(bench, arguments, names)
        print("\n".join([*machine(bench, arguments), *text]))
        if arguments.json:
            arguments.json.write_text(json.dumps(raw, indent=1))
    except CommandError as error:
        sys.exit(str(error))
    finally:
        processes.end_descendants()
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
    sys.exit(0 if sound else 1)


def measure(bench: Bench, arguments: argparse.Namespace, names: Sequence[str]) -> tuple[list[str], Any, bool]:
    """What was asked for: Markdown lines, the raw figures, and whether nothing failed."""
    rounds = arguments.rounds

    def images(kind: str) -> int:
        return arguments.images or lakes.KINDS[kind].images

    wanted = arguments.lake or ["L1", "L2"]
    if arguments.mode == "memory-scaling":
        scaled = [memory_scaling(bench, kind, images(kind), rounds) for kind in wanted]
        return [line for found in scaled for line in tell_memory_scaling(found)], scaled, True
    if arguments.mode == "cascade":
        gated = cascade(bench, images("far"), rounds)
        return list(tell_cascade(gated)), gated, True
    if arguments.mode == "incremental":
        grown = incremental(bench, images("L1"), rounds)
        return list(tell_incremental(grown)), grown, True
    compared = [compare(bench, kind, images(kind), names, rounds) for kind in wanted]
    text = [line for comparison in compared for line in tell_comparison(comparison)]
    return text, [asdict(comparison) for comparison in compared], not any(each.problems for each in compared)


if __name__ == "__main__":
    main()
