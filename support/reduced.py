"""A file of reduced precision: float16 for CUDA or 8-bit integers for CPUs, and its error.

export.py writes the float32 file first; these functions compare their files with it. The network
keeps some of its modules in float32 in both kinds of files (float32_modules).
"""

import copy
import logging
import sys

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from beyond import sample_progressive
from support.trained import eps_of, example_labels

TIMES = (0, 1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 200, 500)  # t for errors, besides T - 1
MAX_ERROR = 0.02  # the largest rms error allowed at any t, relative to the rms of eps

# ---------------------------------------------------------------------------------- the two kinds


def float32_modules(model):
    """Return the names of the modules that must be exact to tell weak noise from images.

    These are those that read x_t, t and y, the first block after them, and the one that returns
    eps: all modules before the first ModuleList, the first module in it, and the last module.
    """
    names = [name for name, _ in model.named_children()]
    is_list = [isinstance(child, torch.nn.ModuleList) for child in model.children()]
    if True not in is_list:
        sys.exit("--half and --int8 need a network whose blocks are in a torch.nn.ModuleList")
    first = names[is_list.index(True)]
    before = names[: names.index(first)]
    while isinstance(model.get_submodule(first), torch.nn.ModuleList):
        first += ".0"
    return [*before, first, names[-1]]


class Half(torch.nn.Module):
    """A network in float16, except its float32_modules: (x_t, t, y) float32 to eps float32.

    The statistics of the norms stay float32 too, by the definition of the ONNX operator.
    """

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model).half()
        for name in float32_modules(model):
            self.model.get_submodule(name).float()
        self.model.load_state_dict(model.state_dict())  # .half() has rounded all weights
        for module in self.model.modules():
            if module is not self.model and next(module.parameters(), None) is not None:
                module.register_forward_pre_hook(cast_inputs)

    def forward(self, x_t, t, *y):
        return self.model(x_t, t, *y).float()


def cast_inputs(module, inputs):
    """Return the inputs of a module in the precision of its weights, as a forward pre-hook."""
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def quantize(exact, path, chain, precise):
    """Write a float32 file again with 8-bit integers in most of its convolutions and products.

    chain: [(x_t, t) or (x_t, t, y)], what the network sees while it samples; the ranges of the
    activations are calibrated on it. precise: names of modules that stay float32, like all 1x1
    convolutions. In a --quick network for Fashion-MNIST, these would raise the error at t = 100
    from 1.6% to 9.4%, and save 6% of the time.
    """
    graph = onnx.load(exact).graph
    sizes = {tensor.name: tensor.dims[2:] for tensor in graph.initializer}
    precise = tuple(f"{name}." for name in precise)
    nodes = [
        node.name
        for node in graph.node
        if node.op_type in ("Conv", "MatMul")
        and sizes.get(node.input[1], [1, 1]) != [1, 1]
        and not f"{node.name.split('/')[0]}.".startswith(precise)
    ]

    class Reader(CalibrationDataReader):
        inputs = iter(chain)

        def get_next(self):
            values = map(torch.Tensor.numpy, next(self.inputs, ()))
            return dict(zip(("x_t", "t", "y"), values, strict=False)) or None

    logging.disable(logging.WARNING)
    try:
        quantize_static(
            exact, path, Reader(), per_channel=True, nodes_to_quantize=nodes,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)


def choose_by_t(precise, quick, first):
    """Return a ModelProto that runs `quick` if all t are at least `first`, else `precise`."""
    merged = onnx.ModelProto()
    merged.CopyFrom(precise)
    del merged.graph.node[:], merged.graph.initializer[:], merged.graph.value_info[:]
    branches = []  # both branches of the If see the inputs by name
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


# -------------------------------------------------------------------------------- their errors


def draw_images(trained):
    """Return eight images that the network draws in 25 steps, and all inputs that it sees."""
    y = example_labels(trained, 8)
    chain = list(
        sample_progressive(
            trained.diffusion, lambda x_t, t: trained.eps(x_t, t, *y), (8, *trained.shape),
            min(25, trained.diffusion.T), "sa-solver", generator=torch.Generator().manual_seed(0),
        )
    )  # fmt: skip
    return chain[-1][2], [(x_t, torch.full((8,), t), *y) for t, x_t, _ in chain]


def relative_errors(eps, exact, diffusion, x0, *y):
    """Return {t: rms difference between two networks over the rms of eps}, for x_t of x0 by (4)."""
    random, errors = torch.Generator().manual_seed(1), {}
    for i in (*(t for t in TIMES if t < diffusion.T - 1), diffusion.T - 1):
        t = torch.full((len(x0),), i)
        x_t = diffusion.q_sample(x0, t, torch.randn(x0.shape, generator=random))
        expected = exact(x_t, t, *y)
        error = (eps(x_t, t, *y) - expected).square().mean() / expected.square().mean()
        errors[i] = error.sqrt().item()
    return errors


def compare(trained, exact, path, x0):
    """Return {t: the error of a file of lower precision}, and the t at which it is too large."""
    y = example_labels(trained, len(x0))
    errors = relative_errors(eps_of(path), eps_of(exact), trained.diffusion, x0, *y)
    return errors, [t for t, error in errors.items() if not error < MAX_ERROR]


def print_table(errors):
    """Print {t: error} as two rows."""
    print("  t       " + "".join(f"{t:6}" for t in errors))
    print("  error, %" + "".join(f"{100 * error:6.2f}" for error in errors.values()))


def write_half(trained, exact, path, half):
    """Write the ModelProto of the network's Half, compared with the float32 file `exact`.

    Exits if the errors are too large.
    """
    onnx.save(half, path)
    errors, bad = compare(trained, exact, path, draw_images(trained)[0])
    if bad:
        sys.exit(f"--half changes eps by {errors[bad[-1]]:.0%} at t = {bad[-1]}; nothing written")
    print_table(errors)


def write_int8(trained, exact, path):
    """Write the float32 file `exact` with 8-bit integers where they suffice.

    At small t, they cannot resolve the weak noise. The file therefore holds the network twice, with
    float32 up to the last of TIMES where integers are too coarse. Exits if that is T / 4 or later.
    """
    x0, chain = draw_images(trained)
    quantize(exact, path, chain, float32_modules(trained.model))
    errors, bad = compare(trained, exact, path, x0)
    if bad and bad[-1] >= trained.diffusion.T // 4:
        sys.exit(f"--int8 changes eps by {errors[bad[-1]]:.0%} at t = {bad[-1]}; nothing written")
    first = next(t for t in errors if not bad or t > bad[-1])
    onnx.save(choose_by_t(onnx.load(exact), onnx.load(path), first), path)
    print(f"float32 below t = {first}, 8-bit integers from there on")
    print_table({t: error for t, error in errors.items() if t >= first})
