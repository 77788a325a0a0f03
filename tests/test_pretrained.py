"""The promises of pretrained.py: weights in the format of diffusers, to and from ddpm.py."""

import json

import numpy as np
import pytest
import torch
from closed_forms import PAPER, VARIANCES, randn, small_unet
from conftest import SMALL, RunsCode, close_mapped_files, read
from safetensors.torch import load_file, save_file

from beyond import cosine_betas
from ddpm import Diffusion, linear_betas
from support import pretrained, reduced
from support.trained import Trained, load

diffusers = pytest.importorskip("diffusers")
SHAPES = {  # size, base, mults, attention, groups, blocks
    "CIFAR-10, shrunken": (32, 64, (1, 2, 2, 2), 16, 32, 2),
    "256x256, shrunken": (64, 32, (1, 1, 2, 2, 4, 4), 4, 8, 2),
    "tiny": (8, 8, (1, 2), 4, 2, 2),
    "one level": (8, 8, (1,), 4, 2, 1),
}


def save_published(folder, shape="tiny", flat=True, safe=True):
    """Save diffusers' own DDPM with random weights; return its network."""
    size, base, mults, attention, groups, blocks = SHAPES[shape]
    attends = [size >> level == attention for level in range(len(mults))]
    torch.manual_seed(1)
    unet = diffusers.UNet2DModel(
        sample_size=size, block_out_channels=[base * m for m in mults], layers_per_block=blocks,
        down_block_types=["Attn" * attend + "DownBlock2D" for attend in attends],
        up_block_types=["Attn" * attend + "UpBlock2D" for attend in reversed(attends)],
        norm_num_groups=groups, norm_eps=1e-6, downsample_padding=0, freq_shift=1,
        flip_sin_to_cos=False, attention_head_dim=None,
    ).eval()  # fmt: skip
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder, safe_serialization=safe)
    for part in ("unet", "scheduler") if flat else ():  # as google/ddpm-* are on the hub
        for path in (folder / part).iterdir():
            path.rename(folder / path.name)
        (folder / part).rmdir()
    return unet


def assert_same_network(ours, theirs):
    size = np.max(theirs.config.sample_size)
    x, t = randn(2, ours.conv_in.in_channels, size, size), torch.tensor([3, 900])
    with torch.no_grad():
        eps = ours(x, t)
        assert eps.std() > 0.1
        torch.testing.assert_close(eps, theirs(x, t).sample, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------- the same network and sampler


@pytest.mark.parametrize("shape", SHAPES)
def test_network_is_diffusers_network_in_both_directions(shape, tmp_path):
    theirs = save_published(tmp_path / "in", shape, flat=False)
    trained = load(tmp_path / "in")
    assert_same_network(trained.model, theirs)
    assert trained.diffusion.variance == "large" and not trained.model.training
    assert torch.equal(trained.diffusion.betas, linear_betas())
    pretrained.to_diffusers(trained, tmp_path / "out")
    again = type(theirs).from_pretrained(tmp_path / "out" / "unet").eval()
    assert_same_network(trained.model, again)
    ours, expected = (
        {key: value for key, value in model.config.items() if not key.startswith("_")}
        for model in (again, theirs)
    )
    assert ours == expected


def test_published_weights_are_read_in_the_old_layout_too(tmp_path):
    """It is a pickle without sub-folders, with the old names of attention."""
    theirs = save_published(tmp_path, safe=False)
    path = tmp_path / "diffusion_pytorch_model.bin"
    state = torch.load(path)
    for new, old in (
        ("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"),
    ):  # fmt: skip
        state = {k.replace(f".{new}.", f".{old}."): v for k, v in state.items()}
    assert any("proj_attn" in k for k in state)
    torch.save(state, path)
    assert_same_network(load(tmp_path).model, theirs)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("betas", [linear_betas(40, 1e-3, 0.3), cosine_betas(40)])
def test_diffusers_pipeline_draws_what_ddpm_py_draws(predicts, variance, betas, tmp_path):
    """Compare all of Algorithm 2 with another implementation, on the output of export.py."""
    diffusion = Diffusion(betas, variance)
    trained = Trained(small_unet(dropout=0.0), diffusion, SMALL, 0, "", predicts=predicts)
    pretrained.to_diffusers(trained, tmp_path)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(2, torch.Generator().manual_seed(0), 40, output_type="np").images
    x0 = diffusion.sample(trained.eps, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    assert x0.std() > 0.1
    np.testing.assert_allclose(drawn, (x0.permute(0, 2, 3, 1) + 1) / 2, rtol=0, atol=1e-4)
    back = load(tmp_path)
    torch.testing.assert_close(back.diffusion.betas, betas, rtol=1e-15, atol=0)
    assert (back.predicts, back.diffusion.variance) == (predicts, variance)


def test_published_weights_to_images_and_back(image_folder, tmp_path, run):
    """Do what a user does: export, draw, fine-tune, evaluate, and write a folder again."""
    theirs = save_published(tmp_path / "published", "one level")
    change(tmp_path / "published" / "scheduler_config.json", num_train_timesteps=40, beta_end=0.3)
    assert "diffusers, published" in run("export.py", "--checkpoint", "published", cwd=tmp_path)
    x, t = randn(2, 3, 8, 8), torch.tensor([3, 30])
    eps = reduced.eps_of(tmp_path / "model.onnx")(x, t)
    with torch.no_grad():
        np.testing.assert_allclose(eps, theirs(x, t).sample, rtol=0, atol=1e-5)
    run("sample.py", "-n", 1, "--steps", 5, cwd=tmp_path)
    flags = ["--data", image_folder, "--init", "published", "--batch", 4]
    run("train.py", *flags, "--steps", 2, cwd=tmp_path)
    settings = read(tmp_path / "run")["config"]["model"]
    assert settings["norm_groups"] == 2  # from the weights
    assert settings["dropout"] == 0.1  # from the training settings
    flags = ["--data", image_folder, "--checkpoint", "published", "--images", 1]
    assert "on 1 image" in run("evaluate.py", *flags, cwd=tmp_path)
    assert [*(tmp_path / "published").glob("rate-distortion-*.csv")]
    run("export.py", "--to-diffusers", "mine", cwd=tmp_path)
    mine, ema = load(tmp_path / "mine").model.state_dict(), read(tmp_path / "run")["ema"]
    assert all(torch.equal(mine[k], ema[k]) for k in mine)


# ----------------------------------------------------------------------- what can't be expressed


@pytest.fixture
def published(tmp_path):
    save_published(tmp_path / "published")
    return tmp_path / "published"


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refusal(folder):
    """Return the line that refuses a folder."""
    with pytest.raises(SystemExit) as refused:
        load(folder)
    said = refused.value.code
    del refused
    close_mapped_files()
    assert said.startswith(f"{folder.as_posix()} is not a DDPM that ddpm.py can express: ")
    assert "\n" not in said
    return said


@pytest.mark.parametrize("key, value, said", [
    ("_class_name", "UNet2DConditionModel", "UNet2DConditionModel"),
    ("num_class_embeds", 10, "tensors missing"), ("out_channels", 6, "mismatch"),
    ("sample_size", [8, 16], "size"), ("sample_size", None, "size"), ("sample_size", 9, "size"),
    ("down_block_types", ["ResnetDownsampleBlock2D", "AttnDownBlock2D"], "tensors missing"),
    ("attention_head_dim", 8, "eps differs by"), ("freq_shift", 0, "eps differs by"),
    ("flip_sin_to_cos", True, "eps differs by"), ("downsample_padding", 1, "eps differs by"),
    ("norm_eps", 1e-5, "eps differs by"), ("act_fn", "gelu", "eps differs by"),
])  # fmt: skip
def test_other_networks_are_refused(key, value, said, published):
    change(published / "config.json", **{key: value})
    assert said in refusal(published)


@pytest.mark.parametrize("key, value", [
    ("class of its scheduler", "FlowMatchEulerDiscreteScheduler"), ("prediction_type", "score"),
    ("variance_type", "learned_range"), ("clip_sample", False), ("clip_sample_range", 2.0),
    ("thresholding", True), ("rescale_betas_zero_snr", True),
])  # fmt: skip
def test_other_schedulers_are_refused(key, value, published):
    name = "_class_name" if key.startswith("class") else key
    change(published / "scheduler_config.json", **{name: value})
    assert f"{key} is {value}" in refusal(published)


def test_other_words_for_the_same_network_are_understood(published):
    change(published / "config.json", sample_size=[8, 8], act_fn="swish", attention_head_dim=16)
    (published / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    trained = load(published)
    assert_same_network(trained.model, diffusers.UNet2DModel.from_pretrained(published).eval())
    assert trained.diffusion.variance == "small"  # what diffusers takes an omitted key for


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_schedules_of_diffusers(schedule, published):
    theirs = diffusers.DDPMScheduler(300, 2e-4, 0.03, schedule)
    theirs.save_pretrained(published)
    betas = load(published).diffusion.betas
    torch.testing.assert_close(betas.float(), theirs.betas, rtol=1e-6, atol=1e-9)


def test_weights_that_are_not_weights_are_refused(published):
    path = published / "diffusion_pytorch_model.safetensors"
    name = "mid_block.attentions.0.to_q.weight"
    whole = path.read_bytes()
    state = {k: v.clone() for k, v in load_file(path).items()}  # not of the mapped file
    left_over = "tensors missing or left over: 1, such as"
    for wrong, said in (
        ({k: v for k, v in state.items() if k != name}, f"{left_over} {name}"),
        (state | {"ema.decay": torch.zeros(1)}, f"{left_over} ema.decay"),
        (state | {name: torch.zeros(3, 3)}, name),
    ):
        save_file(wrong, path)
        assert said in refusal(published)
    for wrong in (whole[: len(whole) // 2], b"version https://git-lfs.github.com/spec/v1\nsize 9"):
        path.write_bytes(wrong)
        refusal(published)
    path.unlink()
    refusal(published)
    torch.save({name: RunsCode(published / "executed")}, path.with_suffix(".bin"))
    refusal(published)
    assert not (published / "executed").exists()


def test_folders_and_names_without_a_config_are_one_line(published, run):
    def said(name):
        return run("export.py", "--checkpoint", name, cwd=published.parent, code=1)

    no = "\nno/such-repository: no config.json can be read"
    assert no in "\n" + said("hf:no/such-repository")
    (published / "scheduler_config.json").unlink()
    assert "published: no scheduler_config.json can be read" in said("published")
    (published / "config.json").write_text("{")
    assert "published: no config.json can be read" in said("published")


def test_to_diffusers_refuses_what_it_cannot_write(tmp_path, run):
    """It refuses a folder that is not empty before it looks for the (missing) checkpoint."""
    mean = Trained(small_unet(dropout=0.0), PAPER, SMALL, 0, "", predicts="mean")
    with pytest.raises(SystemExit, match="can't express a network that predicts 'mean'"):
        pretrained.to_diffusers(mean, tmp_path / "theirs")
    (tmp_path / "mine").touch()
    said = run("export.py", "--to-diffusers", ".", cwd=tmp_path, code=1)
    assert ". must be a new or empty folder" in said
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
