"""Put CLEAR into a diffusers pipeline and take it out again: a random tiny Flux here, yours with --pipeline.

python examples/plug_in.py [--pipeline black-forest-labs/FLUX.1-dev] [--prompt "..."] [--radius 8] [--out FOLDER]
"""

import argparse
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline

from linearize import pipelines
from linearize.testing.pico import pico_diffusion

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--pipeline", help="hub id or folder; none: two random layers that know no words")
parser.add_argument("--prompt", default="a lighthouse in the fog")
parser.add_argument("--radius", type=int, default=2, help="in tokens; the published models have 8, 16 and 32")
parser.add_argument("--out", default="clear-plug-in")
arguments = parser.parse_args()
if arguments.pipeline:
    pipe: Any = DiffusionPipeline.from_pretrained(arguments.pipeline, torch_dtype=torch.bfloat16)
    call = {"prompt": arguments.prompt}
else:
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), *[None] * 5, pico_diffusion("flux"))
    words = {"prompt_embeds": torch.randn(1, 6, 12), "pooled_prompt_embeds": torch.randn(1, 8)}
    call = {**words, "height": 192, "width": 128}


def latents():
    return pipe(**call, num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(0)).images


before, handle = latents(), pipelines.apply(pipe, "clear", radius=arguments.radius)
print(handle.report())
print("changed by", float((latents() - before).norm() / before.norm()))
handle.save(arguments.out)
handle.remove()
print("removed without a trace:", torch.equal(latents(), before))
pipelines.load(pipe, arguments.out)
