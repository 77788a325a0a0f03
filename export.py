"""Export the network of a run as the ONNX file that sample.py needs.

    python export.py                                     # run/ (or demo/) to model.onnx
    python export.py --checkpoint run --onnx model.onnx

The file has the inputs x_t, float32 (batch, C, H, W), and t, int64 (batch,), and the output eps,
float32 (batch, C, H, W); the schedule is in the metadata. With classes, y, int64 (batch,), is a
third input, in which the index after the last class stands for "no class", and the metadata contain
the class names. The file is compared with torch before it is put in place.
"""

import argparse
import ast
import json
import logging
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxscript import opset20 as op

from program import check_writable, guard_output, replacing
from run import default_run, load
from sample import Network, example, thinned

OPSET = 20  # ONNX Runtime has kernels for it on the CPU, on CUDA and in the browser
TOLERANCE = 1e-4  # the largest difference from torch, in an eps that is about N(0, 1)

# The exporter's own translations of the two operators below contain nodes that the CUDA provider of
# ONNX Runtime leaves to the CPU: Shape and, in newer opsets, GroupNormalization.


def group_norm(x, num_groups: int, weight=None, bias=None, eps: float = 1e-5,
               cudnn_enabled: bool = True):  # fmt: skip
    """Express group norm as a layer norm over rows that hold one group each."""
    channels, *sides = list(x.shape)[1:]
    row = np.ones(channels // num_groups * math.prod(sides), x.dtype.numpy())
    per_channel = op.Constant(value_ints=[channels, *[1] * len(sides)])
    h = op.Reshape(x, op.Constant(value_ints=[0, num_groups, -1]))
    ones = op.Constant(value=onnx.numpy_helper.from_array(row))
    h, _, _ = op.LayerNormalization(h, ones, epsilon=eps)
    h = op.Reshape(h, op.Constant(value_ints=[-1, channels, *sides]))
    h = h if weight is None else op.Mul(h, op.Reshape(weight, per_channel))
    return h if bias is None else op.Add(h, op.Reshape(bias, per_channel))


def attention(q, k, v, attn_mask=None, dropout_p: float = 0.0, is_causal: bool = False,
              scale=None, enable_gqa: bool = False):  # fmt: skip
    """Express softmax(q k^T scale) v with a constant scale, for attention without a mask."""
    scale = float(q.shape[-1]) ** -0.5 if scale is None else float(scale)
    scaled = op.Mul(q, op.Constant(value_float=scale))
    *others, last, channels = range(len(k.shape))
    scores = op.MatMul(scaled, op.Transpose(k, perm=[*others, channels, last]))
    return op.MatMul(op.Softmax(scores, axis=-1), v)


def to_onnx(network, diffusion, shape, names=()):
    """Return eps_theta as an onnx.ModelProto with a dynamic batch and the schedule as metadata.

    network: returns eps. shape: (C, H, W) of an image. names: the class names, if any. The nodes
    are named after their modules, as in "down.0.0.conv1/Conv_20", by which extras/half.py finds
    them.
    """
    # The example has a batch of two: the exporter would treat a batch of 1 as a constant.
    inputs = {"x_t": torch.zeros(2, *shape), "t": torch.zeros(2, dtype=torch.int64)}
    inputs |= {"y": torch.zeros(2, dtype=torch.int64)} if names else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        exported = torch.onnx.export(
            network,
            tuple(inputs.values()),
            input_names=[*inputs],
            output_names=["eps"],
            dynamic_shapes=[{0: torch.export.Dim("batch")} for _ in inputs],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            custom_translation_table={
                torch.ops.aten.group_norm.default: group_norm,
                torch.ops.aten.scaled_dot_product_attention.default: attention,
            },
        )
    proto = exported.model_proto
    for k, node in enumerate(proto.graph.node):
        notes = {prop.key: prop.value for prop in node.metadata_props}
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        module = next((name for name in reversed(scopes[:-1]) if name), "")
        node.name = f"{module}/{node.op_type}_{k}"
        del node.metadata_props[:]  # for example, local paths
    metadata = {
        "ddpm.betas": json.dumps(diffusion.betas.tolist()),
        "ddpm.variance": diffusion.variance,
        "ddpm.image_shape": json.dumps(shape),
    }
    metadata |= {"ddpm.classes": json.dumps(names)} if names else {}
    onnx.helper.set_model_props(proto, metadata)
    return proto


@torch.no_grad()
def largest_difference(network, eps, shape, T, classes=0):
    """Return max |network - eps| over batches of 1, 2 and 3, scales of x_t, and t.

    network: takes tensors. eps: takes arrays. classes: their number; both then take (x_t, t, y).
    """
    random, differences = torch.Generator().manual_seed(0), []
    for batch, scale in ((1, 1.0), (2, 0.01), (3, 2.0)):
        x_t = scale * torch.randn(batch, *shape, generator=random)
        for times in ((0, 1, 2), (T - 1, T // 2, T // 4)):
            t = torch.tensor(times[:batch]).clamp(0, T - 1)
            inputs = (x_t, t, classes - torch.arange(batch))[: 3 if classes else 2]
            other = torch.from_numpy(eps(*map(np.asarray, inputs)))
            differences.append((network(*inputs) - other).abs().max())
    return torch.stack(differences).max().item()  # NaN if any is


def write_onnx(network, diffusion, shape, names, path):
    """Write the network as one file, which is put in place after it has agreed with torch.

    The metadata store the eps of sample.py's `example`, for comparison on other devices. Exits
    if the file differs too much from torch.
    """
    proto = to_onnx(network, diffusion, shape, names)
    session = Network(proto.SerializeToString(), "cpu")
    worst = largest_difference(network, session, shape, diffusion.T, len(names))
    eps = thinned(session(*example(shape, diffusion.T)))
    if not worst < TOLERANCE:
        sys.exit(f"export.py: eps differs from torch's by {worst:.1e}; {path} was not written")
    values = [round(float(value), 5) for value in eps]
    proto.metadata_props.add(key="ddpm.eps_of_example", value=json.dumps(values))
    with replacing(path) as file:
        file.write(proto.SerializeToString())
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, eps within {worst:.1e} of torch's")


def main():
    guard_output()
    parser = argparse.ArgumentParser(
        usage="python export.py [--checkpoint RUN] [--onnx model.onnx]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--checkpoint", default=default_run(), help="a run's folder [%(default)s]")
    parser.add_argument("--onnx", type=Path, default="model.onnx", help="output file [%(default)s]")
    args = parser.parse_args()
    if args.onnx.suffix.lower() != ".onnx":
        parser.error("--onnx must be a file such as model.onnx")
    check_writable(args.onnx)
    network, diffusion, state = load(args.checkpoint)
    print(f"{args.checkpoint}: step {state['step']:,}")
    write_onnx(network, diffusion, state["shape"], state["names"], args.onnx)


if __name__ == "__main__":
    main()
