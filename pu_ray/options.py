"""What the commands share: their common options, and flags that the way out needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Job = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one setting; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Ray's own logs, and tracebacks.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No narration.")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else a private Ray on this machine.")
]
Url = Annotated[str, typer.Option(help="Address of a running `pu-ray serve`.")]


class State:
    """Flags of the running command that the exit path needs."""

    verbose = False
    resume_hint = ""


def print_json(value: Any) -> None:
    """To stdout, for machines."""
    print(json.dumps(value, indent=2))
