"""Export a network, a checkpoint's (EMA) or a published one, as the ONNX file that sample.py needs.

    python export.py                                # run/checkpoint.pt to model.onnx
    python export.py --checkpoint run/checkpoint.pt --onnx model.onnx
    python export.py --diffusers ddpm-cifar10-32    # published weights to model.onnx
    python export.py --half                         # float16, for CUDA: half the size
    python export.py --int8                         # integers where they suffice, for CPUs
    python export.py --to-diffusers my-ddpm         # run/checkpoint.pt for diffusers' DDPMPipeline

Inputs x_t float32 (batch, C, H, W) and t int64 (batch,), output eps float32 (batch, C, H, W); the
schedule travels in the file's metadata. The file is compared with torch before it is put in place.

A diffusers folder is a pipeline (unet/ and scheduler/) or flat, as the hub's google/ddpm-* are.
"""

import argparse
import contextlib
import copy
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import safetensors.torch
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxscript import opset20 as op

from ddpm import Diffusion, ResBlock, UNet, cosine_betas, linear_betas

OPSET = 20  # what ONNX Runtime has kernels for, on the CPU, CUDA and in the browser
TOLERANCE = 1e-4  # the largest difference from torch, of noise that is about N(0, 1)
TIMES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)  # where fewer bits are compared, and at T - 1
NARROW_TOLERANCE = 0.02  # rms error over rms of eps, at any t at which fewer bits are used

# The exporter's own forms of these two leave nodes that ONNX Runtime's CUDA provider hands to the
# CPU: GroupNormalization has no kernel at all, and attention reads its scale from a shape.


def group_norm(x, num_groups: int, weight, bias, eps: float = 1e-5, cudnn_enabled: bool = True):
    """Group norm as a layer norm over rows of one group each."""
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
    """softmax(q k^T / sqrt(channels)) v, the scale a constant."""
    scale = op.CastLike(op.Constant(value_float=float(q.shape[-1]) ** -0.5), q)
    scores = op.MatMul(op.Mul(q, scale), op.Transpose(k, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(scores, axis=-1), v)


def to_onnx(model, shape):
    """The network as an onnx.ModelProto with a dynamic batch and no trace of this machine in it.

    shape: of a picture, (C, H, W).
    """
    # A batch of two: one of 1 would be baked in.
    example = (torch.zeros(2, *shape), torch.zeros(2, dtype=torch.int64))
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


def on_cpu(path):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def largest_difference(path, model, T):
    """max |eps of the file - eps of the network| at batches 1, 2, 3 and t from 0 to T - 1."""
    session, random = on_cpu(path), torch.Generator().manual_seed(0)
    differences = []
    for batch in (1, 2, 3):
        for t in (0, 1, T // 2, T - 1):
            x = torch.randn(batch, *session.get_inputs()[0].shape[1:], generator=random)
            times = torch.full((batch,), t)
            with torch.no_grad():
                expected = model(x, times).numpy()
            (eps,) = session.run(["eps"], {"x_t": x.numpy(), "t": times.numpy()})
            differences.append(np.abs(eps - expected).max())
    return float(np.max(differences))  # which is NaN if one is


# ----------------------------------------------------------------------- fewer bits in a number


class Half(torch.nn.Module):
    """The U-Net with weights and activations in float16, but for what needs more: the embedding of
    t; the first layer and block, where at small t there is little noise to be told from the
    picture; and the statistics of the norms, which ONNX takes in float32 in any case."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model).half()
        time, first, last = self.model.time.float(), self.model.down[0].float(), self.model.up[-1]
        self.model.conv_in.float()
        time.register_forward_hook(lambda module, args, temb: temb.half())
        first.register_forward_pre_hook(lambda module, args: (args[0], args[1].float()))
        first.register_forward_hook(lambda module, args, h: h.half())
        last.register_forward_pre_hook(lambda module, args: (args[0].half(), args[1]))

    def forward(self, x_t, t):
        return self.model(x_t, t).float()


def quantize(exact, path, chain):
    """Write at path the network of a float32 file with 8-bit integers in most of its layers.

    chain: [(x_t, t)], what the network is shown, by which the ranges of the activations are chosen.
    The first and the last layer, the first block and the shortcuts stay float32: they cost little
    time, and cause most of the error. Integers are unsigned for activations, and signed for
    weights, with a scale for each output channel.
    """
    graph = onnx.load(exact).graph
    weights = {tensor.name for tensor in graph.initializer}
    precise = ("conv_in.", "conv_out.", "down.0.")
    nodes = [
        node.name
        for node in graph.node
        if node.op_type in ("Conv", "MatMul")
        and node.input[1] in weights
        and not node.input[1].startswith(precise)
        and ".shortcut." not in node.input[1]
    ]

    class Reader(CalibrationDataReader):
        feeds = iter([{"x_t": x.numpy(), "t": t.numpy()} for x, t in chain])

        def get_next(self):
            return next(self.feeds, None)

    logging.disable(logging.WARNING)
    quantize_static(
        exact, path, Reader(), per_channel=True, nodes_to_quantize=nodes,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    logging.disable(logging.NOTSET)


def choose(precise, quick, t):
    """One ModelProto that runs `precise` if any t of a batch is below the given one, else `quick`.

    Each is the branch of an If, which sees the inputs x_t and t by their names.
    """
    merged = onnx.ModelProto()
    merged.CopyFrom(precise)
    del merged.graph.node[:], merged.graph.initializer[:], merged.graph.value_info[:]
    branches = []
    for model in (precise, quick):
        branch = onnx.GraphProto()
        branch.CopyFrom(model.graph)
        del branch.input[:], branch.value_info[:]
        branches.append(branch)
    limit = onnx.numpy_helper.from_array(np.array(t), "first_t_of_quick")
    merged.graph.initializer.append(limit)
    node = onnx.helper.make_node
    merged.graph.node.extend([
        node("ReduceMin", ["t"], ["least_t"], keepdims=0),
        node("Less", ["least_t", limit.name], ["is_precise"]),
        node("If", ["is_precise"], ["eps"], then_branch=branches[0], else_branch=branches[1]),
    ])  # fmt: skip
    return merged


# -------------------------------------------------------------------------------- what is exported


class Trained(
    namedtuple("Trained", "model diffusion settings step name folder", defaults=[None]),
):
    """settings: the arguments of UNet, a dict. step: how long it was trained, 0 if unknown.
    folder: of the run, where train.py keeps the pictures as it decoded them."""

    @property
    def shape(self):
        """(C, H, W) of its pictures."""
        return self.settings["in_channels"], *2 * [self.settings["image_size"]]


def load(path):
    """What a checkpoint of train.py, or the folder of a run, or one of diffusers holds: a Trained.

    Of a checkpoint it takes the averaged weights. The model is in eval mode. Executes nothing from
    a file. ValueError says in one line what is wrong.
    """
    path = Path(path)
    if (path / "checkpoint.pt").is_file():
        path /= "checkpoint.pt"
    if not path.exists():
        hint = "; python train.py makes one" if path.suffix == ".pt" else ""
        raise ValueError(f"there is no {path}{hint}")
    if path.is_dir():
        return from_diffusers(path)
    with refusing(f"{path} is no checkpoint of train.py"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = checkpoint["config"]
        model = UNet(**config["model"]).eval()
        model.load_state_dict(checkpoint["ema"])
        name = f"train.py, {config['train']['data'] or 'demo'}"
        diffusion = Diffusion(**config["diffusion"])
        return Trained(model, diffusion, config["model"], checkpoint["step"], name, path.parent)


@contextlib.contextmanager
def refusing(what):
    """Whatever goes wrong in reading a file is the file's fault: a ValueError of one line."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{why}") from None


# ----------------------------------------------------------------------- the layout of diffusers

UNET_DEFAULTS = {  # what UNet2DModel takes a key for that its config.json leaves out
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
SCHEDULER_DEFAULTS = {  # what DDPMScheduler takes a key for that its config leaves out
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "prediction_type": "epsilon",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "rescale_betas_zero_snr": False,
}
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def unet_config(model, settings):
    """The config.json of the UNet2DModel that computes what UNet(**settings) does."""
    base, mults = settings["base_channels"], settings["channel_mults"]
    kinds = [
        "Attn" * (settings["image_size"] >> level in settings["attention_resolutions"])
        for level in range(len(mults))
    ]
    return UNET_DEFAULTS | {
        "_class_name": "UNet2DModel",
        "sample_size": settings["image_size"],
        "in_channels": settings["in_channels"],
        "out_channels": settings["in_channels"],
        "block_out_channels": [base * mult for mult in mults],
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "layers_per_block": settings["num_res_blocks"],
        "norm_num_groups": model.norm_out.num_groups,
        "norm_eps": model.norm_out.eps,
        "dropout": settings["dropout"],
        "attention_head_dim": None,  # one head
        "downsample_padding": 0,  # right and below
        "freq_shift": 1,
        "flip_sin_to_cos": False,
    }


def unet_settings(config):
    """The other way: the arguments of UNet, of a config.json completed by its defaults."""
    size, base = config["sample_size"], config["block_out_channels"][0]
    return {
        "image_size": size,
        "in_channels": config["in_channels"],
        "base_channels": base,
        "channel_mults": [channels // base for channels in config["block_out_channels"]],
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": [
            size >> level
            for level, kind in enumerate(config["down_block_types"])
            if kind == "AttnDownBlock2D"
        ],
        "dropout": config["dropout"],
        "norm_groups": config["norm_num_groups"],
    }


def diffusers_names(model):
    """The names of the model's tensors -> those of the same tensors in UNet2DModel."""
    places = {
        "time.0": "time_embedding.linear_1",
        "time.2": "time_embedding.linear_2",
        "middle.0": "mid_block.resnets.0",
        "middle.0.attention": "mid_block.attentions.0",
        "middle.1": "mid_block.resnets.1",
        "norm_out": "conv_norm_out",
    }
    for part in ("down", "up"):
        level = j = 0
        for i, module in enumerate(getattr(model, part)):
            if isinstance(module, ResBlock):
                places[f"{part}.{i}"] = f"{part}_blocks.{level}.resnets.{j}"
                places[f"{part}.{i}.attention"] = f"{part}_blocks.{level}.attentions.{j}"
                j += 1
            else:  # the last of its level
                places[f"{part}.{i}"] = f"{part}_blocks.{level}.{part}samplers.0"
                level, j = level + 1, 0
    inside = {"time": "time_emb_proj", "shortcut": "conv_shortcut", "norm": "group_norm"}
    inside |= {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    names = {}
    for name in model.state_dict():
        module, leaf = name.rsplit(".", 1)  # leaf: weight or bias
        if module in places:
            module = places[module]
        elif "." in module:
            outer, inner = module.rsplit(".", 1)
            module = f"{places[outer]}.{inside.get(inner, inner)}"
        names[name] = f"{module}.{leaf}"
    return names


def refuse_others(config, wanted):
    """ValueError that names each key of config which hasn't the wanted value."""
    wrong = [
        f"{key} is {json.dumps(config[key])}, not {json.dumps(value)}"
        for key, value in wanted.items()
        if config[key] != value
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def read_unet(given):
    """(UNet without weights, its arguments) of a config.json, each key of which is checked."""
    config = UNET_DEFAULTS | {"_class_name": "UNet2DModel", "sample_size": None} | given
    refuse_others(config, {"_class_name": "UNet2DModel"})

    # Where a key has several words for the same network, ours:
    size, widths = config["sample_size"], config["block_out_channels"]
    if isinstance(size, list) and size == size[:1] * 2:
        size = config["sample_size"] = size[0]
    if config["act_fn"] == "swish":
        config["act_fn"] = "silu"
    if config["time_embedding_dim"] == 4 * widths[0]:
        config["time_embedding_dim"] = None
    if config["attn_norm_num_groups"] == config["norm_num_groups"]:
        config["attn_norm_num_groups"] = None
    kinds = zip(config["down_block_types"], widths, strict=True)
    attended = {width for kind, width in kinds if kind.startswith("Attn")} | {widths[-1]}
    if attended == {config["attention_head_dim"]}:
        config["attention_head_dim"] = None
    config["num_train_timesteps"] = None  # of no use to an embedding by sinusoids

    if not (isinstance(size, int) and config["in_channels"] in (1, 3)):
        raise ValueError("sample_size must be a number of pixels, in_channels 1 or 3")
    settings = unet_settings(config)
    with torch.device("meta"):
        model = UNet(**settings).eval()
    unknown = {key: None for key in given if not key.startswith("_")}
    refuse_others(config, unknown | unet_config(model, settings))
    return model, settings


def read_scheduler(given):
    """The Diffusion of a scheduler_config.json: of a DDPM, or of a DDIM for the same network."""
    if given.get("_class_name") not in ("DDPMScheduler", "DDIMScheduler"):
        raise ValueError(f"{given.get('_class_name')} is no DDPMScheduler")
    config = SCHEDULER_DEFAULTS | given
    keys = "prediction_type clip_sample clip_sample_range thresholding rescale_betas_zero_snr"
    refuse_others(config, {key: SCHEDULER_DEFAULTS[key] for key in keys.split()})
    T, first, last = (config[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
    variances = {"fixed_large": "large", "fixed_small": "small"}
    schedules = {
        "linear": lambda: linear_betas(T, first, last),
        "scaled_linear": lambda: linear_betas(T, first**0.5, last**0.5) ** 2,
        "squaredcos_cap_v2": lambda: cosine_betas(T),
    }
    for key, words in (("variance_type", variances), ("beta_schedule", schedules)):
        if config[key] not in list(words):
            raise ValueError(f"{key} is {config[key]}, not one of {', '.join(words)}")
    betas = config["trained_betas"]
    if betas is None:
        betas = schedules[config["beta_schedule"]]()
    return Diffusion(betas, variances[config["variance_type"]])


def read_weights(path):
    """The tensors of a .safetensors or .bin file, float32, by their names of today."""
    with open(path, "rb") as file:
        if file.read(19) == b"version https://git":
            raise ValueError("this is a pointer to the weights; get them by: git lfs pull")
    if path.suffix == ".bin":
        weights = torch.load(path, map_location="cpu", weights_only=True)
    else:
        weights = safetensors.torch.load(path.read_bytes())
    if not all(w.is_floating_point() and not w.is_meta for w in weights.values()):
        raise ValueError("it holds more than weights")
    for old, new in OLD_NAMES.items():
        weights = {name.replace(f".{old}.", f".{new}."): w for name, w in weights.items()}
    return {name: w.float() for name, w in weights.items()}


def from_diffusers(folder):
    """The Trained in a folder of the diffusers layout; ValueError if ddpm.py doesn't compute it."""
    unet, scheduler = (
        folder / name if (folder / name).is_dir() else folder for name in ("unet", "scheduler")
    )
    path = unet / "config.json"
    with refusing(path):
        model, settings = read_unet(json.loads(path.read_text(encoding="utf-8")))
    path = scheduler / "scheduler_config.json"
    with refusing(path):
        diffusion = read_scheduler(json.loads(path.read_text(encoding="utf-8")))
    path = unet / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        path = path.with_suffix(".bin")
    with refusing(path):
        weights, names = read_weights(path), diffusers_names(model)
        missing = sorted(set(names.values()) - set(weights))
        left_over = sorted(set(weights) - set(names.values()))
        if missing or left_over:
            raise ValueError(
                f"{len(missing)} tensors of the network in config.json are missing, "
                f"{len(left_over)} left over, such as {(missing + left_over)[0]}"
            )
        state = {ours: weights[theirs] for ours, theirs in names.items()}
        model.load_state_dict(state, assign=True)
    return Trained(model, diffusion, settings, 0, f"diffusers, {folder.resolve().name}")


def to_diffusers(trained, folder):
    """Write a new folder that diffusers' DDPMPipeline.from_pretrained opens and samples from."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: use another name")
    betas = trained.diffusion.betas
    T, first, last = len(betas), betas[0].item(), betas[-1].item()
    linear = torch.equal(betas, linear_betas(T, first, last))
    scheduler = SCHEDULER_DEFAULTS | {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": T,
        "beta_start": first,
        "beta_end": last,
        "trained_betas": None if linear else betas.tolist(),
        "variance_type": f"fixed_{trained.diffusion.variance}",
    }
    pipeline = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, config in (
        ("unet/config.json", unet_config(trained.model, trained.settings)),
        ("scheduler/scheduler_config.json", scheduler),
        ("model_index.json", pipeline),
    ):
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    names = diffusers_names(trained.model)
    whole = torch.contiguous_format  # on CUDA the weights are channels_last
    weights = {
        names[k]: v.clone(memory_format=whole) for k, v in trained.model.state_dict().items()
    }
    path = temporary / "unet" / "diffusion_pytorch_model.safetensors"
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    if folder.is_dir():  # and empty
        folder.rmdir()
    temporary.rename(folder)


# ------------------------------------------------------------------------------------- the program


def save(proto, trained, path):
    """Save the network with the schedule and what else sample.py must know in its metadata."""
    metadata = {
        "ddpm.betas": json.dumps(trained.diffusion.betas.tolist()),
        "ddpm.variance": trained.diffusion.variance,
        "ddpm.image_shape": json.dumps(trained.shape),
        "ddpm.step": str(trained.step),
        "ddpm.source": trained.name,
    }
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, path)


def noised(diffusion, x0, t, random):
    """(x_t, t) for pictures x0 (B, C, H, W), all at the same t."""
    times = torch.full((len(x0),), t)
    return diffusion.q_sample(x0, times, torch.randn(x0.shape, generator=random)), times


def seen_by(trained, batches=25):
    """What the network is shown, to measure on: ([(x_t, t)], and pictures of which to make more).

    It is made of the training's pictures if they lie beside the checkpoint, else it is what DDIM
    shows the network on the way to pictures of its own.
    """
    diffusion, random = trained.diffusion, torch.Generator().manual_seed(0)
    decoded = list(trained.folder.glob("pictures-*.u8")) if trained.folder else []
    if decoded:
        pixels = np.memmap(decoded[0], np.uint8, "r").reshape(-1, *trained.shape)
        some = pixels[np.linspace(0, len(pixels) - 1, 64).round().astype(int)]
        x0 = torch.from_numpy(some).float() / 127.5 - 1
        times = np.linspace(0, diffusion.T - 1, batches).round().astype(int).tolist()
        parts = ((t, x0[torch.randint(len(x0), (8,), generator=random)]) for t in times)
        return [noised(diffusion, part, t, random) for t, part in parts], x0

    chain, x0 = [], None
    for t, x_t, x0_hat in diffusion.sample_progressive(
        trained.model, (8, *trained.shape), min(batches, diffusion.T), 0.0, random
    ):
        chain.append((x_t, torch.full((8,), t)))
        x0 = x0_hat
    return chain, x0


def relative_errors(session, exact, diffusion, x0, times=None):
    """{t: rms difference of the eps of two sessions over the rms of eps}, for TIMES unless given.

    x0: pictures (B, C, H, W), from which the x_t are made.
    """
    if times is None:
        times = [*(t for t in TIMES if t < diffusion.T - 1), diffusion.T - 1]
    random, errors = torch.Generator().manual_seed(1), {}
    for i in times:
        x_t, t = noised(diffusion, x0, i, random)
        feed = {"x_t": x_t.numpy(), "t": t.numpy()}
        eps, expected = (of.run(["eps"], feed)[0] for of in (session, exact))
        errors[i] = float(np.sqrt(np.square(eps - expected).mean() / np.square(expected).mean()))
    return errors


def share_of_time(session, exact, x, t):
    """Median time of a session's eps at x and t over that of another, taking turns."""
    feed, seconds = {"x_t": x.numpy(), "t": t.numpy()}, ([], [])
    for _ in range(9):
        for of, its_seconds in zip((session, exact), seconds, strict=True):
            began = time.perf_counter()
            of.run(["eps"], feed)
            its_seconds.append(time.perf_counter() - began)
    return np.median(seconds[0][4:]) / np.median(seconds[1][4:])  # the first ones are slow


def write_half(trained, path, exact):
    """--half: the file at path. Returns what to say of it."""
    _, x0 = seen_by(trained)
    save(to_onnx(Half(trained.model), trained.shape), trained, path)
    errors = relative_errors(on_cpu(path), on_cpu(exact), trained.diffusion, x0)
    if not all(error < NARROW_TOLERANCE for error in errors.values()):
        raise ValueError("float16 is not enough for this network")
    return ["float16", *table_of(errors)]


def write_int8(trained, path, exact):
    """--int8: the file at path, with integers wherever they err by less than NARROW_TOLERANCE."""
    diffusion, float32 = trained.diffusion, on_cpu(exact)
    chain, x0 = seen_by(trained)
    quantize(exact, path, chain)
    int8 = on_cpu(path)
    errors = relative_errors(int8, float32, diffusion, x0)
    bad = max((t for t, error in errors.items() if not error < NARROW_TOLERANCE), default=-1)
    first = min((t for t in errors if t > bad), default=diffusion.T)
    if first > diffusion.T // 4:
        raise ValueError(f"8-bit integers err by {errors[bad]:.0%} of eps at t = {bad}")
    while first - bad > 1 + first // 16:  # between the two lies the first t that they can do
        t = (bad + first) // 2
        if relative_errors(int8, float32, diffusion, x0, [t])[t] < NARROW_TOLERANCE:
            first = t
        else:
            bad = t
    save(choose(onnx.load(exact), onnx.load(path), first), trained, path)
    both = on_cpu(path)
    x_t, t = max(chain, key=lambda seen: seen[1][0])
    return [
        f"float32 below t = {first}, 8-bit integers from there on, where an eps takes "
        f"{share_of_time(both, float32, x_t, t):.2f} of the time here",
        *table_of(relative_errors(both, float32, diffusion, x0)),
    ]


def table_of(errors):
    """relative_errors in two lines."""
    return [
        "  t       " + "".join(f"{t:6}" for t in errors),
        "  error, %" + "".join(f"{100 * error:6.2f}" for error in errors.values()),
    ]


def write_onnx(trained, path, write=None):
    """The network and its schedule as one file, compared with torch before it is put in place.

    write: None, or write_half or write_int8, which make another file of the float32 one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    exact, temporary = (path.with_name(f"{path.name}.{word}") for word in ("exact.tmp", "tmp"))
    try:
        save(to_onnx(trained.model, trained.shape), trained, exact)
        worst = largest_difference(exact, trained.model, trained.diffusion.T)
        if not worst < TOLERANCE:
            raise ValueError(f"eps differs from torch's by {worst:.1e}; {path} is not written")
        said = [
            f"largest difference from torch {worst:.1e}, at batch 1, 2, 3 and t = 0, 1, T/2, T-1"
        ]
        if write is None:
            os.replace(exact, path)
        else:
            said = write(trained, temporary, exact)
            os.replace(temporary, path)
    finally:
        exact.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)
    step = f", step {trained.step:,}" if trained.step else ""
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, of {trained.name}{step}")
    print("\n".join(said))
    print(f"next:\n  python sample.py --onnx {path.as_posix()}")


def main():
    parser = argparse.ArgumentParser(
        usage="python export.py [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--checkpoint", default="run/checkpoint.pt", help="what train.py wrote [run/checkpoint.pt]"
    )
    source.add_argument("--diffusers", metavar="DIR", help="a DDPM in the layout of diffusers")
    parser.add_argument("--onnx", help="the file to write, unless --to-diffusers [model.onnx]")
    parser.add_argument("--to-diffusers", metavar="DIR", help="write a new folder for DDPMPipeline")
    kind = parser.add_mutually_exclusive_group()
    for name, write, text in (
        ("--half", write_half, "float16, for CUDA: half the size"),
        ("--int8", write_int8, "8-bit integers but for small t, for CPUs: a third larger, quicker"),
    ):
        kind.add_argument(name, dest="write", action="store_const", const=write, help=text)
    args = parser.parse_args()
    if args.diffusers and not Path(args.diffusers).is_dir():
        parser.error(f"--diffusers {args.diffusers}: there is no such folder")
    if args.to_diffusers is None and args.onnx is None:
        args.onnx = "model.onnx"
    if args.onnx and not args.onnx.endswith(".onnx"):
        parser.error("--onnx must be a file such as model.onnx")
    if args.write and not args.onnx:
        parser.error("--half and --int8 need --onnx")

    try:
        trained = load(args.diffusers or args.checkpoint)
        if args.to_diffusers:
            to_diffusers(trained, Path(args.to_diffusers))
            print(f"{args.to_diffusers}: diffusers.DDPMPipeline.from_pretrained opens it")
        if args.onnx:
            write_onnx(trained, Path(args.onnx), args.write)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"export.py: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit("export.py: stopped")


if __name__ == "__main__":
    main()
