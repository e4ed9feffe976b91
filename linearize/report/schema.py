"""What is written down about a run: `report.json` beside a converted model, and the result files of the repository.

    Report   report.json            everything, plots can be drawn again from it
    Result   recipes/results/<method>/<model>.json   the same without plan, series and pictures
    Bench    benchmarks/results/*.json               speed and memory

Numbers are kept to six significant digits; one that is missing or not finite is null. Byte counts are per sequence.
Reading refuses unknown and missing keys. Written by hand: never.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from linearize.report.looks import Diagnostics, Number, Strict, number
from linearize.storage import write_atomic
from linearize.types import InputError, StorageError, nearest

VERSION = 1


def without_paths(value: Any) -> Any:
    """Absolute paths cut to their last name: reports get published, the folders of a machine are nobody's business."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str | Path) and Path(value).is_absolute():
        return Path(value).name
    return str(value) if isinstance(value, Path) else value


class Commit(Strict):
    """id: of the checkout (None: not a checkout). dirty: code or recipes differ from it. package: its version."""

    id: str | None
    dirty: bool | None
    package: str

    def __str__(self) -> str:
        return f"{self.id[:10]}{' + changes' if self.dirty else ''}" if self.id else f"linearize {self.package}"


class Machine(Strict):
    """cores: usable by this process. memory: bytes. device: the accelerator's name, or "cpu"."""

    cpu: str
    cores: int
    threads: int
    memory: int | None
    device: str
    system: str


class Provenance(Strict):
    """Who, with what and when: in every file. date: UTC, ISO 8601."""

    version: Literal[1] = VERSION
    command: str
    commit: Commit
    machine: Machine
    versions: dict[str, str]
    date: str


class Model(Strict):
    """The teacher. source: where it came from. layers: attention layers found; converted: how many were replaced."""

    id: Annotated[str, BeforeValidator(without_paths)]
    source: Literal["hub", "folder", "gguf", "embedded", "object"] | None = None
    revision: str | None = None
    type: str | None = None
    parameters: int | None = None
    layers: int | None = None
    converted: int | None = None
    dtype: str | None = None
    license: str | None = None


class Row(Strict):
    """One model measured on one text: evaluate.quality.Row, and what several of them make.

    name: see tables.LABELS. perplexity = exp(nll), ratio: to the teacher's. kl: KL(teacher || this), nats per token.
    top1: share of positions where both rank the same token first. copy_nll: nats on copy-from-beyond tokens,
    copy_share: their share of all; gap_closed: share of the window-to-teacher gap closed on them. marginal,
    marginal_copy: nats lost with the linear branch off, on all and on those tokens; marginal_share: of that gap.
    residual_error: relative error of the residual stream by depth. by_position: nats at positions 1, 2, ...
    buckets: perplexity by range of positions. intervals: 95 % (low, high), by metric.
    Of encoders: accuracy (likeliest class is the label), agreement (is the teacher's), kl of the classes; cosine and
    dense_cosine, of the pooled feature and of each token's, to the teacher's; spearman, of scored pairs; mrr, halves of
    a passage finding each other; retained, the share of the teacher's accuracy, else of its spearman.
    Of drawings, against the teacher's from the same noise: distance (root mean square), psnr, ssim; trajectory, the
    relative squared error of the answers on the teacher's own way, by_timestep the same; accuracy, a judge sees the
    class asked for; as sets, by the features of the judge and of a random network, frechet and kernel distance, recall,
    coverage; image_seconds of one, by number of steps. Of mosaics accuracy is of the pictures whose class was asked
    for; tiles_seen, how many pictures a judge sees in one; count_kept, as many as in the teacher's; placement_kept, the
    share of the teacher's pictures that are seen in their places; pairs_alike, of pairs that are to be of one class.
    cache_bytes: what one sequence keeps after so many tokens. spread: standard deviation over seeds, by metric.
    parts: metrics on named parts of the text.
    """

    METRICS: ClassVar[tuple[str, ...]] = (
        "perplexity", "nll", "kl", "top1", "ratio", "copy_nll", "copy_share", "gap_closed", "marginal",
        "marginal_copy", "marginal_share", "accuracy", "agreement", "cosine", "dense_cosine", "spearman", "mrr",
        "retained", "distance", "trajectory", "psnr", "ssim", "frechet", "frechet_random", "kernel", "kernel_random",
        "recall", "coverage", "tiles_seen", "count_kept", "placement_kept", "pairs_alike",
    )  # fmt: skip

    name: str
    perplexity: Number = None
    nll: Number = None
    kl: Number = None
    top1: Number = None
    ratio: Number = None
    copy_nll: Number = None
    copy_share: Number = None
    gap_closed: Number = None
    marginal: Number = None
    marginal_copy: Number = None
    marginal_share: Number = None
    accuracy: Number = None
    agreement: Number = None
    cosine: Number = None
    dense_cosine: Number = None
    spearman: Number = None
    mrr: Number = None
    retained: Number = None
    distance: Number = None
    trajectory: Number = None
    psnr: Number = None
    ssim: Number = None
    frechet: Number = None
    frechet_random: Number = None
    kernel: Number = None
    kernel_random: Number = None
    recall: Number = None
    coverage: Number = None
    tiles_seen: Number = None
    count_kept: Number = None
    placement_kept: Number = None
    pairs_alike: Number = None
    by_timestep: dict[int, Number] = {}
    image_seconds: dict[int, Number] = {}
    documents: int | None = None
    tokens: int | None = None
    residual_error: list[Number] | None = None
    by_position: list[Number] | None = None
    buckets: dict[str, Number] = {}
    intervals: dict[str, tuple[Number, Number]] = {}
    cache_bytes: dict[int, int] | None = None
    spread: dict[str, Number] = {}
    parts: dict[str, dict[str, Number]] = {}


class Stage(Strict):
    """What a stage did (types.StageReport). series: one number per logged step, see plots.loss_by_layer."""

    name: str
    steps: int
    tokens: int
    seconds: Number
    tokens_per_second: Number = None
    first: Number = None
    last: Number = None
    series: dict[str, list[Number]] = {}
    notes: list[str] = []

    @model_validator(mode="after")
    def _speed(self) -> Stage:
        if self.tokens_per_second is None and self.seconds and self.tokens:
            self.tokens_per_second = number(self.tokens / self.seconds)
        return self

    @property
    def trains(self) -> bool:
        """Whether its tokens count as training (self-generation's do not)."""
        return self.name.startswith(("transfer", "finetune"))


class Bytes(Strict):
    """What one sequence keeps: the converted model's states (and the caches of layers left alone) against the teacher's
    cache."""

    state_bytes: int
    kv_bytes: int


class Sample(Strict):
    """One prompt, continued by both; of encoders one example (of images with the `image`, PNG in base64), and what both
    make of it."""

    prompt: str
    teacher: str
    student: str
    image: str | None = None


class Generation(Strict):
    """nll_*: the teacher's nats per token on its own and on the student's continuations.

    repetition_*: share of repeated 4-grams.
    """

    nll_teacher: Number = None
    nll_student: Number = None
    repetition_teacher: Number = None
    repetition_student: Number = None


class SiteInfo(Strict):
    """One attention layer: what became of it, and why where it was left alone."""

    name: str
    layer: int | None
    converted: bool
    why: str | None = None
    drops: list[str] = []


class Curve(Strict):
    """A quantity followed along another, e.g. the perplexity ratio against tokens."""

    x_label: str
    y_label: str
    x: list[Number]
    y: list[Number]


class Gate(Strict):
    """One condition of the recipe: what was wanted, what came out (null: not measured, which misses it)."""

    name: str
    bound: Literal["at most", "at least"]
    wanted: float
    got: Number
    passed: bool


class Verdict(Strict):
    """What came of it, in words.

    level: good, weak (a cheaper baseline is as good), dead (the linear branch does nothing), failed (a gate was
    missed), unknown (not measured).
    """

    level: Literal["good", "weak", "dead", "failed", "unknown"]
    headline: str
    lines: list[str] = []
    gates: list[Gate] = []


class Run(Provenance):
    """What Result and Report share.

    task: what the model is for, of "text", "sentences", "image", "diffusion".
    recipe: the recipe's name, e.g. "hedgehog/stories15M". seeds: one per run averaged into the rows. evaluation: the
    text measured on, in words. state: by number of tokens. break_even: tokens from which the state is the smaller.
    implementations: by op, which were called.
    """

    model: Model
    task: str = "text"
    method: str
    recipe: str | None
    plan_digest: str
    seeds: list[int]
    evaluation: str
    rows: list[Row]
    stages: list[Stage]
    state: dict[int, Bytes]
    break_even: int | None = None
    sample: list[Sample] = []
    generation: Generation | None = None
    curves: dict[str, Curve] = {}
    verdict: Verdict
    implementations: dict[str, list[str]] = {}
    notes: list[str] = []

    def row(self, name: str) -> Row | None:
        """The row called `name`, or None."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def trained_tokens(self) -> int:
        """Processed tokens of all training stages, repeats counted, self-generation not."""
        return sum(stage.tokens for stage in self.stages if stage.trains)

    @property
    def trained_seconds(self) -> float:
        return sum(stage.seconds or 0.0 for stage in self.stages if stage.trains)


class Result(Run):
    """A result file: no plan (its digest stays), no series, no pictures."""

    kind: Literal["result"] = "result"


class Report(Run):
    """report.json: with the plan, the sites and what the plots need."""

    kind: Literal["report"] = "report"
    plan: Annotated[dict[str, Any], BeforeValidator(without_paths)]
    sites: list[SiteInfo] = []
    diagnostics: Diagnostics = Field(default_factory=Diagnostics)

    def result(self) -> Result:
        """What of this report is kept in the repository."""
        raw = {k: v for k, v in self.model_dump().items() if k in Result.model_fields}
        raw["kind"] = "result"
        for stage in raw["stages"]:
            stage["series"] = {}
        for sample in raw["sample"]:
            sample["image"] = None
        return Result.model_validate(raw)


class Measure(Strict):
    """One line of a benchmark. metrics: by name, the unit in Bench.units."""

    name: str
    metrics: dict[str, Number]


class Bench(Provenance):
    """A benchmark's file. settings: what was held fixed (batch, length, ...). units: by metric. headline: the rows that
    stand for the whole in the README (empty: all)."""

    kind: Literal["bench"] = "bench"
    name: str
    settings: dict[str, Any]
    units: dict[str, str]
    rows: list[Measure]
    headline: list[str] = []
    notes: list[str] = []


File = TypeVar("File", bound=Provenance)


# ------------------------------------------------------------------------------------------- building
def stage(report: Any, points: int = 400) -> Stage:
    """A types.StageReport (or any dataclass or mapping with its fields) as a Stage.

    Series longer than `points` become means over equal stretches of steps, whose last steps stand in the series "step".
    """
    raw: dict[str, Any] = dict(report) if isinstance(report, Mapping) else asdict(report)
    lengths = {len(values) for values in raw.get("series", {}).values()}
    # Series of different lengths have no common steps: they are left as they came.
    if len(lengths) == 1 and (length := lengths.pop()) > points:
        ends = np.linspace(0, length, points + 1).round().astype(int)
        thin = {key: _means(values, ends) for key, values in raw["series"].items()}
        raw["series"] = {"step": ends[1:].astype(float).tolist(), **thin}
    return Stage.model_validate(raw)


def _means(values: list[float | None], ends: np.ndarray) -> list[float]:
    array = np.array([math.nan if v is None else v for v in values], dtype=float)
    return [float(array[a:b].mean()) for a, b in zip(ends, ends[1:], strict=False)]


def average(rows: list[Row]) -> Row:
    """One row of several seeds' rows: means, standard deviations in `spread`. A metric missing in one is missing."""
    if len(rows) == 1:
        return rows[0]
    mean: dict[str, Any] = {key: getattr(rows[0], key) for key in ("name", "documents", "tokens", "cache_bytes")}
    spread: dict[str, Number] = {}
    for metric in Row.METRICS:
        values = [value for row in rows if (value := getattr(row, metric)) is not None]
        if len(values) == len(rows):
            mean[metric], spread[metric] = float(np.mean(values)), float(np.std(values, ddof=1))
    for metric in ("residual_error", "by_position"):
        curves = [value for row in rows if (value := getattr(row, metric))]
        if len(curves) == len(rows) and len({len(c) for c in curves}) == 1:
            mean[metric] = np.mean(np.array(curves, dtype=float), 0).tolist()
    parts = {}
    for part in rows[0].parts:
        if all(part in row.parts for row in rows):
            keys = [k for k in rows[0].parts[part] if all(row.parts[part].get(k) is not None for row in rows)]
            parts[part] = {k: float(np.mean([row.parts[part][k] for row in rows])) for k in keys}  # type: ignore[arg-type]
    return Row(**mean, spread=spread, parts=parts)


# ------------------------------------------------------------------------------------------- writing and reading
def dumps(value: Any, indent: int = 0) -> str:
    """JSON with one line per key, and a list of plain values on one line: short diffs, no million-line files."""
    pad, inner = " " * indent, " " * (indent + 1)
    if isinstance(value, dict) and value:
        if indent > 2 and all(not isinstance(v, dict | list) for v in value.values()) and len(value) <= 6:
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        items = [f"{inner}{json.dumps(str(k), ensure_ascii=False)}: {dumps(v, indent + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{pad}}}"
    if isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        return "[\n" + ",\n".join(inner + dumps(v, indent + 1) for v in value) + f"\n{pad}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def write(file: Provenance, path: str | Path) -> None:
    """Writes the file whole or not at all. Raises StorageError."""
    write_atomic(path, dumps(file.model_dump(mode="json")) + "\n")


def read(path: str | Path, kind: type[File]) -> File:
    """The file at `path`. Raises StorageError where it cannot be read, InputError naming the first wrong key."""
    path = Path(path)
    if path.is_dir():
        path = path / "report.json"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}; is it the folder of a finished run?") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: write it again with `linearize convert`") from None
    try:
        raw = json.loads(text, parse_constant=lambda word: _refuse(f"{path}: {word} is not a number; use null"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON (line {error.lineno}: {error.msg}): restore it, or run again") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds a {type(raw).__name__}, not a {kind.__name__.lower()}: run again")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{path}: {_first(error, kind)}") from None


def _refuse(message: str) -> Any:
    raise InputError(message)


def _first(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first thing wrong, in one line with its fix."""
    first = error.errors(include_url=False)[0]
    *parents, key = first["loc"] or ("file",)
    where = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        owner = _owner(kind, parents)
        return f"unknown key {where!r}: {nearest(str(key), list((owner or kind).model_fields))}"
    if first["type"] == "missing":
        return f"missing key {where!r}: run again with this version, or add it"
    return f"{where!r}: {first['msg'][0].lower()}{first['msg'][1:]}, got {str(first['input'])[:60]!r}"


def _owner(kind: Any, parents: list[Any]) -> type[BaseModel] | None:
    """The schema class found by walking from `kind` along the keys `parents`."""
    for key in parents:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(key))
            kind = field.annotation if field else None
        elif get_origin(kind) in (list, dict):
            kind = get_args(kind)[-1]
        if get_origin(kind) is Union or type(kind).__name__ == "UnionType":
            kind = next((arg for arg in get_args(kind) if arg is not type(None)), None)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def finished(path: str | Path, plan_digest: str) -> bool:
    """Whether `path` already holds this plan's result: the run can be skipped. Raises InputError on a bad file."""
    return Path(path).exists() and read(path, Result).plan_digest == plan_digest


def read_results(folder: str | Path) -> list[tuple[str, Result]]:
    """Every result file under `folder` with its path relative to it, sorted by path. Raises InputError on the first bad
    one."""
    folder = Path(folder)
    return [(p.relative_to(folder).as_posix(), read(p, Result)) for p in sorted(folder.rglob("*.json"))]


def problems(root: str | Path) -> list[str]:
    """What is wrong with the result files of a checkout, one line each: CI prints them."""
    found = []
    readers = (
        ("recipes/results", lambda path: read(path, Result)),
        ("benchmarks/results", lambda path: read(path, Bench)),
    )
    for folder, reader in readers:
        for path in sorted((Path(root) / folder).rglob("*.json")):
            try:
                reader(path)
            except (InputError, StorageError) as error:
                found.append(str(error))
    return found
