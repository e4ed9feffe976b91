"""What each verb answers: a value that can be printed (`render`) and saved (`as_dict`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linearize.models import Source
    from linearize.plan import Plan
    from linearize.surgery.forecast import Forecast


@dataclass(frozen=True)
class Resolved:
    """What was asked for, made definite. source is None where the model was handed over, or where only its form is
    known. recipe: the name of the one used, if any. notes: what a user may not have expected. revision: the commit that
    the model was loaded from, where the hub gave one."""

    plan: Plan
    config: Any
    source: Source | None
    recipe: str | None
    notes: tuple[str, ...] = ()
    revision: str | None = None


@dataclass(frozen=True)
class Planned:
    """What `plan` answers."""

    resolved: Resolved
    forecast: Forecast

    @property
    def plan(self) -> Plan:
        return self.resolved.plan

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.resolved.recipe,
            "digest": self.plan.digest(),
            "plan": self.plan.model_dump(mode="json"),
            "forecast": self.forecast.as_dict(),
            "notes": list(self.resolved.notes),
        }

    def render(self) -> Any:
        from linearize.report.terminal import planned

        return planned(self)


@dataclass(frozen=True)
class Listing:
    """Named things, each with what is known of it, in columns."""

    kind: str
    rows: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return {self.kind: self.rows}

    def render(self) -> Any:
        from linearize.report.terminal import listed

        return listed(self)


@dataclass(frozen=True)
class Environment:
    """This machine and the libraries on it."""

    machine: dict[str, Any]
    versions: dict[str, str]
    commit: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {"machine": self.machine, "versions": self.versions, "commit": self.commit}

    def render(self) -> Any:
        from linearize.report.terminal import surroundings

        return surroundings(self)


@dataclass(frozen=True)
class Evaluated:
    """A converted model measured again: rows of the table, what they say about the linear branch, and of language
    models what both write."""

    rows: list[Any]
    evaluation: str
    verdict: Any
    task: str = "text"
    generation: Any = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "evaluation": self.evaluation,
            "rows": [row.model_dump(mode="json") for row in self.rows],
            "verdict": self.verdict.model_dump(mode="json"),
            "generation": None if self.generation is None else self.generation.model_dump(mode="json"),
        }

    def render(self) -> Any:
        from linearize.report.terminal import evaluated

        return evaluated(self)


@dataclass(frozen=True)
class Drawn:
    """Drawings of a diffusion model in a folder; tokens: patches in all of them."""

    folder: Path
    drawings: int
    tokens: int
    digest: str

    def as_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "drawings": self.drawings, "tokens": self.tokens, "digest": self.digest}

    def render(self) -> Any:
        return f"{self.drawings:,} drawings ({self.tokens:,} patches) in {self.folder}: train with --dataset"


@dataclass(frozen=True)
class Layered:
    """A converted model layer by layer (evaluate.layers.Layer)."""

    layers: list[Any]

    def as_dict(self) -> dict[str, Any]:
        return {"layers": [asdict(layer) for layer in self.layers]}

    def render(self) -> Any:
        from linearize.report import layers, tables

        return tables.render(layers.table(self.layers), "rich")


@dataclass(frozen=True)
class Recalled:
    """What a converted model finds again in long texts, and the files that say so."""

    recall: Any
    files: list[Path]

    def as_dict(self) -> dict[str, Any]:
        return self.recall.model_dump(mode="json")

    def render(self) -> Any:
        from rich.console import Group

        from linearize.report import recall, tables

        shown = [t for t in (recall.table(self.recall), recall.text_table(self.recall)) if t is not None]
        words = [*self.recall.notes, f"written: {', '.join(map(str, self.files))}"]
        return Group(*(tables.render(t, "rich") for t in shown), *words)


@dataclass(frozen=True)
class Scored:
    """What a converted model scores on standard tasks, and the file that says so."""

    standard: Any
    file: Path

    def as_dict(self) -> dict[str, Any]:
        return self.standard.model_dump(mode="json")

    def render(self) -> Any:
        from rich.console import Group

        from linearize.report import standard, tables

        return Group(tables.render(standard.table(self.standard), "rich"), f"written: {self.file}")


@dataclass(frozen=True)
class Benched:
    """A benchmark file's content, and where it was written (None: nowhere)."""

    bench: Any
    file: Path | None

    def as_dict(self) -> dict[str, Any]:
        return self.bench.model_dump(mode="json")

    def render(self) -> Any:
        from linearize.report import tables

        return tables.render(tables.bench_table(self.bench), "rich")


@dataclass(frozen=True)
class Written:
    """A text and what a converted model went on with. state_bytes: what it kept to do so."""

    prompt: str
    text: str
    tokens: int
    tokens_per_second: float
    state_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> Any:
        from rich.text import Text

        speed = f"{self.tokens} tokens, {self.tokens_per_second:.1f} tokens/s, state of {self.state_bytes:,} bytes"
        return Text.assemble((self.prompt, "dim"), self.text, (f"\n{speed}", "dim"))


@dataclass(frozen=True)
class Inspected:
    """A model's attention layers: what each is, and what became of it."""

    model: str
    method: str | None
    settings: dict[str, Any]
    sites: list[dict[str, Any]]
    written: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> Any:
        from linearize.report.terminal import inspected

        return inspected(self)


@dataclass(frozen=True)
class Saved:
    """A folder or file that was written."""

    folder: Path
    what: str

    def as_dict(self) -> dict[str, Any]:
        return {"folder": str(self.folder), "what": self.what}

    def render(self) -> Any:
        return f"{self.what}: {self.folder}"


@dataclass(frozen=True)
class Reported:
    """A report read again, or the README brought up to date."""

    report: Any = None
    folder: Path | None = None
    changed: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"changed": list(self.changed)} if self.report is None else self.report.model_dump(mode="json")

    def render(self) -> Any:
        from linearize.report.summary import summary

        if self.report is None:
            return "updated: " + ", ".join(self.changed) if self.changed else "everything is up to date"
        return summary(self.report, self.folder)
