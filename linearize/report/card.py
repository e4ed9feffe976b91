"""The model card: README.md of the output folder, with the recipe and the measured table inside. Needs no network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from linearize.report import tables
from linearize.report.schema import Report
from linearize.storage import write_atomic
from linearize.types import InputError

if TYPE_CHECKING:
    from linearize.models import Source

_PIPELINE = {"text": "text-generation", "sentences": "sentence-similarity", "image": "image-classification"}
_PIPELINE["diffusion"] = "unconditional-image-generation"
_METRICS = {
    "text": (("perplexity", "perplexity"), ("kl", "KL to the teacher, nats per token"), ("top1", "top-1 agreement")),
    "sentences": (("spearman", "Spearman correlation"), ("cosine", "cosine to the teacher's vector"), ("mrr", "MRR")),
    "diffusion": (("distance", "distance to the teacher's drawings"), ("ssim", "SSIM to them"), ("frechet", "Fréchet")),
    "image": (("accuracy", "top-1"), ("agreement", "agreement with the teacher"), ("cosine", "feature cosine")),
}
LIMITS = (
    "Only one model, one data set and one machine stand behind the numbers above: measure on your own data "
    "(`linearize eval`).",
    "A state of constant size forgets. Exact recall from far back is where softmax attention stays ahead: look at the "
    "copy columns before you rely on it.",
    "Biases and unsafe behaviour of the base model were neither measured nor removed.",
)


def write_card(report: Report, folder: str | Path, *, adapter: bool | None = None) -> None:
    """Writes README.md into `folder`. adapter: see `card`. Raises StorageError."""
    write_atomic(Path(folder) / "README.md", str(card(report, adapter=adapter)))


def card(report: Report, *, adapter: bool | None = None) -> Any:
    """The huggingface_hub.ModelCard of a report. adapter: not a whole model; None: as the plan's output says."""
    from huggingface_hub import ModelCard, ModelCardData

    if adapter is None:
        adapter = bool((report.plan.get("output") or {}).get("adapter_only"))

    name = f"{report.model.id.rpartition('/')[2]}-{report.method}"
    results, ours = _eval_results(report), adapter or report.task == "diffusion"
    data = ModelCardData(
        model_name=name if results else None,
        eval_results=results or None,
        # Only an id of the hub means something to others; a folder of this machine does not.
        base_model=report.model.id if report.model.source == "hub" else None,
        license=report.model.license,
        library_name="linearize" if ours else "transformers",
        pipeline_tag=_PIPELINE[report.task],
        tags=[
            "linearize",
            "linear-attention",
            report.method,
            *([] if ours else ["custom_code"]),
        ],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(report, name, adapter)}")


def _eval_results(report: Report) -> list[Any]:
    from huggingface_hub import EvalResult

    row = report.row("student")
    if row is None:
        return []
    return [
        EvalResult(
            task_type=_PIPELINE[report.task],
            dataset_type="text" if report.task in ("text", "sentences") else "image",
            dataset_name=report.evaluation,
            metric_type=key,
            metric_name=words,
            metric_value=value,
        )
        for key, words in _METRICS[report.task]
        if (value := getattr(row, key)) is not None
    ]


def _body(report: Report, name: str, adapter: bool) -> str:
    model, escape = report.model, tables.escape_markdown
    shown = [tables.quality_table(report), tables.parts_table(report), tables.state_table(report)]
    layers = "its attention layers"
    if model.converted is not None and model.layers is not None:
        layers = f"{model.converted} of its {model.layers} attention layers"
    command = report.command.replace("`", "'")
    versions = ", ".join(f"{library} {version}" for library, version in report.versions.items())
    parts = [
        f"# {escape(name)}",
        f"{escape(model.id)} with {layers} replaced by `{report.method}`{_paper(report.method)}, made by linearize "
        f"{escape(report.commit.package)}.",
        f"**{escape(report.verdict.headline)}.**\n\n" + "".join(f"- {escape(line)}\n" for line in report.verdict.lines),
        "## Quality",
        *(tables.render(table, "markdown") for table in shown if table is not None and table.rows),
        "## Load",
        _load(report, adapter),
        *_samples(report),
        "## Recipe",
        _fence(yaml.safe_dump(report.plan, sort_keys=False, allow_unicode=True), "yaml"),
        "## Limitations",
        "".join(f"- {line}\n" for line in [*_kept(report), *(LIMITS if report.task == "text" else LIMITS[::2])]),
        "## How it was made",
        tables.render(tables.stages_table(report), "markdown"),
        f"`{command}`, commit {escape(str(report.commit))}, {report.date}, on {escape(report.machine.cpu)} "
        f"({report.machine.device}); {escape(versions)}. Everything else is in `report.json`.",
    ]
    return "\n\n".join(part.rstrip() for part in parts if part.strip()) + "\n"


def _paper(method: str) -> str:
    """Where the method comes from, as its mixer says; nothing for a method that is not installed here."""
    from linearize.mixers.base import get

    try:
        return f" ({tables.escape_markdown(get(method).paper)})"
    except InputError:
        return ""


def _load(report: Report, adapter: bool) -> str:
    if adapter and report.task == "diffusion":
        return _fence('import linearize\n\nhandle = linearize.pipelines.load(pipe, "this/folder")\n', "python")
    if adapter:
        base = report.model.id if report.model.source == "hub" else "path/to/the/base"
        return _fence(f'import linearize\n\nmodel = linearize.load("{base}", adapter="this/folder")\n', "python")
    if report.task != "text":
        return _fence(_ENCODE[report.task], "python")
    return _fence(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this/folder", trust_remote_code=True)  # needs linearize\n'
        'tokenizer = AutoTokenizer.from_pretrained("this/folder")\n'
        'ids = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))\n",
        "python",
    )


_ENCODE = {
    "sentences": "import linearize\n"
    "from transformers import AutoTokenizer\n\n"
    'model = linearize.load("this/folder")  # or AutoModel.from_pretrained(..., trust_remote_code=True)\n'
    'tokenizer = AutoTokenizer.from_pretrained("this/folder")\n'
    'batch = tokenizer(["A sentence.", "Another, longer one."], padding=True, return_tensors="pt")\n'
    "tokens = model(**batch).last_hidden_state\n",
    "diffusion": "import linearize\n\n"
    'transformer = linearize.load("this/folder")  # diffusers alone does not find these weights, on purpose\n'
    "noise = transformer(hidden_states=x, timestep=t, **conditions).sample  # as the base model\n",
    "image": "import linearize\n\n"
    'model = linearize.load("this/folder")  # or the Auto class of the base model, with trust_remote_code=True\n'
    "outputs = model(pixel_values=images)  # float32 [batch, channels, rows, columns], as the base model takes them\n",
}


def _samples(report: Report) -> list[str]:
    if not report.sample or report.task != "text":
        return []
    sample = report.sample[0]
    both = f"{sample.prompt}\n\nteacher:  ...{sample.teacher}\n\nstudent:  ...{sample.student}\n"
    return ["## A sample", _fence(both)]


def _kept(report: Report) -> list[str]:
    escape = tables.escape_markdown
    kept = [site for site in report.sites if not site.converted]
    lines = [f"{escape(site.name)} keeps softmax{': ' + escape(site.why) if site.why else ''}." for site in kept[:8]]
    if len(kept) > 8:
        lines.append(f"So do {len(kept) - 8} more layers, named in `report.json`.")
    drops = sorted({what for site in report.sites if site.converted for what in site.drops})
    lines += [f"Not kept in the converted layers: {escape(what)}." for what in drops]
    if not report.model.license:
        lines.append("The licence of the base model applies; it was not stated where the base was loaded from.")
    return lines


def _fence(text: str, language: str = "") -> str:
    """A code block that no text can close from within."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    mark = "`" * max(3, longest + 1)
    return f"{mark}{language}\n{text.rstrip()}\n{mark}"


def license_of(where: Source) -> str | None:
    """The licence that the model's own card states, or its GGUF file; None where neither does or the card cannot be
    read. Of a hub model the card is fetched, which is kilobytes beside its weights."""
    folder = Path(where.name)
    if where.gguf and (found := _of_gguf(folder / where.gguf)):
        return found
    path: str | Path = folder / "README.md"
    if where.kind == "hub":
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            path = hf_hub_download(where.name, "README.md", revision=where.revision)
        except (OSError, ValueError, HfHubHTTPError):  # no card, no network, or not allowed to go there
            return None
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        stated = (yaml.safe_load(found.group(1)) or {}).get("license") if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        return None
    return stated if isinstance(stated, str) else None


def _of_gguf(file: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("general.license")
    return None if field is None else str(field.contents()) or None


def check_card(path: str | Path) -> None:
    """Raises InputError unless `path` is a card of ours whose header can be read: to be called before publishing."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(path).data
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not a model card ({error}): write it again with `linearize report`") from None
    if "linearize" not in (getattr(data, "tags", None) or []):
        raise InputError(f"{path} was not written by linearize: write it again with `linearize report`")
