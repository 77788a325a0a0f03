"""Export a network, trained here or published, as the ONNX file that sample.py needs.

    python export.py                                # run/checkpoint.pt (EMA) to model.onnx
    python export.py --checkpoint run/checkpoint.pt --onnx model.onnx
    python export.py --checkpoint hf:google/ddpm-cifar10-32    # published weights
    python export.py --half                         # float16, for CUDA: half the size
    python export.py --int8                         # 8-bit integers where they suffice, for CPUs
    python export.py --to-diffusers my-ddpm         # run/checkpoint.pt for diffusers' DDPMPipeline

The file has the inputs x_t, float32 (batch, C, H, W), and t, int64 (batch,), and the output eps,
float32 (batch, C, H, W); the schedule is in the metadata. With classes, y, int64 (batch,), is a
third input, in which the index after the last class stands for "no class", and the metadata contain
the class names. The file is compared with torch before it is put in place.
"""

import support.start  # noqa: F401  # isort: skip

import argparse
import ast
import inspect
import json
import logging
import math
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # noqa: F401  eps_of needs it
import torch
from onnxscript import opset20 as op

from beyond import as_eps, eps_of_output
from ddpm_numpy import Network, example
from images import catch_signals, check_new_folder, check_output, guard_output, replacing
from support import cli
from support.pretrained import import_diffusers, to_diffusers
from support.trained import DEMO, eps_of, example_labels, largest_difference, load

OPSET = 20  # ONNX Runtime has kernels for it on the CPU, on CUDA and in the browser
TOLERANCE = 1e-4  # the largest difference from torch, in an output that is about N(0, 1)

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
    """Express softmax(q k^T scale) v with a constant scale. Exits if there is a mask."""
    if attn_mask is not None or is_causal:
        sys.exit("export.py can't express attention with a mask")
    scale = float(q.shape[-1]) ** -0.5 if scale is None else float(scale)
    scaled = op.Mul(q, op.CastLike(op.Constant(value_float=scale), q))
    *others, last, channels = range(len(k.shape))
    scores = op.MatMul(scaled, op.Transpose(k, perm=[*others, channels, last]))
    return op.MatMul(op.Softmax(scores, axis=-1), v)


def refuse_other_inputs(trained):
    """Exit if the network has an input that the file would lack."""
    _, _, *others = inspect.signature(trained.model.forward).parameters
    has_y = trained.classes or not trained.settings.get("num_classes")
    if lost := [name for name in others if name != "y" or not has_y]:
        sys.exit(f"export.py: the network also takes {lost[0]}, for which the file has no input")


class Eps(torch.nn.Module):
    """eps_theta(x_t, t) as a module. model: the network of a Trained, or the Half of it."""

    def __init__(self, trained, model):
        super().__init__()
        self.model = model  # registered, so that the exporter sees its weights; eps calls it
        self.eps = as_eps(model, trained.diffusion, trained.predicts)

    def forward(self, x_t, t, y=None):
        return self.eps(x_t, t, y)


def to_onnx(trained, model):
    """Return eps_theta as an onnx.ModelProto with a dynamic batch and the schedule as metadata.

    model: the network, or the Half of it.
    """
    # The example has a batch of two: the exporter would treat a batch of 1 as a constant.
    inputs = torch.zeros(2, *trained.shape), torch.zeros(2, dtype=torch.int64)
    inputs += example_labels(trained, 2)
    names, batch = ["x_t", "t", "y"][: len(inputs)], torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            Eps(trained, model),
            inputs,
            input_names=names,
            output_names=["eps"],
            dynamic_shapes=[{0: batch} for _ in names],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            custom_translation_table={
                torch.ops.aten.group_norm.default: group_norm,
                torch.ops.aten.scaled_dot_product_attention.default: attention,
            },
        )
    proto = program.model_proto
    name_nodes(proto.graph)
    metadata = {
        "ddpm.betas": json.dumps(trained.diffusion.betas.tolist()),
        "ddpm.variance": trained.diffusion.variance,
        "ddpm.image_shape": json.dumps(trained.shape),
    }
    if trained.classes:
        metadata["ddpm.classes"] = json.dumps(trained.classes)
    if trained.step:
        metadata["ddpm.step"] = str(trained.step)
    onnx.helper.set_model_props(proto, metadata)
    return proto


def name_nodes(graph):
    """Name the nodes after their modules, as in "down.0.0.conv1/Conv_20".

    Anything else that the exporter notes about them, such as local paths, is removed.
    """
    for k, node in enumerate(graph.node):
        notes = {prop.key: prop.value for prop in node.metadata_props}
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        module = next((name for name in reversed(scopes[:-1]) if name), "")
        module = ".".join(part for part in module.split(".") if part != "model")  # of Eps, Half
        node.name = f"{module}/{node.op_type}_{k}"
        del node.metadata_props[:]
        node.doc_string = ""


def add_example(path):
    """Add the eps of ddpm_numpy's example to the metadata of a file, at up to 64 places.

    On another device than the CPU, ddpm_numpy.py and the page compare their eps with it.
    """
    network, proto = Network(path, "cpu"), onnx.load(path)
    eps = network(*example(network.shape, len(network.betas))).ravel()
    values = [round(float(value), 5) for value in eps[:: -(-eps.size // 64)]]
    proto.metadata_props.add(key="ddpm.eps_of_example", value=json.dumps(values))
    onnx.save(proto, path)


# -------------------------------------------------------------------------------------- the program


def write_onnx(trained, path, kind=None):
    """Write the network as one file, compared with torch before it is put in place.

    kind: None for float32, "half" or "int8". Exits if the file differs too much from torch.
    """
    refuse_other_inputs(trained)
    with tempfile.TemporaryDirectory() as folder:
        exact, reduced = Path(folder, "exact.onnx"), Path(folder, "reduced.onnx")
        onnx.save(to_onnx(trained, trained.model), exact)
        T, classes = trained.diffusion.T, len(trained.classes)
        with torch.no_grad():
            worst = largest_difference(trained.eps, eps_of(exact), trained.shape, T, classes)
        _, b = eps_of_output(trained.diffusion, trained.predicts)  # eps = a x_t + b output
        if not worst < TOLERANCE * max(1, b.abs().max()):
            sys.exit(f"eps differs from torch's by {worst:.1e}; {path} is not written")
        print(f"largest difference from torch {worst:.1e}, for batches of 1, 2 and 3")
        if kind:
            from support.reduced import Half, write_half, write_int8
        if kind == "half":
            write_half(trained, exact, reduced, to_onnx(trained, Half(trained.model)))
        elif kind == "int8":
            write_int8(trained, exact, reduced)
        written = exact if kind is None else reduced
        add_example(written)
        with replacing(path) as file:
            file.write(written.read_bytes())
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    print(cli.drawing("--onnx", path, trained.classes, trained.source == DEMO))


def arguments():
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        usage="python export.py [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kind = parser.add_mutually_exclusive_group()
    parser.add_argument(
        "--checkpoint",
        default="run/checkpoint.pt",
        help="a run, or diffusers weights: a folder, or hf:NAME [%(default)s]",
    )
    parser.add_argument(
        "--onnx", type=Path, help="the file to write [model.onnx; none with --to-diffusers]"
    )
    parser.add_argument("--to-diffusers", metavar="DIR", help="a new folder to write")
    kind.add_argument("--half", dest="kind", action="store_const", const="half",
                      help="float16, for CUDA: half the size")  # fmt: skip
    kind.add_argument("--int8", dest="kind", action="store_const", const="int8",
                      help="8-bit integers except at small t, for CPUs: faster")  # fmt: skip
    args = parser.parse_args()
    if args.onnx is None and args.to_diffusers is None:
        args.onnx = Path("model.onnx")
    if args.onnx and args.onnx.suffix.lower() != ".onnx":
        parser.error("--onnx must be a file such as model.onnx")
    if args.kind and not args.onnx:
        parser.error("--half and --int8 need --onnx")
    return args


def main():
    guard_output()
    catch_signals()
    args = arguments()
    if args.onnx:
        check_output(args.onnx, args.checkpoint)
    if args.to_diffusers:
        check_new_folder(args.to_diffusers)
        import_diffusers("--to-diffusers needs diffusers")
    trained = load(args.checkpoint)
    step = f", step {trained.step:,}" if trained.step else ""
    print(f"{args.checkpoint}: {trained.source}{step}")
    if args.to_diffusers:
        to_diffusers(trained, args.to_diffusers)
        opens = "DDPMPipeline.from_pretrained opens it"
        if trained.classes:  # the pipeline has no argument for a class
            opens = 'UNet2DModel.from_pretrained(..., subfolder="unet") opens it; pass class_labels'
        print(f"{args.to_diffusers}: diffusers.{opens}")
    if args.onnx:
        write_onnx(trained, args.onnx, args.kind)


if __name__ == "__main__":
    main()
