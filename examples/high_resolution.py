"""Draw small, then large around it with CLEAR (arXiv 2412.16112, high resolution): RoPE stretched, attention rescaled.

python examples/high_resolution.py [--pipeline black-forest-labs/FLUX.1-dev] [--prompt "..."] [--side 1024] [--times 2]
"""

import argparse
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline

from linearize import pipelines
from linearize.data.autoencoder import unpack
from linearize.testing.pico import pico_diffusion

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--pipeline", help="hub id or folder; none: two random layers that know no words")
parser.add_argument("--prompt", default="a lighthouse")
parser.add_argument("--side", type=int, default=128, help="of the small picture, in pixels")
parser.add_argument("--times", type=int, default=2, help="how much longer the sides of the large one are")
parser.add_argument("--radius", type=int, default=3)
arguments, steps = parser.parse_args(), 4
pipe: Any = FluxPipeline(FlowMatchEulerDiscreteScheduler(), *[None] * 5, pico_diffusion("flux"))
call = {"prompt_embeds": torch.randn(1, 6, 12), "pooled_prompt_embeds": torch.randn(1, 8)}
if arguments.pipeline:
    pipe, call = DiffusionPipeline.from_pretrained(arguments.pipeline), {"prompt": arguments.prompt}
call |= {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
small = pipe(**call, height=arguments.side, width=arguments.side, num_inference_steps=steps).images
side = int(small.shape[1] ** 0.5)  # in tokens, which hold two by two latents
planes = unpack(small, torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side)))
large = torch.nn.functional.interpolate(planes, scale_factor=arguments.times, mode="bicubic")
strength, size = 0.7, arguments.side * arguments.times  # of the noise that goes on top: the picture keeps its layout
noisy = (1 - strength) * large + strength * torch.randn_like(large)
call |= {"latents": FluxPipeline._pack_latents(noisy, *large.shape), "height": size, "width": size}
call |= {"sigmas": np.linspace(strength, strength / steps, steps)}
pipe.scheduler = FlowMatchEulerDiscreteScheduler()  # which takes these as they are: no shift
with pipelines.apply(pipe, "clear", radius=arguments.radius, ntk=10, proportional=side**2 + 512) as handle:
    print(handle.report(grid=(side * arguments.times,) * 2))
    print("drawn:", tuple(pipe(**call).images.shape))
