"""The promises of train.py: the step, the flags, resuming, signals, accelerators and processes."""

import ast
import copy
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import FULL_DISK, HERE, PAPER, TINY, close, posix, python, read
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import support.run
import train
from beyond import as_eps, loss_weights, sample
from ddpm import Diffusion, UNet, linear_betas
from images import from_pixels
from support import cli, device
from support.data import demo_images
from support.plot import figure_class
from support.trained import load

if sys.platform != "win32":
    import fcntl
    import termios

CPU = torch.device("cpu")
EXACT = ["--dropout", 0, "--no-amp", "--warmup", 0]  # one and two processes differ by rounding

# ----------------------------------------------------------------------------------------- the step


def test_learning_rate_ramps():
    assert [train.learning_rate(s, 2e-4, 4) for s in (0, 1, 3, 9)] == [5e-5, 1e-4, 2e-4, 2e-4]
    assert train.learning_rate(0, 1.0, 0) == 1.0
    falling = [train.learning_rate(s, 1.0, 2, 10) for s in (0, 1, 5, 9)]
    assert falling == pytest.approx([0.5, 0.9, 0.5, 0.1])


@pytest.mark.parametrize(
    "step, decay, expected", [(0, 0.9999, 0.1), (90, 0.9999, 0.91), (10**6, 0.9999, 0.9999)]
)
def test_ema_forgets_the_first_weights(step, decay, expected):
    model = torch.nn.Linear(3, 2)
    ema = copy.deepcopy(model).requires_grad_(False)
    before = ema.weight.clone()
    torch.nn.init.ones_(model.weight)
    train.update_ema(ema, model, step, decay)
    close(ema.weight, expected * before + 1 - expected)
    assert not ema.weight.requires_grad


def test_seeds_differ_for_every_seed_and_step_and_part():
    seen = []
    for seed in range(3):
        for step in range(999):
            for part in range(3):
                train.set_seed(CPU, seed, step, part)
                seen.append(torch.initial_seed())
    assert len(set(seen)) == 3 * 999 * 3
    assert max(seen) > 2**63  # all 64 bits: of 32, some seeds of a long run would be equal


def settings(**changes):
    return train.Settings(**{"batch": 8, **changes})


def take_step(model, ema, optimizer, images, args, step=0):
    batch = train.draw_batch(step, images, None, PAPER.T, args)
    loss = train.loss_of(model, PAPER, args)
    return train.train_step(batch, loss, model, ema, optimizer, step, args)


@pytest.mark.parametrize("weighting, flip", [("simple", True), ("simple", False), ("vlb", True)])
def test_step_is_algorithm_1(weighting, flip):
    """The loss, the norm of the gradient, Adam's step and the EMA, from (seed, step) by hand.

    The optimizer has two groups, and one of them another order than the model.
    """
    images = torch.from_numpy(demo_images()[::9].copy())
    torch.manual_seed(0)
    model = UNet(8, 3, 8, (1, 2), 1, (), dropout=0.0)
    start, ema = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
    *others, last = model.parameters()
    groups = [{"params": others[::-1]}, {"params": [last]}]
    args = settings(flip=flip, weighting=weighting)
    loss, norm = take_step(model, ema, torch.optim.Adam(groups, 1e-3, fused=True), images, args)

    train.set_seed(CPU, 0, 0, 0)
    x0 = from_pixels(images[torch.randint(len(images), (8,))])
    mirrored = torch.rand(8, 1, 1, 1) < 0.5
    assert mirrored.any() and not mirrored.all()
    if flip:
        x0 = torch.where(mirrored, x0.flip(3), x0)
    by_hand = copy.deepcopy(start)
    expected = PAPER.loss(by_hand, x0, weights=loss_weights(PAPER, weighting))  # draws t, noise
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


def test_every_group_of_the_optimizer_is_warmed_up(image_folder, tmp_path, run, monkeypatch):
    """As for somebody who adds a group, with a learning rate that must not stay as it is."""
    rates = []

    class Grouped(torch.optim.Adam):
        def __init__(self, parameters, lr, fused):
            first, *others = parameters
            super().__init__([{"params": [first]}, {"params": others}], lr, fused=fused)

        def step(self):
            rates.append([group["lr"] for group in self.param_groups])
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Grouped)
    words = ["--data", image_folder, *TINY, "--steps", 2, "--warmup", 2, "--lr", 1e-3]
    run("train.py", *words, cwd=tmp_path)
    assert rates == [[5e-4, 5e-4], [1e-3, 1e-3]]


@pytest.mark.parametrize("amp", [True, False])
def test_amp_computes_the_network_in_bfloat16(amp, image_folder, tmp_path, run, monkeypatch):
    """Also on a processor that has no bfloat16. The loss and the weights stay float32."""
    seen, forward = set(), torch.nn.Conv2d.forward

    def watched(self, x):
        seen.add(forward(self, x).dtype)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    words = ["--data", image_folder, *TINY, "--steps", 1, "--amp" if amp else "--no-amp"]
    said = run("train.py", *words, cwd=tmp_path)
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


def test_three_commands_from_folder_to_images(trained):
    folder, (train_said, export_said, sample_said) = trained
    assert "images   12 of 3x8x8; the network will memorise the images" in train_said
    assert train_said.rstrip().endswith("python export.py --checkpoint run/checkpoint.pt")
    assert export_said.rstrip().endswith("python sample.py --onnx model.onnx --steps 20")
    assert "ResourceWarning" not in train_said + export_said + sample_said
    assert {p.name for p in folder.iterdir()} == {"run", "model.onnx", "samples.png"}
    names = {re.sub(r"images-.*\.", "images.", p.name) for p in (folder / "run").iterdir()}
    decoded = {"images.npy", "images.json"}
    assert names == {"checkpoint.pt", "log.csv", "loss.png", "preview-0000012.png"} | decoded
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


def test_checkpoint_of_the_last_version_opens_and_is_resumed(trained, image_folder, tmp_path, run):
    """There, what the network predicts was an argument of Diffusion."""
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    state = read(tmp_path / "run")
    state["config"]["diffusion"]["predicts"] = state["config"]["train"].pop("predicts")
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    assert load(tmp_path / "run").predicts == "eps"
    run("train.py", "--data", image_folder, *TINY, "--steps", 13, cwd=tmp_path)
    state = read(tmp_path / "run")
    assert state["step"] == 13 and Diffusion(**state["config"]["diffusion"]).T == 1000


def test_importing_train_loads_only_what_every_run_needs():
    code = (
        "import sys, train; print({'onnx', 'onnxruntime', 'onnxscript', 'matplotlib', 'diffusers'"
    )
    code += ", 'support.muon', 'support.pretrained', 'support.reduced'} & set(sys.modules))"
    assert python("-c", code, cwd=HERE).strip() == "set()"


@pytest.mark.parametrize("error", [RuntimeError("size of tensor a"), ValueError("a shape")])
def test_bug_in_the_network_keeps_its_traceback(error, image_folder, tmp_path, run, monkeypatch):
    """As in the exercises, where the reader edits ddpm.py."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(UNet, "forward", fail)
    with pytest.raises(type(error)):
        run("train.py", "--data", image_folder, *TINY, "--steps", 1, cwd=tmp_path)


def test_bug_is_printed_with_its_line(tmp_path):
    """A misspelt name in UNet.__init__, in a copy of the repository."""
    for path in HERE.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(HERE / "support", tmp_path / "support")
    source = (tmp_path / "ddpm.py").read_text()
    (tmp_path / "ddpm.py").write_text(source.replace("nn.Conv2d(", "nn.Conv2D("))
    said = python(tmp_path / "train.py", cwd=tmp_path, code=1)
    assert "Traceback" in said and "ddpm.py" in said and "no attribute 'Conv2D'" in said


@pytest.mark.parametrize(
    "words, said",
    [
        ("--image-size 28 --data .", "image_size must be a multiple of 8"),
        ("--image-size 48 --data .", "attention_resolutions must be among [48, 24, 12, 6]"),
        ("--dropout 2", "--dropout: 2 must be at least"),
        ("--image-size 16", "without --data the images are those of the demo"),
        ("--data none", "none: no such folder"),
        ("--quick", "--quick and --classes need --data"),
        ("--batch 0", "--batch: 0 must be at least"),
        ("--steps 0", "--steps: 0 must be at least"),
        ("--seed -1", "--seed: -1 must be at least"),
        ("--lr nan", "--lr: nan must be at least"),
        ("--lr inf", "--lr: inf must be at least"),
        ("--ema 1", "--ema: 1 must be at least"),
        ("--channel-mults 1 0", "--channel-mults: 0 must be at least"),
        ("--base-channels 30", "base_channels must be a multiple of 4"),
        ("--batch 4 --accumulate 5", "--batch must be at least the number of GPUs"),
        ("--steps many", "--steps: invalid int value"),
        ("--predicts score", "invalid choice"),
        ("--device quantum", "--device quantum: Expected one of cpu, cuda"),
        ("--init none.pt", "none.pt does not exist"),
        ("--data none --init ", ". has neither a checkpoint.pt nor weights in diffusers' format"),
        ("--data ", ": no such folder"),
    ],
)
def test_impossible_flags_are_one_line(words, said, tmp_path, run):
    code = 2 if ("must be at least" in said and "batch must" not in said) or "inval" in said else 1
    assert said in run("train.py", *words.split(" "), cwd=tmp_path, code=code)
    assert not list(tmp_path.iterdir())


def test_quick_is_the_settings_that_it_prints(image_folder, tmp_path, run):
    words = ["--data", image_folder, "--image-size", 16, "--batch", 4, "--steps", 2]
    said = run("train.py", *words, "--quick", "--out", "quick", cwd=tmp_path)
    (shown,) = re.findall("^settings the paper's, but (.*)", said, re.MULTILINE)
    flags, settings = [], ast.literal_eval(shown)
    assert settings["steps"] == 2 and settings.pop("lr_decay") is True
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else [value])]
    run("train.py", *words[:2], *flags, "--lr-decay", "--out", "spelt", cwd=tmp_path)
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
    words[3] = f"{trained[0]}/run/checkpoint.pt"  # the same weights
    run("train.py", *words, "--steps", 3, cwd=tmp_path)
    run("train.py", *words[:2], *TINY, "--batch", 4, "--lr", 1e-12, "--steps", 4, cwd=tmp_path)
    (tmp_path / "run").rename(tmp_path / "other")
    words[3] = "other"
    run("train.py", *words, "--steps", 1, cwd=tmp_path)
    words[3] = trained[0] / "run"
    said = run("train.py", *words, "--steps", 5, cwd=tmp_path, code=1)
    assert "init was other, now run" in said
    words += ["--steps", 1, "--out", "b"]
    other = ["--base-channels", 16, "--channels", 1, "--schedule", "cosine", "--predicts", "v"]
    said = run("train.py", *words, *other, "--image-size", 8, cwd=tmp_path, code=1)
    assert "run decides --base-channels, --channels, --predicts, --schedule; leave out" in said
    same = ["--base-channels", 8, "--channel-mults", 1, 2, "--channels", 3, "--schedule", "linear"]
    run("train.py", *words, *same, "--quick", cwd=tmp_path)  # the weights decide
    config = read(tmp_path / "b")["config"]
    assert config["model"] == start["config"]["model"] | {"dropout": 0.0}
    assert config["diffusion"] == start["config"]["diffusion"]


def test_what_is_predicted_stays_with_the_weights(image_folder, tmp_path, run):
    words = ["--data", image_folder, *TINY, "--steps", 2, "--weighting", "native"]
    run("train.py", *words, "--predicts", "v", cwd=tmp_path)
    assert load(tmp_path / "run").predicts == "v"
    said = run("train.py", *words, cwd=tmp_path, code=1)
    assert "predicts was v, now eps" in said and "--init" not in said
    words = ["--data", image_folder, "--init", "run", "--steps", 1, "--batch", 4, "--out", "b"]
    run("train.py", *words, cwd=tmp_path)
    assert read(tmp_path / "b")["config"]["train"]["predicts"] == "v"


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
    before = (tmp_path / "run" / "checkpoint.pt").stat()
    said = run(*words, "--steps", 12, cwd=tmp_path)
    assert "no step was taken: to train again after a change to the code, use another --out" in said
    assert "done: run/checkpoint.pt is at step 12" in said
    assert (tmp_path / "run" / "checkpoint.pt").stat() == before


@pytest.mark.parametrize("left", [None, "", "step,lo", "step,loss,grad_norm,lr\n1,0.5,0.5,0.1\n"])
def test_run_without_a_step_blocks_nobody(left, image_folder, tmp_path, run, monkeypatch):
    """It failed before its first checkpoint, and the command is corrected."""
    words = ["--data", image_folder, *TINY, "--steps", 3]
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(train, "train_step", lambda *_: (_ for _ in ()).throw(MemoryError()))
        run("train.py", *words, cwd=tmp_path)
    if left is not None:
        (tmp_path / "run" / "log.csv").write_text(left)
    run("train.py", *words, "--lr", 1e-4, cwd=tmp_path)
    rows = np.loadtxt(tmp_path / "run" / "log.csv", delimiter=",", skiprows=1)
    assert rows[:, 0].tolist() == [1, 2, 3]


def run_folder(out, step=0):
    args = train.Settings(out=out, image_size=4)
    return support.run.Run(args, support.run.make_config(args, 1), step, lambda k: 0.1)


def test_shown_loss_continues_and_the_curve_has_equal_parts(tmp_path, monkeypatch):
    run = run_folder(tmp_path)
    assert run.log(450, [(k / 450, 1.0) for k in range(450)]) == pytest.approx(399.5 / 450)
    curves = []
    monkeypatch.setattr("support.run.save_plot", lambda path, x, y, *_, **__: curves.append((x, y)))
    monkeypatch.setattr("support.run.save_image", lambda *_: None)
    run = run_folder(tmp_path, 440)  # resumed from an older checkpoint
    assert run.log(441, [(439.5 / 450, 1.0)]) == pytest.approx(390.495 / 450)
    run.preview(441, lambda x, t: x, PAPER)
    ((steps, losses),) = curves
    assert len(steps) == 147 and {*np.diff(steps)} == {3.0}
    assert losses == pytest.approx((steps - 1) / 450, abs=1e-3)


def test_previews_take_a_25th_of_the_time_unless_their_steps_are_given(
    image_folder, tmp_path, monkeypatch, run
):
    now, step = [0.0], train.train_step

    def second(*args):
        now[0] += 1
        return step(*args)

    def plot(*_, **__):
        now[0] += 1

    monkeypatch.setattr(train, "train_step", second)
    monkeypatch.setattr("support.run.save_plot", plot)  # so that a preview takes a second
    monkeypatch.setattr("support.run.time.monotonic", lambda: now[0])
    for words, steps in (([], [11, 44, 65]), (["--preview-every", 30], [30, 60, 65])):
        out = tmp_path / f"run{len(words)}"
        words += ["--data", image_folder, *TINY, "--batch", 512, "--steps", 65]
        run("train.py", *words, "--out", out, cwd=tmp_path)
        assert sorted(int(p.stem[-7:]) for p in out.glob("preview*")) == steps


def test_locked_log_delays_its_rows(tmp_path, monkeypatch):
    """Excel on Windows locks a file that it shows."""
    run = run_folder(tmp_path)
    run.log(1, [(0.5, 1.0)])
    with monkeypatch.context() as locked:
        locked.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(PermissionError()))
        run.log(2, [(0.25, 1.0)])
    run.log(3, [(0.125, 1.0)])
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert rows[0] == "step,loss,grad_norm,lr" and [row[:3] for row in rows[1:]] == [
        "1,0",
        "2,0",
        "3,0",
    ]


def images_that_take_time(folder):
    """Make a folder of images that are decoded long enough to be interrupted; one is whole."""
    folder.mkdir()
    for k in range(4000):
        (folder / f"{k}.png").write_bytes(b"")
    Image.new("L", (2000, 2000)).save(folder / "0.png")


BLANK, SPREADSHEET = "\n \n", "4;0,5;0,25;0,001\n5;0,5;0,25;0,001\n"


@pytest.mark.parametrize("foreign", [BLANK, SPREADSHEET])
def test_foreign_line_in_the_log_stops_no_run(foreign, image_folder, tmp_path, run):
    """Also one that appears while the run goes on. A row that stands twice is kept once."""
    words, path = ["--data", image_folder, *TINY], tmp_path / "run" / "log.csv"
    run("train.py", *words, "--steps", 3, cwd=tmp_path)
    rows = path.read_text()
    path.write_text(rows + rows.splitlines(keepends=True)[-1] + foreign)
    run("train.py", *words, "--steps", 5, cwd=tmp_path)
    assert path.read_text().startswith(rows)
    assert (path.with_name("log-edited.csv")).exists() == (foreign == SPREADSHEET)
    assert [row.split(",")[0] for row in path.read_text().split()] == ["step", *"12345"]
    writer = run_folder(tmp_path / "run", 5)
    path.write_text(path.read_text() + foreign)
    writer.preview(5, lambda x, t: x, PAPER)


@posix
def test_killed_while_decoding_it_resumes_and_removes_the_remains(tmp_path, run, start):
    images_that_take_time(tmp_path / "images")
    process = start("train.py", "--data", "images", *TINY, cwd=tmp_path)
    while not list(tmp_path.glob("run/.images-*")):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert list(tmp_path.glob("run/.images-*.tmp"))
    run("train.py", "--data", "images", *TINY, "--steps", 1, cwd=tmp_path)
    assert not list(tmp_path.glob("run/.*")) and read(tmp_path / "run")["step"] == 1


def test_second_start_beside_the_first_is_one_line(image_folder, tmp_path, run, monkeypatch):
    """While the first one writes, for example the images that it decodes."""
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / f".images-0123.npy.{'0' * 16}.tmp"
    file.touch()
    monkeypatch.setattr("support.run.time.sleep", lambda _: file.write_text(file.read_text() + "x"))
    words = ["--data", image_folder, *TINY, "--steps", 1]
    said = run("train.py", *words, cwd=tmp_path, code=1)
    assert "another process is writing into run; wait for it, or use another --out" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == [file.name]


@pytest.mark.parametrize("first", [0, 2])
def test_checkpoint_of_another_process_is_not_replaced(
    first, image_folder, tmp_path, run, monkeypatch
):
    """Two terminals, the default run: the process that saves last ends, whatever its settings."""
    words, path = ["--data", image_folder, *TINY, "--steps", 5], tmp_path / "run" / "checkpoint.pt"
    if first:
        run("train.py", *words[:-1], first, cwd=tmp_path)
    step, other = train.train_step, []

    def interfere(*args):
        if args[5] == 3:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"of another process")
            other.append(path.stat())
        return step(*args)

    monkeypatch.setattr(train, "train_step", interfere)
    said = run("train.py", *words, cwd=tmp_path, code=1)
    assert "run/checkpoint.pt was written by another process, which trains in the same" in said
    assert path.stat() == other[0] and not list(path.parent.glob(".*"))


@posix
def test_link_of_a_stranger_is_not_followed(image_folder, tmp_path, run):
    """In a run folder from somebody else, that is resumed."""
    words = ["--data", image_folder, *TINY, "--steps"]
    run("train.py", *words, 2, cwd=tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    for name in ("loss.png", "preview-0000003.png", ".checkpoint.pt.tmp", ".log.csv.tmp"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine.txt")
    run("train.py", *words, 3, cwd=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert Image.open(tmp_path / "run" / "loss.png").size == (640, 440)


def test_changed_code_is_said(image_folder, tmp_path, run):
    words = ["--data", image_folder, *TINY, "--steps"]
    run("train.py", *words, 1, cwd=tmp_path)
    assert "changed" not in run("train.py", *words, 2, cwd=tmp_path)
    state = read(tmp_path / "run")
    state["config"]["train"]["code"] = "another"
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    said = run("train.py", *words, 3, cwd=tmp_path)
    assert "ddpm.py or beyond.py has changed since step 2; training continues with the" in said


def test_other_images_of_another_folder_are_refused(image_folder, tmp_path, run):
    """The same images may move, and those of the same folder may change."""
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / name / "images" / "0.png")
    words = [*TINY, "--steps"]
    run("train.py", "--data", "a/images", *words, 2, cwd=tmp_path)
    for steps in (2, 3):
        decoded = set((tmp_path / "run").glob("images-*"))
        said = run("train.py", "--data", "b/images", *words, steps, cwd=tmp_path, code=1)
        assert decoded <= set((tmp_path / "run").glob("images-*"))
        assert "data was images, now another folder, images, with other images" in said
    (tmp_path / "a").rename(tmp_path / "moved")
    assert "changed" not in run("train.py", "--data", "moved/images", *words, 3, cwd=tmp_path)
    Image.new("RGB", (8, 8), "green").save(tmp_path / "moved" / "images" / "1.png")
    said = run("train.py", "--data", "moved/images", *words, 4, cwd=tmp_path)
    assert "the images have changed since step 3; training continues" in said
    assert "images   2 of" in said
    assert len(list((tmp_path / "run").glob("images-*"))) == 2  # the old ones are removed
    Image.new("RGB", (8, 8), "grey").save(tmp_path / "moved" / "images" / "1.png")
    assert "changed" not in run("train.py", "--data", "moved/images", *words, 4, cwd=tmp_path)


@pytest.mark.parametrize(
    "name, said", [("posix", "--data 'my images'"), ("nt", '--data "my images"')]
)
def test_printed_commands_are_quoted_for_the_shell(name, said, monkeypatch):
    monkeypatch.setattr("support.cli.os.name", name)
    assert cli.command("train.py", "--data", "my images") == f"train.py {said}"


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
    assert "--out run holds thesis.txt, but no checkpoint.pt, so it is not the folder of a" in said
    assert os.listdir(tmp_path / "run") == ["thesis.txt"]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log.csv").write_text("step,accuracy\n1,0.9\n")
    for out, said in (("run/thesis.txt", "is not a folder"), ("run/thesis.txt/x", "is not a f"),
                      ("logs", "holds log.csv, but no checkpoint.pt")):  # fmt: skip
        words = ["--data", image_folder, *TINY, "--out", out]
        assert said in run("train.py", *words, cwd=tmp_path, code=1)


def test_run_inside_the_data_is_not_trained_on(image_folder, tmp_path, run):
    shutil.copytree(image_folder, tmp_path / "data")
    words = ["--data", ".", *TINY, "--steps"]
    run("train.py", *words, 1, cwd=tmp_path / "data")
    said = run("train.py", *words, 2, cwd=tmp_path / "data")
    assert "changed" not in said and "images   12 of" in said


def test_preview_is_never_without_a_checkpoint(image_folder, tmp_path, monkeypatch, run):
    words = ["--data", image_folder, *TINY, "--preview-every", 2, "--steps", 9]
    seen, preview = [], support.run.Run.preview

    def look(self, step, *args):
        seen.append((step, read(self.out)["step"]))
        preview(self, step, *args)

    monkeypatch.setattr(support.run.Run, "preview", look)
    run("train.py", *words, cwd=tmp_path)
    assert seen == [(2, 2), (4, 2), (6, 2), (8, 2), (9, 9)]


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


@posix
def test_full_disk_is_one_line_and_leaves_the_checkpoint_whole(image_folder, tmp_path, run):
    words = ["--data", image_folder, *TINY]
    run("train.py", *words, "--steps", 3, cwd=tmp_path)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    said = python("-c", FULL_DISK, HERE / "train.py", *words, "--steps", 6, cwd=tmp_path, code=1)
    assert "run/checkpoint.pt can't be written and stays as it was: File too large" in said
    assert "Traceback" not in said and not list((tmp_path / "run").glob(".*"))
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@posix
@pytest.mark.parametrize("limit, what", [(500, "images-.*"), (16_000, "log")])
def test_full_disk_elsewhere_is_one_line(limit, what, image_folder, tmp_path):
    """While images are decoded, and while the log grows."""
    code = FULL_DISK.replace("100_000", str(limit))
    if what == "log":
        code = f"""
import pathlib, resource, signal, train
from support.run import Run, make_config
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
args = train.Settings(out=pathlib.Path("new"))
run = Run(args, make_config(args, 3), 0, lambda k: 0.1)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
while True:
    run.log(1, [(0.5, 1.0)])
"""
        said = python("-c", code, cwd=tmp_path, code=1, env=os.environ | {"PYTHONPATH": str(HERE)})
        path = os.path.join("new", "log.csv")
        assert said.strip() == f"{path} can't be written, so training ends: File too large"
        return
    words = ["--data", image_folder, *TINY, "--steps", 3]
    said = python("-c", code, HERE / "train.py", *words, cwd=tmp_path, code=1)
    assert re.search(r"run/images-\w+.npy can't be written and stays as it was: File too", said)
    assert "Traceback" not in said and not list((tmp_path / "run").iterdir())


def test_without_matplotlib_a_run_ends_without_its_curve(image_folder, tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    figure_class.cache_clear()
    words = ["--data", image_folder, *TINY, "--steps", 4, "--preview-every", 2]
    said = run("train.py", *words, cwd=tmp_path)
    figure_class.cache_clear()
    assert said.count("matplotlib is missing: pip install matplotlib") == 1
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoint.pt", "log.csv", "preview-0000004.png"} <= names and "loss.png" not in names


def test_folder_that_can_not_be_written_is_refused(image_folder, tmp_path, run, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    said = run("train.py", "--data", image_folder, *TINY, cwd=tmp_path, code=1)
    assert "checkpoint.pt can't be written" in said and not list(tmp_path.iterdir())


def test_command_after_training_names_a_file(image_folder, tmp_path, run):
    said = run("train.py", "--data", image_folder, *TINY, "--steps", 1, "--out", ".", cwd=tmp_path)
    assert f"--onnx {tmp_path.name}.onnx" in said


def test_mistyped_path_is_not_looked_up_on_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "support.pretrained", None)
    for name in ("run1/chekpoint", "runs/best", "mine"):
        with pytest.raises(SystemExit, match=f"^{name} does not exist; python train.py writes"):
            load(name)
    with pytest.raises(ModuleNotFoundError):
        load("hf:runs/best")


# ------------------------------------------------------------------------------- signals and losses


@pytest.mark.parametrize("kind, hint", [("cpu", "; --quick --out quick, a smaller"), ("xpu", "")])
def test_run_of_years_is_said_in_words(kind, hint, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("support.run.time.monotonic", lambda: now[0])
    args = train.Settings(out=tmp_path, device=torch.device(kind))
    slow, quick = (
        support.run.Run(args, support.run.make_config(args, 3), 0, lambda k: 0.1) for _ in range(2)
    )
    for run in (slow, quick):
        assert run.time_left(0 if kind == "cpu" else 9) is None  # on an accelerator, it may compile
    now[0] = 15.0
    said = slow.time_left(1 if kind == "cpu" else 10)
    assert said.startswith("at 15 s per step, the run will take about 5 months" + hint)
    assert len(said) < 70 or hint
    assert slow.time_left(100) is quick.time_left(10_000) is None  # once; and 20 minutes
    assert [cli.duration(s) for s in (10_900, 3e5, 9e7)] == [
        "about 3 hours", "about 3 days", "about 3 years"]  # fmt: skip


@pytest.mark.parametrize("words, each", [([], "1e+02"), (["--compile"], "6")])
def test_time_of_a_run_is_said_as_soon_as_it_is_known(
    words, each, image_folder, tmp_path, run, monkeypatch
):
    """The first step takes 100 s here, and each of the others 6 s. To compile takes the first."""
    now, step = [0.0], train.train_step

    def slow(*args):
        now[0] += 6 if now[0] else 100
        return step(*args)

    monkeypatch.setattr(train, "train_step", slow)
    monkeypatch.setattr(device, "compiled", lambda network: network)
    monkeypatch.setattr("support.run.time.monotonic", lambda: now[0])
    monkeypatch.setattr("support.run.LONG", 0)
    said = run("train.py", "--data", image_folder, *TINY, "--steps", 9, *words, cwd=tmp_path)
    assert re.findall("at (.*) s per step", said) == [each]


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_training_after_a_step_that_is_saved(
    number, image_folder, tmp_path, monkeypatch, run
):
    draw = train.draw_batch

    def interrupted(k, *args):
        if k == 5:
            os.kill(os.getpid(), number)
        return draw(k, *args)

    monkeypatch.setattr(train, "draw_batch", interrupted)
    # Interrupts may be ignored, as in a script's background job. SIGHUP is, by nohup, on purpose:
    signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.SIG_IGN)
    words = ["--data", image_folder, *TINY, "--steps", 13]
    said = run("train.py", *words, cwd=tmp_path, code=1)
    assert "stopped at step 6; to resume:\n  python train.py --data" in said
    assert read(tmp_path / "run")["step"] == 6
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert rows[-1].startswith("6,") and len(rows) == 7


@posix
def test_closed_terminal_saves_the_step(image_folder, tmp_path):
    """The terminal is gone, so the program can print nothing more."""
    ours, theirs = os.openpty()
    words = [sys.executable, HERE / "train.py", "--data", image_folder, *TINY, "--steps", 100_000]

    def attach():
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # if nohup started the tests
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(list(map(str, words)), cwd=tmp_path, stdin=theirs, stdout=theirs,
                               stderr=theirs, preexec_fn=attach)  # fmt: skip
    os.close(theirs)
    while not (tmp_path / "run" / "log.csv").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.close(ours)
    process.wait(timeout=60)
    rows = (tmp_path / "run" / "log.csv").read_text().split()
    assert int(rows[-1].split(",")[0]) == read(tmp_path / "run")["step"] > 0


@posix
def test_nohup_and_a_second_interrupt(monkeypatch, run):
    """`run` restores the handlers. With nohup, SIGHUP stays ignored."""
    before, clock = signal.signal(signal.SIGHUP, signal.SIG_IGN), [5.0]
    monkeypatch.setattr("support.cli.time.monotonic", lambda: clock[0])
    interrupts = cli.Interrupts()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and interrupts.since is None
    signal.signal(signal.SIGHUP, before)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # both at once, as from torchrun or a nervous finger
    assert interrupts.since == 5.0
    clock[0] = 8.0
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit, match="stopped within a step"):
        os.kill(os.getpid(), signal.SIGINT)


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_decoding_leaves_no_files(number, tmp_path, start):
    images_that_take_time(tmp_path / "images")
    process = start("train.py", "--data", "images", *TINY, cwd=tmp_path)
    while not list(tmp_path.glob("run/.images-*")):
        assert process.poll() is None
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and said.rstrip().endswith("stopped before the first step")
    assert "Traceback" not in said and not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("every", [1, 10])
def test_loss_that_is_not_finite_reaches_no_checkpoint(
    every, image_folder, tmp_path, monkeypatch, run
):
    step = train.train_step
    monkeypatch.setitem(train.LOG_TOGETHER, "cpu", every)
    monkeypatch.setattr(
        train, "train_step", lambda *args: step(*args) * (float("nan") if args[5] == 5 else 1)
    )
    words = ["--data", image_folder, *TINY, "--save-minutes", 0, "--steps", 9]
    said = run("train.py", *words, cwd=tmp_path, code=1)
    assert "the loss or its gradient became infinite or NaN" in said and "Try a lower --lr" in said
    if every == 1:
        assert read(tmp_path / "run")["step"] == 5
    else:
        assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_reading_losses_together_changes_nothing(image_folder, tmp_path, monkeypatch, run):
    """As on an accelerator, where ten steps are read at once."""
    words = ["--data", image_folder, *TINY, "--save-minutes", 0, "--preview-every", 9]
    for out, every in (("a", 1), ("b", 3)):
        monkeypatch.setitem(train.LOG_TOGETHER, "cpu", every)
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
        eps, weights = as_eps(model, diffusion, "v"), loss_weights(diffusion, weighting, "v")
        diffusion.loss(eps, x0, weights=weights).backward()
        image = x0, x0 > 0
        for steps, sampler, eta, known in (
            (None, "ddpm", None, None), (4, "ddpm", None, image), (4, "dpm", None, None),
            (4, "ddim", 1.0, image),
        ):  # fmt: skip
            out = sample(diffusion, eps, x0.shape, steps, sampler, eta, device="meta", known=known)
            assert out.is_meta and out.shape == x0.shape
        assert device.reads == 0
        bound = diffusion.vlb(model, x0)
    assert device.reads < 9  # not one for each t
    assert all(part.dtype == torch.float64 and part.is_cpu for part in bound)


def test_step_never_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: lambda function: function)  # no meta
    monkeypatch.setattr(train, "set_seed", lambda *_: None)
    with torch.device("meta"):
        model, images = UNet(8, 3, 8, (1, 2), 1, (4,)), torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    args = settings(accumulate=2, device=torch.device("meta"))
    with StandIn() as device:
        for step in range(2):
            status = take_step(model, ema, optimizer, images, args, step)
    assert device.reads == 0 and status.is_meta and status.shape == (2,)
    with pytest.raises(RuntimeError), StandIn():
        status.sum().item()  # so that a read would not have passed


@pytest.fixture
def machine(monkeypatch):
    """Pretend that torch sees accelerators. Returns a list of the indices that are set."""

    def pretend(kind, count, rank=0, world=1):
        indices, found = [], kind and torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "set_device_index", indices.append)
        monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
        monkeypatch.setattr(device, "LOCAL_RANK", rank)
        monkeypatch.setattr(device, "WORLD", world)
        return indices

    return pretend


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_auto_is_the_accelerator_of_the_machine(kind, machine):
    machine(kind, 1)
    for name in ("auto", kind, f"{kind}:0"):
        assert device.choose_device(name) == torch.device(kind, 0)
    assert device.choose_device("cpu") == CPU
    indices = machine(kind, 4)
    assert device.choose_device(f"{kind}:3") == torch.device(kind, 3) and indices == [3]
    indices = machine(kind, 4, rank=2, world=4)
    assert device.choose_device(kind) == torch.device(kind, 2) and indices == [2]
    machine(kind, 1, rank=2, world=4)  # a launcher that shows each process one card
    one = CPU if kind == "mps" else torch.device(kind, 0)  # gloo has no mps
    assert device.choose_device("auto") == one


def test_devices_that_are_not_there_are_refused(capsys):
    assert device.choose_device("auto") == CPU
    assert capsys.readouterr().out.startswith("no accelerator is used; for a GPU, see Accelerators")
    absent = ["mps"] * (not torch.backends.mps.is_available())  # which cannot be hidden
    for name in ("cuda", "xpu:1", "quantum", *absent):
        with pytest.raises(SystemExit, match=rf"^--device {name}: .*[a-z]"):
            device.choose_device(name)


def test_card_for_which_torch_has_no_kernels_is_refused(machine, monkeypatch):
    machine("cuda", 1)

    def fail(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")

    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(
        SystemExit, match=r"^--device auto: CUDA error: no kernel image is available$"
    ):
        device.choose_device("auto")


@pytest.mark.parametrize("lacks", [None, "triton", "gcc", "Python.h"])
def test_compiling_needs_triton_and_a_c_compiler_and_its_header(lacks, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "find_spec", lambda name: name != lacks)
    monkeypatch.setattr(device.shutil, "which", lambda name: name == "gcc" != lacks)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(device.sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    (tmp_path / ("Python.h" if lacks != "Python.h" else "other.h")).touch()
    assert device.can_compile(torch.device("cuda", 0)) is (lacks is None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert not device.can_compile(torch.device("cuda", 0))  # Pascal
    assert not device.can_compile(CPU)


@pytest.mark.parametrize(
    "kind, nccl, backend",
    [
        ("cpu", True, "gloo"),
        ("cuda", True, "cpu:gloo,cuda:nccl"),
        ("cuda", False, "gloo"),  # Windows
        ("xpu", False, "cpu:gloo,xpu:xccl"),
    ],
)
def test_processes_are_connected_by_the_library_of_their_device(kind, nccl, backend, monkeypatch):
    used = []
    monkeypatch.setattr(device, "WORLD", 2)
    monkeypatch.setattr(device.dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(device.dist, "init_process_group", lambda name, **_: used.append(name))
    device.join_processes(torch.device(kind))
    assert used == [backend]


def test_bfloat16_is_asked_of_the_device(monkeypatch):
    for answer in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda a=answer: {"amx_bf16": not a})
        for module in (torch.cuda, torch.xpu):
            monkeypatch.setattr(
                module, "is_bf16_supported", lambda including_emulation, a=answer: a
            )
        assert device.has_bfloat16(torch.device("cpu")) is not answer
        assert device.has_bfloat16(torch.device("cuda", 1)) is answer
        assert device.has_bfloat16(torch.device("xpu")) is answer
    assert not device.has_bfloat16(torch.device("mps"))


# -------------------------------------------------------------------------------- several processes

TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2 --local-addr=127.0.0.1".split()


def assert_same_weights(a, b, rtol=1e-5, atol=1e-6):
    for part in ("model", "ema"):
        for name, value in a[part].items():
            torch.testing.assert_close(b[part][name], value, rtol=rtol, atol=atol)


@pytest.fixture
def two(start):
    """Train with two processes, as torchrun starts them: [(exit status, what it printed)].

    folders: where each runs; in different folders, they are on two machines.
    """

    def call(folders, *words):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        env = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        env |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        runs = [
            start("train.py", *words, cwd=folder,
                  env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank * (len({*folders}) == 1))})
            for rank, folder in enumerate(folders)
        ]  # fmt: skip
        said = [process.communicate(timeout=120)[0] for process in runs]
        return [(process.returncode, text) for process, text in zip(runs, said, strict=True)]

    return call


@posix
def test_two_processes_and_accumulation_give_the_same_weights(image_folder, tmp_path, run, two):
    words = ["--data", image_folder, *TINY, *EXACT]
    run("train.py", *words, "--steps", 16, "--out", "one", cwd=tmp_path)
    run("train.py", *words, "--steps", 16, "--out", "parts", "--accumulate", 3, cwd=tmp_path)
    run("train.py", *words, "--steps", 9, "--out", "two", cwd=tmp_path)  # resumed by two processes
    words += ["--steps", 16, "--out", "two", "--accumulate", 2]
    (one, said), (other, silent) = two([tmp_path, tmp_path], *words)
    assert one == other == 0, said + silent
    assert "steps    9 to 16" in said and "done: two" in said and "steps" not in silent
    for other in ("parts", "two"):
        assert_same_weights(read(tmp_path / "one"), read(tmp_path / other))
        losses = [np.loadtxt(tmp_path / name / "log.csv", delimiter=",", skiprows=1)
                  for name in ("one", other)]  # fmt: skip
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@posix
def test_torchrun_stops_all_processes_together(image_folder, tmp_path, start):
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


@posix
def test_two_machines_train_as_one(tmp_path, run, two):
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
    (one, said), (other, silent) = two((a, b), *words, 6)
    assert one == other == 0, said + silent
    assert "steps    3 to 6" in said and "steps" not in silent
    assert (b / "run" / "checkpoint.pt").read_bytes() == stale
    assert_same_weights(read(a / "alone"), read(a / "run"), 1e-3, 1e-5)


def test_processes_with_other_images_or_settings_are_refused():
    mine = {"model": {}, "diffusion": {}, "train": {"images": "a", "data": "x", "steps": 9}}
    for other, said in (
        ({"images": "b"}, "rank 1 has other images than rank 0"),
        ({"steps": 8, "seed": 1}, "rank 1 has other seed and other steps than rank 0"),
    ):
        with pytest.raises(SystemExit, match=said):
            support.run.refuse_other_ranks([mine, mine | {"train": mine["train"] | other}])
    support.run.refuse_other_ranks([mine, mine | {"train": mine["train"] | {"data": "y"}}])
