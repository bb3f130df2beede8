"""The tables of the serving benchmark, from its rows: plain arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

CONCURRENCIES = (1, 8, 32)
PEERS = ("litserve", "bentoml", "mlserver", "ray-serve")
PLAIN_RAY = "ray-serve"
_LIMITS = {"torch": "limit-torch", "onnx": "limit-onnx", "onnx-int8": "limit-int8"}
_ORDER = ("ours", *PEERS, "limit")

# A figure of one row; None where the row has none.
Figure = Callable[[Mapping[str, Any]], float | None]
Rows = Sequence[Mapping[str, Any]]


def at(concurrency: int, what: str) -> Figure:
    """`per_s`, `p50_ms`, `p99_ms` or `cpu_ms` under so many requests."""
    return lambda row: float(row["load"][str(concurrency)][what])


def memory(row: Mapping[str, Any]) -> float | None:
    """Of all processes, MiB."""
    return float(row["memory_mib"])


def serving_memory(row: Mapping[str, Any]) -> float | None:
    """Of what serves, MiB: everything where a server has nothing else."""
    return float(row["memory_mib"] if row["serving_mib"] is None else row["serving_mib"])


def kind(words: Sequence[str]) -> str:
    """What a process is called: Ray's own name for its workers, else its program, or the module that Python runs."""
    if not words:
        return "ended"
    name, *rest = words
    if name.startswith("ray::"):
        return name.partition(".")[0]  # behind it stands what it does at the moment
    name = name.rpartition("/")[2]
    if name.startswith("python"):
        if any(word.startswith("multiprocessing.") for word in rest):
            return "multiprocessing"
        if "-m" in rest[:-1]:
            return rest[rest.index("-m") + 1].rpartition(".")[2]
        name = next((word for word in rest if not word.startswith("-")), name).rpartition("/")[2]
    return name


def median(rows: Rows, contestant: str, figure: Figure) -> float | None:
    """Over the contestant's rounds."""
    values = [value for row in rows if row["contestant"] == contestant and (value := figure(row)) is not None]
    return statistics.median(values) if values else None


def compared(
    rows: Rows, one: str, other: str, figure: Figure, how: Callable[[float, float], float]
) -> list[float] | None:
    """`how` of both contestants' figures, round by round; None where they share no round."""
    found: dict[str, dict[int, float]] = {one: {}, other: {}}
    for row in rows:
        value = figure(row)
        if row["contestant"] in found and value is not None:
            found[row["contestant"]][row["round"]] = value
    shared = sorted(found[one].keys() & found[other].keys())
    return [how(found[one][each], found[other][each]) for each in shared] or None


def best_peer(rows: Rows, figure: Figure, largest: bool) -> str | None:
    """The peer with the best median."""
    medians = {peer: value for peer in PEERS if (value := median(rows, peer, figure)) is not None}
    return (max if largest else min)(medians, key=lambda peer: medians[peer]) if medians else None


# -- tables ------------------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _names(rows: Rows) -> list[str]:
    """Ours, peers, limits; in the order of their first rows otherwise."""
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    return sorted(names, key=lambda name: [name.startswith(prefix) for prefix in _ORDER].index(True))


def _above_limit(rows: Rows, name: str, engine: str) -> float | None:
    """CPU milliseconds per request at the highest concurrency beyond what decoding and the network cost."""
    found = compared(rows, name, _LIMITS[engine], at(CONCURRENCIES[-1], "cpu_ms"), lambda one, other: one - other)
    return statistics.median(found) if found else None


def _parts(rows: Rows, name: str) -> dict[str, float]:
    """CPU milliseconds per request at the highest concurrency by process, medians, those of a tenth and more."""
    own = [row["load"][str(CONCURRENCIES[-1])].get("cpu_ms_of", {}) for row in rows if row["contestant"] == name]
    kinds = {kind for each in own for kind in each}
    medians = {kind: statistics.median(each.get(kind, 0.0) for each in own) for kind in kinds}
    return {kind: value for kind, value in sorted(medians.items(), key=lambda item: -item[1]) if value >= 0.1}


def figures(rows: Rows) -> Iterator[str]:
    """One line for each contestant."""
    most = CONCURRENCIES[-1]
    heads = [f"requests/s at {each}" for each in CONCURRENCIES]
    heads += [f"p50, p99 ms at {each}" for each in CONCURRENCIES]
    heads += [f"CPU ms/request at {most}", "above the limit", "PSS MiB", "of what serves"]
    yield f"| contestant (rounds) | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 1) + "|"
    for name in _names(rows):
        own = [row for row in rows if row["contestant"] == name]
        cells = [_number(median(rows, name, at(each, "per_s"))) for each in CONCURRENCIES]
        for each in CONCURRENCIES:
            cells.append(", ".join(_number(median(rows, name, at(each, what))) for what in ("p50_ms", "p99_ms")))
        cells += [
            _number(median(rows, name, at(most, "cpu_ms"))),
            "-" if name.startswith("limit") else _number(_above_limit(rows, name, own[0]["engine"])),
            _number(median(rows, name, memory)),
            _number(median(rows, name, serving_memory)),
        ]
        yield f"| {name} ({len(own)}) | {' | '.join(cells)} |"


def _target(what: str, wanted: str, met: Callable[[float], bool] | None, found: list[float] | None) -> str:
    if found is None:
        return f"| {what} | {wanted} | not measured | |"
    middle = statistics.median(found)
    verdict = "" if met is None else "yes" if met(middle) else "**no**"
    return f"| {what} | {wanted} | {middle:.2f} ({min(found):.2f} to {max(found):.2f}) | {verdict} |"


def targets(rows: Rows) -> Iterator[str]:
    """What is promised, and whether it is kept; with Ray's proxy and with HAProxy."""
    most = CONCURRENCIES[-1]

    def ratio(one: str, other: str | None, figure: Figure) -> list[float] | None:
        return compared(rows, one, other, figure, lambda mine, its: mine / its) if other else None

    fastest = best_peer(rows, at(most, "per_s"), largest=True)
    quickest = best_peer(rows, at(1, "p50_ms"), largest=False)
    smallest = best_peer(rows, memory, largest=False)
    yield "| what | wanted | median (rounds) | kept |"
    yield "|---|---|---|---|"
    for ours in (name for name in _names(rows) if name.startswith("ours")):
        engine = next(row["engine"] for row in rows if row["contestant"] == ours)
        speed = ratio(ours, fastest, at(most, "per_s"))
        if engine == "onnx":
            yield _target(
                f"{ours} / {fastest or 'a peer'}, requests/s at {most}", ">= 1.3", lambda found: found >= 1.3, speed
            )
            yield _target(
                f"{ours} / {fastest or 'a peer'}, p99 at {most}",
                "<= 1",
                lambda found: found <= 1,
                ratio(ours, fastest, at(most, "p99_ms")),
            )
            yield _target(
                f"{ours} / {PLAIN_RAY}, requests/s at {most}",
                ">= 2.4",
                lambda found: found >= 2.4,
                ratio(ours, PLAIN_RAY, at(most, "per_s")),
            )
            yield _target(
                f"{ours} / {quickest or 'a peer'}, p50 at 1",
                "<= 1",
                lambda found: found <= 1,
                ratio(ours, quickest, at(1, "p50_ms")),
            )
            for what, figure in (("PSS, everything", memory), ("PSS of what serves", serving_memory)):
                yield _target(
                    f"{ours} / {smallest or 'a peer'}, {what}",
                    "<= 0.75",
                    lambda found: found <= 0.75,
                    ratio(ours, smallest, figure),
                )
        elif engine == "onnx-int8":
            yield _target(
                f"{ours} / {fastest or 'a peer'}, requests/s at {most}", ">= 2", lambda found: found >= 2, speed
            )
        else:
            yield _target(f"{ours} / {fastest or 'a peer'}, requests/s at {most}", "told", None, speed)
        above = compared(rows, ours, _LIMITS[engine], at(most, "cpu_ms"), lambda one, other: one - other)
        yield _target(f"{ours}, CPU ms/request above the limit", "<= 3", lambda found: found <= 3, above)


def tell(rows: Rows) -> Iterator[str]:
    """Everything as Markdown."""
    if not rows:
        yield "nothing was measured yet"
        return
    versions: dict[str, str] = {}
    for row in rows:
        versions |= row["versions"]
    yield ", ".join(f"{package} {version}" for package, version in sorted(versions.items())) + "."
    yield ""
    yield from figures(rows)
    yield ""
    for name in _names(rows):
        yield f"- {name}: {next(row['about'] for row in rows if row['contestant'] == name)}."
    yield ""
    yield f"CPU ms/request at {CONCURRENCIES[-1]}, by process:"
    yield ""
    for name in _names(rows):
        if parts := _parts(rows, name):
            yield f"- {name}: {', '.join(f'{kind} {value:.1f}' for kind, value in parts.items())}."
    yield ""
    yield from targets(rows)
