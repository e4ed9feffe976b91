"""Pictures of a benchmark of operations, drawn from its file: time and memory against length, and the roofline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linearize.report.plots import INK, MUTED, OTHER, STUDENT, TEACHER, WINDOW, paint
from linearize.report.schema import Bench
from linearize.report.tables import length, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"sdpa": TEACHER, "mapped_linear": STUDENT, "separate maps": "#7cc3b8", "cumsum": WINDOW, "minimax": OTHER}
UNKNOWN = ["#c05a8f", "#b7a22a", "#5b8bd0", "#8a5a44"]
Lines = dict[str, list[tuple[int, dict[str, float]]]]


def lines(bench: Bench, word: str) -> Lines:
    """By contestant, (tokens, metrics) of the rows "`word` NAME TOKENS", shortest first."""
    found: Lines = {}
    for row in bench.rows:
        first, *name, length = row.name.split()
        if first == word and length.isdigit():
            known = {key: value for key, value in row.metrics.items() if value is not None}
            found.setdefault(" ".join(name), []).append((int(length), known))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}


def race(bench: Bench, word: str = "forward", even: float | None = None) -> bytes:
    """PNG: milliseconds, peak bytes, and shares of the ceilings. even: tokens of the break-even with SDPA."""
    field = lines(bench, word)
    others = iter(UNKNOWN * 9)
    colours = {name: COLOURS.get(name) or next(others) for name in field}

    def draw(figure: Figure) -> None:
        time, memory, roof = figure.subplots(1, 3)
        _against_length(time, field, colours, "ms")
        time.set(title="Time", ylabel="ms")
        if even is not None:
            time.axvline(even, color=MUTED, linewidth=1, linestyle=":")
            time.annotate(
                f"break-even\n{even:,.0f} tokens", (even, 0.02), xycoords=("data", "axes fraction"),
                xytext=(4, 0), textcoords="offset points", fontsize=7.5, color=MUTED,
            )  # fmt: skip
        _against_length(memory, field, colours, "peak_bytes")
        memory.set(title="Memory beside the inputs")
        memory.yaxis.set_major_formatter(lambda value, _: size(value))
        _roofline(roof, field, colours)
        figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(field), 5))

    return paint(draw, 3.6)


def _against_length(ax: Axes, field: Lines, colours: dict[str, str], metric: str) -> None:
    from matplotlib.ticker import NullLocator

    for name, points in field.items():
        known = [(tokens, metrics[metric]) for tokens, metrics in points if metrics.get(metric)]
        if known:
            x, y = zip(*known, strict=True)
            ax.plot(x, y, marker="o", markersize=3, color=colours[name], label=name)
    lengths = sorted({tokens for points in field.values() for tokens, _ in points})
    ax.set(xscale="log", yscale="log", xlabel="tokens")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(lengths[:: max(1, len(lengths) // 4)])
    ax.xaxis.set_major_formatter(lambda value, _: length(round(value)))


def _roofline(ax: Axes, field: Lines, colours: dict[str, str]) -> None:
    """Both axes in units of the ceilings: operations per byte over those at which the two meet, and the share of the
    matrix product's rate."""
    from matplotlib.ticker import NullFormatter

    drawn = False
    for name, points in field.items():
        for tokens, metrics in points:
            share, moved = metrics.get("flops_share"), metrics.get("bytes_share")
            if share and moved:
                drawn = True
                ax.plot([share / moved], [share], "o", markersize=4, color=colours[name])
                if tokens in (points[0][0], points[-1][0]):
                    ax.annotate(
                        length(tokens), (share / moved, share), xytext=(3, -9), textcoords="offset points", fontsize=7
                    )
    ax.set(title="Roofline", xlabel="operations per byte (1: the ridge)")
    if not drawn:
        ax.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center", color=MUTED)
        return
    ax.set(xscale="log", yscale="log", ylabel="share of a matrix product's rate")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    low, high = ax.get_xlim()
    bottom = min(ax.get_ylim()[0], 0.1)
    left = min(low, bottom)
    ax.plot([left, 1, max(high, 2)], [left, 1, 1], color=INK, linewidth=1)
    ax.set(ylim=(bottom, 1.4), xlim=(min(low, 0.5), max(high, 2)))
