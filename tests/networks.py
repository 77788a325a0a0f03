"""A network in closed form, in torch and as a model.onnx, which needs no training and no export.

Its images are nearly plain, 4x4 pixels in one of the COLOURS: each value is N(colour, 0.1^2).
"""

import json

import onnx
import torch
from onnx.numpy_helper import from_array

from ddpm import Diffusion, linear_betas
from sample import example

COLOURS = {"blue": (-0.7, -0.5, 0.8), "green": (-0.7, 0.4, -0.3), "red": (0.8, -0.6, -0.7)}
SHAPE = 3, 4, 4
SMALL = Diffusion(linear_betas(), "small")
ABAR = SMALL.alphas_bar.view(-1, 1, 1, 1)
SIGNAL, SLOPE = ABAR.sqrt().float(), ((1 - ABAR).sqrt() / (0.01 * ABAR + 1 - ABAR)).float()
MEANS = torch.tensor([*COLOURS.values(), (0, 0, 0)]).view(4, 3, 1, 1)  # the last is "no class"
GRAPH = """<ir_version: 10, opset_import: ["": 20]>
network (float[n, 3, 4, 4] x_t, int64[n] t, int64[n] y) => (float[n, 3, 4, 4] eps) {
    slope_t = Gather(slope, t)
    signal_t = Gather(signal, t)
    colour = Gather(means, y)
    mean = Mul(signal_t, colour)
    noise = Sub(x_t, mean)
    eps = Mul(slope_t, noise)
}"""


def eps(x_t, t, y=None):
    """Return E[eps | x_t] for the classes y, in torch."""
    y = torch.full_like(t, 3) if y is None else y
    return SLOPE[t] * (x_t - SIGNAL[t] * MEANS[y])


def onnx_file(classes=(*COLOURS,), **changes):
    """Return the bytes of a model.onnx that computes eps.

    classes: their names, or False. changes: of the metadata; None removes an entry.
    """
    model = onnx.parser.parse_model(GRAPH if classes else GRAPH.replace(", int64[n] y", ""))
    tables = {"slope": SLOPE, "signal": SIGNAL, "means": MEANS}
    tables |= {} if classes else {"y": torch.tensor([3])}
    model.graph.initializer.extend(from_array(v.numpy(), name) for name, v in tables.items())
    x_t, t = example(SHAPE, SMALL.T)
    answer = eps(torch.from_numpy(x_t), torch.tensor([t])).flatten().tolist()
    metadata = {"betas": SMALL.betas.tolist(), "image_shape": SHAPE, "eps_of_example": answer}
    metadata |= changes | ({"classes": classes} if classes else {})
    metadata = {f"ddpm.{k}": json.dumps(v) for k, v in metadata.items() if v is not None}
    onnx.helper.set_model_props(model, metadata | {"ddpm.variance": "small"})
    return model.SerializeToString()
