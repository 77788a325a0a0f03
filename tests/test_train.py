"""The promises of train.py: the step, the flags, resuming, signals, accelerators and processes."""

import argparse
import contextlib
import copy
import os
import re
import shutil
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch
from conftest import HERE, TINY, python, read
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import train
from data import demo_images
from ddpm import Diffusion, UNet, linear_betas
from images import from_pixels
from test_ddpm import PAPER, close

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals or torchrun")
EXACT = ["--dropout", 0, "--no-amp", "--warmup", 0]  # one and two processes differ by rounding

# ----------------------------------------------------------------------------------------- the step


def test_learning_rate_and_ema_ramp():
    assert [train.learning_rate(s, 2e-4, 4) for s in (0, 1, 3, 9)] == [5e-5, 1e-4, 2e-4, 2e-4]
    assert train.learning_rate(0, 1.0, 0) == 1.0
    falling = [train.learning_rate(s, 1.0, 2, 10) for s in (0, 1, 5, 9)]
    assert falling == pytest.approx([0.5, 0.9, 0.5, 0.1])
    assert train.ema_decay(0, 0.9999) == 0.1 and train.ema_decay(90, 0.9999) == 0.91
    assert train.ema_decay(10**6, 0.9999) == 0.9999


def test_ema_update_is_an_average_without_a_graph():
    averages, parameters = [torch.zeros(3)], [torch.nn.Parameter(torch.ones(3))]
    for step in range(2):
        train.update_ema(averages, parameters, step, 0.15)
    close(averages[0], torch.full((3,), 0.15 * 0.9 + 0.85))  # decays 0.1, then 0.15 (not 2 / 11)
    assert not averages[0].requires_grad


def test_seeds_differ_for_every_seed_and_step_and_part():
    places = [
        (seed, step, *k) for seed in range(3) for step in range(999) for k in ((), (1,), (2,))
    ]
    assert len({train.seed_of(*place) for place in places}) == len(places)


def flags(**changes):
    """What train_step reads of the command line."""
    values = dict(
        seed=0, batch=8, accumulate=1, flip=True, weighting="simple", amp=False, ema=0.9999
    )
    return argparse.Namespace(**(values | changes))


@pytest.mark.parametrize("weighting, flip", [("simple", True), ("simple", False), ("vlb", True)])
def test_step_is_algorithm_1(weighting, flip):
    """The loss, the norm of the gradient, Adam's step and the EMA, from (seed, step) by hand."""
    images = torch.from_numpy(demo_images()[::9].copy())
    torch.manual_seed(0)
    model = UNet(8, 3, 8, (1, 2), 1, (), dropout=0.0)
    start, ema = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    args = flags(flip=flip, weighting=weighting)
    averages = list(ema.parameters())
    loss, norm = train.train_step(0, model, averages, optimizer, PAPER, images, args)

    torch.manual_seed(train.seed_of(0, 0))
    x0 = from_pixels(images[torch.randint(len(images), (8,))])
    mirrored = torch.rand(8, 1, 1, 1) < 0.5
    assert mirrored.any() and not mirrored.all()
    if flip:
        x0 = torch.where(mirrored, x0.flip(3), x0)
    by_hand = copy.deepcopy(start)
    expected = PAPER.loss(by_hand, x0, weighting=weighting)  # draws t, then the noise
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


# -------------------------------------------------------------------------------------- one command


def test_three_commands_from_folder_to_images(trained):
    folder, (train_said, export_said, sample_said) = trained
    assert "only 12 images: the network will memorise them" in train_said
    assert train_said.rstrip().endswith("python export.py --checkpoint run/checkpoint.pt")
    assert export_said.rstrip().endswith("python sample.py --onnx model.onnx")
    assert "ResourceWarning" not in train_said + export_said + sample_said
    assert {p.name for p in folder.iterdir()} == {"run", "model.onnx", "samples.png"}
    names = {re.sub("images-.*npy", "images.npy", p.name) for p in (folder / "run").iterdir()}
    assert names == {"checkpoint.pt", "log.csv", "loss.png", "images.npy", "preview-0000012.png"}
    image = np.asarray(Image.open(folder / "samples.png"))
    assert image.ndim == 3 and image.std() > 10
    log = (folder / "run" / "log.csv").read_text().splitlines()
    assert log[0] == "step,loss,grad_norm,lr" and len(log) == 13
    assert log[1].startswith("1,") and log[-1].startswith("12,")


def test_checkpoint_describes_itself(trained):
    state = read(trained[0] / "run")
    assert set(state) == {"config", "step", "model", "ema", "optimizer"} and state["step"] == 12
    model = UNet(**state["config"]["model"])
    model.load_state_dict(state["model"])
    model.load_state_dict(state["ema"])
    d = Diffusion(**state["config"]["diffusion"])
    assert torch.equal(d.betas, linear_betas()) and d.variance == "large"


def test_importing_train_loads_neither_onnx_nor_matplotlib():
    code = "import sys, train; print(sorted({'onnx', 'onnxruntime', 'onnxscript', 'matplotlib', "
    code += "'diffusers', 'export', 'sample'} & set(sys.modules)))"
    assert python("-c", code, cwd=HERE).strip() == "[]"


@pytest.mark.parametrize("error", [RuntimeError("size of tensor a"), ValueError("a shape")])
def test_bug_in_the_network_keeps_its_traceback(error, image_folder, tmp_path, run, monkeypatch):
    """As in the exercises, where the reader edits ddpm.py."""

    def fail(*_, **__):
        raise error

    for method in ("forward", "_initialize"):
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(UNet, method, fail)
            words = ["--data", image_folder, *TINY, "--steps", 1, "--out", method]
            run("train.py", *words, cwd=tmp_path)


def test_bug_is_printed_with_its_line(tmp_path):
    """A misspelt name in UNet.__init__, in a copy of the repository."""
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    source = (tmp_path / "ddpm.py").read_text()
    (tmp_path / "ddpm.py").write_text(source.replace("nn.Conv2d(", "nn.Conv2D("))
    said = python(tmp_path / "train.py", cwd=tmp_path, code=1)
    assert "Traceback" in said and "ddpm.py" in said and "no attribute 'Conv2D'" in said


@pytest.mark.parametrize(
    "words, said",
    [
        ("--image-size 28 --data .", "--image-size must be a multiple of 8"),
        ("--image-size 48 --data .", "--attention-resolutions must be among 48 24 12 6"),
        ("--image-size 16", "without --data the images are those of the demo"),
        ("--data none", "--data none: there is no such folder"),
        ("--quick", "--quick needs --data"),
        ("--batch 0", "must be at least 1"),
        ("--base-channels 30", "--base-channels must be a multiple of 4"),
        ("--batch 4 --accumulate 5", "--batch must have an image for each"),
        ("--steps many", "--steps: invalid int value"),
        ("--predicts score", "invalid choice"),
        ("--device quantum", "--device quantum: torch sees"),
        ("--init none.pt", "none.pt does not exist"),
    ],
)
def test_impossible_flags_are_one_line(words, said, tmp_path, run):
    code = 1 if "quantum" in words or "none.pt" in words else 2
    assert said in run("train.py", *words.split(), cwd=tmp_path, code=code)
    assert not list(tmp_path.iterdir())


def test_quick_is_the_flags_that_it_prints(image_folder, tmp_path, run):
    words = ["--data", image_folder, "--image-size", 16, "--batch", 4, "--steps", 2]
    said = run("train.py", *words, "--quick", "--out", "quick", cwd=tmp_path)
    (shown,) = re.findall("^--quick  (--.*)", said, re.MULTILINE)
    assert shown.endswith(" --lr-decay --steps 2")
    run("train.py", *words[:4], *shown.split(), "--out", "spelt", cwd=tmp_path)
    quick, spelt = (read(tmp_path / name) for name in ("quick", "spelt"))
    assert quick["config"] == spelt["config"]
    assert all(torch.equal(w, spelt["ema"][name]) for name, w in quick["ema"].items())


def test_training_starts_from_the_weights_of_a_checkpoint(trained, image_folder, tmp_path, run):
    """--init: no flag repeats the network's shape; the averaged weights are the start."""
    words = ["--data", image_folder, "--init", trained[0] / "run", "--batch", 4, "--lr", 1e-12]
    run("train.py", *words, "--steps", 1, cwd=tmp_path)
    state, start = read(tmp_path / "run"), read(trained[0] / "run")
    assert state["step"] == 1 and state["config"]["model"] == start["config"]["model"]
    for part in ("model", "ema"):
        for name, value in state[part].items():
            close(value, start["ema"][name], 1e-7)
    run("train.py", *words, "--steps", 2, cwd=tmp_path)  # resumes, and does not start again
    assert read(tmp_path / "run")["step"] == 2
    said = run("train.py", *words, "--base-channels", 16, "--out", "b", cwd=tmp_path, code=2)
    assert "--base-channels must be 8, because of --init" in said


def test_what_is_predicted_stays_with_the_weights(image_folder, tmp_path, run):
    words = ["--data", image_folder, *TINY, "--steps", 2, "--weighting", "native"]
    run("train.py", *words, "--predicts", "v", cwd=tmp_path)
    assert checkpoint.load(tmp_path / "run").diffusion.predicts == "v"
    assert "predicts was v, now eps" in run("train.py", *words, cwd=tmp_path, code=1)
    words = ["--data", image_folder, "--init", "run", "--steps", 1, "--batch", 4, "--out", "b"]
    said = run("train.py", *words, "--predicts", "eps", cwd=tmp_path, code=2)
    assert "--predicts must be v, because of --init" in said
    run("train.py", *words, cwd=tmp_path)
    assert read(tmp_path / "b")["config"]["diffusion"]["predicts"] == "v"


# ----------------------------------------------------------------------------------------- resuming


def assert_same_run(a, b):
    one, other = read(a), read(b)
    assert one["step"] == other["step"]
    for part in ("model", "ema"):
        assert all(torch.equal(w, other[part][name]) for name, w in one[part].items())
    assert (a / "log.csv").read_text() == (b / "log.csv").read_text()


def test_resumed_run_equals_the_uninterrupted_run(trained, image_folder, tmp_path, run):
    """To the bit, on a CPU: 5 steps, then the remaining 7. The other run is one process."""
    words = ["train.py", "--data", image_folder, *TINY]
    run(*words, "--steps", 5, cwd=tmp_path)
    with open(tmp_path / "run" / "log.csv", "a") as log:
        log.write("6,0,0,0\n7,0,0,0\n1")  # what a killed run may log after its checkpoint
    run(*words, "--steps", 12, cwd=tmp_path)
    assert_same_run(trained[0] / "run", tmp_path / "run")
    said = run(*words, "--steps", 12, cwd=tmp_path)
    assert "done" in said and read(tmp_path / "run")["step"] == 12


@posix
def test_killed_repeatedly_it_ends_in_the_same_weights(image_folder, tmp_path, run, start):
    """kill -9 at random moments, with a checkpoint at each step: mostly while one is written."""
    words = ["--data", image_folder, *TINY, "--optimizer", "muon", "--steps", 100]
    words += ["--preview-every", 50]
    run("train.py", *words, "--out", "whole", cwd=tmp_path)
    words += ["--out", "killed", "--save-minutes", 0]
    random, steps, path = np.random.default_rng(0), [], tmp_path / "killed" / "checkpoint.pt"
    for _ in range(2):
        began = time.time()
        process = start("train.py", *words, cwd=tmp_path)
        while process.poll() is None and time.time() - began < 60:
            if path.exists() and path.stat().st_mtime > began:  # a step further than before
                break
            time.sleep(0.001)
        time.sleep(random.uniform(0.1, 0.3))
        process.kill()
        process.wait()
        steps.append(read(tmp_path / "killed")["step"])
    assert steps[0] <= steps[1] and steps[0] < 100 and steps[1] > 0
    run("train.py", *words, cwd=tmp_path)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_other_settings_are_refused_in_one_line(trained, image_folder, tmp_path, run):
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    words = ["--data", image_folder, *TINY, "--steps", 20]
    for more, said in (
        (["--base-channels", 12, "--seed", 3], "base_channels was 8, now 12; seed was 0, now 3"),
        (["--channels", 1], "in_channels was 3, now 1"),
        (["--schedule", "cosine"], "betas was one schedule, now another"),
        (["--steps", 5], "run is at step 12 already, so --steps must be larger"),
    ):
        assert said in run("train.py", *words, *more, cwd=tmp_path, code=1)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_run_with_lr_decay_is_not_made_longer(tmp_path, run):
    """Its learning rate has fallen towards 0 and would jump."""
    run("train.py", "--steps", 3, cwd=tmp_path)  # the demo decays
    said = run("train.py", "--steps", 6, cwd=tmp_path, code=1)
    assert "steps was 3, now 6" in said and "--init run starts from its weights" in said
    rates = np.loadtxt(tmp_path / "run" / "log.csv", delimiter=",", skiprows=1)[:, 3]
    assert rates == pytest.approx([3e-3, 2e-3, 1e-3])


def test_longer_run_keeps_its_warmup(image_folder, tmp_path, run):
    words = ["--data", image_folder, *TINY, "--steps"]
    run("train.py", *words, 60, cwd=tmp_path)
    run("train.py", *words, 100, cwd=tmp_path)
    assert read(tmp_path / "run")["config"]["train"]["warmup"] == 3  # 60 / 20, not 100 / 20


def test_folder_of_other_files_is_refused(image_folder, tmp_path, run):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    said = run("train.py", "--data", image_folder, *TINY, cwd=tmp_path, code=1)
    assert "--out run holds files but no checkpoint.pt" in said
    assert os.listdir(tmp_path / "run") == ["thesis.txt"]


def test_changed_images_are_said_and_used(image_folder, tmp_path, run):
    shutil.copytree(image_folder, tmp_path / "data")
    words = ["--data", "data", *TINY, "--steps"]
    run("train.py", *words, 2, cwd=tmp_path)
    (tmp_path / "data").rename(tmp_path / "moved")  # the same images in another place
    words[1] = "moved"
    assert "changed" not in run("train.py", *words, 3, cwd=tmp_path)
    Image.new("RGB", (12, 9)).save(tmp_path / "moved" / "new.png")
    said = run("train.py", *words, 4, cwd=tmp_path)
    assert "the images have changed since step 3" in said and "images   13 of" in said
    assert len(list((tmp_path / "run").glob("images-*"))) == 1
    assert "changed" not in run("train.py", *words, 5, cwd=tmp_path)


def test_run_inside_the_data_is_not_trained_on(image_folder, tmp_path, run):
    shutil.copytree(image_folder, tmp_path / "data")
    words = ["--data", ".", *TINY, "--steps"]
    run("train.py", *words, 1, cwd=tmp_path / "data")
    said = run("train.py", *words, 2, cwd=tmp_path / "data")
    assert "changed" not in said and "images   12 of" in said


def test_broken_checkpoint_is_refused_and_kept(trained, tmp_path, run):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "checkpoint.pt"
    whole = (trained[0] / "run" / "checkpoint.pt").read_bytes()
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    other = (tmp_path / "other.pt").read_bytes()
    for content in (b"", whole[:-1], b"not a checkpoint", other):
        path.write_bytes(content)
        said = run("train.py", "--steps", 20, cwd=tmp_path, code=1)
        assert "run/checkpoint.pt is damaged, or not a checkpoint of train.py" in said
        assert path.read_bytes() == content


FULL_DISK = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
del sys.argv[0]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@posix
def test_full_disk_is_one_line_and_leaves_the_checkpoint_whole(image_folder, tmp_path, run):
    words = ["--data", image_folder, *TINY]
    run("train.py", *words, "--steps", 3, cwd=tmp_path)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    said = python("-c", FULL_DISK, HERE / "train.py", *words, "--steps", 6, cwd=tmp_path, code=1)
    assert "can't be written and stays as it was; is the disk full?" in said
    assert "Traceback" not in said and not list((tmp_path / "run").glob("*.tmp"))
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_deleted_run_folder_is_made_again(tmp_path, run, monkeypatch):
    step = train.train_step

    def delete(k, *args):
        if k == 3:
            shutil.rmtree("run")
        return step(k, *args)

    monkeypatch.setattr(train, "train_step", delete)
    run("train.py", "--steps", 6, cwd=tmp_path)
    assert read(tmp_path / "run")["step"] == 6
    assert (tmp_path / "run" / "log.csv").read_text().splitlines()[1].startswith("4,")


# ------------------------------------------------------------------------------- signals and losses


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_training_after_a_step_that_is_saved(
    number, image_folder, tmp_path, monkeypatch, run
):
    step, handlers = train.train_step, (signal.SIG_IGN, signal.default_int_handler)

    def interrupted(k, *args):
        if k == 5:
            os.kill(os.getpid(), number)
        return step(k, *args)

    monkeypatch.setattr(train, "train_step", interrupted)
    old = signal.getsignal(number)
    try:
        for handler in handlers:  # that of the program before is put back, also in a notebook
            signal.signal(number, handler)
            out = f"run-{handlers.index(handler)}"
            words = ["--data", image_folder, *TINY, "--steps", 13, "--out", out]
            said = run("train.py", *words, cwd=tmp_path, code=1)
            assert signal.getsignal(number) is handler
            assert "stopped at step 6; to resume:\n  python train.py --data" in said
            assert read(tmp_path / out)["step"] == 6
            rows = (tmp_path / out / "log.csv").read_text().splitlines()
            assert rows[-1].startswith("6,") and len(rows) == 7
    finally:
        signal.signal(number, old)


@pytest.mark.parametrize("every", [1, 10])
def test_loss_that_is_not_finite_reaches_no_checkpoint(
    every, image_folder, tmp_path, monkeypatch, run
):
    step = train.train_step
    monkeypatch.setattr(train, "read_every", lambda device, n=every: n)
    monkeypatch.setattr(
        train, "train_step", lambda k, *args: step(k, *args) * (float("nan") if k == 5 else 1)
    )
    words = ["--data", image_folder, *TINY, "--save-minutes", 0, "--steps", 9]
    said = run("train.py", *words, cwd=tmp_path, code=1)
    assert "the loss is not finite" in said and "Try a lower --lr" in said
    assert read(tmp_path / "run")["step"] == (5 if every == 1 else 0)


def test_reading_losses_together_changes_nothing(image_folder, tmp_path, monkeypatch, run):
    """As on an accelerator, where ten steps are read at once."""
    words = ["--data", image_folder, *TINY, "--save-minutes", 0, "--preview-every", 9]
    for out, every in (("a", 1), ("b", 3)):
        monkeypatch.setattr(train, "read_every", lambda device, n=every: n)
        run("train.py", *words, "--steps", 7, "--out", out, cwd=tmp_path)
        run("train.py", *words, "--steps", 13, "--out", out, cwd=tmp_path)
    assert_same_run(tmp_path / "a", tmp_path / "b")


# ------------------------------------------------------------------------------------- accelerators


class StandIn(TorchDispatchMode):
    """Makes the meta device a stand-in for an accelerator: it has no float64, as Apple's, no
    operation but a copy mixes it with the CPU, and reads counts the copies to the CPU."""

    reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_copy = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if is_copy and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            self.reads += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        on_device = {x.is_meta for x in tensors if x.ndim}
        assert is_copy or len(on_device) < 2, f"{function} mixes devices"
        results = function(*args, **kwargs)
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor) and x.is_meta:
                assert x.dtype != torch.float64, f"{function} makes a float64"
        return results


@pytest.mark.parametrize("weighting", ["simple", "vlb"])
def test_ddpm_needs_no_float64_on_the_device_and_mixes_none(weighting):
    diffusion = Diffusion(linear_betas(9, 0.01, 0.2))
    with torch.device("meta"):
        model, x0 = UNet(8, 3, 8, (1, 2), 1, (4,)), torch.zeros(2, 3, 8, 8)
    with StandIn() as device:
        diffusion.loss(model, x0, weighting=weighting).backward()
        for steps, sampler, eta in ((None, "ddpm", None), (4, "dpm", None), (4, "ddim", 1.0)):
            out = diffusion.sample(model, x0.shape, steps, sampler, eta, device="meta")
            assert out.is_meta and out.shape == x0.shape
        assert device.reads == 0
        bound = diffusion.vlb(model, x0)
    assert device.reads < 9  # not one for each t
    assert all(part.dtype == torch.float64 and part.is_cpu for part in bound)


def test_step_never_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # no meta
    monkeypatch.setattr(torch, "get_device_module", lambda _: torch)
    with torch.device("meta"):
        model, images = UNet(8, 3, 8, (1, 2), 1, (4,)), torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
    averages = list(copy.deepcopy(model).requires_grad_(False).parameters())
    optimizer = torch.optim.Adam(model.parameters())
    args = flags(accumulate=2)
    with StandIn() as device:
        for step in range(2):
            status = train.train_step(step, model, averages, optimizer, PAPER, images, args)
    assert device.reads == 0 and status.is_meta and status.shape == (2,)
    with pytest.raises(RuntimeError), StandIn():
        status.sum().item()  # so that a read would not have passed


@pytest.fixture
def machine(monkeypatch):
    """Pretend that torch sees accelerators. Returns a list of the indices that are set."""

    def pretend(kind, count, rank=0, world=1):
        indices, device = [], kind and torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "set_device_index", indices.append)
        monkeypatch.setattr(train, "LOCAL_RANK", rank)
        monkeypatch.setattr(train, "WORLD", world)
        return indices

    return pretend


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_auto_is_the_accelerator_of_the_machine(kind, machine):
    machine(kind, 1)
    for name in ("auto", kind, f"{kind}:0"):
        assert train.choose_device(name) == torch.device(kind, 0)
    assert train.choose_device("cpu") == torch.device("cpu")
    indices = machine(kind, 4)
    assert train.choose_device(f"{kind}:3") == torch.device(kind, 3) and indices == [3]
    indices = machine(kind, 4, rank=2, world=4)
    assert train.choose_device("auto") == torch.device(kind, 2) and indices == [2]


def test_devices_that_are_not_there_are_refused(machine):
    machine(None, 0)
    assert train.choose_device("auto") == torch.device("cpu")
    for kind, count, rank, world, name, said in (
        (None, 0, 0, 1, "cuda", "torch sees only a CPU here"),
        ("mps", 1, 0, 1, "cuda", "torch sees mps here"),
        ("cuda", 2, 0, 1, "cuda:2", "cuda:2 is not there: torch sees 2"),
        ("cuda", 2, 2, 3, "auto", "cuda:2 is not there: torch sees 2"),
    ):
        machine(kind, count, rank, world)
        with pytest.raises(SystemExit, match=said):
            train.choose_device(name)


def test_launcher_may_show_each_process_one_card(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    machine("cuda", 1, rank=2, world=4)
    assert train.choose_device("auto") == torch.device("cuda", 0)
    machine("cuda", 1)  # one process, which asks for a card that is hidden
    with pytest.raises(SystemExit, match="cuda:1 is not there"):
        train.choose_device("cuda:1")


@pytest.mark.parametrize("cuda, said", [("13.0", "too old for CUDA 13.0"), (None, "a CPU build")])
def test_why_torch_can_not_use_the_gpu_is_one_line(cuda, said, machine, monkeypatch, capsys):
    machine(None, 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for program, lines in (("/usr/bin/nvidia-smi", 1), (None, 0)):
        monkeypatch.setattr(train.shutil, "which", lambda name, program=program: program)
        assert train.choose_device("auto") == torch.device("cpu")
        printed = capsys.readouterr().out
        assert printed.count("\n") == lines and (said in printed or not lines)


def test_bfloat16_is_asked_of_the_device(monkeypatch):
    for answer in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda a=answer: {"amx_bf16": not a})
        for module in (torch.cuda, torch.xpu):
            monkeypatch.setattr(
                module, "is_bf16_supported", lambda including_emulation, a=answer: a
            )
        assert train.has_bfloat16(torch.device("cpu")) is not answer
        assert train.has_bfloat16(torch.device("cuda", 1)) is answer
        assert train.has_bfloat16(torch.device("xpu")) is answer
    assert not train.has_bfloat16(torch.device("mps"))


# -------------------------------------------------------------------------------- several processes

TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2".split()


def assert_same_weights(a, b, rtol=1e-5, atol=1e-6):
    for part in ("model", "ema"):
        for name, value in a[part].items():
            torch.testing.assert_close(b[part][name], value, rtol=rtol, atol=atol)


@posix
def test_two_processes_and_accumulation_give_the_same_weights(image_folder, tmp_path, run):
    words = ["--data", image_folder, *TINY, *EXACT]
    run("train.py", *words, "--steps", 16, "--out", "one", cwd=tmp_path)
    run("train.py", *words, "--steps", 16, "--out", "parts", "--accumulate", 3, cwd=tmp_path)
    run("train.py", *words, "--steps", 9, "--out", "two", cwd=tmp_path)  # resumed by two processes
    said = python(*TORCHRUN, HERE / "train.py", *words, "--steps", 16, "--out", "two",
                  "--accumulate", 2, cwd=tmp_path)  # fmt: skip
    assert said.count("steps    9 to 16") == said.count("done: two") == 1  # only one of them speaks
    for other in ("parts", "two"):
        assert_same_weights(read(tmp_path / "one"), read(tmp_path / other))
        losses = [np.loadtxt(tmp_path / name / "log.csv", delimiter=",", skiprows=1)
                  for name in ("one", other)]  # fmt: skip
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@posix
def test_two_processes_stop_together(image_folder, tmp_path, start):
    words = ["--data", image_folder, *TINY, "--steps", 100_000, "--preview-every", 5]
    process = start(*TORCHRUN, HERE / "train.py", *words, cwd=tmp_path)
    deadline = time.time() + 60
    while time.time() < deadline and not list((tmp_path / "run").glob("preview*")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    step = read(tmp_path / "run")["step"]
    assert f"stopped at step {step:,}" in said and "torchrun ..." in said
    assert (tmp_path / "run" / "log.csv").read_text().splitlines()[-1].startswith(f"{step},")


@pytest.fixture
def machines(start):
    """torchrun as on two machines, one in each folder: [(exit status, what it printed)]."""

    def call(folders, words):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        runs = [
            start("-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}",
                  "--nproc_per_node=1", "--master_addr=localhost", f"--master_port={port}",
                  HERE / "train.py", "--data", "images", *TINY, *words, cwd=folder)
            for rank, folder in enumerate(folders)
        ]  # fmt: skip
        said = [process.communicate(timeout=120)[0] for process in runs]
        return [(process.returncode, text) for process, text in zip(runs, said, strict=True)]

    return call


@posix
def test_two_machines_train_as_one_or_say_why_not(tmp_path, run, machines):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        (folder / "images").mkdir(parents=True)
        for k in range(9):
            Image.new("RGB", (8, 8), (20 * k, 90, 30)).save(folder / "images" / f"{k}.png")
    words = ["--data", "images", *TINY, *EXACT, "--steps"]
    run("train.py", *words, 6, "--out", "alone", cwd=a)
    run("train.py", *words, 3, cwd=a)  # which the two resume
    run("train.py", *words, 1, "--seed", 5, cwd=b)  # a stale run, which is left alone
    stale = (b / "run" / "checkpoint.pt").read_bytes()
    (one, said), (other, silent) = machines((a, b), [*EXACT, "--steps", 6])
    assert one == other == 0, said + silent
    assert "steps    3 to 6" in said and "steps" not in silent
    assert (b / "run" / "checkpoint.pt").read_bytes() == stale
    assert_same_weights(read(a / "alone"), read(a / "run"), 1e-3, 1e-5)

    Image.new("RGB", (8, 8), "red").save(b / "images" / "9.png")  # only on the second machine
    done = machines((a, b), [*EXACT, "--steps", 9])
    assert done[0][0] and done[1][0] and read(a / "run")["step"] == 6
    assert re.search(r"images is \w+ in rank 0, but \w+ in rank 1", done[0][1])
