"""tests/docs/pages.py: the pages made from the code say what the code says, and leave nothing out."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from typing import get_args

import pytest
import yaml

from pu_ray import config, errors, schema
from tests.docs import pages

ROOT = pages.ROOT


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", pages.PAGES)
def test_each_page_is_as_the_code(path):
    page = ROOT / path
    assert page.exists(), f"{path} is missing: run make docs"
    assert page.read_text() == pages.PAGES[path](), f"{path} is out of date: run make docs"


def test_the_pages_are_made_without_ray_and_torch_and_leave_the_folder_alone_when_they_are_current():
    probe = (
        "import sys\nfrom tests.docs import pages\npages.write()\n"
        "heavy = [name for name in ('ray', 'torch') if name in sys.modules]\nassert not heavy, heavy\n"
    )
    before = {path: (ROOT / path).stat().st_mtime_ns for path in pages.PAGES}
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {path: (ROOT / path).stat().st_mtime_ns for path in pages.PAGES} == before


# -- errors ------------------------------------------------------------------------------------------------


def _put(source: str, monkeypatch, tmp_path) -> None:
    (tmp_path / "pu_ray").mkdir(exist_ok=True)
    (tmp_path / "pu_ray/new.py").write_text(source)
    monkeypatch.setattr(pages, "ROOT", tmp_path)


def _made(source: str, monkeypatch, tmp_path) -> list[pages.Entry]:
    _put(source, monkeypatch, tmp_path)
    return pages.entries()


def test_every_place_that_makes_an_error_is_in_the_catalogue():
    made = set()
    for package in pages.PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            if re.search(rf"\b({'|'.join(pages.MAKERS)})\(\s*[^):\s]", file.read_text()):
                made.add(".".join(file.relative_to(ROOT).with_suffix("").parts))
    assert made == {entry.module for entry in pages.entries()}


def test_every_kind_of_error_has_a_section_with_its_exit_status():
    page = (ROOT / "docs/errors.md").read_text()
    assert {kind.kind for kind in errors.PuRayError.__subclasses__()} == set(
        re.findall(r"^## (\w+): exit status \d", page, flags=re.MULTILINE)
    )


def _slugs(maker: pages.Found) -> list[str]:
    """The slugs written where an error is made: one, or two where the condition of the message chooses."""
    slug, problem = maker.keyword("slug"), maker.call.args[0]
    if isinstance(slug, ast.IfExp) and isinstance(problem, ast.IfExp):
        assert ast.unparse(slug.test) == ast.unparse(problem.test), _line(maker)
        written = [slug.body, slug.orelse]
    else:
        written = [slug]
    assert all(isinstance(each, ast.Constant) for each in written), f"{_line(maker)}: a slug is a literal"
    return [each.value for each in written]


def _line(maker: pages.Found) -> str:
    return f"{maker.module}, line {maker.call.lineno}"


def test_every_place_that_makes_an_error_writes_its_slug_out_in_lower_case_with_hyphens():
    places = {_line(maker): _slugs(maker) for maker in pages.makers()}
    assert len(places) > 150
    wrong = [
        (place, slug)
        for place, slugs in places.items()
        for slug in slugs
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug) or len(slug) > 40
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ('DataError("a")', "a slug is a literal"),
        ('DataError("a", slug=n)', "a slug is a literal"),
        ('DataError("a", slug=f"b-{n}")', "a slug is a literal"),
        ('DataError("a", slug="b" if n else "c")', "a slug is a literal"),
        ('DataError("a" if n else "b", slug="a" if not n else "b")', "line 2"),
    ],
)
def test_a_place_that_does_not_write_its_slug_out_is_found(call, said, monkeypatch, tmp_path):
    _put(f"def look(n):\n    raise {call}\n", monkeypatch, tmp_path)
    with pytest.raises(AssertionError, match=said):
        [_slugs(maker) for maker in pages.makers()]


def test_a_code_is_one_mistake_and_a_mistake_has_one_code():
    wordings, codes = defaultdict(set), defaultdict(set)
    for entry in pages.entries():
        wordings[entry.code].add(entry.problem)
        codes[entry.code.partition("/")[0], entry.problem].add(entry.code)
    assert {code for code, told in wordings.items() if len(told) > 1} == pages.SAME_MISTAKE
    assert [found for (_, problem), found in codes.items() if _has_words(problem) and len(found) > 1] == []


def _has_words(problem: str) -> bool:
    return bool(re.search(r"\w", re.sub(r"\{[^}]*\}", "", problem)))


def test_every_code_has_one_entry_in_the_catalogue_and_an_anchor():
    page = (ROOT / "docs/errors.md").read_text()
    codes = sorted({entry.code for entry in pages.entries()})
    assert sorted(re.findall(r"^### ([a-z]+/\S+)$", page, flags=re.MULTILINE)) == codes
    assert sorted(re.findall(r'<a id="([^"]+)">', page)) == sorted(map(pages.anchor_of, codes))
    assert pages.anchor_of("config/unknown-key") == "config-unknown-key"


def test_every_error_says_what_to_do_or_what_is_allowed():
    """Else a person is left with a statement."""
    helpless = {e.code for e in pages.entries() if not (e.hint or e.allowed)} - set(pages.PUT_TOGETHER)
    # A refused setting says in its message what would be allowed.
    helpless -= _refused()
    # What stands in these is the system's own reason, with the path; there is nothing to add.
    assert helpless == {"config/file-not-writable", "config/image-unreadable", "config/tokens-file-not-writable"}


def _refused() -> set[str]:
    makers = [maker for maker in pages.makers() if maker.call.func.id == errors.RefusedSetting.__name__]
    return {f"config/{slug}" for maker in makers for slug in _slugs(maker)}


def test_every_message_that_is_put_together_is_explained():
    wordless = {e.code for e in pages.entries() if not _has_words(e.problem)}
    partly = {e.code for e in pages.entries() if "{" in e.problem}
    assert wordless <= set(pages.PUT_TOGETHER) <= wordless | partly


def test_every_code_of_an_unusable_image_is_explained():
    assert set(pages.IMAGE_CODES) == set(get_args(schema.ErrorCode))


def test_a_new_error_enters_the_catalogue_with_its_parts(monkeypatch, tmp_path):
    [entry] = _made(
        'FILE = "a.json"\n\n\ndef look(uri, n):\n'
        '    raise DataError(f"{FILE} is no {n}", slug="not-it", where=uri, allowed="a" if n else "b", hint=None)\n',
        monkeypatch,
        tmp_path,
    )
    assert (entry.code, entry.problem, entry.module) == ("data/not-it", "a.json is no {n}", "pu_ray.new")
    assert (entry.where, entry.allowed, entry.hint) == (("{uri}",), ("a", "b"), ())


def test_a_condition_that_chooses_the_message_chooses_its_hint_too(monkeypatch, tmp_path):
    found = _made(
        'def look(ok):\n    raise DataError("one" if ok else "two", slug="a" if ok else "b", '
        'hint="mend 1" if ok else "mend 2")\n',
        monkeypatch,
        tmp_path,
    )
    assert [(entry.code, entry.problem, entry.hint) for entry in found] == [
        ("data/a", "one", ("mend 1",)),
        ("data/b", "two", ("mend 2",)),
    ]


def test_a_name_stands_for_what_it_was_given_last(monkeypatch, tmp_path):
    source = (
        'def look(ok):\n    if ok:\n        hint = "first"\n        return DataError("a", slug="a", hint=hint)\n'
        '    hint = "second"\n    return DataError("b", slug="b", hint=hint)\n'
    )
    assert [entry.hint for entry in _made(source, monkeypatch, tmp_path)] == [("first",), ("second",)]


# -- settings and verbs ------------------------------------------------------------------------------------


def test_every_setting_of_a_job_is_in_the_reference_with_a_description():
    readme = (ROOT / "README.md").read_text()
    known = {path for path, _, _ in config.resolve([("README", yaml.safe_load(blocks(readme, "yaml")[0]))]).values()}
    listed = {it.path: it for _, _, settings in pages.sections() for it in settings}
    assert known <= set(listed)
    assert [path for path, it in listed.items() if not it.description] == []


def test_defaults_in_the_reference_are_those_of_a_job():
    readme = (ROOT / "README.md").read_text()
    job = yaml.safe_load(blocks(readme, "yaml")[0])
    values = {path: value for path, value, origin in config.resolve([("", job)]).values() if origin == "default"}
    listed = {it.path: it.default for _, _, settings in pages.sections() for it in settings}
    written = {path: yaml.safe_load(listed[path].strip("`")) for path in values if "architecture" not in path}
    assert {path: _numbers(value) for path, value in written.items()} == {
        path: _numbers(values[path]) for path in written
    }


def _numbers(value):
    # YAML 1.1 takes 1e-05 for a text.
    return float(value) if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value) else value


def test_every_verb_and_option_is_in_the_reference():
    page = (ROOT / "docs/reference/cli.md").read_text()
    found = dict(pages.verbs())
    assert {"run", "lake build", "registry canary", "compare", "serve"} <= set(found)
    for verb, command in found.items():
        section = page.partition(f"\n## pu-ray {verb}\n")[2].partition("\n## ")[0]
        assert command.help.split("\n")[0] in section.replace("\\", ""), verb
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert all(f"{flag}" in section for flag in parameter.opts if flag != "--help"), (verb, parameter.name)
