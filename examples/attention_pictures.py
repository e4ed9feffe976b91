"""Where the middle patch of an image looks, as the teacher and as its conversion (untrained here): one picture.

python examples/attention_pictures.py [IMAGE] [--method hedgehog|lit|clear] [--out attention.png]
"""

import argparse

import matplotlib.pyplot as plt
import torch
from PIL import Image

import linearize
from linearize.evaluate.diagnostics import dense_maps
from linearize.models import load_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("image", nargs="?", help="none: a random one")
parser.add_argument("--method", default="hedgehog")
parser.add_argument("--out", default="attention.png")
arguments = parser.parse_args()

loaded = load_model(task="image")
picture = torch.rand(1, 1, 28, 28)
if arguments.image:
    grey = Image.open(arguments.image).convert("L").resize((28, 28))
    picture = torch.tensor(list(grey.tobytes())).view(1, 1, 28, 28) / 255
surgery = linearize.attach(loaded.model, None, arguments.method)
maps = dense_maps(surgery, {"pixel_values": (picture - 0.5) / 0.5}, {layer: range(4) for layer in (0, 2, 4)})

figure, axes = plt.subplots(6, 4, figsize=(8, 12))
for (layer, head), weights in maps.items():
    for row, side in enumerate(("teacher", "student")):
        axis = axes[layer + row, head]  # layers 0, 2, 4: two rows each
        axis.imshow(weights[side][1 + 7 * 14 + 7, 1:].view(14, 14))  # of row 7, column 7, behind the class token
        axis.set_title(f"layer {layer}, head {head}, {side}", fontsize=7)
        axis.axis("off")
figure.savefig(arguments.out, dpi=100)
