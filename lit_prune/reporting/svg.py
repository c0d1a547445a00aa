"""Matplotlib figures as inline SVG that follows a page's colours and needs nothing from outside."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Colours that stand for those of the page, so that a dark one shows other ones.
INK, FAINT, LINE, CARD = "#010201", "#010202", "#010203", "#010204"
SERIES = tuple(f"#0103{number:02x}" for number in range(1, 7))
_LIGHT = ("#2563a8", "#c2571a", "#2e7d4f", "#7a4fa3", "#9a7b12", "#5c6570")
_CSS = {
    INK: "currentColor",
    FAINT: "var(--faint, #6b7280)",
    LINE: "var(--line, #d9dce1)",
    CARD: "var(--card, #ffffff)",
    **{
        code: f"var(--series-{number}, {light})"
        for number, (code, light) in enumerate(zip(SERIES, _LIGHT, strict=True), start=1)
    },
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a model's name may have a dollar
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
}


@contextmanager
def figure(width: float = 4.6, height: float = 3.0) -> Iterator[Figure]:
    """A figure in the pages' style, to be drawn and turned into SVG within the context.

    Args:
        width: Inches.
        height: Inches.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own style shall not change the page
        matplotlib.rcParams.update(_STYLE)
        yield Figure((width, height), layout="constrained")


def inline(drawn: Figure, name: str, title: str) -> str:
    """A figure as an SVG element; the same figure gives the same text.

    Args:
        drawn: The figure, within its context.
        name: Begins the ids in it, so that several figures fit into one page.
        title: Says what is to be seen, for those who can't see it.
    """
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        drawn.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    box = re.search(r'viewBox="[^"]+"', text)
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]+(; )?", "", body)
    body = body.replace("xlink:href", "href").replace(
        'transform="rotate(-0 ', 'transform="rotate(0 '
    )
    body = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", body)
    for code, css in _CSS.items():
        body = body.replace(code, css)
    body = re.sub(r"\s*\n\s*", " ", body)
    label = escape(title)
    head = f'<svg class="plot" role="img" aria-label="{label}" {box[0] if box else ""}>'
    return f"{head}<title>{label}</title>{body.strip()}"
