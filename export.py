"""Export a network, trained here or published, as the ONNX file that sample.py needs.

    python export.py                                # run/checkpoint.pt (EMA) to model.onnx
    python export.py --checkpoint run/checkpoint.pt --onnx model.onnx
    python export.py --diffusers google/ddpm-cifar10-32    # published weights to model.onnx
    python export.py --half                         # float16, for CUDA: half the size
    python export.py --int8                         # 8-bit integers where they suffice, for CPUs
    python export.py --to-diffusers my-ddpm         # run/checkpoint.pt for diffusers' DDPMPipeline

Inputs x_t float32 (batch, C, H, W) and t int64 (batch,), output eps float32 (batch, C, H, W); the
schedule is in the metadata. With classes, y int64 (batch,) is a third input, in which the index
after the last class stands for "no class", and the metadata has their names. The file is compared
with torch before it is put in place.
"""

import argparse
import ast
import copy
import json
import logging
import os
import shlex
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxscript import opset20 as op

import checkpoint
from ddpm import ResBlock
from pretrained import largest_difference, to_diffusers

OPSET = 20  # ONNX Runtime has kernels for it on the CPU, on CUDA and in the browser
TOLERANCE = 1e-4  # the largest difference from torch, in an output that is about N(0, 1)
TIMES = (0, 1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 200, 500)  # t for errors, besides T - 1
REDUCED_TOLERANCE = 0.02  # the largest rms error over rms of eps at a t with reduced precision

# The exporter's own translations of these two contain nodes that the CUDA provider of ONNX Runtime
# leaves to the CPU: GroupNormalization, and a Shape from which attention derives its scale.


def group_norm(x, num_groups: int, weight, bias, eps: float = 1e-5, cudnn_enabled: bool = True):
    """Express group norm as a layer norm over rows that hold one group each."""
    channels, height, width = list(x.shape)[1:]
    row = np.ones(channels // num_groups * height * width, x.dtype.numpy())
    per_channel = op.Constant(value_ints=[channels, 1, 1])
    h = op.Reshape(x, op.Constant(value_ints=[0, num_groups, -1]))
    ones = op.Constant(value=onnx.numpy_helper.from_array(row))
    h, _, _ = op.LayerNormalization(h, ones, epsilon=eps)
    h = op.Reshape(h, op.Constant(value_ints=[-1, channels, height, width]))
    return op.Add(op.Mul(h, op.Reshape(weight, per_channel)), op.Reshape(bias, per_channel))


def attention(q, k, v, attn_mask=None, dropout_p: float = 0.0, is_causal: bool = False,
              scale=None, enable_gqa: bool = False):  # fmt: skip
    """Express softmax(q k^T / sqrt(channels)) v with the scale as a constant."""
    scale = op.CastLike(op.Constant(value_float=float(q.shape[-1]) ** -0.5), q)
    scores = op.MatMul(op.Mul(q, scale), op.Transpose(k, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(scores, axis=-1), v)


class Eps(torch.nn.Module):
    """eps_theta(x_t, t) of a model that may predict something else."""

    def __init__(self, model, diffusion):
        super().__init__()
        self.model, self.diffusion = model, diffusion

    def forward(self, x_t, t, y=None):
        return self.diffusion.predict_eps(partial(self.model, y=y), x_t, t)


def to_onnx(trained, model):
    """Return eps_theta as an onnx.ModelProto with a dynamic batch and the schedule as metadata.

    model: the network, or its Half. Nodes are named after their modules, as in
    "down.0.0.conv1/Conv_20". Nothing in the file comes from this machine.
    """
    # The example has a batch of two: the exporter would take 1 for a constant.
    example = (
        torch.zeros(2, *trained.shape),
        torch.zeros(2, dtype=torch.int64),
        *third_input(trained, 2),
    )
    names, batch = ["x_t", "t", "y"][: len(example)], torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            Eps(model, trained.diffusion),
            example,
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
    for k, node in enumerate(proto.graph.node):
        notes = {prop.key: prop.value for prop in node.metadata_props}
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        module = next((name for name in reversed(scopes[:-1]) if name), "")
        module = ".".join(part for part in module.split(".") if part != "model")  # of Eps and Half
        node.name = f"{module}/{node.op_type}_{k}"
        del node.metadata_props[:]  # the source lines that it comes from
        node.doc_string = ""
    metadata = {
        "ddpm.betas": json.dumps(trained.diffusion.betas.tolist()),
        "ddpm.variance": trained.diffusion.variance,
        "ddpm.image_shape": json.dumps(trained.shape),
        "ddpm.step": str(trained.step),
        "ddpm.source": trained.source,
    }
    if trained.classes:
        metadata["ddpm.classes"] = json.dumps(trained.classes)
    onnx.helper.set_model_props(proto, metadata)
    return proto


def third_input(trained, batch):
    """Return (y,), the classes in turn with "no class" among them, or () without classes."""
    return (torch.arange(batch) % (len(trained.classes) + 1),) if trained.classes else ()


def feed(inputs):
    """Return (x_t, t) or (x_t, t, y) as what ONNX Runtime takes."""
    return dict(zip(("x_t", "t", "y"), (tensor.numpy() for tensor in inputs), strict=False))


def eps_of(path):
    """Return eps(x_t, t) or eps(x_t, t, y), on torch tensors, of an ONNX file on the CPU."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])

    def eps(*inputs):
        return torch.from_numpy(session.run(["eps"], feed(inputs))[0])

    return eps


# ------------------------------------------------------------------------------- reduced precision


class Half(torch.nn.Module):
    """The U-Net in float16, except where more precision is needed.

    The embeddings of t and y, the first layer and the first block stay float32: at small t they
    must separate weak noise from the image. So do the statistics of the norms, by the definition of
    the ONNX operator. (ONNX Runtime's convert_float_to_float16 passes every tensor between two
    float32 nodes through float16, which costs 0.38 % of eps at t = 0 instead of 0.26 %.)
    """

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model).half()
        first, last = self.model.down[0][0], self.model.up[-1][-2]
        for name, module in self.model.named_children():
            if name in ("time_mlp", "class_embedding", "conv_in"):
                module.float()
        first.float()
        for block in self.model.modules():
            if isinstance(block, ResBlock) and block is not first:
                block.time_proj.register_forward_pre_hook(lambda module, args: args[0].half())
        first.register_forward_hook(lambda module, args, h: h.half())
        last.register_forward_pre_hook(lambda module, args: (args[0].half(), args[1]))

    def forward(self, x_t, t, y=None):
        return self.model(x_t, t, y).float()


def quantize(exact, path, chain):
    """Write a float32 file again with 8-bit integers in most of its convolutions and products.

    chain: [(x_t, t) or (x_t, t, y)], what the network sees while it samples; the ranges of the
    activations are calibrated on it. The first and the last layer, the first block and the
    shortcuts stay float32: they take little of the time and cause most of the error.
    """
    graph = onnx.load(exact).graph
    weights = {tensor.name for tensor in graph.initializer}
    nodes = [
        node.name
        for node in graph.node
        if node.op_type in ("Conv", "MatMul")
        and node.input[1] in weights
        and not node.name.startswith(("conv_in/", "conv_out/", "down.0.0."))
        and ".shortcut/" not in node.name
    ]

    class Reader(CalibrationDataReader):
        feeds = map(feed, chain)

        def get_next(self):
            return next(self.feeds, None)

    logging.disable(logging.WARNING)
    try:
        quantize_static(
            exact, path, Reader(), per_channel=True, nodes_to_quantize=nodes,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)


def switch(precise, quick, first):
    """Return a ModelProto that runs `quick` if all t are at least `first`, else `precise`."""
    merged = onnx.ModelProto()
    merged.CopyFrom(precise)
    del merged.graph.node[:], merged.graph.initializer[:], merged.graph.value_info[:]
    branches = []  # of an If; they see the inputs by name
    for model in (precise, quick):
        branch = onnx.GraphProto()
        branch.CopyFrom(model.graph)
        del branch.input[:], branch.value_info[:]
        branches.append(branch)
    limit = onnx.numpy_helper.from_array(np.array(first), "first_t_of_quick")
    merged.graph.initializer.append(limit)
    node = onnx.helper.make_node
    merged.graph.node.extend([
        node("ReduceMin", ["t"], ["least_t"], keepdims=0),
        node("Less", ["least_t", limit.name], ["is_precise"]),
        node("If", ["is_precise"], ["eps"], then_branch=branches[0], else_branch=branches[1]),
    ])  # fmt: skip
    return merged


def drawn_by(trained):
    """Return eight images that the network draws in 25 steps, and all its inputs meanwhile."""
    y = third_input(trained, 8)
    chain = list(
        trained.diffusion.sample_progressive(
            lambda x_t, t: trained.model(x_t, t, *y), (8, *trained.shape),
            min(25, trained.diffusion.T), "dpm", generator=torch.Generator().manual_seed(0),
        )
    )  # fmt: skip
    return chain[-1][2], [(x_t, torch.full((8,), t), *y) for t, x_t, _ in chain]


def relative_errors(eps, exact, diffusion, x0, *y):
    """Return {t: the rms difference of two networks over the rms of eps}, for x_t of x0 by (4)."""
    random, errors = torch.Generator().manual_seed(1), {}
    for i in (*(t for t in TIMES if t < diffusion.T - 1), diffusion.T - 1):
        t = torch.full((len(x0),), i)
        x_t = diffusion.q_sample(x0, t, torch.randn(x0.shape, generator=random))
        expected = exact(x_t, t, *y)
        error = (eps(x_t, t, *y) - expected).square().mean() / expected.square().mean()
        errors[i] = error.sqrt().item()
    return errors


def reduce_precision(trained, exact, path, kind):
    """Write a float32 file again at `path`, as "half" or "int8", and print what that costs.

    At small t, 8-bit integers cannot resolve the weak noise, so the "int8" file holds the network
    twice, with float32 up to the last of TIMES at which integers err too much. Exits if the errors
    are too large.
    """
    x0, chain = drawn_by(trained)
    if kind == "half":
        onnx.save(to_onnx(trained, Half(trained.model)), path)
    else:
        quantize(exact, path, chain)
    y = third_input(trained, len(x0))
    errors = relative_errors(eps_of(path), eps_of(exact), trained.diffusion, x0, *y)
    bad = [t for t, error in errors.items() if not error < REDUCED_TOLERANCE]
    if bad and (kind == "half" or bad[-1] >= trained.diffusion.T // 4):
        sys.exit(f"--{kind} changes eps by {errors[bad[-1]]:.0%} at t = {bad[-1]}; nothing written")
    if kind == "int8":
        first = next(t for t in errors if not bad or t > bad[-1])
        onnx.save(switch(onnx.load(exact), onnx.load(path), first), path)
        print(f"float32 below t = {first}, 8-bit integers from there on")
        errors = {t: error for t, error in errors.items() if t >= first}
    print("  t       " + "".join(f"{t:6}" for t in errors))
    print("  error, %" + "".join(f"{100 * error:6.2f}" for error in errors.values()))


# -------------------------------------------------------------------------------------- the program


def write_onnx(trained, path, kind=None):
    """Write the network as one file, compared with torch before it is put in place.

    kind: None for float32, "half" or "int8". Exits if the file differs too much from torch.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        exact, reduced = Path(folder, "exact.onnx"), Path(folder, "reduced.onnx")
        onnx.save(to_onnx(trained, trained.model), exact)
        model = Eps(trained.model, trained.diffusion)
        T, classes = trained.diffusion.T, len(trained.classes)
        worst = largest_difference(model, eps_of(exact), trained.shape, T, classes)
        if not worst < TOLERANCE * max(1, trained.diffusion.b.abs().max()):  # eps = a x_t + b F
            sys.exit(f"eps differs from torch's by {worst:.1e}; {path} is not written")
        print(f"largest difference from torch {worst:.1e}, at batches of 1, 2 and 3")
        if kind is not None:
            reduce_precision(trained, exact, reduced, kind)
        os.replace(exact if kind is None else reduced, path)
    step = f", step {trained.step:,}" if trained.step else ""
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, from {trained.source}{step}")
    print(f"next:\n  python sample.py --onnx {shlex.quote(str(path))}")


def main():
    parser = argparse.ArgumentParser(
        usage="python export.py [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source, kind = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", default="run/checkpoint.pt", help="[%(default)s]")
    source.add_argument("--diffusers", metavar="WEIGHTS",
                        help="published weights: a folder, or a name on the hub")  # fmt: skip
    parser.add_argument("--onnx", type=Path,
                        help="the file to write, unless --to-diffusers [model.onnx]")  # fmt: skip
    parser.add_argument("--to-diffusers", metavar="DIR", help="write a new folder for it")
    kind.add_argument("--half", dest="kind", action="store_const", const="half",
                      help="float16, for CUDA: half the size")  # fmt: skip
    kind.add_argument("--int8", dest="kind", action="store_const", const="int8",
                      help="8-bit integers but for small t, for CPUs: faster")  # fmt: skip
    args = parser.parse_args()
    if args.onnx is None and args.to_diffusers is None:
        args.onnx = Path("model.onnx")
    if args.onnx and args.onnx.suffix != ".onnx":
        parser.error("--onnx must be a file such as model.onnx")
    if args.kind and not args.onnx:
        parser.error("--half and --int8 need --onnx")

    trained = checkpoint.load(args.diffusers or args.checkpoint)
    if args.to_diffusers:
        to_diffusers(trained.model, trained.settings, trained.diffusion, args.to_diffusers)
        opens = "DDPMPipeline.from_pretrained opens it"
        if trained.classes:  # the pipeline has no argument for a class
            opens = 'UNet2DModel.from_pretrained(..., subfolder="unet") opens it; pass class_labels'
        print(f"{args.to_diffusers}: diffusers.{opens}")
    if args.onnx:
        write_onnx(trained, args.onnx, args.kind)


if __name__ == "__main__":
    main()
