"""What will be done, as one value: read from a recipe, checked before anything is loaded, printed, saved and digested.

A recipe is YAML and holds only what differs from `recipes/defaults.yaml`. It knows no model code; a method is asked
for its own settings (`method.mixer`) by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from linearize import recipe
from linearize.problems import LATER, LOSSES, SAID, stage_problems, task_problems
from linearize.types import InputError, nearest

_STRICT = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
#: "auto" (where it pays), "all", "every:4", "keep:3,7" (all but these), or indices and ranges: "0,2,5-7".
_LAYERS = re.compile(r"auto|all|every:[1-9]\d*|(keep:)?\d+(-\d+)?(,\d+(-\d+)?)*")


class ModelPlan(BaseModel):
    """id: hub id, folder or GGUF file; None is the embedded teacher. form: the model's configuration, as far as sizes
    go, so that a recipe can be planned offline. auto: this recipe is taken for any model of this form."""

    model_config = _STRICT
    id: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    form: dict[str, Any] | None = None
    auto: bool = False


class MethodPlan(BaseModel):
    """name: a file of linearize/mixers. mixer: that method's own settings. layers "auto": all whose state is smaller
    than the teacher's cache at target_length tokens; whatever else is named is converted regardless."""

    model_config = _STRICT
    name: str = "hedgehog"
    layers: str = "auto"
    target_length: int = Field(default=8192, gt=0)
    mixer: dict[str, Any] = {}

    @field_validator("name")
    @classmethod
    def _one_spelling(cls, name: str) -> str:
        return name.replace("-", "_")

    @field_validator("layers", mode="before")
    @classmethod
    def _one_layer(cls, layers: Any) -> Any:
        return str(layers) if isinstance(layers, int) and not isinstance(layers, bool) else layers


class DataPlan(BaseModel):
    """source: files, a folder or a hub data set. length, of text and sentences, in tokens.

    Text: None or "self" is what the teacher writes, at most `self_tokens` (repeated where the stages want more),
    `self_batch` sequences at a time, freely or as completions of `prompts` (texts, with `chat` conversations: files, a
    folder or a hub data set). self_folder: where that text is kept for other runs to use as well (None: for this run
    alone); self_seed: its own seed (None: the run's).
    Sentences: each line of plain text, each row of a table; longer ones end at `length`. With `minimum` documents are
    cut into passages of `minimum` to `length` tokens instead. label_column: of classes, where the stages want
    them. Images: image_column, label_column; skip_bad: leave out images that cannot be read; without a source images
    like the embedded teacher's own are drawn for it (self_tokens: patches).
    Diffusion: a folder of `linearize selfgen`, else what the teacher draws in `steps` steps (self_tokens: patches).
    """

    model_config = _STRICT
    source: str | None = None
    prompts: str | None = None
    split: str | None = None
    text_column: str | None = None
    length: int = Field(default=256, gt=1)
    chat: bool = False
    completion_only: bool = False
    self_tokens: int = Field(default=1_000_000, gt=0)
    self_batch: int = Field(default=64, gt=0)
    self_seed: int | None = Field(default=None, ge=0)
    self_folder: str | None = None
    valid: str | None = None
    valid_tokens: int = Field(default=16384, gt=0)
    allow_longer: bool = False
    minimum: int | None = Field(default=None, gt=0)
    image_column: str | None = None
    label_column: str | None = None
    skip_bad: bool = False
    steps: int = Field(default=20, gt=0)


class LoraPlan(BaseModel):
    """targets: "attention" (the projections around each converted layer) or names of linear modules."""

    model_config = _STRICT
    r: int = Field(default=16, gt=0)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["attention"] | list[str] = "attention"


class _Stage(BaseModel):
    """tokens counts processed tokens (patches, of images), repeats included; batch is examples per optimiser step;
    warmup is a share of the steps; clip 0 is off; max_steps: at most so many, whatever `tokens` says. precision
    bfloat16: matrix products outside the mixers, by autocast; weights, moments, mixers and losses stay float32.
    ema: what is kept at the end is the running mean of the weights, which keeps so much of itself at a step (0: off).
    """

    model_config = _STRICT
    tokens: int = Field(gt=0)
    batch: int = Field(gt=0)
    lr: float = Field(gt=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, ge=0)
    max_steps: int | None = Field(default=None, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    ema: float = Field(default=0.0, ge=0, lt=1)

    def steps(self, length: float) -> int:
        """Optimiser steps at examples of `length` tokens on average."""
        steps = math.ceil(self.tokens / (self.batch * length))
        return steps if self.max_steps is None else min(steps, self.max_steps)


class TransferPlan(_Stage):
    """Attention transfer: only the mixers learn, the stream stays the teacher's.

    Weights of the losses: output (MSE of the layer's output over the teacher's mean square), map (cross-entropy of
    attention maps), far (the same on keys outside window and sinks), mass (two-way KL of their log-mass), own (what the
    method itself brings; None: 1 where it does).
    target "linear" matches the linear branch alone to the full softmax. window_drop: share of steps without window.
    map_chunk: query rows of a map held at once.
    """

    kind: Literal["transfer"]
    output: float = Field(default=1.0, ge=0)
    map: float = Field(default=0.0, ge=0)
    far: float = Field(default=0.0, ge=0)
    mass: float = Field(default=0.0, ge=0)
    own: float | None = Field(default=None, ge=0)
    target: Literal["output", "linear"] = "output"
    window_drop: float = Field(default=0.0, ge=0, le=1)
    far_weight: bool = False
    map_chunk: int = Field(default=512, gt=0)


class FinetunePlan(_Stage):
    """Fine-tuning by LoRA or in full. mixer_lr None: mixers frozen.

    Weights of the losses: kl (logits against the teacher's; of text on `share` of the positions), hidden (matching of
    hidden states); lm (next tokens, of text); of encoders feature (cosine of the pooled feature), dense (relative
    error of the last hidden state, token by token or patch by patch), task (cross-entropy of labels); of diffusion
    models those of stages/denoising.py: denoise, prediction, attention (of every `every`-th converted layer), variance;
    weighting min_snr: of the timesteps. teacher: a folder or hub id of another, as a rule larger, denoiser of the same
    latents and noise, whose answers and variance are learned (None: those of the model itself before it was converted).
    """

    kind: Literal["finetune"]
    mixer_lr: float | None = Field(default=None, gt=0)
    mode: Literal["lora", "full"] = "lora"
    lora: LoraPlan = LoraPlan()
    kl: float = Field(default=1.0, ge=0)
    lm: float = Field(default=0.0, ge=0)
    hidden: float = Field(default=0.0, ge=0)
    feature: float = Field(default=0.0, ge=0)
    dense: float = Field(default=0.0, ge=0)
    task: float = Field(default=0.0, ge=0)
    denoise: float = Field(default=0.0, ge=0)
    prediction: float = Field(default=0.0, ge=0)
    attention: float = Field(default=0.0, ge=0)
    variance: float = Field(default=0.0, ge=0)
    every: int = Field(default=1, gt=0)
    weighting: Literal["none", "min_snr"] = "none"
    teacher: str | None = None
    share: float = Field(default=1.0, gt=0, le=1)


StagePlan = Annotated[TransferPlan | FinetunePlan, Field(discriminator="kind")]


class EvalPlan(BaseModel):
    """source None: the data set's own held-out part. limit: documents (sentences, images). length: positions per
    document; minimum: passages of at least so many, as in `data`, whose halves have to find each other. pairs: scored
    pairs of sentences, for Spearman's rank correlation. window, sinks: the zero-token window of
    the table (on images a circle around each patch, in patches). window_only: train a window-only student on the same
    tokens for the table. parts: numbers of documents by name, "0-48", scored apart as well. curve: the main figure
    is measured after every so many tokens of training, on a few of the documents. lengths: where state and KV
    bytes are compared. Of diffusion: steps of each drawing; judge: a classifier of images (a folder; None: the
    embedded image teacher), which sees them less `crop` pixels at each edge; mosaic: what stands where, of drawings of
    several pictures (evaluate/mosaics.py), which the judge sees one by one."""

    model_config = _STRICT
    source: str | None = None
    split: str | None = None
    pairs: str | None = None
    minimum: int | None = Field(default=None, gt=0)
    limit: int | None = Field(default=None, gt=0)
    length: int = Field(default=255, gt=1)
    batch: int = Field(default=8, gt=0)
    generate: int = Field(default=64, ge=0)
    window: int = Field(default=32, gt=0)
    sinks: int = Field(default=0, ge=0)
    window_only: bool = False
    parts: dict[str, Annotated[str, Field(pattern=r"^\d+-\d+$")]] = {}
    curve: int | None = Field(default=None, gt=0)
    lengths: list[int] = [1024, 8192, 65536]
    steps: int = Field(default=20, gt=0)
    judge: str | None = None
    crop: int = Field(default=0, ge=0)
    mosaic: str | None = Field(default=None, pattern=r"^[a-z]+(/[a-z]+)*$")

    @field_validator("mosaic")
    @classmethod
    def _even(cls, text: str | None) -> str | None:
        if text is not None and (len({len(row) for row in text.split("/")}) > 1 or len(text) < 2):
            raise ValueError("write rows of one length, like ab/ba: a is the class asked for")
        return text


class GatePlan(BaseModel):
    """What the result must reach, else exit code 4.

    Text: linear_gain, the NLL, in nats, that the linear branch must save (True: any); perplexity_ratio, student over
    teacher, at most. Encoders: retained and mrr, the shares that are left of the teacher's own top-1 or Spearman, and
    of its MRR; cosine, of the features to the teacher's: at least. Drawings: retained, of the classes that a judge
    sees; distance to the teacher's drawings, over that of the untrained swap: at most.
    """

    model_config = _STRICT
    linear_gain: bool | float | None = None
    perplexity_ratio: float | None = Field(default=None, gt=0)
    retained: float | None = Field(default=None, gt=0)
    cosine: float | None = Field(default=None, gt=0, le=1)
    mrr: float | None = Field(default=None, gt=0)
    distance: float | None = Field(default=None, gt=0)


class OutputPlan(BaseModel):
    model_config = _STRICT
    folder: str | None = None
    adapter_only: bool = False


class Plan(BaseModel):
    """A whole conversion. task: what the model is for, "text" (a decoder), "sentences" (an encoder), "image" or
    "diffusion". `published` holds a paper's own numbers, `measured` where ours are, or "not here"."""

    model_config = _STRICT
    version: Literal[1] = 1
    task: Literal["text", "sentences", "image", "diffusion"] = "text"
    seed: int = Field(default=0, ge=0)
    model: ModelPlan = ModelPlan()
    method: MethodPlan = MethodPlan()
    data: DataPlan = DataPlan()
    stages: list[StagePlan] = []
    eval: EvalPlan = EvalPlan()
    gate: GatePlan = GatePlan()
    output: OutputPlan = OutputPlan()
    published: dict[str, Any] = {}
    measured: str | None = None

    @classmethod
    def read(
        cls,
        source: str | Path | Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | Iterable[str | tuple[str, Any]] = (),
        task: str | None = None,
    ) -> Plan:
        """The plan of a recipe (name, path or mapping; None: the defaults alone), with overrides applied last.

        task: where the recipe does not name one ("text" where nobody does).
        overrides: {"stages.transfer.lr": 1e-3}, its items, or the command line's ["stages.transfer.lr=1e-3"].
        Raises InputError with one line for every unknown key or wrong value.
        """
        title, raw = recipe.raw(source)
        errors: list[str] = []
        _known(cls, raw, (), errors)
        if errors:
            raise InputError(_lines(title, errors))
        items = recipe.pairs(overrides)
        asked = next((value for path, value in reversed(items) if path == "task"), None)
        merged = recipe.merge(recipe.defaults(asked or raw.get("task") or task or "text"), raw)
        for path, value in items:
            recipe.assign(merged, path, value)
        _known(cls, merged, (), errors)
        if errors:  # the recipe's own keys were fine
            raise InputError(_lines("--set", errors))
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise InputError(_lines(title, [_line(item, merged) for item in error.errors()])) from None

    def dump(self) -> str:
        """The plan in full, as YAML that `read` gives back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        """sha256 of everything that decides the weights: not of the output folder, nor of numbers quoted."""
        what = self.model_dump(mode="json", exclude={"output", "published", "measured"})
        for key in ("auto", "form"):  # how the recipe was found; the weights have a digest of their own
            del what["model"][key]
        del what["data"]["self_folder"]
        for part, later in LATER.items():
            for node in what["stages"] if part == "stages" else [what[part] if part else what]:
                for key, default in later.items():
                    if key in node and node[key] == default:
                        del node[key]
        what["method"]["mixer"] = self.mixer().model_dump(mode="json")
        text = json.dumps(what, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def mixer(self) -> Any:
        """The method's own settings as its Config. Raises InputError for an unknown method, key or value."""
        from linearize.mixers import base

        return base.configure(self.method.name, self.method.mixer)

    def longer(self) -> bool:
        """Whether sequences may be longer than the model's positions: asked for, or none is ever looked up."""
        return self.data.allow_longer or _unbounded(self, self.mixer())

    def stage(self, kind: str) -> StagePlan | None:
        """The first stage of a kind, if there is one."""
        return next((stage for stage in self.stages if stage.kind == kind), None)

    def stage_names(self) -> list[str]:
        """What each stage is called in checkpoints and reports: its kind, numbered from the second of a kind on."""
        kinds = [stage.kind for stage in self.stages]
        return [k if (n := kinds[: i + 1].count(k)) == 1 else f"{k}-{n}" for i, k in enumerate(kinds)]

    def limited(self, max_steps: int | None) -> Plan:
        """This plan with at most `max_steps` optimiser steps in each stage."""
        if max_steps is None:
            return self
        if max_steps < 1:
            raise InputError(f"--max-steps must be at least 1, not {max_steps}")
        stages = []
        for stage in self.stages:  # of text every sequence is of one length, and less has to be written
            tokens = min(stage.tokens, max_steps * stage.batch * self.data.length)
            most = min(max_steps, stage.max_steps or max_steps)
            stages.append(stage.model_copy(update={"tokens": tokens} if self.task == "text" else {"max_steps": most}))
        return self.model_copy(update={"stages": stages})

    def checked(self) -> Plan:
        """This plan. Raises InputError with all its problems."""
        if found := self.problems():
            raise InputError("\n".join(found))
        return self

    def problems(self) -> list[str]:
        """Everything wrong that can be known without the model or the data, one line each, with what to do."""
        found: list[str] = []
        settings: Any = None
        try:
            settings = self.mixer()
        except InputError as error:
            found.append(f"method: {error}")
        if not _LAYERS.fullmatch(self.method.layers):
            found.append(
                f"method.layers: {self.method.layers!r} is no layer list:"
                " write auto, all, 0-11, every:4, keep:3,7 or 0,2,5-7"
            )
        form = self.model.form
        if form is not None and not isinstance(form.get("model_type"), str):
            found.append(
                "model.form: needs model_type, the name transformers gives the architecture (llama, gpt2, ...)"
            )
        positions = (form or {}).get("max_position_embeddings") or (form or {}).get("n_positions")
        if positions and self.data.length > positions and not (self.data.allow_longer or _unbounded(self, settings)):
            found.append(
                f"data.length: {self.data.length} is more than the model's {positions} positions:"
                " shorten it, or pass --allow-longer"
            )
        for index, stage in enumerate(self.stages):
            at = stage.kind if sum(s.kind == stage.kind for s in self.stages) == 1 else index
            found += stage_problems(self, f"stages.{at}", stage, settings)
        if self.output.adapter_only and any(getattr(stage, "mode", "") == "full" for stage in self.stages):
            found.append("output.adapter_only: full fine-tuning changes the base: write the model, or use mode: lora")
        found += task_problems(self)
        own = self.task == "text" and self.data.source in (None, "self")
        if self.data.prompts and self.task == "diffusion":
            found.append("data.prompts: drawing from them takes a whole pipeline: linearize selfgen, then --dataset")
        elif self.data.prompts and not own:
            found.append("data.prompts: they are for text that the teacher writes: drop them, or data.source")
        if self.data.chat and own and not self.data.prompts:
            found.append("data.chat: name conversations (data.source), or data.prompts that the teacher answers")
        if self.data.completion_only and not (self.data.chat or self.data.prompts):
            found.append("data.completion_only: needs data.chat or data.prompts: what is the completion otherwise?")
        if self.eval.window <= self.eval.sinks:
            found.append(f"eval.sinks: {self.eval.sinks} must be fewer than eval.window ({self.eval.window})")
        return found

    def explain(self) -> str:
        """The plan in words, a line per step."""
        model = self.model.id or (f"a {self.model.form['model_type']} model" if self.model.form else "embedded teacher")
        settings = ", ".join(f"{k} {v}" for k, v in self.method.mixer.items())
        own = {"text": "self (the teacher writes it)", "diffusion": "self (the teacher draws it)"}
        own |= {} if self.model.id else {"image": "to be named; for the embedded teacher it is drawn"}
        lines = [
            f"model     {model}, {self.model.dtype}",
            f"method    {self.method.name}{f' ({settings})' if settings else ''} on "
            + (
                f"every layer where it pays at {self.method.target_length:,} tokens"
                if self.method.layers == "auto"
                else f"layers {self.method.layers}"
            ),
            f"data      {self.data.source or own.get(self.task, 'to be named')}"
            + ("" if self.task in ("image", "diffusion") else f", {SAID[self.task]} {self.data.length}")
            + (f", completing {self.data.prompts}" if self.data.prompts else "")
            + (", chat" if self.data.chat else "")
            + (", completions only" if self.data.completion_only else ""),
        ]
        for stage in self.stages:
            losses = " + ".join(f"{getattr(stage, k):g} {k}" for k in LOSSES[stage.kind] if getattr(stage, k))
            steps = f" in {stage.steps(self.data.length):,} steps" if self.task == "text" else " in batches"
            line = (
                f"{stage.kind:<10}{stage.tokens:,} tokens{steps} of {stage.batch},"
                f" lr {stage.lr:g} {stage.schedule}, loss {losses}" + ", bfloat16" * (stage.precision == "bfloat16")
            )
            if isinstance(stage, FinetunePlan):
                line += f", LoRA r {stage.lora.r}" if stage.mode == "lora" else ", all weights"
                line += f", mixers at {stage.mixer_lr:g}" if stage.mixer_lr else ", mixers frozen"
            elif stage.target == "linear":
                line += ", linear branch alone"
            lines.append(line)
        gates = [f"{k} {v}" for k, v in self.gate.model_dump().items() if v]
        lines.append(
            f"eval      {self.eval.source or 'held-out data'}"
            + ("" if self.task in ("image", "diffusion") else f", {self.eval.length} positions")
            + (f", pairs {self.eval.pairs}" if self.eval.pairs else "")
            + f", against a window of {self.eval.window}"
            + (f" + {self.eval.sinks} sinks" if self.eval.sinks else "")
        )
        if gates:
            lines.append(f"gate      {', '.join(gates)}")
        lines.append(f"output    {self.output.folder or 'chosen by convert'}" + ", adapter" * self.output.adapter_only)
        if self.published:
            lines.append(f"published {json.dumps(self.published, ensure_ascii=False)}")
        if self.measured:
            lines.append(f"measured  {self.measured}")
        return "\n".join(lines)


def _unbounded(plan: Plan, settings: Any) -> bool:
    """Every layer linear over everything, without RoPE: no window and no sinks, whose softmax is of rotated keys. With
    layers "auto" it is so far a wish: `resolve.choose` refuses where the model's own sizes leave a layer as it was."""
    rotated = getattr(settings, "window", 0) or getattr(settings, "sinks", 0)
    return getattr(settings, "rope", "keep") == "undo" and not rotated and plan.method.layers in ("auto", "all")


# ------------------------------------------------------------------------------------------------ messages
def _known(model: type[BaseModel], raw: Any, at: tuple[Any, ...], errors: list[str]) -> None:
    """Collects unknown keys below `raw`, each with its dotted path and the nearest valid name."""
    if not isinstance(raw, Mapping):
        return
    for key, value in raw.items():
        if key not in model.model_fields:
            errors.append(f"{_dotted((*at, key))}: unknown key, {nearest(str(key), list(model.model_fields))}")
        elif model is Plan and key == "stages" and isinstance(value, list):
            for index, stage in enumerate(value):
                kind = stage.get("kind") if isinstance(stage, Mapping) else None
                if kind in _KINDS:
                    many = sum(isinstance(s, Mapping) and s.get("kind") == kind for s in value) > 1
                    _known(_KINDS[kind], stage, (key, index if many else kind), errors)
                else:
                    kinds = list(_KINDS)
                    said = nearest(str(kind), kinds) if kind is not None else f"choose from: {', '.join(kinds)}"
                    errors.append(f"stages.{index}.kind: {kind!r} is no stage, {said}")
        else:
            inner = model.model_fields[key].annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                _known(inner, value, (*at, key), errors)


_KINDS: dict[str, type[BaseModel]] = {"transfer": TransferPlan, "finetune": FinetunePlan}


def _dotted(path: Iterable[Any]) -> str:
    return ".".join(str(p) for p in path)


def _line(error: Any, raw: Mapping[str, Any]) -> str:
    """One line of a pydantic error, with the path as `--set` would write it."""
    path = list(error["loc"])
    if len(path) > 2 and path[0] == "stages":
        kinds = [s.get("kind") for s in raw.get("stages", []) if isinstance(s, Mapping)]
        path[1:3] = [path[2] if kinds.count(path[2]) == 1 else path[1]]
    said = error["msg"][0].lower() + error["msg"][1:]
    given = "" if error["type"] == "missing" else f", not {error['input']!r}"
    return f"{_dotted(p for p in path if not str(p).startswith(('literal[', 'list['))) or 'plan'}: {said}{given}"


def _lines(title: str, errors: Sequence[str]) -> str:
    return "\n".join(f"{title}: {error}" for error in dict.fromkeys(errors))
