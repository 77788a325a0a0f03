"""The promises of train.py: the step, the flags, and what one command does."""

import copy
import re
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch
from closed_forms import PAPER, close
from conftest import HERE, TINY, SmallDiT, python, read
from PIL import Image

import train
from beyond import loss_weights
from ddpm import Diffusion, UNet, linear_betas
from images import from_pixels
from support import device, settings
from support import trained as trained_module
from support.demo import demo_images
from support.trained import load

CPU = torch.device("cpu")

# ----------------------------------------------------------------------------------------- the step


def test_learning_rate_ramps():
    args = train.Settings(warmup=4)
    assert [train.learning_rate(k, args) for k in (0, 1, 3, 9)] == [5e-5, 1e-4, 2e-4, 2e-4]
    assert train.learning_rate(0, train.Settings(lr=1.0, warmup=0)) == 1.0
    args = train.Settings(lr=1.0, warmup=2, steps=10, lr_decay=True)
    falling = [train.learning_rate(k, args) for k in (0, 1, 5, 9)]
    assert falling == pytest.approx([0.5, 0.9, 0.5, 0.1])


@pytest.mark.parametrize(
    "step, decay, expected", [(0, 0.9999, 0.1), (90, 0.9999, 0.91), (10**6, 0.9999, 0.9999)]
)
def test_ema_forgets_the_first_weights(step, decay, expected):
    """Buffers, such as those of batch norm, are copied."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    ema = copy.deepcopy(model).requires_grad_(False)
    before = ema[0].weight.clone()
    torch.nn.init.ones_(model[0].weight)
    model(torch.randn(9, 3))
    train.update_ema(ema, model, step, decay)
    close(ema[0].weight, expected * before + 1 - expected)
    assert not ema[0].weight.requires_grad
    assert torch.equal(ema[1].running_mean, model[1].running_mean) and ema[1].running_mean.any()


def test_seeds_differ_for_every_seed_and_step_and_part():
    seen = []
    for seed in range(3):
        for step in range(999):
            for part in range(3):
                train.set_seed(CPU, seed, step, part)
                seen.append(torch.initial_seed())
    assert len(set(seen)) == 3 * 999 * 3
    assert max(seen) > 2**63  # all 64 bits: with 32, some seeds of a long run would be equal


@pytest.mark.parametrize("weighting, flip", [("simple", True), ("simple", False), ("vlb", True)])
def test_step_is_algorithm_1(weighting, flip):
    """Compute the loss, the gradient norm, Adam's step and the EMA from (seed, step) by hand.

    The optimizer has two groups, and one of them another order than the model.
    """
    images = torch.from_numpy(demo_images()[::9].copy())
    torch.manual_seed(0)
    model = UNet(8, 3, 8, (1, 2), 1, (), dropout=0.0)
    start, ema = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
    *others, last = model.parameters()
    groups = [{"params": others[::-1]}, {"params": [last]}]
    args = train.Settings(batch=8, flip=flip, weighting=weighting, lr=1e-3, warmup=0)
    adam = torch.optim.Adam(groups, 1e-3, fused=True)
    loss, norm = train.algorithm_1(model, ema, adam, PAPER, images, None, args)(0)

    train.set_seed(CPU, 0, 0, 0)
    x0 = from_pixels(images[torch.randint(len(images), (8,))])
    mirrored = torch.rand(8, 1, 1, 1) < 0.5
    assert mirrored.any() and not mirrored.all()
    if flip:
        x0 = torch.where(mirrored, x0.flip(3), x0)
    by_hand = copy.deepcopy(start)
    t, noise = torch.randint(1000, (8,)), torch.randn_like(x0)
    error = (noise - by_hand(PAPER.q_sample(x0, t, noise), t)).square()
    expected = (loss_weights(PAPER, weighting)[t, None, None, None] * error).float().mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    gradients = [p.grad for p in by_hand.parameters()]
    total = torch.stack([g.norm() for g in gradients]).norm().item()
    assert norm == pytest.approx(total, rel=1e-4)
    for g in gradients:
        g *= min(1, 1 / total)
    torch.optim.Adam(by_hand.parameters(), 1e-3).step()
    for ours, theirs, average, before in zip(
        *(m.parameters() for m in (model, by_hand, ema, start)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        close(average, 0.1 * before + 0.9 * ours, 1e-6)  # the EMA's decay begins at 0.1


def test_every_group_of_the_optimizer_is_warmed_up(tiny, monkeypatch):
    """A reader may add a group, whose learning rate must follow the schedule, too."""
    rates = []

    class Grouped(torch.optim.Adam):
        def __init__(self, parameters, lr, fused):
            first, *others = parameters
            super().__init__([{"params": [first]}, {"params": others}], lr, fused=fused)

        def step(self):
            rates.append([group["lr"] for group in self.param_groups])
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Grouped)
    tiny("--steps", 2, "--warmup", 2, "--lr", 1e-3)
    assert rates == [[5e-4, 5e-4], [1e-3, 1e-3]]


@pytest.mark.parametrize("amp", [True, False])
def test_amp_computes_the_network_in_bfloat16(amp, tiny, tmp_path, monkeypatch):
    """This works on processors without bfloat16, too. The loss and the weights stay float32."""
    seen, forward = set(), torch.nn.Conv2d.forward

    def watched(self, x):
        seen.add(forward(self, x).dtype)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    said = tiny("--steps", 1, "--amp" if amp else "--no-amp")
    kind = "bfloat16" if amp else "float32"
    assert seen == {getattr(torch, kind)} and f"cpu, {kind}" in said
    assert all(w.dtype == torch.float32 for w in read(tmp_path / "run")["model"].values())


def test_network_compiles_as_one_graph(monkeypatch):
    model, x, t = UNet(8, 3, 8, (1, 2), 1, (4,), 0.0).eval(), torch.randn(2, 3, 8, 8), torch.ones(2)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x, t.long()), model(x, t.long()))
    monkeypatch.setattr(torch, "compile", lambda network, **words: words)
    assert {*device.compiled(model)["options"]} <= {*torch._inductor.list_options()}


# -------------------------------------------------------------------------------------- one command


def test_three_commands_from_folder_to_images(trained, image_folder, tmp_path):
    """Each command runs in a process of its own, which leaves no file open."""
    words, warn = ["--data", image_folder, *TINY, "--steps", 12], ["-W", "always::ResourceWarning"]
    train_said = python(*warn, "train.py", *words, cwd=tmp_path)
    export_said = python(*warn, "export.py", cwd=tmp_path)
    words = ["--onnx", "model.onnx", "-n", 5, "--steps", 20]
    sample_said = python(*warn, "sample.py", *words, cwd=tmp_path)
    assert "images   12 of 3x8x8; the network will memorise the images" in train_said
    assert train_said.rstrip().endswith("sample.py --checkpoint run --steps 10")
    assert export_said.rstrip().endswith("sample.py --onnx model.onnx --steps 10")
    assert "ResourceWarning" not in train_said + export_said + sample_said
    assert {p.name for p in tmp_path.iterdir()} == {"run", "model.onnx", "samples.png"}
    names = {re.sub(r"images-.*\.", "images.", p.name) for p in (tmp_path / "run").iterdir()}
    decoded = {"images.npy", "images.json"}
    assert names == {"checkpoint.pt", "log.csv", "loss.png", "preview-0000012.png"} | decoded
    image = np.asarray(Image.open(tmp_path / "samples.png"))
    assert image.ndim == 3 and image.std() > 10
    log = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert log[0] == "step,loss,grad_norm,lr" and len(log) == 13
    assert log[1].startswith("1,") and log[-1].startswith("12,")
    again, state = read(trained[0] / "run"), read(tmp_path / "run")  # in another process
    assert all(torch.equal(w, again["ema"][name]) for name, w in state["ema"].items())


def test_checkpoint_describes_itself(trained):
    state = read(trained[0] / "run")
    assert set(state) == {"config", "step", "model", "ema", "optimizer"} and state["step"] == 12
    model = UNet(**state["config"]["model"])
    model.load_state_dict(state["model"])
    model.load_state_dict(state["ema"])
    diffusion, network = Diffusion(**state["config"]["diffusion"]), load(trained[0] / "run")
    assert torch.equal(diffusion.betas, linear_betas()) and diffusion.variance == "large"
    assert network.shape == (3, 8, 8) and network.predicts == "eps" and not network.classes


def test_every_setting_has_its_place(trained):
    """It is in the part of the checkpoint's config that its flag names, or nowhere."""
    config, kept = read(trained[0] / "run")["config"], {"schedule": "diffusion"}
    for f in fields(train.Settings):
        place = kept[f.name] = f.metadata["kept"]
        assert place in (None, "model", "diffusion", "train"), f.name
        found = {part for part, values in config.items() if f.name in values}
        assert found == {place} - {None} or f.name == "schedule"  # which is kept as its betas
    others = {"folder", "images", "code"}
    assert {name for values in config.values() for name in values} <= kept.keys() | others
    required = {"out", "accumulate", "device", "amp", "compile", "preview_every", "save_minutes"}
    assert {name for name, place in kept.items() if place is None} == required


def test_setting_that_an_older_run_did_not_know_has_its_default(trained, tiny, tmp_path):
    """This holds for a run that is resumed, and for one whose weights start another."""
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    state = read(tmp_path / "run")
    del state["config"]["model"]["norm_groups"], state["config"]["train"]["weighting"]
    del state["config"]["train"]["classes"]
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    tiny("--steps", 13)
    assert read(tmp_path / "run")["config"]["train"]["weighting"] == "simple"
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    tiny("--init", "run", "--out", "b", "--steps", 1)
    assert "weighting was simple, now vlb" in tiny("--weighting", "vlb", "--steps", 14, code=1)


class OwnNetwork(SmallDiT):
    """A network of another kind, with the arguments that train.py passes to its network."""

    def __init__(self, image_size, in_channels, **_):
        super().__init__()


def test_network_is_chosen_in_one_place(tiny, tmp_path, run, monkeypatch):
    """Another network trains with Muon, resumes, is exported, also with --half, and draws."""
    monkeypatch.setattr(trained_module, "Network", OwnNetwork)
    monkeypatch.setattr(train, "Network", OwnNetwork)
    monkeypatch.setattr(settings, "Network", OwnNetwork)
    words = ["--optimizer", "muon", "--steps"]
    tiny(*words, 2)
    tiny(*words, 3)
    assert "patches.weight" in read(tmp_path / "run")["ema"]
    run("export.py", "--half", cwd=tmp_path)  # which exports it in float32, too
    run("sample.py", "-n", 2, "--steps", 2, cwd=tmp_path)
    code = read(tmp_path / "run")["config"]["train"]["code"]
    monkeypatch.setattr(settings, "Network", UNet)  # from another file
    assert settings.config_of(train.Settings())["train"]["code"] != code


def test_importing_train_loads_only_what_every_run_needs():
    names = {"onnx", "onnxruntime", "onnxscript", "matplotlib", "diffusers"}
    names |= {"support.muon", "support.pretrained", "support.reduced"}
    code = f"import sys, train; print({names!r} & sys.modules.keys())"
    assert python("-c", code, cwd=HERE).strip() == "set()"


@pytest.mark.parametrize("error", [RuntimeError("size of tensor a"), ValueError("a shape")])
def test_bug_in_the_network_keeps_its_traceback(error, tiny, monkeypatch):
    """In the exercises, the reader edits ddpm.py."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(UNet, "forward", fail)
    with pytest.raises(type(error)):
        tiny("--steps", 1)


def test_bug_is_printed_with_its_line(tmp_path):
    """The bug is a misspelt name in UNet.__init__, in a copy of the repository."""
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(HERE / "support", tmp_path / "support")
    source = (tmp_path / "ddpm.py").read_text()
    (tmp_path / "ddpm.py").write_text(source.replace("nn.Conv2d(", "nn.Conv2D("))
    said = python(tmp_path / "train.py", cwd=tmp_path, code=1)
    assert "Traceback" in said and "ddpm.py" in said and "no attribute 'Conv2D'" in said


REFUSED = {
    "--image-size 28 --data .": "image_size must be a multiple of 8",
    "--image-size 48 --data .": "attention_resolutions [16] must be among [48, 24, 12, 6]",
    "--base-channels 30": "base_channels must be a multiple of 4",
    "--image-size 16": "without --data the images are those of the demo",
    "--quick": "--quick and --classes need --data",
    "--batch 4 --accumulate 5": "--batch must be at least the number of GPUs",
    "--data none": "none: no such folder",
    "--data ": ": no such folder",
    "--device quantum": "--device quantum: Expected one of cpu, cuda",
    "--init none.pt": "none.pt does not exist",
    "--data none --init ": ". has neither a checkpoint.pt nor weights in diffusers' format",
}
NO_NUMBERS = "dropout 2, batch 0, steps 0, seed -1, lr nan, lr inf, ema 1, channel-mults 0".split(
    ", "
)


def test_impossible_flags_are_one_line(tmp_path, run):
    for words, said in REFUSED.items():
        assert said in run("train.py", "--device", "cpu", *words.split(" "), cwd=tmp_path, code=1)
    for words in NO_NUMBERS:
        name, value = words.split()
        said = run("train.py", f"--{name}", value, cwd=tmp_path, code=2)
        assert f"--{name}: {value} must be at least" in said
    for words, said in (
        ("--steps many", "invalid int value"),
        ("--predicts score", "invalid choice"),
    ):
        assert said in run("train.py", *words.split(), cwd=tmp_path, code=2)
    assert not list(tmp_path.iterdir())


def test_quick_is_the_settings_that_it_prints(image_folder, tmp_path, run):
    words = ["--data", image_folder, "--image-size", 16, "--batch", 4, "--steps", 2]
    said = run("train.py", *words, "--quick", "--out", "quick", cwd=tmp_path)
    (shown,) = re.findall("^settings the paper's, but (.*)", said, re.MULTILINE)
    assert "--steps 2" in shown and "--lr-decay" in shown
    run("train.py", *words[:2], *shown.split(), "--out", "spelt", cwd=tmp_path)
    quick, spelt = (read(tmp_path / name) for name in ("quick", "spelt"))
    assert quick["config"] == spelt["config"]
    assert all(torch.equal(w, spelt["ema"][name]) for name, w in quick["ema"].items())


def test_training_starts_from_the_weights_of_a_checkpoint(
    trained, tiny, image_folder, tmp_path, run
):
    """With --init, no flag repeats the network's shape; the averaged weights are the start."""

    def init(weights, *words, code=0):
        words = ["--data", image_folder, "--init", weights, "--batch", 4, "--lr", 1e-12, *words]
        return run("train.py", *words, cwd=tmp_path, code=code)

    weights, start = trained[0] / "run", read(trained[0] / "run")
    init(weights, "--steps", 1)
    state = read(tmp_path / "run")
    assert state["step"] == 1 and state["config"]["model"] == start["config"]["model"]
    for part in ("model", "ema"):
        for name, value in state[part].items():
            close(value, start["ema"][name], 1e-7)
    init(weights, "--steps", 2)  # resumes, and does not start again
    assert read(tmp_path / "run")["step"] == 2
    init(weights / "checkpoint.pt", "--steps", 3)  # the same weights
    tiny("--batch", 4, "--lr", 1e-12, "--steps", 4)
    words = ["--data", image_folder, "--batch", 4, "--lr", 1e-12, "--steps", 5]  # without --init
    assert "steps    4 to 5" in run("train.py", *words, cwd=tmp_path)
    (tmp_path / "run").rename(tmp_path / "other")
    init("other", "--steps", 1)
    assert "init was other, now run" in init(weights, "--steps", 6, code=1)

    other = ["--base-channels", 16, "--in-channels", 1, "--schedule", "cosine", "--predicts", "v"]
    said = init(weights, "--out", "b", *other, "--image-size", 8, code=1)
    assert "--init fixes --in-channels, --base-channels, --predicts, --schedule; omit the" in said
    same = "--base-channels 8 --channel-mults 1 2 --in-channels 3 --schedule linear".split()
    init(weights, "--steps", 1, "--out", "b", *same, "--quick")  # the weights decide
    config = read(tmp_path / "b")["config"]
    assert config["model"] == start["config"]["model"] | {"dropout": 0.0}
    assert config["diffusion"] == start["config"]["diffusion"]


def test_what_is_predicted_stays_with_the_weights(tiny, image_folder, tmp_path, run):
    tiny("--steps", 2, "--weighting", "native", "--predicts", "v")
    assert load(tmp_path / "run").predicts == "v"
    said = tiny("--steps", 2, "--weighting", "native", code=1)
    assert "predicts was v, now eps" in said and "--init" not in said
    words = ["--data", image_folder, "--init", "run", "--steps", 1, "--batch", 4, "--out", "b"]
    run("train.py", *words, cwd=tmp_path)
    assert read(tmp_path / "b")["config"]["train"]["predicts"] == "v"
