"""Convert a model.onnx to float16: half the size, for CUDA.

    python -m extras.half model.onnx half.onnx

ONNX Runtime converts the network, except where float16 would hide the weak noise of small t: the
time embedding, the first and last layers and the first block stay in float32. The program prints by
how much eps changes on images that the network generates. Above 2%, it writes nothing.
"""

import argparse
import math
import sys

import numpy as np
import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from program import check_writable, guard_output, replacing
from sample import Network, noise_of, sample


def to_half(model):
    """Return the onnx.ModelProto of a U-Net in float16, with inputs and outputs in float32."""
    names = [node.name for node in model.graph.node]  # such as "down.0.0.conv1/Conv_20"
    first = [k for k, name in enumerate(names) if name.startswith("down.0.0")]
    last = [k for k, name in enumerate(names) if name.startswith("norm_out")]
    if not first or not last:
        raise ValueError("half.py needs a UNet that export.py wrote")
    keep = names[: first[-1] + 1] + names[last[0] :]
    half = convert_float_to_float16(model, keep_io_types=True, node_block_list=keep)
    # The converter casts a value once for each node that reads it, under the same name, and rounds
    # values between two nodes in float32 to float16 and back.
    nodes = {node.output[0]: node for node in half.graph.node}
    del half.graph.node[:]
    half.graph.node.extend(nodes.values())
    half = OnnxModel(half)
    half.remove_cascaded_cast_nodes()
    half.topological_sort()
    return half.model


def relative_errors(half, exact):
    """Return {t: the rms difference of two Networks, relative to the rms of eps} at a few t."""
    T, errors = len(exact.betas), {}
    alphas_bar = np.cumprod(1 - exact.betas).tolist()
    x0, draw_noise = sample(exact, 8, steps=min(10, T)), noise_of(1, 0, 8, exact.shape)
    for t in sorted({0, T // 100, T // 20, T // 10, T // 2, T - 1}):
        x_t = math.sqrt(alphas_bar[t]) * x0 + math.sqrt(1 - alphas_bar[t]) * draw_noise()  # (4)
        eps = exact(x_t, t)
        errors[t] = math.sqrt(np.square(half(x_t, t) - eps).mean() / np.square(eps).mean())
    return errors


def main():
    guard_output()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a file from export.py")
    parser.add_argument("half", help="the file to write")
    args = parser.parse_args()
    check_writable(args.half, args.model)
    try:
        exact = Network(args.model)
        half = to_half(onnx.load(args.model))
    except ValueError as error:
        sys.exit(f"half.py: {error}")
    errors = relative_errors(Network(half.SerializeToString()), exact)
    print("error of eps:", ", ".join(f"{error:.2%} at t = {t}" for t, error in errors.items()))
    if not all(error < 0.02 for error in errors.values()):  # or NaN
        sys.exit(f"half.py: {args.half} was not written, because the error is above 2%")
    with replacing(args.half) as file:
        file.write(half.SerializeToString())
    print(f"{args.half}: {half.ByteSize() / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
