"""Training on two Ray nodes goes on when one of them is lost: whole machines die here, with what runs on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration import lost_node

ROOT = Path(__file__).parents[2]


def disturbed(mode: str, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(Path(lost_node.__file__)), mode, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert result["steps"] == lost_node.STEPS
    assert result["accuracy"] > 0.95
    assert len(result["attempts"]) == 1 + len(result["lost"]), "one start, and one more after a loss"
    return result


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_node_that_dies_takes_no_more_than_one_checkpoint_interval_along(tmp_path: Path) -> None:
    result = disturbed("kill", tmp_path)
    (lost,) = result["lost"]
    before = [saved["step"] for saved in result["saved"] if saved["at"] < lost]
    assert 0 < max(before) < lost_node.STEPS, "it was lost half-way"
    # A checkpoint that was still on its way when the node died may be gone too.
    assert result["attempts"][1]["first"] >= max(before) - lost_node.INTERVAL
    assert result["attempts"][1]["first"] > 0
    assert [attempt["world"] for attempt in result["attempts"]] == [2, 2]
    assert result["weights"] == disturbed("none", tmp_path / "undisturbed")["weights"], "bit by bit"


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_node_that_is_announced_to_go_leaves_a_checkpoint_behind(tmp_path: Path) -> None:
    result = disturbed("notice", tmp_path)
    early = [saved["step"] for saved in result["saved"] if saved["step"] < lost_node.STEPS]
    assert early, "no checkpoint was due before the end"
    assert result["attempts"][1]["first"] == early[0]


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_elastic_training_goes_on_with_those_that_are_left(tmp_path: Path) -> None:
    result = disturbed("elastic", tmp_path)
    assert [attempt["world"] for attempt in result["attempts"]] == [2, 1]
    assert result["attempts"][1]["first"] > 0
