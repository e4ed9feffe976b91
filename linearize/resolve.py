"""From what was asked for to a definite plan, and to the layers it means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.answers import Resolved

if TYPE_CHECKING:
    from torch import nn

    from linearize.plan import Plan
    from linearize.types import Site


def resolve(
    model: str | Path | nn.Module | None = None,
    method: str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | Iterable[str | tuple[str, Any]] = (),
    *,
    task: str | None = None,
    max_steps: int | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
) -> Resolved:
    """The plan for a model, with everything checked that can be without its weights.

    No model is the recipe's own, else the embedded teacher of the task; no recipe is the best for the model's form,
    else the defaults of its task. task: what the model has to be for (None: whatever it is). offline: a recipe's
    `model.form` is enough. Raises InputError (all problems at once), Unsupported.
    """
    from linearize import models
    from linearize.plan import Plan
    from linearize.recipe import pairs, raw, recipe_for
    from linearize.types import InputError, nearest

    if task is not None and task not in models.TASKS:
        raise InputError(f"there is no task {task!r}: {nearest(task, models.TASKS)}")
    items = pairs(overrides)
    if method is not None:
        items.insert(0, ("method.name", method))
    given = recipe is not None
    # Reads the recipe before the model: a mistake in it should not wait for a download.
    plan = Plan.read(recipe, items, task)
    wanted = plan.task if "task" in raw(recipe)[1] or any(key == "task" for key, _ in items) else task
    source, notes = None, []
    config: Any
    if model is not None and not isinstance(model, str | Path):
        config = models.config_of(model)
    elif model is None and offline and plan.model.form and not plan.model.id:
        config = models.config_of_form(plan.model.form)
    elif model is None and offline and plan.model.form:
        config = models.config_of_form(plan.model.form)
        notes.append(f"sizes are those of the recipe's model.form; {plan.model.id} itself was not asked")
    else:
        source = models.source(model if model is not None else plan.model.id, plan.model.revision, plan.task)
        config = models.config(source, trust_remote_code)
    if given and source is not None and source.kind == "embedded" and not _agrees(config, plan.model.form):
        raise InputError(f"recipe {recipe} is for another model than the embedded one: name it with --model")
    found = models.task_of(model) if source is None and model is not None else models.kind(config)[0]
    if wanted not in (None, found):
        raise InputError(f"task: {wanted} was asked for, but this {config.model_type} is a model for {found}")
    if not given:
        recipe = recipe_for(config.to_dict(), plan.method.name)
    if recipe is None and found == "image" and not models.classifies(config if source or model is None else model):
        items = [("stages.finetune.kl", 0.0), ("stages.finetune.feature", 1.0), *items]  # there are no classes
    plan = Plan.read(recipe, items, found)
    if given and model is not None and not _agrees(config, plan.model.form):
        notes.append(f"recipe {recipe} was made for a model of other sizes")
    if model is None:
        named = plan.model.id
    else:
        named = str(model) if isinstance(model, str | Path) else getattr(model, "name_or_path", None)
    form = plan.model.form if source is None and model is None else _form(config)
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"id": named or None, "form": form})}).limited(
        max_steps
    )
    label = None if recipe is None or isinstance(recipe, Mapping) else str(recipe)
    return Resolved(plan.checked(), config, source, label, tuple(notes))


def short(name: str | None) -> str:
    """A model or recipe in the names of files: "owner/Llama-3.2-1B" -> "llama-3.2-1b"; None is the embedded teacher."""
    return re.sub(r"\.(gguf|ya?ml)$", "", Path(name or "embedded").name.lower())


def _agrees(config: Any, form: Mapping[str, Any] | None) -> bool:
    """Whether a model is of the form a recipe was written for (a recipe without a form is for any)."""
    return all(getattr(config, key, None) == value for key, value in (form or {}).items())


def _form(config: Any) -> dict[str, Any]:
    """The sizes of a model, as `model.form` holds them."""
    if hasattr(config, "form"):
        return config.form
    keys = (
        "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "max_position_embeddings", "sliding_window",
        "image_size", "patch_size", "num_channels",
    )  # fmt: skip
    sizes = {key: getattr(config, key, None) for key in keys}
    return {key: value for key, value in sizes.items() if isinstance(value, int | str)}


def choose(plan: Plan, model: nn.Module) -> tuple[list[Site], list[Site], dict[str, str]]:
    """(all sites of the model, those to convert, why some are left alone).

    With layers "auto" a site whose state would exceed the teacher's own cache at the plan's target length is left
    alone; layers that are named are converted regardless. Raises Unsupported where nothing remains, or where the
    method does not fit, InputError where sequences are to be longer than the positions of a layer left alone.
    """
    from linearize.mixers import base as mixers
    from linearize.surgery.select import find, parse_layers, worthwhile
    from linearize.types import InputError, Unsupported

    sites, settings = find(model), plan.mixer()
    if plan.method.layers == "auto":
        chosen, left = worthwhile(sites, plan.method.name, settings, plan.method.target_length)
        if not chosen:
            reason = next(iter(left.values()))
            raise Unsupported(f"no layer would gain: {reason}; convert them all the same with --layers all")
        config: Any = model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None) if plan.task == "text" else None
        if left and limit and plan.data.length > limit and not plan.data.allow_longer:
            raise InputError(
                f"data.length: {plan.data.length} is more than the model's {limit} positions, which {len(left)} layers "
                f"that are left alone keep ({next(iter(left))}): shorten it, or pass --layers all or --allow-longer"
            )
        return sites, chosen, left
    chosen = parse_layers(plan.method.layers, sites)
    for site in chosen:
        where = mixers.home(site.shape)
        if why := mixers.refusal(plan.method.name, where):
            raise Unsupported(f"{site.name}: method {plan.method.name!r} does not fit {where} attention: {why}")
    return sites, chosen, {}


def fitting(plan: Plan, chosen: Sequence[Site], recipe: str | None) -> tuple[Plan, list[str]]:
    """(plan, notes) without the stages that a method with nothing to learn cannot use.

    Nothing to transfer: transfer stages go. Without a recipe that asks for more, such a method is a zero-token
    baseline, and fine-tuning goes as well.
    """
    import torch

    from linearize.mixers import base
    from linearize.types import InputError

    with torch.device("meta"):
        mixer = base.build(plan.method.name, chosen[0].shape, plan.mixer())
    for name, stage in zip(plan.stage_names(), plan.stages, strict=True):
        if mixer.signed and getattr(stage, "map", 0):
            raise InputError(
                f"stages.{name}.map: weights of {plan.method.name} as configured may be negative, which have no "
                "cross-entropy: set map to 0 and output above it"
            )
        if getattr(stage, "own", None) and not mixer.teaches:
            raise InputError(
                f"stages.{name}.own: {plan.method.name} brings no losses of its own: drop it, or set output"
            )
    if any(True for _ in mixer.parameters()):
        return plan, []
    kept = [stage for stage in plan.stages if stage.kind != "transfer"] if recipe is not None else []
    if len(kept) == len(plan.stages):
        return plan, []
    words = "transfer is" if kept else "all stages are"
    note = f"{plan.method.name} has no parameters: {words} left out"
    return plan.model_copy(update={"stages": kept}), [note]
