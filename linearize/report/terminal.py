"""Answers of the command line, for eyes. Their numbers are those of `as_dict`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from linearize.report import beside, tables
from linearize.report.tables import count, size

if TYPE_CHECKING:
    from linearize.answers import Environment, Evaluated, Inspected, Listing, Planned


def _table(*columns: str, title: str | None = None) -> Table:
    """Columns ending in ">" are set to the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        right = "right" if column.endswith(">") else "left"
        table.add_column(column.rstrip(">"), justify=right, overflow="fold", no_wrap=i == 0)
    return table


def _numbers(values: tuple[int | None, ...]) -> str:
    """0-3, 6, 8-9"""
    known = sorted(v for v in values if v is not None)
    if len(known) < len(values):
        return f"{len(values)} layers"
    spans: list[list[int]] = []
    for value in known:
        if spans and spans[-1][1] == value - 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


def _from(tokens: int | None) -> str:
    return "never" if tokens is None else f"{tokens:,}"


def planned(answer: Planned) -> RenderableType:
    """The plan in words, the layers, what a sequence keeps and costs, and what is left alone."""
    forecast, plan = answer.forecast, answer.plan
    decodes = any(group.shape["causal"] for group in forecast.groups)  # nothing is kept between calls otherwise
    kept = ("state>", "smaller from>") if decodes else ()
    sites = _table(
        "layers", "heads>", "kv>", "key x value", "new parameters>", *kept, "cheaper from>", "drops",
        title=f"{forecast.method} in {sum(len(g.sites) for g in forecast.groups)} layers of a {forecast.model_type}"
        f" model of {count(forecast.base_parameters)} parameters",
    )  # fmt: skip
    for group in forecast.groups:
        shape = group.shape
        sites.add_row(
            _numbers(group.layers),
            str(shape["heads"]),
            str(shape["kv_heads"]),
            f"{shape['key_dim']} x {shape['value_dim']}",
            f"{group.parameters:,}",
            *((size(group.state_bytes), _from(group.break_even_memory)) if decodes else ()),
            _from(group.break_even_flops),
            "; ".join(group.drops) or "nothing",
        )
    keeps = ("teacher keeps>", "student keeps>") if decodes else ()
    lengths = _table(
        "tokens>", *keeps, "teacher's attention FLOPs>", "student's>",
        title="One sequence, all layers",
    )  # fmt: skip
    for row in forecast.lengths:
        lengths.add_row(
            f"{row.tokens:,}",
            *((size(row.kv_bytes), size(row.state_bytes)) if decodes else ()),
            f"{row.teacher_flops:.3g}",
            f"{row.student_flops:.3g}",
        )
    share = forecast.new_parameters / forecast.base_parameters if forecast.base_parameters else 0.0
    lines = [
        f"new parameters    {forecast.new_parameters:,} ({share:.2%} of the model)",
        f"memory breaks even at {_from(forecast.break_even_memory)} tokens, attention FLOPs at"
        f" {_from(forecast.break_even_flops)} (float32 state against a bf16 cache)"
        if decodes
        else f"attention FLOPs break even at {_from(forecast.break_even_flops)} tokens",
    ]
    if forecast.left:
        reasons: dict[str, list[str]] = {}
        for name, why in forecast.left.items():
            reasons.setdefault(why, []).append(name)
        lines += [f"left alone        {_shortened(names)}: {why}" for why, names in reasons.items()]
    if forecast.kept:
        lines.append(f"kept softmax      {_shortened(forecast.kept)}")
    lines += [f"note              {note}" for note in answer.resolved.notes]
    head = Text(f"recipe    {answer.resolved.recipe or 'defaults'}\n{plan.explain()}\n")
    return Group(head, sites, lengths, Text("\n".join(lines)))


def _shortened(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} ... {names[-1]} ({len(names)})"


def listed(answer: Listing) -> RenderableType:
    """A column for each key."""
    if not answer.rows:
        return Text(f"no {answer.kind} here")
    columns = [key for key in answer.rows[0] if key != "refuses"]  # its sentences stand below the table
    table = _table(*columns)
    for row in answer.rows:
        table.add_row(*(escape(_words(key, row[key])) for key in columns))
    said: dict[tuple[str, str], list[str]] = {}
    for row in answer.rows:
        for where, why in row.get("refuses", {}).items():
            said.setdefault((row["name"], why), []).append(where)
    lines = [f"{name}, not for {', '.join(where)}: {why}" for (name, why), where in said.items()]
    return Group(table, Text("\n".join(lines))) if lines else table


def _words(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(value) or "-"
    if isinstance(value, int):
        return size(value) if key == "bytes" else f"{value:,}"
    return str(value) if value not in (None, "") else "-"


def surroundings(answer: Environment) -> RenderableType:
    """Two columns."""
    table = _table("what", "value")
    for part in (answer.versions, answer.machine, answer.commit):
        for key, value in part.items():
            table.add_row(key, escape(size(float(value)) if key == "memory" and value else str(value)))
    return table


def evaluated(answer: Evaluated) -> RenderableType:
    """The rows, then what they say."""
    verdict = answer.verdict
    said = Text("\n".join([f"{verdict.headline}.", *(f"  {line}" for line in verdict.lines)]))
    if answer.task != "text":
        found = tables.encoder_table(
            answer.rows, answer.task, answer.evaluation, lambda name: tables.LABELS.get(name, name)
        )
        return Group(tables.render(found, "rich"), said)
    table = _table("", "perplexity>", "KL>", "top-1>", "copy NLL>", "closed>", title=f"Measured on {answer.evaluation}")
    for row in tables.ordered(answer.rows):
        table.add_row(
            tables.LABELS.get(row.name, row.name),
            tables.number(row.perplexity, 2),
            tables.number(row.kl, 3),
            tables.percent(row.top1),
            tables.number(row.copy_nll, 3),
            tables.percent(row.gap_closed, 0),
        )
    return Group(table, *(Text(line, style="dim") for line in beside.lines(answer.rows, answer.generation)), said)


def inspected(answer: Inspected) -> RenderableType:
    """A line per attention layer, and what was written beside it."""
    settings = ", ".join(f"{key} {value}" for key, value in answer.settings.items())
    title = f"{answer.model}: {f'{answer.method} ({settings})' if answer.method else 'softmax in every layer'}"
    keys = list(answer.sites[0])
    # Columns that say nothing about any layer of this model are left out.
    keys = [key for key in keys if any(site[key] not in (None, [], 0) for site in answer.sites)]
    table = _table(*(key.replace("_", " ") for key in keys), title=title)
    for site in answer.sites:
        table.add_row(*(escape(_words("bytes" if key == "state_bytes" else key, site[key])) for key in keys))
    return Group(table, f"written: {', '.join(answer.written)}") if answer.written else table
