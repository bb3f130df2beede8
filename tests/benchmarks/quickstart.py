"""Measure the quickstart from nothing and print its table: `make bench`.

Two figures, wall clock of the whole processes: building the demo (teacher and lake), and the chain. Everything is done
in a temporary folder, so nothing is reused.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def timed(*arguments: str, folder: str) -> tuple[float, Any]:
    """Wall-clock seconds of a command, and its parsed result."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pu_ray", *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return time.monotonic() - started, json.loads(done.stdout)


def table(demo_s: float, chain_s: float, summary: dict[str, Any]) -> str:
    """The recorded run in Markdown."""

    def percent(rate: dict[str, Any]) -> str:
        return f"{100 * rate['value']:.2f} ({100 * rate['low']:.2f} to {100 * rate['high']:.2f})"

    gap = summary["gap_to_teacher"]
    smaller = summary["teacher_parameters"] / summary["student_parameters"]
    rows = [
        (
            "run time, demo data and teacher + chain, s",
            f"{demo_s:.0f} + {chain_s:.0f} = {demo_s + chain_s:.0f}",
            "<= 300",
        ),
        ("parameters, teacher / student", f"{smaller:.1f}", ">= 4"),
        ("teacher accuracy, %", percent(summary["teacher_accuracy"]), ""),
        ("student accuracy, %", percent(summary["student_accuracy"]), ""),
        ("gap, points", f"{gap:.2f}", "<= 1.5"),
        (
            "control: random, same number of images, %",
            percent(summary["controls"]["random"]["student_accuracy"]),
            "worse",
        ),
        ("mined precision, %", percent(summary["mined_precision"]), ">= 95"),
        ("mined recall, %", percent(summary["mined_recall"]), ">= 90"),
        (
            "share of digits in the lake: estimate",
            "{estimate:.4f} ({low:.4f} to {high:.4f})".format(**summary["prior"]),
            f"{summary['true_prior']:.4f} in truth",
        ),
        (
            "copies of test images kept out, exact / near",
            f"{summary['leaks_exact']} / {summary['leaks_near']}",
            "20 planted",
        ),
        ("unusable images", str(summary["error_rows"]), "25 planted"),
    ]
    lines = ["| what | measured | wanted |", "|---|---|---|"]
    lines += [f"| {what} | {measured} | {wanted} |" for what, measured, wanted in rows]
    lines += ["", "| stage | seconds | images/s |", "|---|---|---|"]
    for stage, seconds in summary["seconds"].items():
        lines.append(f"| {stage} | {seconds:.1f} | {summary['images_per_s'].get(stage, '')} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        demo_s, _ = timed("demo", "demo", folder=folder)
        chain_s, summary = timed("run", str(ROOT / "cluster/jobs/smoke.yaml"), folder=folder)
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "onnxruntime"))
    print(f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, {packages}.\n")
    print(table(demo_s, chain_s, summary))


if __name__ == "__main__":
    main()
