"""report.html: one file that needs nothing else, the verdict first. Whatever came from outside is escaped."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

import yaml

from linearize.report import beside, tables
from linearize.report.schema import Provenance, Report
from linearize.storage import write_atomic

STYLE = """
:root { --ink: #1f2933; --muted: #6b7785; --line: #e6e9ed; --teal: #0b7a75; --amber: #b5651d; --red: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 1.1rem; margin: 2.8rem 0 .8rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
.sub { color: var(--muted); margin: .2rem 0 1.4rem; }
.verdict { border-left: .35rem solid var(--muted); background: #f7f9fa; padding: 1rem 1.2rem;
  border-radius: 0 .4rem .4rem 0; }
.verdict strong { display: block; font-size: 1.15rem; }
.verdict ul { margin: .4rem 0 0; padding-left: 1.1rem; }
.verdict.good { border-color: var(--teal); background: #f0f8f6; }
.verdict.weak { border-color: var(--amber); background: #fdf6ee; }
.verdict.dead, .verdict.failed { border-color: var(--red); background: #fdf1f0; }
.verdict.dead strong, .verdict.failed strong { color: var(--red); }
figure { margin: 1.2rem 0; }
figcaption { font-weight: 600; margin-bottom: .35rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; min-width: 26rem; font-variant-numeric: tabular-nums; font-size: .86rem; }
th, td { padding: .35rem 0 .35rem 1.1rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 600; border-bottom: 2px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.strong td { font-weight: 650; background: #f0f8f6; }
.note, figure p { color: var(--muted); font-size: .88rem; margin: .4rem 0 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin: .6rem 0 1.4rem; }
.pair > div { border: 1px solid var(--line); border-radius: .4rem; padding: .8rem 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font-family: Georgia, serif; }
.pair h3 { font: 600 .8rem system-ui, sans-serif; color: var(--muted); margin: 0 0 .4rem; }
.pair .student { border-color: #9fd0c8; }
.triple { display: grid; grid-template-columns: 8rem 1fr 1fr; gap: 1rem; margin: .6rem 0 1rem; }
.triple > div { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; white-space: pre-wrap; }
.triple h3 { font: 600 .8rem system-ui, sans-serif; color: var(--muted); margin: 0 0 .4rem; }
.small { image-rendering: pixelated; }
.pair mark { background: none; color: var(--muted); }
img { width: 100%; height: auto; }
pre { background: #f7f9fa; border: 1px solid var(--line); border-radius: .4rem; padding: 1rem; overflow-x: auto;
  font-size: .82rem; }
dl { display: grid; grid-template-columns: 9rem 1fr; gap: .2rem 1rem; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr; } dl { grid-template-columns: 1fr; } }
@media print { main { max-width: none; padding: 0; } figure, .pair { break-inside: avoid; } }
"""


def write_html(report: Report, path: str | Path, plots: bool = True) -> None:
    """Writes the page. plots=False leaves the pictures out (matplotlib is not imported). Raises StorageError."""
    write_atomic(path, render(report, plots))


def render(report: Report, plots: bool = True) -> str:
    """The page as text: verdict, table, samples, pictures, plan, provenance."""
    title = f"{report.model.id}, {report.method}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=sub>{escape(_subtitle(report))}</p>",
        _verdict(report),
        section("Quality", _tables(report)),
        section("Side by side", "\n".join([*_grid(report), *_samples(report)])),
    ]
    if plots:
        from linearize.report.plots import drawings

        body.append(section("Pictures", "\n".join(picture(drawing) for drawing in drawings(report))))
    body += [
        section("Layers", _layers(report)),
        section("Notes", bullets(report.notes)),
        section("Plan", f"<pre>{escape(yaml.safe_dump(report.plan, sort_keys=False, allow_unicode=True))}</pre>"),
        section("Provenance", provenance(report, _runs(report))),
    ]
    return document(title, body)


def document(title: str, body: list[str]) -> str:
    """A whole page; parts of `body` that are empty are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def section(title: str, content: str) -> str:
    """Nothing where there is nothing to say."""
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>" if content.strip() else ""


def bullets(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _subtitle(report: Report) -> str:
    model, words = report.model, []
    if model.converted is not None and model.layers is not None:
        words.append(f"{model.converted} of {model.layers} attention layers linear")
    if model.parameters:
        words.append(f"{tables.count(model.parameters)} parameters")
    words.append(
        f"{tables.count(report.trained_tokens)} tokens of training in {tables.seconds(report.trained_seconds)}"
    )
    return ", ".join(words)


def _verdict(report: Report) -> str:
    verdict = report.verdict
    words = f"<strong>{escape(verdict.headline)}</strong>{bullets(verdict.lines)}"
    return f"<div class='verdict {verdict.level}'>{words}</div>"


def _tables(report: Report) -> str:
    shown = [tables.quality_table(report), tables.parts_table(report), tables.buckets_table(report)]
    shown.append(tables.state_table(report))
    if report.stages:
        shown.append(tables.stages_table(report))
    return "".join(tables.render(table, "html") for table in shown if table is not None and table.rows)


def _grid(report: Report) -> list[str]:
    """Drawings of the same noise below each other."""
    looks = report.diagnostics
    if looks.grid is None:
        return []
    words = (
        f"Top to bottom: {', '.join(tables.LABELS.get(name, name) for name in looks.grid_rows)}; one noise a column."
    )
    image = f"<img src='data:image/png;base64,{escape(looks.grid)}' alt='' class=small>"
    return [f"<figure>{image}<p>{escape(words)}</p></figure>"]


def _samples(report: Report) -> list[str]:
    out = []
    for sample in report.sample:
        if sample.image is not None:
            shown = f"<img src='data:image/png;base64,{escape(sample.image)}' alt='' class=small>"
            label = f"<p class=note>{escape(sample.prompt)}</p>" if sample.prompt else ""
            out.append(
                f"<div class=triple><div>{shown}{label}</div><div><h3>teacher</h3>{escape(sample.teacher)}</div>"
                f"<div class=student><h3>student</h3>{escape(sample.student)}</div></div>"
            )
            continue
        if report.task == "sentences":
            out.append(f"<p class=note>Nearest to: {escape(sample.prompt)}</p>")
        prompt = "" if report.task == "sentences" else f"<mark>{escape(sample.prompt)}</mark>"
        out.append(
            f"<div class=pair><div><h3>teacher</h3>{prompt}{escape(sample.teacher)}</div>"
            f"<div class=student><h3>student</h3>{prompt}{escape(sample.student)}</div></div>"
        )
    if (made := report.generation) is not None:
        out.append(f"<p class=note>{escape(beside.continuations(made))}</p>")
    return out


def picture(drawing: Any) -> str:
    data = base64.b64encode(drawing.png).decode()
    caption = f"<p>{escape(drawing.caption)}</p>" if drawing.caption else ""
    title = escape(drawing.title)
    image = f'<img alt="{title}" src="data:image/png;base64,{data}">'
    return f"<figure><figcaption>{title}</figcaption>{image}{caption}</figure>"


def _layers(report: Report) -> str:
    """Layers left alone and properties dropped: both change what a reader may expect."""
    lines = [f"{site.name} keeps softmax: {site.why}" for site in report.sites if not site.converted and site.why]
    dropped: dict[str, list[str]] = {}
    for site in report.sites:
        for what in site.drops if site.converted else ():
            dropped.setdefault(what, []).append(site.name)
    lines += [f"Not kept in {len(names)} layers: {what}" for what, names in dropped.items()]
    return bullets(lines)


def _runs(report: Report) -> dict[str, str]:
    recipe = f"{report.recipe or 'none'} (plan {report.plan_digest})"
    licence = report.model.license or "not stated where it was loaded from"
    return {"recipe": recipe, "seeds": ", ".join(map(str, report.seeds)), "base's licence": licence}


def provenance(report: Provenance, more: dict[str, str]) -> str:
    """Where numbers come from. more: lines before the machine."""
    machine = report.machine
    memory = f", {tables.size(machine.memory)}" if machine.memory else ""
    facts = {
        "command": report.command,
        "commit": str(report.commit),
        "date": report.date,
        **more,
        "machine": f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads{memory}, {machine.system}",
        "device": machine.device,
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    }
    return "<dl>" + "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()) + "</dl>"
