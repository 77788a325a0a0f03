"""Published weights: a DDPM in the format of the diffusers library, to and from ddpm.py.

from_diffusers serves trained.load, and to_diffusers serves `export.py --to-diffusers`. diffusers
itself reads and writes the files. After reading, both networks must compute the same eps.
"""

import re
import sys
from pathlib import Path

import numpy as np
import torch

from ddpm import Diffusion, UNet, linear_betas
from support.trained import Trained, largest_difference

NAMES = (  # regular expressions that turn our names into diffusers', in this order
    (r"^(down|up)\.(\d+)\.\d+\.conv\.", r"\1_blocks.\2.\1samplers.0.conv."),
    (r"^(down|up)\.(\d+)\.(\d+)\.", r"\1_blocks.\2.resnets.\3."),
    (r"^middle\.", r"mid_block.resnets."),
    (r"resnets\.(\d+)\.attention\.norm", r"attentions.\1.group_norm"),
    (r"resnets\.(\d+)\.attention\.out", r"attentions.\1.to_out.0"),
    (r"resnets\.(\d+)\.attention\.", r"attentions.\1.to_"),
    (r"time_proj", r"time_emb_proj"),
    (r"shortcut", r"conv_shortcut"),
    (r"time_mlp\.0", r"time_embedding.linear_1"),
    (r"time_mlp\.2", r"time_embedding.linear_2"),
    (r"norm_out", r"conv_norm_out"),
)
PREDICTS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # ours, and diffusers'
SCHEDULER = {  # the settings of a scheduler that ddpm.py can express
    "prediction_type": list(PREDICTS.values()),
    "variance_type": ["fixed_large", "fixed_small"],
    "clip_sample": [True],
    "clip_sample_range": [1.0],
    "thresholding": [False],
    "rescale_betas_zero_snr": [False],
}


def diffusers_names(model):
    """Return {name of a tensor of the model: its name in diffusers' UNet2DModel}."""
    names = {name: name for name in model.state_dict()}
    for pattern, replacement in NAMES:
        names = {ours: re.sub(pattern, replacement, name) for ours, name in names.items()}
    return names


def import_diffusers(what):
    """Return the diffusers package, or exit with the command that installs it."""
    try:
        import diffusers
    except ModuleNotFoundError:
        sys.exit(f"{what}: pip install diffusers")
    diffusers.logging.set_verbosity_error()
    return diffusers


def read_part(cls, source, part):
    """Return (config, keyword arguments that find it) of "unet" or "scheduler".

    The part is in a sub-folder of that name or, as in google/ddpm-*, in no sub-folder. Exits if it
    is in neither.
    """
    errors = []
    for place in ({"subfolder": part}, {}):
        try:
            return cls.load_config(source, **place), place
        except (OSError, ValueError) as error:
            errors.append(" ".join(str(error).split()))
    sys.exit(f"{source}: no {cls.config_name} can be read, in a folder or on the hub: {errors[-1]}")


def from_diffusers(source):
    """Return the Trained of published weights.

    source: a folder, or a name on the hub. No code in the files is executed. Exits if ddpm.py can't
    express the model.
    """
    diffusers = import_diffusers(f"{source} is not a checkpoint; other weights need diffusers")
    theirs, model, settings = read_unet(diffusers, source)
    diffusion, predicts = read_diffusion(diffusers, source)
    name = f"diffusers, {Path(source).name}"
    trained = Trained(model, diffusion, settings, 0, name, predicts=predicts)

    def eps(x_t, t):
        return theirs(x_t, t).sample

    difference = largest_difference(model, eps, trained.shape, diffusion.T)
    if not difference < 1e-4:
        refuse(source, f"eps differs by {difference:.1g} between diffusers and ddpm.py")
    return trained


def refuse(source, why):
    """Exit, because ddpm.py can't express the model."""
    sys.exit(f"{source} is not a DDPM that ddpm.py can express: {why}")


def read_unet(diffusers, source):
    """Return (their UNet2DModel, our UNet with the same weights in eval mode, its arguments)."""
    config, place = read_part(diffusers.UNet2DModel, source, "unet")
    if config.get("_class_name") != "UNet2DModel":
        refuse(source, f"its class is {config.get('_class_name')}")
    try:
        theirs, report = diffusers.UNet2DModel.from_pretrained(
            source, **place, output_loading_info=True
        )
    except Exception as error:  # diffusers and safetensors raise many kinds
        refuse(source, " ".join(str(error).split()))
    c = theirs.eval().float().config
    base, attends = c.block_out_channels[0], ["Attn" in name for name in c.down_block_types]
    sizes = set(np.ravel(c.sample_size or 0).tolist())
    size = max(sizes)
    if c.in_channels not in (1, 3) or len(sizes) > 1:
        refuse(source, f"its images have {c.in_channels} channels and the size {c.sample_size}")
    settings = {
        "image_size": size,
        "in_channels": c.in_channels,
        "base_channels": base,
        "channel_mults": [channels // base for channels in c.block_out_channels],
        "num_res_blocks": c.layers_per_block,
        "attention_resolutions": [size >> k for k, attend in enumerate(attends) if attend],
        "dropout": c.dropout,
        "norm_groups": c.norm_num_groups,
    }
    try:
        model = UNet(**settings).eval()
    except ValueError as error:
        refuse(source, error)
    names, weights = diffusers_names(model), theirs.state_dict()
    wanted = {(names[name], tuple(w.shape)) for name, w in model.state_dict().items()}
    found = {(name, tuple(w.shape)) for name, w in weights.items()}
    different = {name for name, _ in wanted ^ found}
    different |= {*report["missing_keys"], *report["unexpected_keys"]}
    if different:
        refuse(source, f"tensors missing or left over: {len(different)}, such as {min(different)}")
    model.load_state_dict({name: weights[their_name] for name, their_name in names.items()})
    return theirs, model, settings


def read_diffusion(diffusers, source):
    """Return (Diffusion, what the network predicts) of the scheduler."""
    config, place = read_part(diffusers.DDPMScheduler, source, "scheduler")
    if config.get("_class_name") not in ("DDPMScheduler", "DDIMScheduler"):
        refuse(source, f"the class of its scheduler is {config.get('_class_name')}")
    scheduler = diffusers.DDPMScheduler.from_pretrained(source, **place)
    c = scheduler.config
    for key, values in SCHEDULER.items():
        if c[key] not in values:
            refuse(source, f"{key} is {c[key]}, not {' or '.join(map(str, values))}")
    betas = c.trained_betas or scheduler.betas.tolist()
    if c.beta_schedule == "linear" and not c.trained_betas:  # theirs are rounded to float32
        betas = linear_betas(c.num_train_timesteps, c.beta_start, c.beta_end)
    predicts = next(name for name, theirs in PREDICTS.items() if theirs == c.prediction_type)
    return Diffusion(betas, c.variance_type.removeprefix("fixed_")), predicts


def to_diffusers(trained, folder):
    """Write a Trained to a folder that diffusers' DDPMPipeline opens.

    Exits if diffusers can't express the model.
    """
    diffusers = import_diffusers("--to-diffusers needs diffusers")
    model, settings, diffusion = trained.model, trained.settings, trained.diffusion
    if not isinstance(model, UNet):
        sys.exit(f"diffusers can't express {type(model).__name__}, only the UNet of ddpm.py")
    if trained.predicts not in PREDICTS:
        sys.exit(f"diffusers can't express a network that predicts {trained.predicts!r}")
    attends = [
        settings["image_size"] >> level in settings["attention_resolutions"]
        for level in range(len(settings["channel_mults"]))
    ]
    unet = diffusers.UNet2DModel(
        sample_size=settings["image_size"],
        in_channels=settings["in_channels"],
        out_channels=settings["in_channels"],
        block_out_channels=[settings["base_channels"] * n for n in settings["channel_mults"]],
        down_block_types=["Attn" * attend + "DownBlock2D" for attend in attends],
        up_block_types=["Attn" * attend + "UpBlock2D" for attend in reversed(attends)],
        layers_per_block=settings["num_res_blocks"],
        norm_num_groups=model.norm_out.num_groups,
        norm_eps=model.norm_out.eps,
        dropout=settings["dropout"],
        attention_head_dim=None,  # one head
        downsample_padding=0,  # right and below
        num_class_embeds=model.num_classes + 1 if model.num_classes else None,
        freq_shift=1,
        flip_sin_to_cos=False,
    )
    names = diffusers_names(model)
    unet.load_state_dict({names[name]: w for name, w in model.state_dict().items()})
    betas = diffusion.betas
    T, first, last = len(betas), betas[0].item(), betas[-1].item()
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=T,
        beta_start=first,
        beta_end=last,
        trained_betas=None if torch.equal(betas, linear_betas(T, first, last)) else betas.tolist(),
        variance_type=f"fixed_{diffusion.variance}",
        prediction_type=PREDICTS[trained.predicts],
    )
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
