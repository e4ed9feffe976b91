"""The pictures of a report, drawn from report.json alone: PNG bytes, light background, one palette throughout."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from linearize.report.looks import Pair
from linearize.report.schema import Bytes, Curve, Report, Stage
from linearize.report.tables import count, label, length, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1f2933", "#6b7785", "#e6e9ed", "#ffffff"
TEACHER, STUDENT, WINDOW, OTHER = "#4a5568", "#0b7a75", "#d9822b", "#8e5aa8"
SHADES = ["#f7faf9", "#cfe8e3", "#84c7bb", "#2a9d8f", "#0b6468", "#06303c"]
COLOURS = {
    "teacher": TEACHER, "student": STUDENT, "zero-token window": WINDOW, "window-only student": OTHER,
    "swapped": "#c3ccd5", "after transfer": "#7cc3b8", "linear_off": "#c05a8f", "window_off": "#d99abf",
}  # fmt: skip
WIDTH = 9.0
DPI = 144

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER, "figure.facecolor": PAPER, "savefig.facecolor": PAPER, "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.8, "axes.titlesize": 10, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 10, "axes.labelsize": 9, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.8, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "xtick.labelsize": 8, "ytick.labelsize": 8, "xtick.major.size": 3, "ytick.major.size": 3,
    "xtick.minor.size": 0, "ytick.minor.size": 0, "legend.frameon": False, "legend.fontsize": 8.5,
    "lines.linewidth": 1.8, "lines.solid_capstyle": "round", "figure.constrained_layout.use": True,
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """A picture with its words."""

    name: str
    title: str
    caption: str
    png: bytes


def drawings(report: Report) -> list[Drawing]:
    """Every picture that this report has the numbers for, in reading order."""
    out = []
    converted = [site.layer for site in report.sites if site.converted and site.layer is not None]
    for stage in report.stages:
        for template, losses in per_layer(stage).items():
            # Stages number the converted layers; where some were left alone that is not the layer's number.
            if sorted(losses) == list(range(len(converted))):
                losses = {converted[i]: values for i, values in losses.items()}
            what = "" if template in ("layer.#", "#") else f" ({template.replace('#', 'n')})"
            out.append(
                Drawing(
                    f"loss-{stage.name}-{len(out)}",
                    f"Loss by layer and step: {stage.name}{what}",
                    "Each layer learns by itself. Left: a line per layer, darker is deeper. Right: the same as a map.",
                    loss_by_layer(stage, losses),
                )
            )
    steps = {stage.name: stage.series["loss"] for stage in report.stages if _measured(stage.series.get("loss"))}
    if steps:
        words = "The loss that was minimised, as logged."
        out.append(Drawing("loss", "Loss by step", words, loss_by_step(report.stages)))
    if any(row.by_position for row in report.rows):
        words = "Where context helps: perplexity at each position of a document, averaged over neighbouring positions."
        out.append(Drawing("position", "Perplexity by position", words, perplexity_by_position(report)))
    if len(report.state) > 1:
        words = "What one sequence keeps while decoding, summed over all layers."
        out.append(Drawing("state", "State against cache", words, state_against_cache(report.state, report.break_even)))
    if any(row.residual_error for row in report.rows):
        words = "How far the residual stream is from the teacher's after each layer, relative to its size."
        out.append(Drawing("residual", "Error by depth", words, error_by_depth(report)))
    found = report.diagnostics
    if found.entropy or found.monotonicity:
        words = (
            "A dot per head, teacher left, student right; the bar is the layer's mean. Softmax attention is spiky (low "
            "entropy) and follows its scores (monotonicity near 1); a linear map that keeps both imitates it well."
        )
        out.append(Drawing("heads", "Attention, head by head", words, heads(report)))
    if found.pictures:
        words = "Rows are queries, columns are keys, darker is more. The colour follows the square root of the weight."
        out.append(Drawing("attention", "Attention weights", words, attention(report)))
    if found.gazes and found.image:
        words = (
            "Where the marked patch looks (or, without a mark, the token before the patches): weights over the image, "
            "darker is more. The colour follows the square root, teacher and student of a row on one scale."
        )
        out.append(Drawing("gazes", "Attention over the image", words, gazes(report)))
    for name, curve in report.curves.items():
        out.append(Drawing(f"curve-{name}", f"{curve.y_label.capitalize()} against {curve.x_label}", "", follow(curve)))
    return out


def per_layer(stage: Stage) -> dict[str, dict[int, list[float]]]:
    """The stage's series whose names hold a layer's number, by name with `#` in its place, then by layer."""
    groups: dict[str, dict[int, list[float]]] = {}
    for key, values in stage.series.items():
        found = re.search(r"\d+", key)
        if found and _measured(values):
            template = key[: found.start()] + "#" + key[found.end() :]
            groups.setdefault(template, {})[int(found.group())] = _floats(values)
    return groups


def _floats(values: Any) -> list[float]:
    return [math.nan if v is None else float(v) for v in values]


def _measured(values: Any) -> bool:
    return bool(values) and any(v is not None for v in values)


def paint(draw: Callable[[Any], None], height: float, width: float = WIDTH) -> bytes:
    """PNG of what `draw(figure)` draws.

    Neither pyplot nor a global style is touched: convert() runs in people's notebooks.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI)
        FigureCanvasAgg(figure)
        draw(figure)
        out = io.BytesIO()
        # No software or date in the file: the same report gives the same bytes.
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def colormap() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("linearize", SHADES)


def _steps(stage: Stage, length: int) -> np.ndarray:
    logged = stage.series.get("step", [])
    return np.array(_floats(logged)) if len(logged) == length else np.linspace(1, max(stage.steps, length), length)


def _log_axis(axis: Any) -> None:
    """Plain numbers on a log axis that spans little: 0.1, 0.2, 0.5 rather than 10^-1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1.0,) if high / low > 1e3 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def loss_by_layer(stage: Stage, losses: Mapping[int, list[float]]) -> bytes:
    """Lines and a heat-map of one per-layer loss."""
    layers = sorted(losses)
    grid = np.array([losses[layer] for layer in layers])
    steps = _steps(stage, grid.shape[1])
    smooth = np.array([_smooth(line, len(line) // 100) for line in grid])
    shades = colormap()

    def draw(figure: Figure) -> None:
        from matplotlib.colors import LogNorm

        lines, picture = figure.subplots(1, 2, width_ratios=[1.15, 1])
        figure.get_layout_engine().set(wspace=0.08)  # type: ignore[union-attr]
        for i in range(len(layers)):
            depth = i / max(1, len(layers) - 1)
            lines.plot(steps, smooth[i], color=shades(0.35 + 0.6 * depth), linewidth=1.4)
        for i in (0, -1) if len(layers) > 1 else (0,):
            lines.annotate(
                f"layer {layers[i]}", (steps[-1], smooth[i, -1]), xytext=(5, 0), textcoords="offset points",
                fontsize=8, va="center", color=shades(0.5 if i == 0 else 0.95),
            )  # fmt: skip
        lines.set(title="each layer", xlabel="step", ylabel="loss")
        positive = grid[np.isfinite(grid) & (grid > 0)]
        if positive.size and np.nanmin(grid) > 0:
            lines.set_yscale("log")
            _log_axis(lines.yaxis)
        norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01)) if positive.size else None
        edges = np.concatenate([[0.0], steps]) if steps[0] > 0 else np.append(steps, steps[-1] + 1)
        mesh = picture.pcolormesh(
            edges, np.arange(len(layers) + 1), grid, cmap=shades, norm=norm, linewidth=0, rasterized=True
        )
        every = max(1, math.ceil(len(layers) / 12))
        picture.set_yticks(np.arange(len(layers))[::every] + 0.5, [str(layer) for layer in layers[::every]])
        picture.invert_yaxis()
        picture.grid(False)
        picture.set(title="the same, as a map", xlabel="step", ylabel="layer")
        for side in ("left", "bottom"):
            picture.spines[side].set_visible(False)
        bar = figure.colorbar(mesh, ax=picture, pad=0.02, aspect=28)
        bar.outline.set_visible(False)  # type: ignore[operator]
        _log_axis(bar.ax.yaxis)

    return paint(draw, 3.6)


def loss_by_step(stages: list[Stage]) -> bytes:
    """One panel per stage that logged its loss: as logged, and smoothed."""
    shown = [stage for stage in stages if _measured(stage.series.get("loss"))]

    def draw(figure: Figure) -> None:
        for ax, stage in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
            values = np.array(_floats(stage.series["loss"]))
            steps = _steps(stage, len(values))
            ax.plot(steps, values, color="#b8dcd6", linewidth=1)
            ax.plot(steps, _smooth(values, max(1, len(values) // 25)), color=STUDENT)
            ax.set(title=stage.name, xlabel="step", ylabel="loss")
            ax.set_xlim(left=0)

    return paint(draw, 2.9)


def _smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over `reach` neighbours on both sides; what is missing does not count."""
    return np.array([_mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))])


def _mean(values: np.ndarray) -> float:
    """Of what is finite; NaN, without numpy's warning, where nothing is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def perplexity_by_position(report: Report) -> bytes:
    """A line per row that has one."""

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for row in report.rows:
            if not row.by_position or row.name in ("swapped", "window_off"):
                continue
            nll = _smooth(np.array(_floats(row.by_position)), max(1, len(row.by_position) // 60))
            ax.plot(
                np.arange(1, len(nll) + 1), np.exp(nll), color=COLOURS.get(row.name, MUTED),
                label=label(report, row.name), zorder=3 if row.name in ("teacher", "student") else 2,
            )  # fmt: skip
        ax.set_yscale("log")
        _log_axis(ax.yaxis)
        ax.set(xlabel="position in the document", ylabel="perplexity")
        ax.set_xlim(left=0)
        ax.legend(loc="upper right")

    return paint(draw, 3.3)


def break_even(state: Mapping[int, Bytes]) -> float | None:
    """Tokens at which the state becomes the smaller, by straight lines between the lengths known; None if never there.

    Before the first length known both are taken to go on as between the first two.
    """
    points = [(tokens, b.state_bytes - b.kv_bytes) for tokens, b in sorted(state.items())]
    if len(points) < 2 or points[-1][1] >= 0:
        return None
    if points[0][1] < 0:
        (x0, y0), (x1, y1) = points[:2]
        slope = (y1 - y0) / (x1 - x0)
        return max(1.0, x0 - y0 / slope) if slope < 0 else None
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if y0 >= 0 > y1:
            return x0 + (x1 - x0) * y0 / (y0 - y1)
    return None


def state_against_cache(state: Mapping[int, Bytes], even: float | None = None) -> bytes:
    """Log-log; the crossing is marked. even: where they cross, if the plan says so."""
    tokens = np.array(sorted(state), dtype=float)
    kept = {"state": [state[int(t)].state_bytes for t in tokens], "cache": [state[int(t)].kv_bytes for t in tokens]}
    even = break_even(state) if even is None else even

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

        ax = figure.subplots()
        left = min(tokens[0], even / 4 if even else tokens[0])
        x = np.geomspace(left, tokens[-1], 200)
        lines = {name: _extend(x, tokens, np.array(values, dtype=float)) for name, values in kept.items()}
        ax.plot(x, lines["cache"], color=TEACHER, linewidth=2)
        ax.plot(x, lines["state"], color=STUDENT, linewidth=2)
        ax.fill_between(
            x, lines["state"], lines["cache"], where=lines["state"] < lines["cache"], color=STUDENT, alpha=0.09, lw=0
        )
        ax.set(xscale="log", yscale="log", xlabel="tokens in the sequence", ylabel="bytes per sequence")
        if even and left < even < tokens[-1]:
            y = float(np.interp(even, x, lines["state"]))
            ax.plot([even], [y], "o", color=WINDOW, markersize=7, zorder=4)
            ax.annotate(
                f"break-even at {even:,.0f} tokens", (even, y), xytext=(10, -16), textcoords="offset points",
                color="#a85f14",
            )  # fmt: skip
        # Names stand at the lines' ends: no legend to look up.
        for name, words, colour in (("cache", "teacher's KV cache", TEACHER), ("state", "state", STUDENT)):
            values = kept[name]
            ax.plot(tokens, values, "o", color=colour, markersize=4)
            ax.annotate(
                f"{words}\n{size(values[-1])} at {length(tokens[-1])}", (tokens[-1], values[-1]), xytext=(10, 0),
                textcoords="offset points", va="center", color=colour, fontsize=8.5,
            )  # fmt: skip
        every = [2.0**k for k in range(0, 40, 2 if x[-1] / x[0] > 100 else 1) if x[0] <= 2.0**k <= x[-1] * 1.01]
        ax.xaxis.set_major_locator(FixedLocator(every))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda t, _: length(t)))
        ax.margins(y=0.12)
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(FixedLocator([b for k in range(0, 50, 3) if low <= (b := 2.0**k) <= high]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda b, _: size(b)))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_formatter(NullFormatter())

    return paint(draw, 3.6)


def _extend(x: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Straight lines through the known points, the first one continued to the left."""
    slope = (values[1] - values[0]) / (known[1] - known[0])
    return np.maximum(np.where(x < known[0], values[0] + slope * (x - known[0]), np.interp(x, known, values)), 1.0)


def error_by_depth(report: Report) -> bytes:
    """A line per row that has one."""

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        ax = figure.subplots()
        for row in report.rows:
            if row.residual_error and row.name != "teacher":
                error = _floats(row.residual_error)
                colour = COLOURS.get(row.name, MUTED)
                ax.plot(range(len(error)), error, "o-", markersize=4, color=colour, label=label(report, row.name))
        ax.set(xlabel="after layer", ylabel="relative error")
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(loc="upper left")

    return paint(draw, 3.0)


def heads(report: Report) -> bytes:
    """Entropy and monotonicity: in each layer a thin line per head from teacher to student."""
    found = report.diagnostics
    shown = [
        (title, words, pair)
        for title, words, pair in (
            ("entropy of the weights", "nats", found.entropy),
            ("monotonicity: weights against scores", "rank correlation", found.monotonicity),
        )
        if pair
    ]

    def draw(figure: Figure) -> None:
        axes = np.atleast_1d(figure.subplots(len(shown), 1, sharex=True))
        for ax, (title, words, pair) in zip(axes, shown, strict=True):
            _slopes(ax, pair)
            ax.set(title=title, ylabel=words)
        numbers = found.layers or list(range(len(shown[0][2].teacher)))
        every = max(1, math.ceil(len(numbers) / 16))
        axes[-1].set_xticks(range(0, len(numbers), every), [str(n) for n in numbers[::every]])
        axes[-1].set_xlabel("layer")
        axes[0].legend(
            *axes[0].get_legend_handles_labels(), loc="lower right", bbox_to_anchor=(1, 1.0), ncols=2, borderaxespad=0.2
        )

    return paint(draw, 0.6 + 2.5 * len(shown))


def _slopes(ax: Axes, pair: Pair) -> None:
    reach, crowded = 0.2, sum(map(len, pair.teacher)) > 150
    means: dict[str, list[float]] = {"teacher": [], "student": []}
    for layer, (one, other) in enumerate(zip(pair.teacher, pair.student, strict=True)):
        heads = {"teacher": np.array(_floats(one)), "student": np.array(_floats(other))}
        ends = [layer - reach, layer + reach]
        # In a crowd the lines would hide the points they join.
        if not crowded:
            for y in zip(*heads.values(), strict=True):
                ax.plot(ends, y, color="#ccd3da", linewidth=0.8, zorder=1)
        for x, (name, values) in zip(ends, heads.items(), strict=True):
            dots = {"s": 6, "alpha": 0.4} if crowded else {"s": 16, "alpha": 0.75}
            ax.scatter(np.full(len(values), x), values, color=COLOURS[name], linewidth=0, zorder=2, **dots)
            means[name].append(_mean(values))
    for side, (name, values) in zip((-reach, reach), means.items(), strict=True):
        places = np.arange(len(values)) + side
        width = 0.16 if crowded else 0.1
        ax.hlines(values, places - width, places + width, color=COLOURS[name], linewidth=2.4, zorder=3, label=name)
    ax.grid(False, axis="x")


def attention(report: Report, most: int = 4) -> bytes:
    """The first `most` pictures: teacher above, student below."""
    pictures = report.diagnostics.pictures[:most]
    shades = colormap()

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2, len(pictures), squeeze=False)
        for column, picture in enumerate(pictures):
            for line, which in enumerate(("teacher", "student")):
                ax = axes[line, column]
                weights = np.sqrt(picture.unpack(which))
                ax.imshow(weights, cmap=shades, vmin=0, vmax=1, interpolation="nearest")
                ax.grid(False)
                ax.set_xticks([])
                ax.set_yticks([])
                for side in ax.spines.values():
                    side.set(visible=True, color=GRID, linewidth=0.8)
                if line == 0:
                    ax.set_title(f"layer {picture.layer}, head {picture.head}", loc="center", fontsize=9)
                if column == 0:
                    ax.set_ylabel(which, color=TEACHER if line == 0 else STUDENT, fontweight="bold")
        bar = figure.colorbar(axes[0, 0].images[0], ax=axes, shrink=0.5, aspect=24, pad=0.015)
        bar.set_ticks([0, 0.1**0.5, 0.3**0.5, 1], labels=["0", "0.1", "0.3", "1"])
        bar.outline.set_visible(False)  # type: ignore[operator]

    return paint(draw, 2 * 8.2 / max(3, len(pictures)) + 0.5)


def gazes(report: Report, most: int = 9) -> bytes:
    """Three gazes a line: the image with the token marked, the teacher's weights, the student's."""
    from matplotlib.image import imread

    found = report.diagnostics
    assert found.image is not None
    image = imread(io.BytesIO(base64.b64decode(found.image)))
    shown = found.gazes[:most]
    lines = math.ceil(len(shown) / 3)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(lines, 9, squeeze=False)
        for ax in axes.flat:
            ax.axis("off")
        for i, gaze in enumerate(shown):
            trio = axes[i // 3, 3 * (i % 3) : 3 * (i % 3) + 3]
            rows, columns = gaze.grid
            trio[0].imshow(image, cmap="gray", extent=(-0.5, columns - 0.5, rows - 0.5, -0.5))
            if gaze.patch is not None:
                trio[0].plot(gaze.patch % columns, gaze.patch // columns, "s", color=WINDOW, markersize=5, mfc="none")
            trio[0].set_title(f"layer {gaze.layer}, head {gaze.head}", loc="center", fontsize=7, fontweight="normal")
            for ax, which in zip(trio[1:], ("teacher", "student"), strict=True):
                ax.imshow(gaze.unpack(which), cmap=colormap(), vmin=0, vmax=1, interpolation="nearest")
                ax.set_title(which, loc="center", fontsize=7, color=COLOURS[which])

    return paint(draw, 1.25 * lines + 0.2)


def follow(curve: Curve) -> bytes:
    """One quantity along another."""

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter

        ax = figure.subplots()
        ax.plot(_floats(curve.x), _floats(curve.y), "o-", color=STUDENT, markersize=4)
        ax.set(xlabel=curve.x_label, ylabel=curve.y_label)
        if max(_floats(curve.x), default=0) >= 1e4:
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x) if x else "0"))

    return paint(draw, 3.0)
