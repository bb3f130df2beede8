"""The pages that are made from the code: `make docs` writes them, and a test holds them equal to it.

docs/errors.md comes from the source text, docs/reference/job.md from the models of the settings and
docs/reference/cli.md from the command line. Ray and torch are never imported.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import annotated_types
import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pu_ray import config, errors, schema
from pu_ray.cli import app

ROOT = Path(__file__).parents[2]
PACKAGES = ("pu_ray", "serving", "cluster")
MADE = "<!-- Made from the code by `make docs`: do not edit. -->"

# -- what may be read in the source ------------------------------------------------------------------------

UNKNOWN = "{...}"
MOST_ALTERNATIVES = 4
Names = dict[str, list[ast.expr]]

_CONSTANTS = {name: value for name, value in vars(schema).items() if name.isupper() and isinstance(value, str)}


def _assigned(statement: ast.AST) -> Names:
    """Every value that a statement gives to a plain name, blocks inside it included."""
    found: Names = {}
    for node in ast.walk(statement):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                for name, value in pairs:
                    if isinstance(name, ast.Name):
                        found.setdefault(name.id, []).append(value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None and isinstance(node.target, ast.Name):
            found.setdefault(node.target.id, []).append(node.value)
    return found


@dataclass(frozen=True)
class Reader:
    """Reads texts out of expressions.

    Attributes:
        names: What each name may stand for, at this place of the source.
        chosen: Conditions whose outcome is settled, as source text.
    """

    names: Names
    chosen: Mapping[str, bool]

    def texts(self, node: ast.expr | None, depth: int = 0) -> list[str]:
        """The texts that an expression may be; nothing for None."""
        if node is None or (isinstance(node, ast.Constant) and node.value is None):
            return []
        if isinstance(node, ast.JoinedStr):
            return self._each([self._parts(part, depth) for part in node.values])
        if isinstance(node, ast.IfExp):
            outcome = self.chosen.get(ast.unparse(node.test))
            branches = [node.body, node.orelse] if outcome is None else [node.body if outcome else node.orelse]
            return _unique([text for branch in branches for text in self.texts(branch, depth)])
        if isinstance(node, ast.BoolOp):
            return _unique([text for value in node.values for text in self.texts(value, depth)])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._each([self.texts(node.left, depth), self.texts(node.right, depth)])
        if isinstance(node, ast.Name) and depth < 3 and node.id in self.names:
            return _unique([text for value in self.names[node.id] for text in self.texts(value, depth + 1)])
        return [self._placeholder(node)]

    def _parts(self, part: ast.expr, depth: int) -> list[str]:
        if not isinstance(part, ast.FormattedValue):
            return [self._placeholder(part)]
        found = self.texts(part.value, depth) if isinstance(part.value, ast.IfExp) else [self._placeholder(part.value)]
        return [repr(text) if part.conversion == ord("r") and text != UNKNOWN else text for text in found]

    @staticmethod
    def _each(choices: list[list[str]]) -> list[str]:
        made = _unique(["".join(parts) for parts in itertools.product(*choices)])
        return made if len(made) <= MOST_ALTERNATIVES else ["".join(parts[0] for parts in choices)]

    def _placeholder(self, node: ast.expr, depth: int = 0) -> str:
        """What stands for a value inside a text: a constant itself, else its name in braces."""
        match node:
            case ast.Constant(value=value):
                return str(value)
            case ast.Attribute(attr=name) if name in _CONSTANTS:
                return _CONSTANTS[name]
            case ast.Attribute(attr=name):
                return f"{{{name.strip('_')}}}"
            case ast.Name(id=name):
                known = self.names.get(name, [])
                if len(known) == 1 and name.isupper() and depth < 3 and not isinstance(known[0], ast.Call):
                    return self._placeholder(known[0], depth + 1)
                return f"{{{name.strip('_')}}}"
            case ast.Call(func=ast.Name(id="str" | "repr"), args=[only]):
                return self._placeholder(only, depth)
            case ast.Call(func=ast.Name(id="len")):
                return "{n}"
        return UNKNOWN


def _unique(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(" ".join(text.split("\n")) for text in texts))


@dataclass(frozen=True)
class Found:
    """A call in the source, with what its names stand for there."""

    module: str
    call: ast.Call
    names: Names

    def variants(self) -> list[Reader]:
        """One reader, or two where a condition decides which message this is."""
        first = self.call.args[0] if self.call.args else None
        if isinstance(first, ast.IfExp):
            condition = ast.unparse(first.test)
            return [Reader(self.names, {condition: outcome}) for outcome in (True, False)]
        return [Reader(self.names, {})]

    def keyword(self, name: str) -> ast.expr | None:
        """The value of a keyword argument."""
        return next((given.value for given in self.call.keywords if given.arg == name), None)


def calls(wanted: Callable[[str], bool], packages: tuple[str, ...] = PACKAGES) -> Iterator[Found]:
    """Every call of such a name in the packages, file by file."""
    for file in sorted(file for package in packages for file in (ROOT / package).rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        tree = ast.parse(file.read_text())
        names: Names = {}
        for statement in tree.body:
            if isinstance(statement, ast.Assign | ast.AnnAssign):
                names |= _assigned(statement)
        yield from _calls_below(tree, module, names, wanted)


def _calls_below(node: ast.AST, module: str, names: Names, wanted: Callable[[str], bool]) -> Iterator[Found]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and wanted(node.func.id):
        yield Found(module, node, dict(names))
    for _, value in ast.iter_fields(node):
        if isinstance(value, ast.AST):
            yield from _calls_below(value, module, names, wanted)
        elif isinstance(value, list):
            here = dict(names)  # a block: what it assigns is known in the statements that follow
            for child in value:
                if isinstance(child, ast.AST):
                    yield from _calls_below(child, module, here, wanted)
                if isinstance(child, ast.stmt) and not isinstance(child, ast.FunctionDef | ast.ClassDef):
                    here |= _assigned(child)


# -- docs/errors.md ----------------------------------------------------------------------------------------

KINDS = {kind.__name__: kind for kind in errors.PuRayError.__subclasses__()}
# What makes an error for users, by name; a refused setting becomes an error of the configuration.
MAKERS = KINDS | {errors.RefusedSetting.__name__: errors.ConfigError}

# Mistakes whose message is put together while the program runs: what it says, by code.
PUT_TOGETHER = {
    "config/invalid-serve-arguments": "what pydantic says of an argument in a Serve config file",
    "config/invalid-value": "what pydantic says of a value that is not allowed",
    "config/several-wrong-settings": "several settings are wrong; each is told, with a code of its own",
    "config/token-refused": "what the server answered",
    "cluster/server-busy": "what the server answered",
    "cluster/server-fault": "what the server answered",
    "data/request-refused": "what the server answered: see [the server's answers](#what-a-server-answers)",
    "gate/bounds-violated": "the student, and what it does not do well enough",
}

# Codes that stand for one mistake in several wordings.
SAME_MISTAKE = {"config/invalid-value"}

IMAGE_CODES = {
    "truncated": "The file ends too early. Fetch it again.",
    "not_an_image": "These bytes are no picture, for example an HTML page under the name of one.",
    "too_large": "More bytes than `lake.max_image_bytes` or more pixels than `lake.max_image_px`; raise them if it is "
    "meant to be there.",
    "unsupported": "A picture of a kind that is not decoded (JPEG 2000, HEIC, AVIF, PSD, ...), or a JPEG of more than "
    "100 scans. Convert it.",
    "unreadable": "A damaged file, a row without bytes, a URI that leads nowhere; or a shard that cannot be read, for "
    "which one such row stands.",
}


@dataclass(frozen=True)
class Entry:
    """One place where an error is made."""

    code: str
    problem: str
    module: str
    where: tuple[str, ...]
    allowed: tuple[str, ...]
    hint: tuple[str, ...]


def makers() -> Iterator[Found]:
    """Every call that makes an error for users, but those in pu_ray/errors.py that pass a code on."""
    for each in calls(MAKERS.__contains__):
        if each.module != "pu_ray.errors" or isinstance(each.keyword("slug"), ast.Constant):
            yield each


def entries() -> list[Entry]:
    """Every error that the three packages make, by code."""
    found = []
    for each in makers():
        assert isinstance(each.call.func, ast.Name)
        kind = MAKERS[each.call.func.id].kind
        for reader in each.variants():
            [slug] = reader.texts(each.keyword("slug"))
            for problem in reader.texts(each.call.args[0]):
                parts = (tuple(reader.texts(each.keyword(name))) for name in ("where", "allowed", "hint"))
                found.append(Entry(f"{kind}/{slug}", problem, each.module, *parts))
    return sorted(found, key=lambda entry: (entry.code, _sortable(entry.problem), entry.module))


def refused_combinations() -> list[tuple[str, str]]:
    """What the models of a job's settings refuse beyond single values: code and message."""
    found = []
    for each in calls(errors.RefusedSetting.__name__.__eq__, ("pu_ray",)):
        reader = Reader(each.names, {})
        [slug] = reader.texts(each.keyword("slug"))
        found += [(f"{errors.ConfigError.kind}/{slug}", problem) for problem in reader.texts(each.call.args[0])]
    return found


def server_answers() -> dict[str, list[str]]:
    """What a server says to a request that it refuses, by status."""
    found: dict[str, list[str]] = {}
    for each in calls("ProtocolError".__eq__, ("serving",)):
        status, message = each.call.args
        by = str(status.value) if isinstance(status, ast.Constant) else "413, 415 or 422"
        found.setdefault(by, []).extend(Reader(each.names, {}).texts(message))
    return {status: sorted(set(found[status]), key=_sortable) for status in sorted(found)}


def _has_words(text: str) -> bool:
    return bool(re.search(r"\w", re.sub(r"\{[^}]*\}", "", text)))


def _sortable(text: str) -> str:
    return re.sub(r"[^a-z0-9 ]", "", text.lower())


def _escaped(text: str) -> str:
    """Plain text in Markdown; what stands between backticks is left alone."""
    parts = text.replace("\n", " ").split("`")
    parts[::2] = [re.sub(r"([<*\[\]|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _place(entry: Entry) -> str:
    told = [f"`{entry.module}`"]
    if where := [text for text in entry.where if UNKNOWN not in text]:
        told[0] += ", at " + " or ".join(f"`{text}`" for text in where)
    if allowed := list(filter(_has_words, entry.allowed)):
        told.append("allowed: " + _escaped("; or ".join(allowed)))
    if entry.hint:
        known = list(filter(_has_words, entry.hint))
        told.append("what to do: " + (_escaped("; or: ".join(known)) or "told with the error"))
    return "- " + ". ".join(part if number == 0 else part[0].upper() + part[1:] for number, part in enumerate(told))


ERRORS_HEAD = """\
# Errors

MADE

Every error says what was wrong, where, what is allowed, what was there instead, and what to do:

```text
EXAMPLE
```

In brackets stands its code: the kind of error, which decides the exit status, and the mistake. Codes stay; wordings may
change. `docs/errors.md#config-unknown-key` leads to a code's entry below. With `--json` the same parts are a document
on stdout: `{"error": {"code", "kind", "problem", "where", "allowed", "got", "hint"}}`. Who makes a mistake gets no
traceback; `-v` shows it. Below, words in braces stand for what is filled in.

| kind | exit status | what it means |
|---|---|---|
KINDS
| usage | 2 | No such verb or option, or an argument is missing; `--help` shows them. |
| interrupted | INTERRUPTED | Ctrl-C. The last line says how to go on: finished work is kept. |
| internal | 1 | A fault of PU-Ray, with its traceback: please report it. |

The last three have no kinds of mistakes below them: with `--json` the word itself is the code.
"""

IMAGES_HEAD = """\
## What an unusable image is called

An image of the lake that cannot be used stops nothing: its row has one of these codes, the report counts them, and
their share may be at most `lake.max_error_share`. A labeled or test image that cannot be used stops the run.

| code | meaning |
|---|---|"""

SERVER_HEAD = """
## What a server answers

As `{"error": "..."}` with the status, over gRPC with the code that belongs to it ([serving.md](serving.md)).

| status | message |
|---|---|"""


def errors_page() -> str:
    """docs/errors.md."""
    kinds = [
        f"| [{kind.kind}](#{kind.kind}-exit-status-{kind.exit_status}) | {kind.exit_status} | {_said(kind)} |"
        for kind in KINDS.values()
    ]
    head = _filled(
        ERRORS_HEAD, EXAMPLE=_example(), KINDS="\n".join(kinds), INTERRUPTED=str(errors.INTERRUPTED_EXIT_STATUS)
    )
    lines = [head]
    found = entries()
    for kind in KINDS.values():
        lines += [f"## {kind.kind}: exit status {kind.exit_status}", "", _said(kind), ""]
        mine = [entry for entry in found if entry.code.startswith(f"{kind.kind}/")]
        for code, places in itertools.groupby(mine, lambda it: it.code):
            # GitHub's own anchor of such a heading has no hyphen for the slash.
            lines += [f'<a id="{anchor_of(code)}"></a>', "", f"### {code}", ""]
            for message, same in itertools.groupby(places, _message):
                lines += [message, "", *dict.fromkeys(map(_place, same)), ""]
    lines += [IMAGES_HEAD, *(f"| `{code}` | {IMAGE_CODES[code]} |" for code in schema.ERROR_CODES), SERVER_HEAD]
    for status, messages in server_answers().items():
        lines += [f"| {status} | {_escaped(message)} |" for message in messages]
    return "\n".join(lines) + "\n"


def anchor_of(code: str) -> str:
    """Where the page tells of a code."""
    return code.replace("/", "-")


def _message(entry: Entry) -> str:
    if _has_words(entry.problem) and entry.code not in PUT_TOGETHER:
        return f"**{_escaped(entry.problem)}**"
    told = PUT_TOGETHER[entry.code]
    return told[0].upper() + told[1:] + "."


def _filled(text: str, **values: str) -> str:
    return functools.reduce(lambda told, name: told.replace(name, values[name]), values, text.replace("MADE", MADE))


def _example() -> str:
    try:
        config.load(ROOT / "cluster/jobs/smoke.yaml", ["scorer.pior=0.2"], environment={})
    except errors.ConfigError as error:
        shown = f"error ({error.code}): {error}".split("\n")
        return "\n".join(line if len(line) < 100 else f"{line[:90]}..." for line in shown)
    raise AssertionError("an unknown key must be refused")


def _said(thing: Any) -> str:
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


# -- docs/reference/job.md ---------------------------------------------------------------------------------


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_of, typing.get_args(annotation))), None)


def _takes(annotation: Any, metadata: list[Any]) -> str:
    """What a setting may be, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _takes(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return ", ".join(f"`{_yaml(value)}`" for value in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of: {_takes(arguments[0], [])}"
        return "[" + ", ".join(_takes(each, []) for each in arguments) + "]"
    if origin is dict:
        return f"mapping of names to: {_takes(arguments[1], [])}"
    if arguments:
        return ", or ".join(_takes(each, metadata) for each in arguments)
    if _section_of(annotation) is not None:
        return "a section"
    words = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text", type(None): "`null`"}[
        annotation
    ]
    return words if annotation in (bool, type(None)) else words + _bounds(metadata)


def _bounds(metadata: list[Any]) -> str:
    told = []
    for each in itertools.chain.from_iterable(
        each.metadata if isinstance(each, FieldInfo) else [each] for each in metadata
    ):
        for kind, sign in ((annotated_types.Gt, ">"), (annotated_types.Ge, "≥"), (annotated_types.Lt, "<")):
            if isinstance(each, kind):
                told.append(f"{sign} {_bound(getattr(each, kind.__name__.lower()))}")
        if isinstance(each, annotated_types.Le):
            told.append(f"≤ {_bound(each.le)}")
        if isinstance(each, annotated_types.MinLen):
            told.append("not empty")
        if pattern := getattr(each, "pattern", None):
            told.append(f"like `{pattern}`")
    return f", {', '.join(dict.fromkeys(told))}" if told else ""


def _bound(value: Any) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _yaml(value: Any) -> str:
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plainly(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Setting:
    """One row of the reference."""

    path: str
    takes: str
    default: str
    description: str


def sections() -> Iterator[tuple[str, type[BaseModel], list[Setting]]]:
    """Every section with its settings, the job itself first."""
    yield from _sections(config.JobConfig, "", None)


def _sections(
    model: type[BaseModel], path: str, given: BaseModel | None
) -> Iterator[tuple[str, type[BaseModel], list[Setting]]]:
    own, below = [], []
    for name, field in model.model_fields.items():
        key = f"{path}.{field.alias or name}".lstrip(".")
        default = getattr(given, name) if given is not None else field.get_default(call_default_factory=True)
        section = _section_of(field.annotation)
        if section is not None:
            below.append((section, key, default if isinstance(default, BaseModel) else None))
        if section is None or default is None:
            required = field.is_required() and given is None
            told = "**required**" if required else f"`{_yaml(_plainly(default))}`"
            own.append(Setting(key, _takes(field.annotation, field.metadata), told, field.description or ""))
    yield path, model, own
    for section, key, default in below:
        yield from _sections(section, key, default)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _rounded(value: Any) -> Any:
    return [round(each, 4) if isinstance(each, float) else each for each in value] if isinstance(value, list) else value


JOB_HEAD = """\
# The job file

MADE

One YAML file; what is not written has its default. Values come in layers, and later ones win: the defaults, the
recipe, the file, the environment (`PREFIXSCORER__PRIOR=0.2`), and `--set scorer.prior=0.2`. `pu-ray config show
JOB.yaml` prints every value with its origin, `pu-ray config schema` a JSON Schema for editors. An unknown key is an
error, and the nearest known one is named.

Sections: SECTIONS; then [recipes](#recipes) and [refused combinations](#refused-combinations).
"""

RECIPES_HEAD = """\
## Recipes

`recipe: default` is all of the above. `recipe: paper` has the settings of Xu et al. (2019) and of their published
code, and any of them can be set on top. [method.md](../method.md) says why the default differs.

| setting | default | paper |
|---|---|---|"""


def job_page() -> str:
    """docs/reference/job.md."""
    top = [path for path, _, _ in sections() if path and "." not in path]
    links = ", ".join(f"[{path}](#{_anchor(path)})" for path in top)
    lines = [_filled(JOB_HEAD, PREFIX=config.ENVIRONMENT_PREFIX, SECTIONS=links)]
    for path, model, settings in sections():
        depth = "###" if "." in path else "##"
        lines += [f"{depth} {path or 'The job itself'}", "", *_paragraphs(model), ""]
        if not settings:
            continue
        lines += ["| setting | takes | default | what it is |", "|---|---|---|---|"]
        lines += [
            f"| `{it.path}` | {_in_cell(it.takes)} | {_in_cell(it.default)} | {_escaped(it.description)} |"
            for it in settings
        ]
        lines.append("")
    defaults = {it.path: it.default for _, _, settings in sections() for it in settings}
    lines.append(RECIPES_HEAD)
    for path, value in _flat(config.RECIPES["paper"]):
        paper = f"`{_yaml(_rounded(value))}`"
        lines.append(f"| `{path}` | {defaults[path]} | {paper}{' (the same)' if paper == defaults[path] else ''} |")
    lines += ["", "## Refused combinations", "", "Each is found before anything starts (exit 2).", ""]
    lines += [
        f"- [`{code}`](../errors.md#{anchor_of(code)}): {_escaped(text)}" for code, text in refused_combinations()
    ]
    return "\n".join(lines) + "\n"


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|")


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def _paragraphs(thing: Any) -> list[str]:
    paragraphs = (inspect.getdoc(thing) or "").split("\n\n")
    return "\n\n".join(" ".join(_escaped(paragraph).split()) for paragraph in paragraphs).split("\n")


# -- docs/reference/cli.md ---------------------------------------------------------------------------------


def verbs() -> Iterator[tuple[str, Any]]:
    """Every verb with its command, groups left out."""

    def below(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        if not hasattr(command, "commands"):
            yield path, command
            return
        for name, child in command.commands.items():
            yield from below(child, f"{path} {name}".strip())

    yield from below(typer.main.get_command(app), "")


def _value_of(parameter: Any, hints: Mapping[str, Any]) -> str:
    if getattr(parameter, "is_flag", False):
        return ""
    if parameter.metavar:
        return str(parameter.metavar)
    kind = hints[parameter.name]
    while (arguments := typing.get_args(kind)) and kind not in (int, float):
        kind = arguments[0]
    return {int: "N", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")


def _default_of(parameter: Any) -> str:
    if parameter.required or parameter.default is None or parameter.default is False:
        return ""
    return f"`{parameter.default}`"


def _limits_of(parameter: Any) -> str:
    low, high = getattr(parameter, "min", None), getattr(parameter, "max", None)
    told = [f"from {low}" if low is not None else "", f"to {high}" if high is not None else ""]
    return " ".join(filter(None, told))


CLI_HEAD = """\
# The command line

MADE

`pu-ray VERB ...`; `pu-ray VERB --help` says the same as this page, and `pu-ray --version` the version. Results go to
stdout, narration and errors to stderr. Words in capitals are yours to fill in; what stands in brackets may be left
out.

| exit status | meaning |
|---|---|
| 0 | done |
| 1 | a fault of PU-Ray |
KINDS
| INTERRUPTED | interrupted with Ctrl-C; the last line says how to go on |

| verb | what it does |
|---|---|
VERBS"""


def cli_page() -> str:
    """docs/reference/cli.md."""
    found = list(verbs())
    kinds = []
    for kind in KINDS.values():
        link = f"[{kind.kind}](../errors.md#{kind.kind}-exit-status-{kind.exit_status})"
        also = " Also: no such verb or option." if kind is errors.ConfigError else ""
        kinds.append(f"| {kind.exit_status} | {link}: {_said(kind)}{also} |")
    listed = [
        f"| [`{verb}`](#{_anchor(f'pu-ray {verb}')}) | {_escaped(command.help or '')} |" for verb, command in found
    ]
    interrupted = str(errors.INTERRUPTED_EXIT_STATUS)
    lines = [_filled(CLI_HEAD, KINDS="\n".join(kinds), INTERRUPTED=interrupted, VERBS="\n".join(listed))]
    for verb, command in found:
        hints = typing.get_type_hints(command.callback) if command.callback else {}
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        options = [each for each in command.params if each.param_type_name == "option" and "--help" not in each.opts]
        usage = " ".join([f"pu-ray {verb}", *(_value_of(each, hints) or each.name.upper() for each in arguments)])
        lines += [
            "",
            f"## pu-ray {verb}",
            "",
            _escaped(command.help or ""),
            "",
            f"`{usage}{' [OPTIONS]' if options else ''}`",
        ]
        if command.params:
            lines += ["", "| | default | |", "|---|---|---|"]
        for each in [*arguments, *options]:
            value = _value_of(each, hints)
            name = value if each in arguments else " ".join(filter(None, [", ".join(each.opts), value]))
            notes = [each.help or ""]
            if limits := _limits_of(each):
                notes.append(f"({limits})")
            lines.append(f"| `{name}` | {_default_of(each)} | {_escaped(' '.join(notes))} |")
    return "\n".join(lines) + "\n"


# -- all of them -------------------------------------------------------------------------------------------

PAGES: dict[str, Callable[[], str]] = {
    "docs/errors.md": errors_page,
    "docs/reference/job.md": job_page,
    "docs/reference/cli.md": cli_page,
}


def write() -> None:
    """Write every page where it differs."""
    for path, make in PAGES.items():
        page, text = ROOT / path, make()
        changed = not page.exists() or page.read_text() != text
        if changed:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(text)
        print(f"{path}: {'written' if changed else 'is as the code'}")


if __name__ == "__main__":
    write()
