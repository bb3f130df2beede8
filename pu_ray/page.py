"""What the HTML pages share: templates, plots and pictures that are part of the page, one style.

A page is one file without external requests.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATES = Path(__file__).parent / "templates"

# Plots use one colour per meaning, and colours that work on a light and on a dark page.
BLUE, ORANGE, GREY = "#3b7dd8", "#e0822e", "#8a8f98"


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
    environment.filters |= {"percent": percent, "interval": interval}
    return environment.get_template(name)


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
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    draw(axes)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=GREY)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(GREY)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(GREY)
    buffer = io.BytesIO()
    # Neither a creation date nor random ids: the same run gives the same page.
    with matplotlib.rc_context({"svg.hashsalt": "pu-ray"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return inline(buffer.getvalue(), "svg+xml")
