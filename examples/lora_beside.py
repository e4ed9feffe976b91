"""A LoRA of the base model beside CLEAR, in either order: a random tiny Flux here, yours with --pipeline and --lora.

python examples/lora_beside.py [--pipeline black-forest-labs/FLUX.1-dev --lora FOLDER] [--prompt "..."] [--radius 8]
"""

import argparse
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from peft import LoraConfig

from linearize import pipelines
from linearize.testing.pico import pico_diffusion

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--pipeline", help="hub id or folder; none: two random layers that know no words")
parser.add_argument("--lora", help="as load_lora_weights takes it; none: a random one")
parser.add_argument("--prompt", default="a lighthouse")
parser.add_argument("--radius", type=int, default=2, help="in tokens; the published models have 8, 16 and 32")
arguments = parser.parse_args()
pipe: Any = FluxPipeline(FlowMatchEulerDiscreteScheduler(), *[None] * 5, pico_diffusion("flux"))
call = {"prompt_embeds": torch.randn(1, 6, 12), "pooled_prompt_embeds": torch.randn(1, 8), "height": 192, "width": 128}
if arguments.pipeline:
    pipe, call = DiffusionPipeline.from_pretrained(arguments.pipeline), {"prompt": arguments.prompt}


def latents():
    return pipe(**call, num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(0)).images


handle, base = pipelines.apply(pipe, "clear", radius=arguments.radius), latents()
if arguments.lora:
    pipe.load_lora_weights(arguments.lora)  # before or after the plug-in: it is found by the names of its layers
else:
    pipe.transformer.add_adapter(LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False))
print("the LoRA changes what CLEAR draws by", float((latents() - base).norm() / base.norm()))
handle.remove()
print("and stays when CLEAR is gone:", bool(pipe.transformer.active_adapters()))
