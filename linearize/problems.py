"""What is wrong with a plan's stages, and with settings its task has no use for: one line each, with what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linearize.plan import Plan, StagePlan

#: the losses of each stage, as recipes weigh them
LOSSES = {
    "transfer": ("output", "map", "far", "mass", "own"),
    "finetune": (
        *("kl", "lm", "hidden", "feature", "dense", "task"),
        *("denoise", "prediction", "attention", "variance"),
    ),
}
SAID = {"text": "sequences of", "sentences": "sentences of at most"}
PLURAL = {"text": "text", "sentences": "sentences", "image": "images", "diffusion": "drawings"}
#: losses that a task has nothing for
_DENOISING = {"denoise", "prediction", "attention", "variance"}
FOREIGN = {
    "text": {"feature", "dense", "task", *_DENOISING},
    "sentences": {"lm", *_DENOISING},
    "image": {"lm", *_DENOISING},
    "diffusion": {"kl", "lm", "hidden", "feature", "dense", "task"},
}


_DRAWN = {**dict.fromkeys(sorted(_DENOISING), 0), "every": 1, "weighting": "none", "teacher": None}
#: keys that a plan's digest leaves out while they say nothing: they came after the first runs, whose digests stay
LATER: dict[str, dict[str, Any]] = {
    "": {"task": "text"},
    "data": {"minimum": None, "image_column": None, "label_column": None, "skip_bad": False, "steps": 20},
    "eval": {"pairs": None, "minimum": None, "steps": 20, "judge": None, "crop": 0, "mosaic": None},
    "gate": {"retained": None, "cosine": None, "mrr": None, "distance": None},
    "stages": {
        "max_steps": None,
        "precision": "float32",
        "own": None,
        "ema": 0,
        "feature": 0,
        "dense": 0,
        "task": 0,
        **_DRAWN,
    },
}


def stage_problems(plan: Plan, at: str, stage: StagePlan, settings: Any) -> list[str]:
    """Of one stage. at: what it is called; settings: the mixer's (None where they are wrong themselves)."""
    found = []
    grid = plan.task in ("image", "diffusion")
    if not grid and stage.tokens < plan.data.length:
        found.append(f"{at}.tokens: {stage.tokens} is less than one sequence of {plan.data.length}")
    losses = [key for key in LOSSES[stage.kind] if key not in FOREIGN[plan.task]]
    if not any(getattr(stage, key) for key in losses):
        found.append(f"{at}: nothing to learn: give {', '.join(losses[:-1])} or {losses[-1]} a weight above 0")
    for key in set(LOSSES[stage.kind]) & FOREIGN[plan.task]:
        if getattr(stage, key):
            found.append(f"{at}.{key}: no loss for {PLURAL[plan.task]}: give a weight to {' or '.join(losses)}")
    if stage.kind == "finetune":
        return found + _teacher_problems(plan, at, stage)
    if stage.far_weight and not stage.output:
        found.append(f"{at}.far_weight: it weighs the output error: give output a weight above 0")
    near = "radius" if grid else "window"
    for key in ("far", "mass", "window_drop", "far_weight"):
        if getattr(stage, key) and settings is not None and not getattr(settings, near, None):
            found.append(f"{at}.{key}: needs a window: set method.mixer.{near}, or {key} to 0")
    return found


def _teacher_problems(plan: Plan, at: str, stage: StagePlan) -> list[str]:
    if getattr(stage, "teacher", None) is None:
        return []
    if plan.task != "diffusion":
        return [f"{at}.teacher: another teacher is for denoisers, this model is for {PLURAL[plan.task]}: drop it"]
    if getattr(stage, "attention", 0):
        return [f"{at}.attention: another teacher has attention of other sizes: set it to 0, or drop teacher"]
    if not (getattr(stage, "prediction", 0) or getattr(stage, "variance", 0)):
        return [f"{at}.teacher: nothing is learned from it: give prediction or variance a weight above 0"]
    return []


def task_problems(plan: Plan) -> list[str]:
    """Settings that say something which a model of this task has no use for."""
    task, data, gate = plan.task, plan.data, plan.gate
    text_only = ("prompts", "chat", "completion_only", "self_folder", "self_seed")
    foreign = {
        "text": ("image_column", "label_column", "skip_bad", "minimum"),
        "sentences": (*text_only, "image_column", "skip_bad"),
        "image": (*text_only, "text_column", "minimum"),
        "diffusion": ("chat", "completion_only", "text_column", "image_column", "label_column", "skip_bad", "minimum"),
    }[task]
    found = [f"data.{key}: has no meaning for {PLURAL[task]}: drop it" for key in foreign if getattr(data, key)]
    for name, node in (("data", data), ("eval", plan.eval)):
        if node.minimum and node.minimum > node.length:
            found.append(f"{name}.minimum: {node.minimum} is more than {name}.length ({node.length}): lower it")
    if plan.eval.pairs and task != "sentences":
        found.append(f"eval.pairs: scored pairs are of sentences, this model is for {PLURAL[task]}: drop it")
    if plan.eval.mosaic and task != "diffusion":
        found.append(f"eval.mosaic: is of drawings, this model is for {PLURAL[task]}: drop it")
    elif plan.eval.mosaic and not plan.eval.crop:
        found.append("eval.mosaic: pictures are told apart by their dark frames: say how wide these are (eval.crop)")
    gates = ("retained", "cosine", "mrr") if task == "text" else ("linear_gain", "perplexity_ratio")
    if task in ("image", "diffusion"):
        gates = (*gates, "mrr")
    if task != "diffusion":
        gates = (*gates, "distance")
    found += [f"gate.{key}: is not measured on {PLURAL[task]}: drop it" for key in gates if getattr(gate, key)]
    return found
