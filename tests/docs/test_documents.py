"""What README and the other documents say must work: settings validate, commands and files exist."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from pu_ray import config
from pu_ray.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(document: Path, language: str) -> list[str]:
    # Fences are matched in pairs, whatever their language, or the end of one block would open the next.
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [content for name, content in fences if name == language]


def commands() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        for block in blocks(document, ""):
            lines = [line.split("#")[0].strip() for line in block.splitlines()]
            found += [(document.name, line) for line in lines if re.match(r"(\.venv/bin/)?(pu-ray|make) ", line)]
    return found


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize(("document", "line"), commands())
def test_every_command_in_the_documents_exists_with_its_flags(document: str, line: str) -> None:
    program, *arguments = shlex.split(line)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), (
            f"{document}: {line}"
        )
        return
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert arguments[0] in command.commands, f"{document}: {line}"
        command = command.commands[arguments.pop(0)]
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert {word for word in arguments if word.startswith("-")} <= flags, f"{document}: {line}"
    for override in (value for flag, value in itertools.pairwise(arguments) if flag == "--set"):
        path, _, value = override.partition("=")
        for key in reversed(path.split(".")):
            value = {key: yaml.safe_load(value) if isinstance(value, str) else value}
        config.resolve([("README", yaml.safe_load(blocks(ROOT / "README.md", "yaml")[0])), (document, value)])
    for word in arguments:
        assert not word.startswith(("cluster/", "docs/")) or (ROOT / word).exists(), f"{document}: {line}"


@pytest.mark.parametrize(
    ("document", "block"), [(document.name, block) for document in DOCUMENTS for block in blocks(document, "yaml")]
)
def test_every_job_in_the_documents_is_valid(document: str, block: str) -> None:
    job = config.resolve([(document, yaml.safe_load(block))]).job
    assert job.name


def test_every_relative_link_leads_somewhere() -> None:
    broken = []
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            if not (document.parent / target).exists():
                broken.append(f"{document.name}: {target}")
    assert not broken


def test_every_line_to_type_in_the_tutorial_is_a_command_that_is_checked() -> None:
    tutorial = ROOT / "docs/tutorial.md"
    lines = [line.split("#")[0].strip() for block in blocks(tutorial, "") for line in block.splitlines()]
    assert lines
    assert [(tutorial.name, line) for line in lines] == [found for found in commands() if found[0] == tutorial.name]


def headings(document: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them, and those that are written out."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
    found = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return set(re.findall(r'<a id="([^"]+)">', text)) | {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found
    }


def test_every_link_to_a_heading_finds_it() -> None:
    broken, seen = [], 0
    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text()):
            seen += 1
            if anchor not in headings(document.parent / target if target else document):
                broken.append(f"{document.name}: {target}#{anchor}")
    assert seen
    assert not broken


def test_every_verb_is_in_the_readme() -> None:
    said = (
        (ROOT / "README.md").read_text()
        + (ROOT / "docs/serving.md").read_text()
        + (ROOT / "docs/cluster.md").read_text()
    )
    verbs = typer.main.get_command(app).commands
    assert {name for name in verbs if not re.search(rf"pu-ray {name}\b|\b{name}\b.*: one stage", said)} == set()


def test_every_document_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    pages = [page.relative_to(ROOT).as_posix() for page in [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/reference/*.md")]]
    assert [page for page in pages if f"]({page})" not in readme] == []


def test_every_setting_named_in_the_documents_exists() -> None:
    known = {
        path
        for path, _, _ in config.resolve([("README", yaml.safe_load(blocks(ROOT / "README.md", "yaml")[0]))]).values()
    }
    sections = {path.split(".")[0] for path in known if "." in path} - {"lake", "features"}
    named = set()
    explaining = [ROOT / f"docs/{name}.md" for name in ("method", "is-this-for-me", "tutorial")]
    for document in (ROOT / "README.md", ROOT / "docs/LOG.md", *explaining):
        named |= set(re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_.]+)(?:[:=][^`]*)?`", document.read_text()))
    assert named
    assert {name for name in named if not any(path == name or path.startswith(f"{name}.") for path in known)} == set()


def test_every_job_file_that_is_shipped_is_valid() -> None:
    jobs = sorted((ROOT / "cluster/jobs").glob("*.yaml"))
    assert {job.stem for job in jobs} >= {"smoke", "paper-cifar10", "paper-imagenet"}
    for job in jobs:
        assert config.load(job, environment={}).job.name
