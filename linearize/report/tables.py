"""Tables: built once, rendered for the terminal, for markdown and for HTML. What is missing is an en dash, never 0."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from linearize.report.schema import Bench, Result, Row, Run

MISSING = "–"
LENGTHS = (1024, 8192, 65536)

#: Row names in the order shown, with the words a reader sees.
LABELS = {
    "teacher": "teacher",
    "swapped": "swapped",
    "after transfer": "after transfer",
    "student": "student",
    "window-only student": "window-only student",
    "zero-token window": "zero-token window",
    "none": "no attention",
    "teacher, other seeds": "teacher, other seeds",
    "window_off": "window off",
    "linear_off": "linear off",
}


@dataclass(frozen=True)
class Link:
    """A cell that leads somewhere; in the terminal only its text is shown."""

    text: str
    target: str


Cell = str | Link


@dataclass
class Table:
    """Cells as text, columns after the first to the right. strong: rows set in bold. notes: lines under the table."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    strong: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def without_empty(self, keep: Sequence[str] = ()) -> Table:
        """The same without columns in which nothing was measured, except the first and those in `keep`."""
        shown = [
            i for i, name in enumerate(self.columns)
            if i == 0 or name in keep or any(row[i] != MISSING for row in self.rows)
        ]  # fmt: skip
        self.columns = [self.columns[i] for i in shown]
        self.rows = [[row[i] for i in shown] for row in self.rows]
        return self


# ------------------------------------------------------------------------------------------- numbers as text
def number(value: float | None, digits: int = 2, spread: float | None = None) -> str:
    if value is None:
        return MISSING
    # A perplexity of 1234.5 does not deserve two decimals.
    digits = max(0, digits - 1) if abs(value) >= 100 else digits
    text = f"{value:.{digits}f}"
    return text if spread is None else f"{text} ± {spread:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None else f"{100 * value:.{digits}f} %"


def times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}×" if value >= 10 else f"{value:.3f}×"


def size(value: float | None) -> str:
    """Bytes, in powers of 1024."""
    if value is None:
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" or value == int(value) else f"{value:.1f} {unit}"


def count(value: float | None) -> str:
    """How many: 512, 1.02k, 520k, 1.5M."""
    if value is None:
        return MISSING
    if value >= 1e6:
        return f"{value / 1e6:.3g}M"
    return f"{value / 1e3:.3g}k" if value >= 1e3 else f"{value:.0f}"


def length(tokens: float) -> str:
    """Tokens of a sequence: 512, 1k, 64k where they are multiples of 1024."""
    return f"{tokens / 1024:.0f}k" if 1024 <= tokens < 2**20 and tokens % 1024 == 0 else count(tokens)


def seconds(value: float | None) -> str:
    if value is None:
        return MISSING
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{value / 3600:.1f} h"


# ------------------------------------------------------------------------------------------- the tables
def label(run: Run, name: str) -> str:
    """How a row is called: the student by the last stage it went through."""
    if name == "student":
        tuned = [stage.name for stage in run.stages if stage.name.startswith("finetune")]
        if tuned:
            return "after fine-tuning" if "full" in tuned[-1] else "after LoRA"
    return LABELS.get(name, name)


def ordered(rows: Sequence[Row]) -> list[Row]:
    """In LABELS' order; rows it does not know last, as they came."""
    order = {name: i for i, name in enumerate(LABELS)}
    return sorted(rows, key=lambda row: order.get(row.name, len(order)))


def kept_bytes(run: Run, row: Row, tokens: int) -> int | None:
    """What a row's model keeps per sequence after `tokens` tokens: its own figure, else the run's for teacher and
    student."""
    if row.cache_bytes is not None:
        return row.cache_bytes.get(tokens)
    if tokens not in run.state:
        return None
    if row.name == "teacher":
        return run.state[tokens].kv_bytes
    return run.state[tokens].state_bytes if row.name in ("swapped", "after transfer", "student") else None


def quality_table(run: Run, lengths: Sequence[int] = LENGTHS) -> Table:
    """Every row of the evaluation; columns that nobody measured are left out, the four main ones stay.

    lengths: numbers of tokens, a column each for what one sequence keeps then.
    """
    if run.task != "text":
        return encoder_table(run.rows, run.task, run.evaluation, lambda name: label(run, name))
    teacher = run.row("teacher")
    cells: list[list[Cell]] = []
    rows = ordered(run.rows)
    for row in rows:
        cells.append([
            label(run, row.name),
            number(row.perplexity, 2, row.spread.get("perplexity")),
            times(_ratio(row, teacher)) if row.name != "teacher" else MISSING,
            number(row.kl, 3, row.spread.get("kl")),
            percent(row.top1),
            number(row.copy_nll, 3, row.spread.get("copy_nll")),
            percent(row.gap_closed, 0),
            *(size(kept_bytes(run, row, tokens)) for tokens in lengths),
        ])  # fmt: skip
    main = ["perplexity", "KL", "top-1", "copy NLL"]
    notes = [f"Measured on {run.evaluation}."] if run.evaluation else []
    notes.append("KL(teacher || student) in nats per token. Ratio: to the teacher's perplexity.")
    if any(row.copy_nll is not None for row in rows):
        notes.append("Copy: tokens seen before, but not in the window. Closed: of the window's loss on them.")
    names = {row.name for row in rows}
    if names & {"window_off", "linear_off"}:
        notes.append("Window off, linear off: the student with one of its branches alone.")
    columns = ["", "perplexity", "ratio", "KL", "top-1", "copy NLL", "closed"]
    table = Table(
        "Quality, and what one sequence keeps" if lengths else "Quality",
        [*columns, *(f"at {length(tokens)}" for tokens in lengths)],
        cells,
        strong={i for i, row in enumerate(rows) if row.name == "student"},
        notes=notes,
    )
    return table.without_empty(keep=main)


#: of encoders: the columns of each task, with the words under the table
ENCODERS: dict[str, list[tuple[str, str]]] = {
    "image": [
        ("top-1", "accuracy"), ("share", "retained"), ("agree", "agreement"), ("KL", "kl"), ("cosine", "cosine"),
        ("patches", "dense_cosine"),
    ],
    "sentences": [
        ("top-1", "accuracy"), ("Spearman", "spearman"), ("share", "retained"), ("agree", "agreement"), ("KL", "kl"),
        ("cosine", "cosine"), ("tokens", "dense_cosine"), ("MRR", "mrr"),
    ],
    "diffusion": [
        ("distance", "distance"), ("PSNR", "psnr"), ("SSIM", "ssim"), ("answers", "trajectory"), ("class", "accuracy"),
        ("share", "retained"), ("agree", "agreement"), ("cosine", "cosine"), ("Fréchet", "frechet"),
        ("random", "frechet_random"), ("recall", "recall"), ("coverage", "coverage"), ("seen", "tiles_seen"),
        ("count kept", "count_kept"), ("placement kept", "placement_kept"), ("pairs alike", "pairs_alike"),
    ],
}  # fmt: skip
_PERCENT = (
    "accuracy", "retained", "agreement", "mrr", "recall", "coverage", "count_kept", "placement_kept", "pairs_alike",
)  # fmt: skip
_DRAWINGS = (
    "Distance: root mean square to the teacher's drawing from the same noise, in -1 ... 1. Answers: relative squared "
    "error at the teacher's own steps.",
    "Class: a judge sees the class asked for. Fréchet: of the judge's features (no FID); random: of a fixed random "
    "network's.",
)


def encoder_table(rows: Sequence[Row], task: str, evaluation: str, name: Callable[[str], str]) -> Table:
    """Every row of an encoder's evaluation; columns that nobody measured are left out. name: what a row is called."""
    shown = ordered(rows)
    columns, steps = ENCODERS[task], sorted({n for row in rows for n in row.image_seconds})
    cells: list[list[Cell]] = [
        [
            name(row.name),
            *(
                _share(row, key) if key in _PERCENT else number(getattr(row, key), 4, row.spread.get(key))
                for _, key in columns
            ),
            *(number(row.image_seconds.get(n), 3) for n in steps),
        ]
        for row in shown
    ]
    notes = [f"Measured on {evaluation}."] if evaluation else []
    if any(row.retained is not None for row in rows):
        notes.append("Share: of the teacher's own score, the first column.")
    if any(row.agreement is not None for row in rows):
        notes.append("Agree: the likeliest class is the teacher's. KL(teacher || student) in nats per example.")
    if steps:
        notes.append("s at ... steps: seconds of one picture end to end, teacher and student in turns.")
    if task == "diffusion":
        notes += _DRAWINGS
        if any(row.tiles_seen is not None for row in rows):
            notes.append(
                "Mosaics: class, cosine and Fréchet are of their pictures. Seen: how many a judge sees; count kept: as "
                "many as in the teacher's; placement kept: of the pictures there, those seen in their places; pairs "
                "alike: two places that are to show one class, which nobody named, do."
            )
    what = "patches" if task == "image" else "tokens"
    if task != "diffusion":
        notes.append(f"Cosine: of the pooled feature to the teacher's; {what}: the same of each last hidden state.")
    if any(row.mrr is not None for row in rows):
        notes.append("MRR: how high the second half of a passage ranks among all, looked for by the first.")
    strong = {i for i, row in enumerate(shown) if row.name == "student"}
    titles = ["", *(title for title, _ in columns), *(f"s at {n} steps" for n in steps)]
    return Table("Quality", titles, cells, strong=strong, notes=notes).without_empty()


def _share(row: Row, key: str) -> str:
    value, spread = getattr(row, key), row.spread.get(key)
    return percent(value, 2) if value is None or spread is None else f"{100 * value:.2f} ± {100 * spread:.2f} %"


def parts_table(run: Run) -> Table | None:
    """The main figure on the named parts of what was measured on, one column each; None where there are no parts."""
    words, metric = {
        "text": ("Perplexity by part of the text", "perplexity"),
        "sentences": ("Cosine by part of the sentences", "cosine"),
        "image": ("Agreement by part of the images", "agreement"),
        "diffusion": ("", ""),
    }[run.task]
    return _by_part(
        words, run, lambda row: {part: found[metric] for part, found in row.parts.items() if metric in found}
    )


def buckets_table(run: Run) -> Table | None:
    """Perplexity by range of positions; None where it was not measured."""
    return _by_part("Perplexity by position", run, lambda row: row.buckets)


def _by_part(title: str, run: Run, parts: Callable[[Row], dict[str, float | None]]) -> Table | None:
    found = {row.name: parts(row) for row in run.rows}
    names = list(dict.fromkeys(part for values in found.values() for part in values))
    if not names:
        return None
    cells: list[list[Cell]] = [
        [label(run, row.name), *(number(found[row.name].get(part)) for part in names)]
        for row in ordered(run.rows)
        if found[row.name]
    ]
    return Table(title, ["", *names], cells)


def state_table(run: Run) -> Table:
    """State against cache by length."""
    cells: list[list[Cell]] = [
        [
            length(tokens),
            size(b.state_bytes),
            size(b.kv_bytes),
            times(b.state_bytes / b.kv_bytes if b.kv_bytes else None),
        ]
        for tokens, b in sorted(run.state.items())
    ]
    notes = [] if run.break_even is None else [f"The state is the smaller from {run.break_even:,} tokens on."]
    return Table("Bytes per sequence", ["tokens", "state", "KV cache", "state / KV"], cells, notes=notes)


def stages_table(run: Run) -> Table:
    """What each stage cost."""
    cells: list[list[Cell]] = [
        [
            stage.name, count(stage.tokens), str(stage.steps), seconds(stage.seconds),
            number(stage.tokens_per_second, 0), number(stage.first, 4), number(stage.last, 4),
        ]
        for stage in run.stages
    ]  # fmt: skip
    ran = [f"{op} by {', '.join(names)}" for op, names in run.implementations.items()]
    notes = [f"Attention ran as {'; '.join(ran)}."] if ran else []
    return Table("Stages", ["", "tokens", "steps", "time", "tokens/s", "first loss", "last loss"], cells, notes=notes)


def results_table(results: Sequence[tuple[str, Result]], link: Callable[[str], str]) -> Table:
    """The README's table, a line per result file. link: a file's path relative to recipes/results -> where it leads."""
    cells: list[list[Cell]] = []
    for path, run in results:
        ppl = {row.name: row.perplexity for row in run.rows}
        student, teacher = run.row("student"), run.row("teacher")
        longest = max(run.state, default=None)
        saved = run.state[longest] if longest else None
        spread = student.spread.get("perplexity") if student else None
        windows = [ppl.get(name) for name in ("zero-token window", "window-only student")]
        cells.append([
            Link(path.removesuffix(".json"), link(path)),
            str(len(run.seeds)),
            count(run.trained_tokens),
            number(ppl.get("teacher")),
            number(ppl.get("swapped")),
            number(ppl.get("student"), 2, spread),
            times(_ratio(student, teacher)),
            " / ".join(number(value) for value in windows) if any(v is not None for v in windows) else MISSING,
            number(student.kl if student else None, 3),
            percent(student.gap_closed if student else None, 0),
            number(student.marginal if student else None, 3),
            times(saved.state_bytes / saved.kv_bytes if saved and saved.kv_bytes else None),
            str(run.commit),
        ])  # fmt: skip
    columns = [
        "run", "seeds", "tokens", "teacher", "swapped", "student", "× teacher", "window 0 / trained", "KL",
        "copy gap closed", "linear branch, nats", "state / KV", "commit",
    ]  # fmt: skip
    return Table("", columns, cells)


def encoder_results(results: Sequence[tuple[str, Result]], link: Callable[[str], str]) -> Table:
    """The README's table of encoders and vision transformers, a line per result file."""
    cells: list[list[Cell]] = []
    for path, run in results:
        rows = {row.name: row for row in run.rows}
        main = next((m for m in ("accuracy", "spearman") if any(getattr(row, m) is not None for row in run.rows)), None)
        student = rows.get("student")

        def figure(name: str, main: str | None = main, rows: dict[str, Row] = rows) -> str:
            row = rows.get(name)
            if row is None or main is None:
                return MISSING
            return _share(row, main) if main in _PERCENT else number(getattr(row, main), 4, row.spread.get(main))

        interval = student.intervals.get("retained", (None, None)) if student else (None, None)
        cells.append([
            Link(path.removesuffix(".json"), link(path)),
            str(len(run.seeds)),
            count(run.trained_tokens),
            {"accuracy": "top-1", "spearman": "Spearman", None: MISSING}[main],
            *(figure(name) for name in ("teacher", "swapped", "student", "zero-token window", "none")),
            _share(student, "retained") if student else MISSING,
            percent(interval[0], 2),
            number(student.cosine if student else None, 4),
            percent(student.mrr if student else None, 2),
            str(run.commit),
        ])  # fmt: skip
    columns = [
        "run", "seeds", "tokens", "score", "teacher", "swapped", "student", "window, untrained", "no attention",
        "of the teacher's", "at least", "feature cosine", "MRR", "commit",
    ]  # fmt: skip
    return Table("", columns, cells).without_empty()


def drawing_results(results: Sequence[tuple[str, Result]], link: Callable[[str], str]) -> Table:
    """The README's table of diffusion models, a line per result file."""
    cells: list[list[Cell]] = []
    for path, run in results:
        rows = {row.name: row for row in run.rows}
        student, swapped, floor = (rows.get(n) for n in ("student", "swapped", "teacher, other seeds"))

        def figure(row: Row | None, key: str, digits: int = 3) -> str:
            return MISSING if row is None else number(getattr(row, key), digits, row.spread.get(key))

        cells.append([
            Link(path.removesuffix(".json"), link(path)),
            str(len(run.seeds)),
            count(run.trained_tokens),
            *(figure(row, "distance") for row in (swapped, student, floor)),
            *(figure(student, key, 2) for key in ("psnr", "ssim")),
            *(_share(row, "accuracy") if row else MISSING for row in (rows.get("teacher"), student)),
            _share(student, "retained") if student else MISSING,
            *(figure(row, "frechet", 2) for row in (student, floor)),
            str(run.commit),
        ])  # fmt: skip
    columns = [
        "run", "seeds", "tokens", "distance, swapped", "student", "other seeds", "PSNR", "SSIM", "class seen, teacher",
        "class seen, student", "of the teacher's", "Fréchet", "other seeds' Fréchet", "commit",
    ]  # fmt: skip
    return Table("", columns, cells).without_empty()


def _ratio(row: Row | None, teacher: Row | None) -> float | None:
    """Of perplexities: the row's own figure (a mean over seeds), else from the two rows."""
    if row is None or row.ratio is not None or row.perplexity is None:
        return None if row is None else row.ratio
    return row.perplexity / teacher.perplexity if teacher is not None and teacher.perplexity else None


def bench_table(bench: Bench, headline: bool = False) -> Table:
    """A benchmark's rows, columns in the order of its units. headline: only those that stand for the whole."""
    names = list(bench.units)
    rows = [row for row in bench.rows if not (headline and bench.headline) or row.name in bench.headline]
    cells: list[list[Cell]] = [[row.name, *(number(row.metrics.get(name), 2) for name in names)] for row in rows]
    return Table(bench.name, ["", *(f"{name} [{unit}]" if unit else name for name, unit in bench.units.items())], cells)


# ------------------------------------------------------------------------------------------- rendering
def render(table: Table, form: Literal["rich", "markdown", "html"]) -> Any:
    """A rich renderable for `rich`, text otherwise."""
    if form == "markdown":
        return _markdown(table)
    return _rich(table) if form == "rich" else _html(table)


def _text(cell: Cell) -> str:
    return cell.text if isinstance(cell, Link) else cell


def _rich(table: Table) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    # Text, not str: a model called "[bold]" is a name, not markup.
    out = RichTable(
        title=Text(table.title) if table.title else None,
        caption=Text("\n".join(table.notes)) if table.notes else None,
        box=box.SIMPLE_HEAD, title_style="bold", title_justify="left", caption_justify="left", pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    for i, name in enumerate(table.columns):
        # Where it is narrow, headers are folded; numbers never are, nor short names of rows.
        widest = max((len(_text(row[i])) for row in table.rows), default=0)
        out.add_column(
            Text(name), justify="right" if i else "left", min_width=min(widest, 24), overflow="fold",
            no_wrap=i == 0 and widest <= 24,
        )  # fmt: skip
    for i, row in enumerate(table.rows):
        out.add_row(*(Text(_text(cell)) for cell in row), style="bold" if i in table.strong else None)
    return out


def escape_markdown(text: str) -> str:
    """Text that stays text in a markdown table cell."""
    for char in "\\`*_[]|":
        text = text.replace(char, "\\" + char)
    return html.escape(" ".join(text.split()), quote=False)


def _markdown(table: Table) -> str:
    def cell(value: Cell, strong: bool) -> str:
        text = escape_markdown(_text(value))
        text = f"**{text}**" if strong and text.strip() and text != MISSING else text
        return f"[{text}]({value.target})" if isinstance(value, Link) else text

    lines = [
        "| " + " | ".join(escape_markdown(name) for name in table.columns) + " |",
        "|" + "|".join(" --- " if i == 0 else " ---: " for i in range(len(table.columns))) + "|",
        *("| " + " | ".join(cell(c, i in table.strong) for c in row) + " |" for i, row in enumerate(table.rows)),
    ]
    if table.notes:
        lines += ["", *(escape_markdown(note) for note in table.notes)]
    return "\n".join(lines) + "\n"


def _html(table: Table) -> str:
    def cell(value: Cell) -> str:
        text = html.escape(_text(value))
        return f'<a href="{html.escape(value.target)}">{text}</a>' if isinstance(value, Link) else text

    out = ["<figure class=table>"]
    if table.title:
        out.append(f"<figcaption>{html.escape(table.title)}</figcaption>")
    out.append(
        "<table><thead><tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in table.columns) + "</tr></thead><tbody>"
    )
    for i, row in enumerate(table.rows):
        mark = " class=strong" if i in table.strong else ""
        out.append(f"<tr{mark}>" + "".join(f"<td>{cell(c)}</td>" for c in row) + "</tr>")
    out.append("</tbody></table>")
    out += [f"<p class=note>{html.escape(note)}</p>" for note in table.notes]
    return "\n".join(out) + "</figure>\n"
