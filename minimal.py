# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2.0", "Pillow>=11.3", "tqdm>=4.66", "onnxruntime>=1.31",
#                 "torch>=2.11", "onnx>=1.20", "onnxscript>=0.6.2"]
# ///
"""Train a DDPM on a folder of images, export it to ONNX, and sample 16 images without torch.

    python minimal.py ./images [STEPS]    # 10,000 steps, unless you give another number

This is the whole pipeline on one page: Algorithm 1 with Adam, the network as model.onnx, and
Algorithm 2 in numpy under ONNX Runtime, which makes samples.png. It needs ddpm.py, torch, numpy,
Pillow, tqdm, onnx, onnxscript and onnxruntime (onnxruntime-gpu for an NVIDIA GPU). The programs
train.py, export.py and sample.py add resuming, checks, faster samplers, flips, bfloat16 and more.
"""

import argparse
import contextlib
import copy
import json
import logging
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from PIL import Image, ImageOps
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from ddpm import Diffusion, UNet, linear_betas

parser = argparse.ArgumentParser(description="Train a DDPM, export it, and sample 16 images.")
parser.add_argument("folder", help="folder of images")
parser.add_argument("steps", nargs="?", type=int, default=10_000, help="default: %(default)s")
args = parser.parse_args()
if {"model.onnx", "samples.png"} & {*os.listdir()} or not os.access(".", os.W_OK):
    sys.exit("minimal.py: run it in a writable folder without model.onnx and samples.png")

# The images of the folder that can be read: float32 (N, 3, 32, 32) in [-1, 1]
pixels, files = [], [path for path in Path(args.folder).rglob("*") if path.is_file()]
for path in tqdm(files):
    with contextlib.suppress(Exception):  # Pillow raises many kinds of errors
        image = ImageOps.exif_transpose(Image.open(path, formats=("PNG", "JPEG", "WEBP")))
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
            image = Image.fromarray(np.uint8(np.asarray(image) / 257))
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        pixels.append(np.asarray(ImageOps.fit(image.convert("RGB"), (32, 32))))
if not pixels:
    sys.exit(f"{args.folder}: there are no PNG, JPEG or WebP files that can be read")
print(f"images: {len(pixels):,}; files that can't be used: {len(files) - len(pixels):,}")
device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(device) / 127.5 - 1

# Algorithm 1 with Adam, and an average of the weights
diffusion = Diffusion(linear_betas())
# 32 pixels, 3 channels, four levels of 16, 32, 64 and 64 features; the paper's network is UNet()
model = UNet(32, 3, 16, (1, 2, 4, 4), num_res_blocks=1, attention_resolutions=(), dropout=0)
average = copy.deepcopy(model.to(device)).eval()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
bar = tqdm(range(args.steps))  # which shows how long it will take
with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends the training early
    for step in bar:
        # The learning rate falls to 0 in the last quarter.
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, 4 - 4 * step / args.steps)
        loss = diffusion.loss(model, images[torch.randint(len(images), (64,), device=device)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(0.9999, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)([*average.parameters()], [*model.parameters()], None)
        if step % 100 == 0:  # reading the loss waits for the device
            bar.set_postfix(loss=f"{loss.item():.3f}")
print("exporting model.onnx")

# The network as ONNX, with the schedule in its metadata; the exporter's messages are suppressed
warnings.simplefilter("ignore")
logging.disable()
x_t, t, batch = torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64), torch.export.Dim("n")
options = {"input_names": ["x_t", "t"], "output_names": ["eps"], "dynamo": True, "verbose": False}
options |= {"dynamic_shapes": ({0: batch}, {0: batch}), "opset_version": 20}
network = torch.onnx.export(average.cpu(), (x_t, t), **options).model_proto
metadata = {"ddpm.betas": json.dumps(diffusion.betas.tolist()), "ddpm.variance": "large"}
metadata["ddpm.image_shape"] = json.dumps([3, 32, 32])
onnx.helper.set_model_props(network, metadata)
onnx.save(network, "model.onnx")


# The lines from here on do not need torch and can be copied on their own, with a model.onnx.
import json
import shutil

import numpy as np
import onnxruntime
from PIL import Image
from tqdm import tqdm

# Algorithm 2 under ONNX Runtime, on CUDA if its libraries are there
providers = ["CPUExecutionProvider"]
if shutil.which("nvidia-smi") and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
    onnxruntime.preload_dlls()
    providers.insert(0, "CUDAExecutionProvider")
session = onnxruntime.InferenceSession("model.onnx", providers=providers)
metadata = session.get_modelmeta().custom_metadata_map
betas, shape = json.loads(metadata["ddpm.betas"]), json.loads(metadata["ddpm.image_shape"])
alphas_bar = np.cumprod(1 - np.array(betas)).tolist()
random = np.random.default_rng(0)
x = random.standard_normal((16, *shape), np.float32)
for t in tqdm(range(len(betas))[::-1]):
    beta, abar = betas[t], alphas_bar[t]
    (eps,) = session.run(["eps"], {"x_t": x, "t": np.full(len(x), t)})
    x0 = ((x - (1 - abar) ** 0.5 * eps) / abar**0.5).clip(-1, 1)  # (15)
    if t > 0:  # the posterior mean (7), and noise
        abar_prev = alphas_bar[t - 1]
        mean = abar_prev**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - abar_prev) * x
        x = mean / (1 - abar) + beta**0.5 * random.standard_normal(x.shape, np.float32)
rows = ((x0 + 1) * 127.5).round().astype(np.uint8).reshape(4, 4, *shape)
grid = rows.transpose(0, 3, 1, 4, 2).reshape(4 * shape[1], -1, shape[0]).repeat(4, 0).repeat(4, 1)
Image.fromarray(grid.squeeze()).save("samples.png")
print(f"samples.png: 16 images by Algorithm 2, with model.onnx on {session.get_providers()[0]}")
