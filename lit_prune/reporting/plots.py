"""The plots of reports and comparisons: inline SVG from plain types, no state of pyplot."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from lit_prune.reporting.svg import CARD, INK, SERIES, figure, inline

#: From few that are kept to all; light to dark, on light and dark pages.
_HEAT = LinearSegmentedColormap.from_list("kept", ["#f4c26b", "#86b89b", "#22628f"], N=20)
#: Layers up to which cells of the heat map have gaps.
_MOST_CELLS = 48
#: Of a loss, largest divided by least, from which it is drawn on a logarithmic scale.
_WIDE = 30

#: Characters of a line of a long legend, and of a name beside a point.
_LEGEND, _NAME = 46, 16

Curve = Sequence[Sequence[Any]]


def width_heat_map(layers: Mapping[str, Mapping[str, Sequence[int]]]) -> str | None:
    """Share of each layer's units that is kept, a row for each axis that was cut.

    Args:
        layers: axis -> {"dense", "kept"}: units of each layer, or one number for ``hidden``.

    Returns:
        SVG, or None if nothing was cut.
    """
    rows = {a: w for a, w in layers.items() if list(w["dense"]) != list(w["kept"])}
    if not rows:
        return None
    number = max(len(widths["dense"]) for widths in layers.values())
    shares = [_shares(widths, number) for widths in rows.values()]
    least = min(math.floor(min(map(min, shares)) * 10) / 10, 0.9)
    with figure(height=1.15 + 0.55 * len(rows)) as drawn:
        axes: Any = drawn.subplots()
        gaps = {"edgecolors": CARD, "linewidth": 1.2} if number <= _MOST_CELLS else {}
        sides = [layer - 0.5 for layer in range(number + 1)]
        heights = [row - 0.5 for row in range(len(rows) + 1)]
        mesh = axes.pcolormesh(sides, heights, shares, cmap=_HEAT, vmin=least, vmax=1.0, **gaps)
        axes.invert_yaxis()
        axes.set_yticks(range(len(rows)), [f"{a}\n{_span(w)}" for a, w in rows.items()])
        axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=8.5)
        axes.set_xlabel("layer")
        _whole_numbers(axes)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        bar: Any = drawn.colorbar(mesh, ax=axes, format=PercentFormatter(1.0, decimals=0), pad=0.03)
        bar.set_ticks([least, (least + 1) / 2, 1.0])
        bar.set_label("kept")
        bar.solids.set_edgecolor("face")
        bar.outline.set_visible(False)
        return inline(drawn, "widths", f"Kept share of {', '.join(rows)} in each layer")


def _shares(widths: Mapping[str, Sequence[int]], number: int) -> list[float]:
    """Kept share in each layer; what all layers share is in each."""
    found = [k / d if d else 1.0 for k, d in zip(widths["kept"], widths["dense"], strict=True)]
    return found * number if len(found) == 1 else found


def _span(widths: Mapping[str, Sequence[int]]) -> str:
    """Such as `1,024 to 1,152` on a line and `of 1,536` on the next."""
    kept, dense = (sorted({min(widths[w]), max(widths[w])}) for w in ("kept", "dense"))
    return "\nof ".join(" to ".join(f"{n:,}" for n in numbers) for numbers in (kept, dense))


def score_histogram(axis: str, histogram: Mapping[str, Any]) -> str:
    """Scores of an axis' units, those that stay on those that go.

    Args:
        axis: Its name.
        histogram: `log10`, `edges`, `kept`, `removed` and `zeros`, as
            `lit_prune.reporting.distribution` makes them.

    Returns:
        SVG.
    """
    kept, removed, edges = (histogram[name] for name in ("kept", "removed", "edges"))
    total = [a + b for a, b in zip(kept, removed, strict=True)]
    with figure() as drawn:
        axes: Any = drawn.subplots()
        axes.stairs(total, edges, baseline=removed, fill=True, color=SERIES[0], label="kept")
        axes.stairs(removed, edges, fill=True, color=SERIES[1], label="removed")
        axes.set_xlabel("log₁₀ of the score" if histogram["log10"] else "score")
        axes.set_ylabel("units")
        axes.set_ylim(0, max([*total, 1]) * 1.05)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.grid(axis="x", visible=False)
        _legend(axes, 2)
        return inline(drawn, f"scores-{_plain(axis)}", f"Scores of {axis}: kept and removed units")


def curves(name: str, title: str, lines: Mapping[str, Curve], *, percent: bool = False) -> str:
    """Logged values over optimizer steps.

    Args:
        name: The plot's name, for ids.
        title: What it shows.
        lines: label -> [[step, value], …]; a value that is None is left out.
        percent: Whether values are shares.

    Returns:
        SVG.
    """
    known = {k: [(x, y) for x, y in line if y is not None] for k, line in lines.items()}
    with figure() as drawn:
        axes: Any = drawn.subplots()
        for (label, points), color in zip(known.items(), cycle(SERIES), strict=False):
            mark = "o" if len(points) < 2 else None
            steps = {"drawstyle": "steps-post", "marker": "o"} if label.startswith("prune/") else {}
            style: dict[str, Any] = {"marker": mark, "markersize": 4, **steps}
            axes.plot(*zip(*points, strict=True), color=color, label=label, **style)
        values = [y for points in known.values() for _, y in points]
        if values and min(values) > 0 and max(values) / min(values) > _WIDE:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("optimizer step")
        _whole_numbers(axes)
        _legend(axes, 2)
        return inline(drawn, _plain(name), f"{title} over optimizer steps")


def perplexity_bars(models: Mapping[str, float]) -> str:
    """Perplexity of the dense, the pruned and the recovered model.

    Args:
        models: name -> perplexity.

    Returns:
        SVG.
    """
    with figure(height=0.75 + 0.5 * len(models)) as drawn:
        axes: Any = drawn.subplots()
        names, values = list(models), list(models.values())
        colors = [SERIES[5], SERIES[1], SERIES[0]]
        bars = axes.barh(names, values, height=0.6, color=colors[: len(names)])
        axes.bar_label(bars, labels=[f"{value:,.2f}" for value in values], padding=5, color=INK)
        axes.set_xlim(0, max([*values, 0.0]) * 1.2 or 1)
        axes.invert_yaxis()
        axes.set_xlabel("perplexity (lower is better)")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        return inline(drawn, "perplexity", f"Perplexity of {', '.join(names)}")


def perplexity_against_parameters(points: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity of several models against their parameters; protocols have a colour each.

    Args:
        points: Each `name`, `parameters`, `perplexity` and `protocol`.

    Returns:
        SVG.
    """
    kinds = list(dict.fromkeys(str(point["protocol"]) for point in points))
    ends = [point["parameters"] / 1e6 for point in points] or [0.0]
    span, middle = (max(ends) - min(ends)) or 1.0, (max(ends) + min(ends)) / 2
    with figure(height=3.6) as drawn:
        axes: Any = drawn.subplots()
        for kind, color in zip(kinds, cycle(SERIES), strict=False):
            own = [point for point in points if str(point["protocol"]) == kind]
            own = [p for p in own if _known(p["perplexity"])]
            sizes = [point["parameters"] / 1e6 for point in own]
            text = textwrap.fill(kind, _LEGEND)
            axes.scatter(sizes, [p["perplexity"] for p in own], color=color, s=28, label=text)
            shared: dict[int, list[Mapping[str, Any]]] = {}
            for size, point in zip(sizes, own, strict=True):  # one label for points side by side
                shared.setdefault(round(size / span * 12), []).append({**point, "x": size})
            for near in shared.values():
                at = (near[-1]["x"], max(point["perplexity"] for point in near))
                is_right = at[0] > middle
                label = axes.annotate(
                    ", ".join(_brief(point["name"]) for point in near),
                    at,
                    (-5 if is_right else 5, 5),
                    textcoords="offset points",
                    ha="right" if is_right else "left",
                    fontsize=8.5,
                )
                label.set_in_layout(False)
        axes.margins(x=0.18, y=0.15)
        axes.set_xlabel("parameters, millions")
        axes.set_ylabel("perplexity")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        _legend(axes, 1)
        return inline(drawn, "perplexity-parameters", "Perplexity against parameters")


def latency_against_multiple(points: Sequence[Mapping[str, Any]]) -> str:
    """Latency against the number of which widths are multiples, with ranges.

    Args:
        points: Each `name` (of its series), `multiple`, `latency_ms` and its range `low`, `high`.

    Returns:
        SVG.
    """
    with figure(height=3.2) as drawn:
        axes: Any = drawn.subplots()
        multiples = sorted({point["multiple"] for point in points})
        names = dict.fromkeys(str(point["name"]) for point in points)
        for name, color in zip(names, cycle(SERIES), strict=False):
            own = sorted((p for p in points if str(p["name"]) == name), key=lambda p: p["multiple"])
            places = [multiples.index(point["multiple"]) for point in own]
            middle = [point["latency_ms"] for point in own]
            below = [point["latency_ms"] - point["low"] for point in own]
            above = [point["high"] - point["latency_ms"] for point in own]
            bars: Any = [below, above]
            style: dict[str, Any] = {"marker": "o", "markersize": 4.5, "capsize": 3}
            axes.errorbar(places, middle, yerr=bars, color=color, label=name, **style)
        axes.set_xticks(range(len(multiples)), [f"{multiple:g}" for multiple in multiples])
        axes.set_xlabel("widths are multiples of")
        axes.set_ylabel("latency, ms")
        axes.margins(x=0.1)
        _legend(axes, 2)
        return inline(drawn, "latency-multiple", "Latency against multiples of widths")


def _brief(name: str) -> str:
    """The end of a long name."""
    last = name.rstrip("/").rpartition("/")[2].removeprefix("embedded:")
    return last if len(last) <= _NAME else f"{last[: _NAME - 1]}…"


def _legend(axes: Axes, columns: int) -> None:
    """A legend above the plot, if there is something to name."""
    _, labels = axes.get_legend_handles_labels()
    if labels:
        longest = max(map(len, labels))
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=columns if longest < 24 else 1,
            borderaxespad=0.2,
            columnspacing=1.4,
            handlelength=1.4,
        )


def _whole_numbers(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _plain(text: str) -> str:
    """A name for ids."""
    return "".join(letter if letter.isalnum() else "-" for letter in text)
