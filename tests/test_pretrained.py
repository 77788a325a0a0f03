"""The promises of pretrained.py: weights in the format of diffusers, to and from ddpm.py."""

import gc
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from conftest import HERE, PAPER, VARIANCES, RunsCode, python, randn, read, small_unet
from safetensors.torch import load_file, save_file

import export
from beyond import cosine_betas
from ddpm import Diffusion, linear_betas
from support import pretrained, reduced
from support.trained import Trained, load

SHAPES = {  # size, base, mults, attention, groups
    "CIFAR-10": (32, 128, (1, 2, 2, 2), 16, 32),
    "256x256, shrunken": (64, 32, (1, 1, 2, 2, 4, 4), 4, 8),
    "tiny": (8, 8, (1, 2), 4, 2),
}
SMALL = dict(image_size=8, in_channels=3, base_channels=8, channel_mults=(1, 2),
             num_res_blocks=1, attention_resolutions=(4,), dropout=0.0)  # fmt: skip


def diffusers_unet(size, base, mults, attention, groups):
    """Another implementation of the network, with weights of its own."""
    from diffusers import UNet2DModel

    here = [size >> level == attention for level in range(len(mults))]
    torch.manual_seed(1)
    return UNet2DModel(
        sample_size=size,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in here],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(here)],
        block_out_channels=[base * m for m in mults],
        layers_per_block=2,
        norm_num_groups=groups,
        norm_eps=1e-6,
        downsample_padding=0,
        freq_shift=1,
        flip_sin_to_cos=False,
        attention_head_dim=None,
    ).eval()


def save_published(folder, shape="tiny", flat=True, safe=True):
    """Save a DDPM of diffusers' own with random weights; returns its network."""
    from diffusers import DDPMPipeline, DDPMScheduler

    unet = diffusers_unet(*SHAPES[shape])
    scheduler = DDPMScheduler(variance_type="fixed_large")
    DDPMPipeline(unet, scheduler).save_pretrained(folder, safe_serialization=safe)
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
    configs = [
        {key: value for key, value in model.config.items() if not key.startswith("_")}
        for model in (theirs, again)
    ]
    assert configs[0] == configs[1]


def test_published_weights_are_read_in_the_old_layout_too(tmp_path):
    """A pickle without sub-folders, with the names that attention had then."""
    theirs = save_published(tmp_path, safe=False)
    path = tmp_path / "diffusion_pytorch_model.bin"
    state = torch.load(path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in names.items():
        state = {k.replace(f".{new}.", f".{old}."): v for k, v in state.items()}
    assert any("proj_attn" in k for k in state)
    torch.save(state, path)
    assert_same_network(load(tmp_path).model, theirs)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("betas", [linear_betas(40, 1e-3, 0.3), cosine_betas(40)])
def test_diffusers_pipeline_draws_what_ddpm_py_draws(variance, betas, tmp_path):
    """All of Algorithm 2 against another implementation, opened from what export.py wrote."""
    from diffusers import DDPMPipeline

    model = small_unet(dropout=0.0)
    diffusion = Diffusion(betas, variance)
    pretrained.to_diffusers(Trained(model, diffusion, SMALL, 0, ""), tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(2, torch.Generator().manual_seed(0), 40, output_type="np").images
    x0 = diffusion.sample(model, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    assert x0.std() > 0.1
    np.testing.assert_allclose(drawn, (x0.permute(0, 2, 3, 1) + 1) / 2, rtol=0, atol=1e-4)
    back = load(tmp_path)
    torch.testing.assert_close(back.diffusion.betas, betas, rtol=1e-15, atol=0)
    assert back.diffusion.variance == variance


def test_file_computes_eps_whatever_is_predicted(tmp_path):
    """Of a network that predicts the mean; the other files of the tests predict eps."""
    model = small_unet(channel_mults=(1,), attention_resolutions=())  # is exported faster
    trained = Trained(model, PAPER, SMALL, 1, "", predicts="mean")
    export.write_onnx(trained, tmp_path / "x.onnx")
    x, t = randn(3, 3, 8, 8), torch.tensor([5, 500, 999])
    with torch.no_grad():
        expected, raw = trained.eps(x, t), model(x, t)
    eps = reduced.eps_of(tmp_path / "x.onnx")(x, t)
    torch.testing.assert_close(eps, expected, rtol=1e-4, atol=1e-4)
    assert (expected - raw).abs().max() > 0.1
    names = [node.name for node in onnx.load(tmp_path / "x.onnx").graph.node]
    assert any(name.startswith("conv_in/") for name in names)  # --int8 goes by such names


@pytest.mark.parametrize("predicts", ["x0", "v"])
def test_outputs_are_those_of_diffusers(predicts, tmp_path):
    from diffusers import DDPMScheduler

    model = small_unet(dropout=0.0)
    trained = Trained(model, PAPER, SMALL, 0, "", predicts=predicts)
    pretrained.to_diffusers(trained, tmp_path)
    assert load(tmp_path).predicts == predicts
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "scheduler")
    x, t = randn(1, 3, 8, 8), torch.tensor([500])
    with torch.no_grad():
        theirs = scheduler.step(model(x, t), 500, x).pred_original_sample
        ours = PAPER.predict_x0(x, t, trained.eps(x, t)).clamp(-1, 1)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_published_weights_to_images_and_back(image_folder, tmp_path, run):
    """As a user: to model.onnx, to images, fine-tuned, evaluated, and to a folder again."""
    theirs = save_published(tmp_path / "published")
    change(tmp_path / "published" / "scheduler_config.json", num_train_timesteps=40, beta_end=0.3)
    assert "diffusers, published" in run("export.py", "--diffusers", "published", cwd=tmp_path)
    x, t = randn(2, 3, 8, 8), torch.tensor([3, 30])
    eps = reduced.eps_of(tmp_path / "model.onnx")(x, t)
    with torch.no_grad():
        np.testing.assert_allclose(eps, theirs(x, t).sample, rtol=0, atol=1e-5)
    run("sample.py", "-n", 1, "--steps", 5, cwd=tmp_path)
    flags = ["--data", image_folder, "--init", "published", "--batch", 4]
    run("train.py", *flags, "--steps", 2, cwd=tmp_path)
    settings = read(tmp_path / "run")["config"]["model"]
    assert settings["norm_groups"] == 2  # of the weights
    assert settings["dropout"] == 0.1  # of the training
    flags = ["--data", image_folder, "--checkpoint", "published", "--images", 1]
    assert "on 1 image" in run("evaluate.py", *flags, cwd=tmp_path)
    assert (tmp_path / "published" / "rate-distortion.csv").is_file()
    run("export.py", "--to-diffusers", "mine", cwd=tmp_path)
    mine, ema = load(tmp_path / "mine").model.state_dict(), read(tmp_path / "run")["ema"]
    assert all(torch.equal(mine[k], ema[k]) for k in mine)


# ----------------------------------------------------------------------- what can't be expressed


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    save_published(folder)
    return folder


@pytest.fixture
def copy(published, tmp_path):
    return shutil.copytree(published, tmp_path / "copy")


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refusal(folder):
    """Return the line with which a folder is refused."""
    with pytest.raises(SystemExit) as refused:
        load(folder)
    said = refused.value.code
    del refused
    gc.collect()  # the file is mapped until then, and Windows does not let one change it
    assert said.startswith(f"{folder.as_posix()} is not a DDPM that ddpm.py can express: ")
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("_class_name", "UNet2DConditionModel", "UNet2DConditionModel"),
        ("num_class_embeds", 10, "tensors missing"),
        ("out_channels", 6, "mismatch"),
        ("sample_size", [8, 16], "size"),
        ("sample_size", None, "size"),
        ("sample_size", 9, "size"),
        ("down_block_types", ["ResnetDownsampleBlock2D", "AttnDownBlock2D"], "tensors missing"),
        ("attention_head_dim", 8, "eps differs by"),
        ("freq_shift", 0, "eps differs by"),
        ("flip_sin_to_cos", True, "eps differs by"),
        ("downsample_padding", 1, "eps differs by"),
        ("norm_eps", 1e-5, "eps differs by"),
        ("act_fn", "gelu", "eps differs by"),
    ],
)
def test_other_networks_are_refused(key, value, said, copy):
    change(copy / "config.json", **{key: value})
    assert said in refusal(copy)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("_class_name", "FlowMatchEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
        ("prediction_type", "score", "prediction_type is score"),
        ("variance_type", "learned_range", "variance_type is learned_range"),
        ("clip_sample", False, "clip_sample is False"),
        ("clip_sample_range", 2.0, "clip_sample_range is 2.0"),
        ("thresholding", True, "thresholding is True"),
        ("rescale_betas_zero_snr", True, "rescale_betas_zero_snr is True"),
    ],
)
def test_other_schedulers_are_refused(key, value, said, copy):
    change(copy / "scheduler_config.json", **{key: value})
    assert said in refusal(copy)


def test_other_words_for_the_same_network_are_understood(copy):
    from diffusers import UNet2DModel

    change(copy / "config.json", sample_size=[8, 8], act_fn="swish", attention_head_dim=16)
    (copy / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    trained = load(copy)
    assert_same_network(trained.model, UNet2DModel.from_pretrained(copy).eval())
    assert trained.diffusion.variance == "small"  # what diffusers takes an omitted key for


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_schedules_of_diffusers(schedule, copy):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(300, 2e-4, 0.03, schedule)
    theirs.save_pretrained(copy)
    betas = load(copy).diffusion.betas
    torch.testing.assert_close(betas.float(), theirs.betas, rtol=1e-6, atol=1e-9)


def test_weights_that_are_not_weights_are_refused(copy):
    path = copy / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    state = {k: v.clone() for k, v in load_file(path).items()}  # not of the mapped file
    name = "mid_block.attentions.0.to_q.weight"
    save_file({k: v for k, v in state.items() if k != name}, path)
    assert f"tensors missing or left over: 1, such as {name}" in refusal(copy)
    save_file(state | {"ema.decay": torch.zeros(1)}, path)
    assert "tensors missing or left over: 1, such as ema.decay" in refusal(copy)
    save_file(state | {name: torch.zeros(3, 3)}, path)
    assert name in refusal(copy)
    path.write_bytes(whole[: len(whole) // 2])
    refusal(copy)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refusal(copy)
    path.unlink()
    refusal(copy)
    torch.save({name: RunsCode(copy / "executed")}, path.with_suffix(".bin"))
    refusal(copy)
    assert not (copy / "executed").exists()


def test_folders_and_names_without_a_config_are_one_line(copy, run):
    (copy / "scheduler_config.json").unlink()
    said = run("export.py", "--diffusers", "copy", cwd=copy.parent, code=1)
    assert "copy: no scheduler_config.json can be read" in said
    (copy / "config.json").write_text("{")
    said = run("export.py", "--diffusers", "copy", cwd=copy.parent, code=1)
    assert "copy: no config.json can be read" in said
    said = run("export.py", "--diffusers", "no/such-repository", cwd=copy.parent, code=1)
    assert "no/such-repository: no config.json can be read" in said


def test_to_diffusers_refuses_what_it_cannot_write(tmp_path):
    model = small_unet(dropout=0.0)
    mean, eps = (Trained(model, PAPER, SMALL, 0, "", predicts=p) for p in ("mean", "eps"))
    with pytest.raises(SystemExit, match="can't express a network that predicts 'mean'"):
        pretrained.to_diffusers(mean, tmp_path / "theirs")
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit, match="must be a new or empty folder"):
        pretrained.to_diffusers(eps, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_diffusers_is_needed_only_for_published_weights(tmp_path):
    (tmp_path / "config.json").touch()
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); sys.modules['diffusers'] = None; "
        "import export; sys.argv = ['export.py', '--diffusers', '.']; export.main()"
    )
    said = python("-c", code, cwd=tmp_path, code=1)
    assert said == ". is not a checkpoint; to read published weights: pip install diffusers\n"
