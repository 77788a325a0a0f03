"""Export the averaged (EMA) network of a checkpoint as one ONNX file, all that sample.py needs.

    python export.py                                # run/checkpoint.pt to model.onnx
    python export.py --checkpoint run/checkpoint.pt --onnx model.onnx

Inputs x_t float32 (batch, C, H, W) and t int64 (batch,), output eps float32 (batch, C, H, W); the
schedule travels in the file's metadata. The file is compared with torch before it is put in place.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxscript import opset20 as op

from ddpm import Diffusion, UNet

OPSET = 20  # what ONNX Runtime has kernels for, on the CPU, CUDA and in the browser
TOLERANCE = 1e-4  # the largest difference from torch, of noise that is about N(0, 1)

# The exporter's own forms of these two leave nodes that ONNX Runtime's CUDA provider hands to the
# CPU: GroupNormalization has no kernel at all, and attention reads its scale from a shape.


def group_norm(x, num_groups: int, weight, bias, eps: float = 1e-5, cudnn_enabled: bool = True):
    """Group norm as a layer norm over rows of one group each."""
    channels, height, width = list(x.shape)[1:]
    row = np.ones(channels // num_groups * height * width, dtype=np.float32)
    per_channel = op.Constant(value_ints=[channels, 1, 1])
    h = op.Reshape(x, op.Constant(value_ints=[0, num_groups, -1]))
    ones = op.Constant(value=onnx.numpy_helper.from_array(row))
    h, _, _ = op.LayerNormalization(h, ones, epsilon=eps)
    h = op.Reshape(h, op.Constant(value_ints=[-1, channels, height, width]))
    return op.Add(op.Mul(h, op.Reshape(weight, per_channel)), op.Reshape(bias, per_channel))


def attention(q, k, v, attn_mask=None, dropout_p: float = 0.0, is_causal: bool = False,
              scale=None, enable_gqa: bool = False):  # fmt: skip
    """softmax(q k^T / sqrt(channels)) v, the scale a constant."""
    scale = op.Constant(value_float=float(q.shape[-1]) ** -0.5)
    scores = op.MatMul(op.Mul(q, scale), op.Transpose(k, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(scores, axis=-1), v)


def to_onnx(model):
    """The network as an onnx.ModelProto with a dynamic batch and no trace of this machine in it."""
    c, size = model.conv_in.in_channels, model.image_size
    # A batch of two: one of 1 would be baked in.
    example = (torch.zeros(2, c, size, size), torch.zeros(2, dtype=torch.int64))
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            model,
            example,
            input_names=["x_t", "t"],
            output_names=["eps"],
            dynamic_shapes={"x_t": {0: batch}, "t": {0: batch}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            custom_translation_table={
                torch.ops.aten.group_norm.default: group_norm,
                torch.ops.aten.scaled_dot_product_attention.default: attention,
            },
        )
    proto = program.model_proto
    for node in proto.graph.node:  # the exporter notes the source lines each node came from
        del node.metadata_props[:]
        node.doc_string = ""
    return proto


def largest_difference(path, model, T):
    """max |eps of the file - eps of the network| at batches 1, 2, 3 and t from 0 to T - 1."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    random = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in (1, 2, 3):
        for t in (0, 1, T // 2, T - 1):
            x = torch.randn(batch, *session.get_inputs()[0].shape[1:], generator=random)
            times = torch.full((batch,), t)
            with torch.no_grad():
                expected = model(x, times).numpy()
            (eps,) = session.run(["eps"], {"x_t": x.numpy(), "t": times.numpy()})
            worst = max(worst, float(np.abs(eps - expected).max()))
    return worst


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", default="run/checkpoint.pt", help="what train.py wrote [run/checkpoint.pt]"
    )
    parser.add_argument("--onnx", default="model.onnx", help="the file to write [model.onnx]")
    args = parser.parse_args()
    if not Path(args.checkpoint).is_file():
        sys.exit(f"export.py: there is no {args.checkpoint}; python train.py makes one")

    try:
        checkpoint = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        config = checkpoint["config"]
        diffusion = Diffusion(**config["diffusion"])
        model = UNet(**config["model"]).eval()
        model.load_state_dict(checkpoint["ema"])
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        sys.exit(f"export.py: {args.checkpoint} is no checkpoint of train.py ({why})")
    shape = [config["model"]["in_channels"]] + 2 * [config["model"]["image_size"]]

    proto = to_onnx(model)
    metadata = {
        "ddpm.betas": json.dumps(diffusion.betas.tolist()),
        "ddpm.variance": diffusion.variance,
        "ddpm.image_shape": json.dumps(shape),
        "ddpm.step": str(checkpoint["step"]),
        "ddpm.source": f"train.py, {config['train']['data'] or 'demo'}",
    }
    onnx.helper.set_model_props(proto, metadata)

    path = Path(args.onnx)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        onnx.save(proto, temporary)
        worst = largest_difference(temporary, model, diffusion.T)
        if not worst < TOLERANCE:
            sys.exit(f"export.py: eps differs from torch's by {worst:.1e}; {path} is not written")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, step {checkpoint['step']:,}")
    print(f"largest difference from torch {worst:.1e}, at batch 1, 2, 3 and t = 0, 1, T/2, T-1")
    print(f"next:\n  python sample.py --onnx {path.as_posix()}")


if __name__ == "__main__":
    main()
