"""What there is: methods, families, recipes and embedded teachers, each row asked of its source."""

from __future__ import annotations

from typing import Any


def methods() -> list[dict[str, Any]]:
    from linearize.mixers import base

    rows = []
    for name in base.names():
        mixer = base.get(name)
        rows.append(
            {
                "name": name,
                "fits": [where for where in base.HOMES if base.refusal(name, where) is None],
                "refuses": {where: why for where in base.HOMES if (why := base.refusal(name, where))},
                "needs": sorted(mixer.needs),
                "state": "constant" if mixer.recurrent else "grows",
                "settings": {key: field.get_default(call_default_factory=True) for key, field in _fields(mixer)},
                "paper": mixer.paper,
            }
        )
    return rows


def _fields(mixer: Any) -> list[tuple[str, Any]]:
    return list(mixer.Config.model_fields.items())


def families() -> list[dict[str, Any]]:
    """Asked of a skeleton of each family, not remembered."""
    import torch
    from transformers.utils import logging

    from linearize import models
    from linearize.surgery.select import find
    from linearize.testing.pico import FAMILIES, IMAGE_ENCODERS, TEXT_ENCODERS, pico_config
    from linearize.types import Unsupported

    logging.set_verbosity_error()  # tiny configurations make some families warn
    rows = []
    for family in (*FAMILIES, *TEXT_ENCODERS, *IMAGE_ENCODERS):
        config = pico_config(family)
        try:
            with torch.no_grad():
                sites = find(models.skeleton(config))
        except Unsupported as error:
            rows.append({"name": family, "task": "-", "reached": "no", "drops": str(error)})
            continue
        drops = list(dict.fromkeys(drop for site in sites for drop in site.drops))
        task = models.kind(config)[0]
        rows.append({"name": family, "task": task, "reached": sites[0].seam, "drops": "; ".join(drops)})
    return rows


def recipes() -> list[dict[str, Any]]:
    from linearize import recipe
    from linearize.plan import Plan

    rows = []
    for name in recipe.recipes():
        made = Plan.read(name)
        form = made.model.form or {}
        rows.append(
            {
                "name": name,
                "task": made.task,
                "method": made.method.name,
                "model": made.model.id or form.get("model_type") or "any",
                "tokens": sum(stage.tokens for stage in made.stages),
                "measured": made.measured,
            }
        )
    return rows


def embedded() -> list[dict[str, Any]]:
    from linearize import models

    rows = []
    for name in models.embedded():
        config = models.config(models.source(models.TEACHERS / name))
        size = sum(path.stat().st_size for path in (models.TEACHERS / name).rglob("*") if path.is_file())
        layers = config.num_layers if models.kind(config)[0] == "diffusion" else config.num_hidden_layers
        rows.append({"name": name, "model": config.model_type, "layers": layers, "bytes": size})
    return rows
