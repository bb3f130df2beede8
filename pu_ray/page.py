"""What the HTML pages share: templates, plots and pictures that are part of the page, one style.

A page is one file without external requests.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from pu_ray.board import counted

_TEMPLATES = Path(__file__).parent / "templates"

# Plots use one colour per meaning, and colours that work on a light and on a dark page.
BLUE, ORANGE, GREY = "#3b7dd8", "#d2691e", "#8a8f98"
# No one colour can be read as text on both; these are --soft of the style.
INK, INK_ON_DARK = "#5d6570", "#a3abb5"

_CSS_PX_PER_INCH = 96


@dataclass(frozen=True)
class Picture:
    """A picture that is part of the page.

    Attributes:
        light: Data URI.
        dark: Another for dark pages, or None where one serves both.
        width: In CSS pixels; with `height` it keeps the place before the picture is drawn.
        height: In CSS pixels.
        alt: What it shows, in words.
        title: Short, for the caption.
    """

    light: str
    dark: str | None
    width: int
    height: int
    alt: str
    title: str


def percent(rate: Mapping[str, Any]) -> str:
    """A share, as pages show it."""
    return f"{100 * rate['value']:.2f} %"


def interval(rate: Mapping[str, Any]) -> str:
    """Its interval."""
    return f"{100 * rate['low']:.2f} to {100 * rate['high']:.2f}"


def template(name: str) -> jinja2.Template:
    """A template of the package; what is filled in is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "interval": interval,
        "size": size,
        "mib": mib,
        "hours": hours,
        "money": money,
    }
    environment.globals["counted"] = counted
    return environment.get_template(name)


def text(name: str) -> str:
    """A file of the package's templates as it is."""
    return (_TEMPLATES / name).read_text()


def size(count: int) -> str:
    """Bytes, as people read them."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{count:,} bytes" if unit == "bytes" else f"{value:,.1f} {unit}"


def mib(count: int | None) -> str:
    """Bytes of memory, in MiB; nothing where nothing is known."""
    return "" if count is None else f"{count / 2**20:,.0f}"


def hours(value: float | None) -> str:
    """Hours of a processor: those of a short stage are not nothing."""
    return "not known" if value is None else f"{value:,.1f}" if value >= 100 else f"{value:,.4f}" if value else "0"


def money(value: float | None) -> str:
    """An amount in whatever currency."""
    return "not known" if value is None else "< 0.01" if 0 < value < 0.01 else f"{value:,.2f}" if value else "0"


def inline(picture: bytes, kind: str) -> str:
    """A picture as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def plot(draw: Callable[[Any], None], width: float = 7.2, height: float = 2.6) -> str:
    """An SVG plot as a data URI.

    Args:
        draw: Draws on matplotlib's axes.
        width: In inches.
        height: In inches.
    """
    return inline(_svg(draw, width, height, GREY), "svg+xml")


def themed_plot(draw: Callable[[Any], None], alt: str, title: str, width: float = 4.8, height: float = 2.9) -> Picture:
    """An SVG plot in two inks, for light and dark pages; at its width it can be read on a phone.

    Args:
        draw: Draws on matplotlib's axes.
        alt: What it shows, in words.
        title: For the caption.
        width: In inches.
        height: In inches.
    """
    drawn = _svg(draw, width, height, INK)
    light, dark = (inline(each, "svg+xml") for each in (drawn, drawn.replace(INK.encode(), INK_ON_DARK.encode())))
    return Picture(light, dark, round(width * _CSS_PX_PER_INCH), round(height * _CSS_PX_PER_INCH), alt, title)


def _svg(draw: Callable[[Any], None], width: float, height: float, ink: str) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    draw(axes)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=ink)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(ink)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(ink)
    if (legend := axes.get_legend()) is not None:
        for text in legend.get_texts():
            text.set_color(ink)
    buffer = io.BytesIO()
    # Neither a creation date nor random ids: the same run gives the same page.
    with matplotlib.rc_context({"svg.hashsalt": "pu-ray"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()
