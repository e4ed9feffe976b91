"""linearize: turn a pretrained softmax transformer into a linear-cost one that keeps its quality.

import linearize
sites = linearize.find(model)
surgery = linearize.attach(model, sites, "hedgehog", {"window": 64, "sinks": 4})
...
surgery.detach()
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public verbs and where they live; imported on first use, so that `import linearize` costs nothing.
_VERBS = {
    "convert": "linearize.api",
    "find": "linearize.surgery.select",
    "attach": "linearize.surgery.attach",
    "Surgery": "linearize.surgery.attach",
    "save": "linearize.surgery.files",
    "load": "linearize.models",
    "prefix": "linearize.api",
    "restore": "linearize.surgery.state",
    "snapshot": "linearize.surgery.state",
}
__all__ = ["__version__", *_VERBS]


def __getattr__(name: str) -> Any:
    if name == "pipelines":  # the plug-in for diffusers
        return import_module("linearize.pipelines")
    if name not in _VERBS:
        raise AttributeError(f"module 'linearize' has no attribute {name!r}")
    return getattr(import_module(_VERBS[name]), name)
