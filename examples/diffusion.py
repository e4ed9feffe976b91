"""Convert a diffusion transformer: the embedded teacher (garments of 32x32 pixels), yours with --pipeline.

python examples/diffusion.py [--pipeline FOLDER] [--method clear] [--tokens 16384] [--out FOLDER]
"""

import argparse

import torch

import linearize
from linearize import api
from linearize.data.drawing import denoise, noise_of
from linearize.denoisers import form_of, load_scheduler

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--pipeline", help="folder or hub id of a class-conditional one; none: the embedded teacher")
parser.add_argument("--method", default="clear")
parser.add_argument("--tokens", type=int, default=614_400, help="patches that training sees, in batches of 16 images")
parser.add_argument("--drawings", type=int, default=320, help="that the teacher makes to learn from")
parser.add_argument("--out", default="diffusion")
arguments = parser.parse_args()

# The teacher draws its own data: conditions, seeds and pixels, in a folder that goes on where it was interrupted.
print(api.selfgen(f"{arguments.out}-data", arguments.pipeline, num=arguments.drawings).render())
more = [f"stages.finetune.tokens={arguments.tokens}", f"data.valid_tokens={256 * (arguments.drawings // 8)}"]
common = {"task": "diffusion", "data": f"{arguments.out}-data", "output_dir": arguments.out}
done = api.convert(arguments.pipeline, arguments.method, overrides=more, **common)
for row in done.report.rows:
    print(
        f"{row.name:22} distance {row.distance or 0:.3f}  SSIM {row.ssim or 1:.3f}  class seen {row.accuracy or 0:.2f}"
    )

model = linearize.load(arguments.out)
labels = {"class_labels": torch.arange(4)}
size = (model.config.in_channels, model.config.sample_size, model.config.sample_size)
drawn = denoise(
    model, load_scheduler(arguments.out, form_of(arguments.out)), noise_of(torch.arange(4), size), labels, 20
)
print("drawn by the student:", tuple(drawn.shape))
