"""Turn published weights into a run, or a run into diffusers' format.

    python -m extras.diffusers_weights google/ddpm-cifar10-32 run        # or a folder on the disk
    python -m extras.diffusers_weights --to-diffusers run my-ddpm        # for DDPMPipeline

The new run is at step 0, and train.py, export.py and sample.py take it like any other; for example,
`python train.py --data ./images --out run` trains it further. The diffusers library reads and
writes the files. No code in them is executed, and an imported network is compared with theirs.
"""

import argparse
import re
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ddpm import UNet, linear_betas
from export import TOLERANCE, largest_difference
from program import check_writable, guard_output
from run import Settings, begin_anew, build, load, write_checkpoint

RENAMES = (  # regular expressions that turn our names into diffusers', in this order
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
# What a scheduler predicts, and the parts of a run
PREDICTS = {"epsilon": (), "v_prediction": ("v",)}
SCHEDULER = {  # the settings of a scheduler that ddpm.py can express
    "prediction_type": [*PREDICTS],
    "variance_type": ["fixed_large", "fixed_small"],
    "clip_sample": [True],
    "clip_sample_range": [1.0],
    "thresholding": [False],
    "rescale_betas_zero_snr": [False],
}


def diffusers_name(name):
    """Return the name that diffusers' UNet2DModel gives a tensor of our UNet."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def refuse(source, why):
    """Exit, because ddpm.py can't express the model."""
    sys.exit(f"{source} is not a DDPM that ddpm.py can express: {why}")


def read_part(cls, source, part):
    """Return (config, where) of "unet" or "scheduler", in a folder of that name or at the top."""
    for where in {"subfolder": part}, {}:
        try:
            return cls.load_config(source, **where), where
        except (OSError, ValueError) as error:
            why = " ".join(str(error).split())
    sys.exit(f"{source}: no readable {cls.config_name} in a folder or on the Hub: {why}")


def from_diffusers(source):
    """Return the state of a checkpoint with published weights. Exits if ddpm.py can't express them.

    source: a folder, or a name on the hub.
    """
    import diffusers

    config, where = read_part(diffusers.UNet2DModel, source, "unet")
    if config.get("_class_name") != "UNet2DModel":
        refuse(source, f"its class is {config.get('_class_name')}")
    where |= {"output_loading_info": True, "low_cpu_mem_usage": False}
    try:
        theirs, info = diffusers.UNet2DModel.from_pretrained(source, **where)
    except (OSError, RuntimeError, ValueError) as error:
        refuse(source, " ".join(str(error).split()))
    if lost := info["missing_keys"]:  # these have random values
        refuse(source, f"its files lack {lost[0]}")
    theirs = theirs.eval().float()
    config, where = read_part(diffusers.DDPMScheduler, source, "scheduler")
    if config.get("_class_name") not in ("DDPMScheduler", "DDIMScheduler"):
        refuse(source, f"the class of its scheduler is {config.get('_class_name')}")
    scheduler = diffusers.DDPMScheduler.from_pretrained(source, **where)
    u, c = theirs.config, scheduler.config
    if wrong := [key for key, values in SCHEDULER.items() if c[key] not in values]:
        refuse(source, f"{wrong[0]} is {c[wrong[0]]}, not {SCHEDULER[wrong[0]]}")
    betas = c.trained_betas or scheduler.betas.tolist()
    if c.beta_schedule == "linear" and not c.trained_betas:  # theirs are rounded to float32
        betas = linear_betas(c.num_train_timesteps, c.beta_start, c.beta_end).tolist()
    base, size = u.block_out_channels[0], int(np.max(u.sample_size or 0))
    attends = ["Attn" in name for name in u.down_block_types]
    settings = Settings(
        image_size=size,
        in_channels=u.in_channels,
        base_channels=base,
        channel_mults=tuple(channels // base for channels in u.block_out_channels),
        num_res_blocks=u.layers_per_block,
        attention_resolutions=tuple(size >> k for k, attend in enumerate(attends) if attend),
        dropout=u.dropout,
        norm_groups=u.norm_num_groups,
        betas=tuple(betas),
        variance=c.variance_type.removeprefix("fixed_"),
        parts=PREDICTS[c.prediction_type],
    )
    shape = u.in_channels, size, size
    try:
        network, diffusion = build(settings, shape)
    except ValueError as error:
        refuse(source, error)
    weights, new = theirs.state_dict(), network.state_dict()
    shapes = {(name, weight.shape) for name, weight in weights.items()}
    if different := shapes ^ {(diffusers_name(name), new[name].shape) for name in new}:
        refuse(source, f"{len(different)} tensors differ, such as {min(different)[0]}")
    network.load_state_dict({name: weights[diffusers_name(name)] for name in new})

    def output(x_t, t):
        return theirs(torch.from_numpy(x_t), torch.from_numpy(t)).sample.numpy()

    ours = partial(UNet.forward, network.eval())  # the raw output, also of a VUNet
    if not (worst := largest_difference(ours, output, shape, diffusion.T)) < TOLERANCE:
        refuse(source, f"its output differs by {worst:.1g} between diffusers and ddpm.py")
    return {"settings": vars(settings), "shape": shape, "names": (), "ema": network.state_dict()}


def to_diffusers(run, folder):
    """Write a run to a folder that diffusers' DDPMPipeline opens."""
    import diffusers

    network, diffusion, state = load(run)
    s = Settings(**state["settings"])
    if s.patch_size > 1:
        sys.exit(f"{run} has a network on patches, which diffusers' UNet2DModel can't express")
    attends = [s.image_size >> k in s.attention_resolutions for k in range(len(s.channel_mults))]
    unet = diffusers.UNet2DModel(
        sample_size=s.image_size,
        in_channels=state["shape"][0],
        out_channels=state["shape"][0],
        block_out_channels=[s.base_channels * mult for mult in s.channel_mults],
        down_block_types=["Attn" * attend + "DownBlock2D" for attend in attends],
        up_block_types=["Attn" * attend + "UpBlock2D" for attend in reversed(attends)],
        layers_per_block=s.num_res_blocks,
        norm_num_groups=network.norm_out.num_groups,
        norm_eps=network.norm_out.eps,
        dropout=s.dropout,
        attention_head_dim=None,  # one head
        downsample_padding=0,  # right and below
        num_class_embeds=network.num_classes + 1 if network.num_classes else None,
        freq_shift=1,
        flip_sin_to_cos=False,
    )
    unet.load_state_dict({diffusers_name(name): w for name, w in network.state_dict().items()})
    T, first, last = len(s.betas), s.betas[0], s.betas[-1]
    is_linear = torch.equal(diffusion.betas, linear_betas(T, first, last))
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=T,
        beta_start=first,
        beta_end=last,
        trained_betas=None if is_linear else list(s.betas),
        variance_type=f"fixed_{s.variance}",
        prediction_type="v_prediction" if "v" in s.parts else "epsilon",
    )
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)


def main():
    guard_output()
    parser = argparse.ArgumentParser(
        usage="python -m extras.diffusers_weights [--to-diffusers] SOURCE NEW_FOLDER",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--to-diffusers", action="store_true")
    parser.add_argument("source")
    parser.add_argument("new", type=Path)
    args = parser.parse_args()
    if not find_spec("diffusers"):
        sys.exit("published weights need the package diffusers: pip install diffusers")
    check_writable(args.new / "checkpoint.pt")
    if args.new.exists() and any(args.new.iterdir()):
        parser.error(f"{args.new} must be a new or empty folder")
    if args.to_diffusers:
        to_diffusers(args.source, args.new)
        print(f"{args.new}: DDPMPipeline.from_pretrained (with classes, UNet2DModel's) opens it")
        return
    state = begin_anew(from_diffusers(args.source))
    write_checkpoint(state, args.new / "checkpoint.pt")
    print(f"{args.new}: python train.py --data ./images --out {args.new} trains it further")


if __name__ == "__main__":
    main()
