"""The verbs: each a few lines that join plan -> surgery -> stages -> report. Importing this file costs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from linearize.models import Source
    from linearize.plan import Plan
    from linearize.surgery.forecast import Forecast
    from linearize.types import Site

LISTS = ("methods", "families", "recipes", "embedded")


@dataclass(frozen=True)
class Resolved:
    """What was asked for, made definite. source is None where the model was handed over, or where only its form is
    known. recipe: the name of the one used, if any. notes: what a user may not have expected."""

    plan: Plan
    config: Any
    source: Source | None
    recipe: str | None
    notes: tuple[str, ...] = ()


def resolve(
    model: str | Path | nn.Module | None = None,
    method: str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | Iterable[str | tuple[str, Any]] = (),
    *,
    max_steps: int | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
) -> Resolved:
    """The plan for a model, with everything checked that can be without its weights.

    No model is the recipe's own, else the embedded teacher; no recipe is the best for the model's form, else the
    defaults. offline: a recipe's `model.form` is enough. Raises InputError (all problems at once), Unsupported.
    """
    from linearize import models
    from linearize.plan import Plan, pairs, recipe_for
    from linearize.types import InputError

    items = pairs(overrides)
    if method is not None:
        items.insert(0, ("method.name", method))
    given = recipe is not None
    # Reads the recipe before the model: a mistake in it should not wait for a download.
    plan = Plan.read(recipe, items)
    source, notes = None, []
    config: Any
    if model is not None and not isinstance(model, str | Path):
        config = model.config
    elif model is None and offline and plan.model.form and not plan.model.id:
        config = models.config_of_form(plan.model.form)
    elif model is None and offline and plan.model.form:
        config = models.config_of_form(plan.model.form)
        notes.append(f"sizes are those of the recipe's model.form; {plan.model.id} itself was not asked")
    else:
        source = models.source(model if model is not None else plan.model.id, plan.model.revision)
        config = models.config(source, trust_remote_code)
    if given and source is not None and source.kind == "embedded" and not _agrees(config, plan.model.form):
        raise InputError(f"recipe {recipe} is for another model than the embedded one: name it with --model")
    if not given:
        recipe = recipe_for(config.to_dict(), plan.method.name)
        plan = Plan.read(recipe, items)
    elif model is not None and not _agrees(config, plan.model.form):
        notes.append(f"recipe {recipe} was made for a model of other sizes")
    named = str(model) if isinstance(model, str | Path) else plan.model.id if source is not None else None
    form = plan.model.form if source is None and model is None else _form(config)
    plan = plan.model_copy(
        update={"model": plan.model.model_copy(update={"id": named or plan.model.id, "form": form})}
    ).limited(max_steps)
    return Resolved(plan.checked(), config, source, None if isinstance(recipe, Mapping) else str(recipe), tuple(notes))


def _agrees(config: Any, form: Mapping[str, Any] | None) -> bool:
    """Whether a model is of the form a recipe was written for (a recipe without a form is for any)."""
    return all(getattr(config, key, None) == value for key, value in (form or {}).items())


def _form(config: Any) -> dict[str, Any]:
    """The sizes of a model, as `model.form` holds them."""
    keys = (
        "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "max_position_embeddings", "sliding_window",
    )  # fmt: skip
    sizes = {key: getattr(config, key, None) for key in keys}
    return {key: value for key, value in sizes.items() if isinstance(value, int | str)}


def choose(plan: Plan, model: nn.Module) -> tuple[list[Site], list[Site], dict[str, str]]:
    """(all sites of the model, those to convert, why some are left alone).

    With layers "auto" a site whose state would exceed the teacher's own cache at the plan's target length is left
    alone; layers that are named are converted regardless. Raises Unsupported where nothing remains, or where the
    method does not fit.
    """
    from linearize.mixers import base as mixers
    from linearize.surgery.select import find, parse_layers, worthwhile
    from linearize.types import Unsupported

    sites, settings = find(model), plan.mixer()
    if plan.method.layers == "auto":
        chosen, left = worthwhile(sites, plan.method.name, settings, plan.method.target_length)
        if not chosen:
            reason = next(iter(left.values()))
            raise Unsupported(f"no layer would gain: {reason}; convert them all the same with --layers all")
        return sites, chosen, left
    chosen = parse_layers(plan.method.layers, sites)
    for site in chosen:
        kind = "causal" if site.shape.causal else "bidirectional"
        if kind not in (kinds := mixers.get(plan.method.name).kinds):
            raise Unsupported(
                f"method {plan.method.name!r} replaces {' or '.join(sorted(kinds))} attention; {site.name} is {kind}"
            )
    return sites, chosen, {}


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


def plan(
    model: str | Path | nn.Module | None = None,
    method: str | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | Iterable[str | tuple[str, Any]] = (),
    *,
    max_steps: int | None = None,
    trust_remote_code: bool = False,
) -> Planned:
    """What `convert` would do and what would come of it: sites, parameters, state, FLOPs, break-even lengths.

    From the configuration's shapes: nothing is downloaded but the configuration, and no forward pass is made. Raises
    InputError, Unsupported.
    """
    from linearize import models
    from linearize.surgery.forecast import forecast

    resolved = resolve(
        model, method, recipe, overrides, max_steps=max_steps, trust_remote_code=trust_remote_code, offline=True
    )
    made = resolved.plan
    named = model is None or isinstance(model, str | Path)
    skeleton: Any = models.skeleton(resolved.config, trust_remote_code) if named else model
    sites, chosen, left = choose(made, skeleton)
    lengths: Sequence[int] = sorted({*made.eval.lengths, made.method.target_length})
    return Planned(
        resolved,
        forecast(
            skeleton,
            sites,
            chosen,
            left,
            made.method.name,
            made.mixer(),
            lengths,
            made.method.target_length,
        ),
    )


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


def listing(kind: str) -> Listing:
    """What there is of "methods", "families", "recipes" or "embedded". Raises InputError for another word."""
    from linearize.types import InputError, nearest

    makers = {"methods": _methods, "families": _families, "recipes": _recipes, "embedded": _embedded}
    if kind not in makers:
        raise InputError(f"there is no list of {kind!r}: {nearest(kind, LISTS)}")
    return Listing(kind, makers[kind]())


def _methods() -> list[dict[str, Any]]:
    from linearize.mixers import base

    rows = []
    for name in base.names():
        mixer = base.get(name)
        rows.append(
            {
                "name": name,
                "replaces": sorted(mixer.kinds),
                "needs": sorted(mixer.needs),
                "state": "constant" if mixer.recurrent else "grows",
                "settings": {key: field.get_default(call_default_factory=True) for key, field in _fields(mixer)},
                "paper": mixer.paper,
            }
        )
    return rows


def _fields(mixer: Any) -> list[tuple[str, Any]]:
    return list(mixer.Config.model_fields.items())


def _families() -> list[dict[str, Any]]:
    """Asked of a skeleton of each family, not remembered."""
    import torch
    from transformers.utils import logging

    from linearize import models
    from linearize.surgery.select import find
    from linearize.testing.pico import FAMILIES, pico_config
    from linearize.types import Unsupported

    logging.set_verbosity_error()  # tiny configurations make some families warn
    rows = []
    for family in FAMILIES:
        try:
            with torch.no_grad():
                sites = find(models.skeleton(pico_config(family)))
        except Unsupported as error:
            rows.append({"name": family, "reached": "no", "drops": str(error)})
            continue
        drops = list(dict.fromkeys(drop for site in sites for drop in site.drops))
        rows.append({"name": family, "reached": sites[0].seam, "drops": "; ".join(drops)})
    return rows


def _recipes() -> list[dict[str, Any]]:
    from linearize.plan import Plan, recipes

    rows = []
    for name in recipes():
        made = Plan.read(name)
        form = made.model.form or {}
        rows.append(
            {
                "name": name,
                "method": made.method.name,
                "model": made.model.id or form.get("model_type") or "any",
                "tokens": sum(stage.tokens for stage in made.stages),
                "measured": made.measured,
            }
        )
    return rows


def _embedded() -> list[dict[str, Any]]:
    from linearize import models

    rows = []
    for name in models.embedded():
        config = models.config(models.source(models.TEACHERS / name))
        size = sum(path.stat().st_size for path in (models.TEACHERS / name).iterdir())
        rows.append({"name": name, "model": config.model_type, "layers": config.num_hidden_layers, "bytes": size})
    return rows


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


def environment() -> Environment:
    """What a bug report needs."""
    import torch

    from linearize.report import provenance

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Environment(provenance.machine(device).model_dump(), provenance.versions(), provenance.commit().model_dump())
