"""extras/diffusers_weights.py: published weights as a run, a run as such weights, and a new run."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import COLOURS, read, save_run
from safetensors.torch import save_file

from ddpm import UNet, linear_betas
from run import load
from test_ddpm import randn, seeded

diffusers = pytest.importorskip("diffusers")
PROGRAM = "extras/diffusers_weights.py"


def publish(folder, size=8, base=8, mults=(1, 2), attention=4, groups=1, channels=3, **schedule):
    """Save diffusers' own DDPM with random weights, as on the hub; return network and scheduler."""
    attends = [size >> level == attention for level in range(len(mults))]
    torch.manual_seed(1)
    network = diffusers.UNet2DModel(
        sample_size=size, block_out_channels=[base * m for m in mults], layers_per_block=2,
        down_block_types=["Attn" * attend + "DownBlock2D" for attend in attends],
        up_block_types=["Attn" * attend + "UpBlock2D" for attend in reversed(attends)],
        norm_num_groups=groups, norm_eps=1e-6, downsample_padding=0, freq_shift=1,
        flip_sin_to_cos=False, attention_head_dim=None, in_channels=channels,
    ).eval()  # fmt: skip
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=20, beta_end=0.3, **schedule)
    for part in network, scheduler:
        part.save_pretrained(folder)
    return network, scheduler


@pytest.mark.parametrize("shape, schedule", [
    ((16, 32, (1, 2, 2, 2), 8, 8), {"variance_type": "fixed_large"}),  # CIFAR-10, but smaller
    ((32, 16, (1, 1, 2, 2, 4, 4), 2, 4), {"variance_type": "fixed_small"}),  # 256x256, but smaller
    ((8,), {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}),
])  # fmt: skip
def test_weights_become_a_run_and_a_run_becomes_weights(shape, schedule, tmp_path, program):
    """Their pipeline then draws the same images by Algorithm 2."""
    unet, scheduler = publish(tmp_path / "in", *shape, **schedule)
    assert "train.py --data ./images --out run" in program(PROGRAM, "in", "run", cwd=tmp_path)
    network, diffusion, state = load(tmp_path / "run")
    assert (state["step"], state["names"], state["optimizer"]) == (0, (), None)
    if "beta_schedule" not in schedule:  # theirs are rounded to float32
        assert torch.equal(diffusion.betas, linear_betas(20, 1e-4, 0.3))
    program(PROGRAM, "--to-diffusers", "run", "out", cwd=tmp_path)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(pipeline.scheduler.betas, scheduler.betas)
    assert all(pipeline.scheduler.config[k] == v for k, v in schedule.items() if k[0] != "b")
    x, t = randn(2, *state["shape"]), torch.tensor([3, 15])
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet(x, t).sample, unet(x, t).sample)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(2, seeded(), 20, output_type="np").images
    ours = diffusion.sample(network, x.shape, generator=seeded())
    assert ours.std() > 0.1
    np.testing.assert_allclose(theirs, (ours.permute(0, 2, 3, 1) + 1) / 2, rtol=0, atol=1e-4)


def test_weights_are_trained_further(image_folder, tmp_path, program):
    """Their norm groups and betas stay for good."""
    weights = publish(tmp_path / "in")[0].state_dict()
    (file,) = (tmp_path / "in").glob("*.safetensors")
    file.unlink()
    for pair in "to_q query", "to_k key", "to_v value", "to_out.0 proj_attn":  # old, as on the hub
        new, old = pair.split()
        weights = {k.replace(f".{new}.", f".{old}."): v for k, v in weights.items()}
    torch.save(weights, file.with_suffix(".bin"))
    program(PROGRAM, "in", "run", cwd=tmp_path)
    words = "--steps", 2, "--lr", 1e-3, "--batch", 4, "--device", "cpu"
    program("train.py", "--data", image_folder, "--out", "run", *words, cwd=tmp_path)
    network, diffusion, state = load(tmp_path / "run")
    assert state["step"] == 2 and state["settings"]["lr"] == 1e-3
    assert network.norm_out.num_groups == 1 and len(diffusion.betas) == 20


def test_new_run_has_the_averaged_weights_and_the_classes(class_folder, tmp_path, program):
    save_run(tmp_path / "old", (3, 8, 8), (*COLOURS,), parts=("v",))
    words = ["--data", class_folder, "--device", "cpu"]
    words += "--classes --out new --init old --lr 0 --steps 1".split()
    program("train.py", *words, cwd=tmp_path)
    said = program("train.py", *words, cwd=tmp_path)
    assert "new already holds a run, which continues; --init is ignored" in said
    program(PROGRAM, "--to-diffusers", "new", "out", cwd=tmp_path)
    (network, _, old), state = load(tmp_path / "old"), read(tmp_path / "new")
    assert (state["step"], state["names"]) == (1, old["names"])
    for part in "model", "ema":
        assert all(torch.equal(state[part][name], weight) for name, weight in old["ema"].items())
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet").eval()
    x, t, y = randn(4, 3, 8, 8), torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        v = UNet.forward(network, x, t, y)
        torch.testing.assert_close(theirs(x, t, class_labels=y).sample, v, rtol=0, atol=1e-5)


def test_what_is_no_ddpm_is_one_line(tmp_path, program, monkeypatch):
    """So are weights that are damaged or incomplete, folders in use, and a missing diffusers."""

    def refused(said, source="in"):
        line = program(PROGRAM, source, "run", cwd=tmp_path, code=1)
        assert f"{source} is not a DDPM that ddpm.py can express: " in line and said in line

    weights = publish(tmp_path / "in")[0].state_dict()
    publish(tmp_path / "wide", channels=6)
    refused("tensors differ, such as conv_out.bias", "wide")
    for name, changes in (("config.json", {
        "_class_name": "UNet2DConditionModel", "sample_size": None, "out_channels": 6,
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"], "act_fn": "gelu",
    }), ("scheduler_config.json", {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "variance_type": "learned_range",
    })):  # fmt: skip
        text = (tmp_path / "in" / name).read_text()
        for key, value in changes.items():
            (tmp_path / "in" / name).write_text(json.dumps(json.loads(text) | {key: value}))
            refused(str(value) if name[0] == "s" else "")
        (tmp_path / "in" / name).write_text(text)
    (file,) = (tmp_path / "in").glob("*.safetensors")
    save_file({name: w for name, w in weights.items() if name != "conv_in.bias"}, file)
    refused("its files lack conv_in.bias")
    file.write_bytes(file.read_bytes()[:999])
    refused("")
    assert "no readable config.json" in program(PROGRAM, "no/where", "run", cwd=tmp_path, code=1)
    assert "new or empty folder" in program(PROGRAM, "in", ".", cwd=tmp_path, code=2)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install diffusers" in program(PROGRAM, "in", "run", cwd=tmp_path, code=1)
    assert not (tmp_path / "run").exists()
