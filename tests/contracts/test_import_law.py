"""DESIGN, section 2: who may import whom, and what importing may cost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("ray", "torch", "torchvision", "timm", "pyarrow", "onnxruntime", "sklearn", "scipy", "matplotlib", "s3fs")


def loaded_by(statement: str) -> list[str]:
    """The heavy packages that a fresh interpreter holds after a statement."""
    probe = f"import sys, json\n{statement}\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    loaded: list[str] = json.loads(done.stdout)
    return loaded


def lint(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([command, "--no-cache", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_import_law_is_kept():
    done = lint()
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_a_broken_import_law_would_be_noticed(tmp_path):
    # Every check can fail: `config` imports `errors`, so a law against it must be red.
    law = tmp_path / "law.ini"
    law.write_text(
        "[importlinter]\nroot_packages =\n  pu_ray\n"
        "[importlinter:contract:1]\nname = impossible\ntype = forbidden\n"
        "source_modules =\n  pu_ray.config\nforbidden_modules =\n  pu_ray.errors\n"
    )
    done = lint("--config", str(law))
    assert done.returncode != 0
    assert "1 broken" in done.stdout


def test_the_layers_of_the_law_name_every_module_of_the_package():
    import tomllib

    law = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract for contract in law if contract["type"] == "layers")["layers"]
    named = {name.strip() for layer in layers for name in layer.split("|")}
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "pu_ray").rglob("*.py")
        if path.stem not in ("__init__", "__main__")
    }
    assert modules - named == set()
    assert {name for name in named if name.startswith("pu_ray.")} - modules == set()


def test_what_is_installed_holds_every_package():
    import tomllib

    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [file.parent for name in ("pu_ray", "serving", "cluster") for file in (ROOT / name).rglob("__init__.py")]
    assert sorted(installed) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)


def test_importing_the_packages_loads_nothing_heavy():
    assert loaded_by("import pu_ray, serving, cluster") == []


@pytest.mark.parametrize("module", ["pu_ray.errors", "pu_ray.config", "pu_ray.cli", "pu_ray.progress"])
def test_what_runs_before_a_cluster_starts_loads_nothing_heavy(module):
    assert loaded_by(f"import {module}") == []


@pytest.mark.parametrize("module", ["storage", "manifest", "ledger", "lake", "images", "engine", "gate"])
def test_data_rooms_load_neither_ray_nor_torch(module):
    assert not {"ray", "torch"} & set(loaded_by(f"import pu_ray.{module}"))


def test_remote_storage_libraries_are_loaded_on_use():
    assert "s3fs" not in loaded_by("import pu_ray.storage")


def test_importing_everything_leaves_no_traces(tmp_path):
    # House rule 1: no directories, no logging set up, no Ray started.
    modules = "pu_ray.cli, pu_ray.config, pu_ray.storage, pu_ray.lake, pu_ray.images, pu_ray.manifest, pu_ray.ledger"
    probe = f"import logging, {modules}\nassert not logging.getLogger().handlers\n"
    subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True, timeout=120)
    assert list(tmp_path.iterdir()) == []
