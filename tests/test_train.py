"""The promises of train.py: the data, the step, resuming, the run folder, --eval and --init."""

import argparse
import contextlib
import copy
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import FULL_DISK, HERE, TINY, checkpoint, python
from PIL import Image

import devices
import sample
import train
from ddpm import Diffusion, UNet, linear_betas
from test_ddpm import PAPER, close, randn

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and limits")

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
    assert train.seed_of(0, 5) == train.seed_of(0, 5)


def step_by_hand(images, flips=True, **changes):
    """One train_step from the seeded start; returns what it returned, and what it changed."""
    flags = dict(seed=0, batch=8, accumulate=1, no_flip=not flips, weighting="simple", amp=False,
                 lr=1e-3, warmup=0, lr_decay=False, steps=9, ema=0.9999)  # fmt: skip
    args = argparse.Namespace(**(flags | changes))
    torch.manual_seed(0)
    model = UNet(8, 3, 8, (1, 2), 1, (), dropout=0.0)
    start, ema = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    result = train.train_step(0, model, ema, optimizer, PAPER, images, args)
    return result, start, model, ema


@pytest.mark.parametrize("weighting, flips", [("simple", True), ("simple", False), ("vlb", True)])
def test_step_is_algorithm_1(weighting, flips):
    """The loss, the gradient norm, Adam's step and the EMA, from (seed, step) by hand."""
    images = train.demo_pictures()[::9].contiguous()
    (loss, norm), start, model, ema = step_by_hand(images, flips, weighting=weighting)
    torch.manual_seed(train.seed_of(0, 0))
    x0 = images[torch.randint(len(images), (8,))].float() / 127.5 - 1
    mirrored = torch.rand(8, 1, 1, 1) < 0.5
    assert mirrored.any() and not mirrored.all()
    if flips:
        x0 = torch.where(mirrored, x0.flip(3), x0)
    by_hand = copy.deepcopy(start)
    expected = PAPER.loss(by_hand, x0, weighting=weighting)  # draws t, then the noise
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    gradients = [p.grad for p in by_hand.parameters()]
    total = torch.stack([g.norm() for g in gradients]).norm().item()
    assert norm == pytest.approx(total, rel=1e-4)
    optimizer = torch.optim.Adam(by_hand.parameters(), 1e-3)
    for g in gradients:
        g *= min(1, 1 / total)
    optimizer.step()
    for ours, theirs, average, before in zip(
        *(m.parameters() for m in (model, by_hand, ema, start)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        close(average, 0.1 * before + 0.9 * ours, 1e-6)  # the EMA's decay begins at 0.1


def test_compiled_training_is_the_plain_training(pictures, tmp_path, monkeypatch, run):
    """What CUDA does by default, here with a backend that leaves the arithmetic as it is."""
    calls, compile = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda net: calls.append(net) or compile(net, backend="eager")
    )
    assert not devices.is_worth_compiling(torch.device("cpu"), 10**6)
    monkeypatch.setattr(devices, "find_spec", lambda name: name == "triton")
    assert not devices.is_worth_compiling(torch.device("cuda"), 4999)
    assert devices.is_worth_compiling(torch.device("cuda"), 5000)
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert not devices.is_worth_compiling(torch.device("cuda"), 5000)
    monkeypatch.setattr(devices, "is_worth_compiling", lambda *_: True)
    monkeypatch.setattr(torch.version, "hip", "6")  # on NVIDIA, channels_last rounds differently
    weights = []
    for flags in (["--no-compile"], []):
        run("train.py", "--data", pictures, *TINY, "--steps", 3, "--out", len(flags), *flags,
            cwd=tmp_path)  # fmt: skip
        assert len(calls) == len(weights)
        weights.append(checkpoint(tmp_path / str(len(flags)))["model"])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# --------------------------------------------------------------------------------- the training set


def test_folder_is_read_with_its_sub_folders(pictures, capsys):
    images = train.read_folder(pictures, 8)
    assert images.shape == (12, 3, 8, 8) and images.dtype == torch.uint8
    said = capsys.readouterr().out
    assert "left out 1 of 13" in said and "broken.png" in said
    assert train.read_folder(pictures, 8, channels=1).shape == (12, 1, 8, 8)
    assert torch.equal(images, train.read_folder(pictures, 8))
    assert len(train.read_folder(pictures, 8, most=5)) == 5


def test_folder_is_grey_only_if_every_image_is(tmp_path):
    Image.new("L", (28, 28), 9).save(tmp_path / "a.png")
    Image.new("1", (28, 28), 1).save(tmp_path / "b.png")
    Image.new("F", (28, 28)).save(tmp_path / "c.tif")  # left out, but grey
    images = train.read_folder(tmp_path, 4)
    assert images[:, :, 0, 0].tolist() == [[9], [255]]
    Image.new("RGB", (4, 4), (0, 255, 0)).save(tmp_path / "d.png")
    images = train.read_folder(tmp_path, 4)
    assert images[:, :, 0, 0].tolist() == [[9, 9, 9], [255, 255, 255], [0, 255, 0]]
    images = train.read_folder(tmp_path, 4, channels=1)
    assert images[:, :, 0, 0].tolist() == [[9], [255], [150]]


def test_awkward_files_are_read_or_left_out(tmp_path, capsys):
    grey = Image.new("L", (5, 9), 100)
    grey.save(tmp_path / "SMALLER.PNG")
    grey.save(tmp_path / "really-a.png", "JPEG")  # a suffix that lies
    Image.fromarray(np.full((4, 4), 25700, np.uint16)).save(tmp_path / "i.tiff")
    first, second = Image.new("L", (8, 8), 100), Image.new("L", (8, 8), 200)
    first.save(tmp_path / "animated.gif", save_all=True, append_images=[second])
    Image.new("1", (8, 8), 1).save(tmp_path / "z-one-bit.bmp")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.jpg").write_text("not an image")
    bomb = bytearray((tmp_path / "SMALLER.PNG").read_bytes())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # width and height, in the header
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)
    Image.new("F", (4, 4)).save(tmp_path / "f.tif")
    images = train.read_folder(tmp_path, 8)
    assert images[:, 0].float().mean((1, 2)).tolist() == [100, 100, 100, 100, 255]
    said = capsys.readouterr().out
    assert "left out 4 of 9" in said and "exceeds limit" in said and "it is not an image" in said


@posix
def test_links_are_followed_once_and_pipes_are_not_opened(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    Image.new("L", (4, 4), 1).save(tmp_path / "data" / "a" / "1.png")
    Image.new("L", (4, 4), 2).save(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a" / "loop").symlink_to("..")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "data" / "pipe.png")
    images = train.read_folder(tmp_path / "data", 4)
    assert images[:, 0, 0, 0].tolist() == [1, 2]


def test_order_is_that_of_the_names_with_any_number_of_workers(tmp_path):
    names = ["b/1.png", "a.png", "B.png", "a/z.png", "a/10.png", "a/9.png", "a-.png"]
    names += [f"many/{k:03d}.png" for k in range(270)]  # enough for two workers
    for k, name in enumerate(sorted(names)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4), k % 256).save(tmp_path / name)
    found = [p.relative_to(tmp_path).as_posix() for p in train.picture_files(tmp_path)]
    assert found == sorted(names)
    assert train.read_folder(tmp_path, 4)[:, 0, 0, 0].tolist() == [
        k % 256 for k in range(len(names))
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="where names are bytes")
def test_undecodable_and_control_characters_in_names_are_escaped(tmp_path, run):
    data = tmp_path / os.fsdecode(b"na\xefve")
    data.mkdir()
    Image.new("L", (4, 4)).save(data / "a.png")
    os.rename(data / "a.png", os.fsencode(data) + b"/\xff.png")
    (data / os.fsdecode(b"\xfe.png")).write_bytes(b"broken")
    (data / "bell\x07\x1b[31m.png").write_bytes(b"broken")
    tiny = [*TINY, "--steps", 1]
    said = run("train.py", "--data", data, *tiny, cwd=tmp_path)
    assert "left out 2 of 3" in said and "bell\\x07\\x1b[31m.png" in said and "\x07" not in said
    assert train.load(tmp_path / "run").source == "train.py, na\\udcefve"
    python("train.py", "--data", data, *tiny, "--out", "b", cwd=tmp_path,
           env=os.environ | {"PYTHONIOENCODING": "cp1252"})  # fmt: skip


def test_images_are_decoded_once(tmp_path, monkeypatch):
    """One memory-mapped file, used again until the folder changes, and never for another folder."""
    folder, out = tmp_path / "data", tmp_path / "run"
    folder.mkdir()
    out.mkdir()
    for k in range(3):
        Image.new("L", (4, 4), k).save(folder / f"{k}.png")
    decoded, decode = [], train.decode
    monkeypatch.setattr(train, "decode", lambda *args: decoded.append(1) or decode(*args))

    def read(folder=folder, channels=None, expected=None):
        train.cache_folder(folder, 4, channels, out, expected)
        images, digest = train.open_cache(out)
        return images[:, 0, 0, 0].tolist(), digest

    before = read()
    assert before[0] == [0, 1, 2] and read() == before and len(decoded) == 1
    assert {p.name for p in out.iterdir()} == {"pictures.u8", "pictures.json"}
    assert (out / "pictures.u8").stat().st_size == 3 * 4 * 4  # uint8, and nothing else
    assert read(channels=1) == before and len(decoded) == 1  # what it has anyway
    assert read(channels=3)[0] == [0, 1, 2] and len(decoded) == 2
    shutil.copytree(folder, tmp_path / "copy")  # the same names, sizes and times
    assert read(tmp_path / "copy") == before and len(decoded) == 3
    Image.new("L", (4, 4), 7).save(folder / "1.png")
    os.utime(folder / "1.png", ns=(1, 1))
    with pytest.raises(ValueError, match="holds another run, of 3 other images; now there are 3"):
        read(expected={"digest": before[1], "pictures": 3})
    assert train.open_cache(out)[1] == before[1] and len(list(out.iterdir())) == 2
    values, digest = read()
    assert values == [0, 7, 2] and digest != before[1] and len(decoded) == 5
    (folder / "2.png").unlink()
    assert read()[0] == [0, 7] and len(decoded) == 6
    for name in ("pictures.u8", "pictures.json"):
        (out / name).write_bytes((out / name).read_bytes()[:-1])  # damaged
        assert read()[0] == [0, 7]
    cache = json.loads((out / "pictures.json").read_text())
    for shape in ([32], [2, 1, 2, 8], [4, 1, 2, 4]):
        (out / "pictures.json").write_text(json.dumps(cache | {"shape": shape}))
        assert read()[0] == [0, 7] and decoded.pop()
    assert len(decoded) == 8
    for place in ("here", "there"):  # the same relative name, the same files
        shutil.copytree(folder, tmp_path / place / "data")
        monkeypatch.chdir(tmp_path / place)
        assert read("data")[0] == [0, 7]
    assert len(decoded) == 10
    with pytest.raises(ValueError, match="other images"):  # also if the cache is up to date
        read("data", expected={"digest": "of another run", "pictures": 3})


# ------------------------------------------------------------------------------- the three commands


def test_three_commands_from_folder_to_images(trained):
    folder, (train_said, export_said, sample_said) = trained
    assert "only 12 images: the network will memorise them" in train_said
    assert train_said.rstrip().endswith("python export.py --checkpoint run/checkpoint.pt")
    assert export_said.rstrip().endswith("python sample.py --onnx model.onnx")
    assert "on the CPU" in sample_said or "on CUDA" in sample_said
    assert "ResourceWarning" not in train_said + export_said + sample_said
    assert len(train_said.splitlines()) < 15  # not a terminal: no progress bar that fills the log
    assert {p.name for p in folder.iterdir()} == {"run", "model.onnx", "samples.png"}
    assert {p.name for p in (folder / "run").iterdir()} == {
        "checkpoint.pt", "log.csv", "loss.png", "pictures.u8", "pictures.json",
        "preview-0000012.png"}  # fmt: skip
    image = np.asarray(Image.open(folder / "samples.png"))
    assert image.ndim == 3 and image.std() > 10
    log = (folder / "run" / "log.csv").read_text().splitlines()
    assert log[0] == "step,loss,grad_norm,lr" and len(log) == 13
    assert log[1].startswith("1,") and log[-1].startswith("12,")


def test_checkpoint_describes_itself(trained):
    state = checkpoint(trained[0] / "run")
    assert set(state) == {"config", "step", "model", "ema", "optimizer"} and state["step"] == 12
    model = UNet(**state["config"]["model"])
    model.load_state_dict(state["model"])
    model.load_state_dict(state["ema"])
    d = Diffusion(**state["config"]["diffusion"])
    assert torch.equal(d.betas, linear_betas()) and d.variance == "large"


def test_importing_train_loads_neither_onnx_nor_matplotlib():
    code = "import sys, train; print(sorted({'onnx', 'onnxruntime', 'onnxscript', 'matplotlib', "
    code += "'diffusers', 'export'} & set(sys.modules)))"
    assert python("-c", code, cwd=HERE).strip() == "[]"


# ----------------------------------------------------------------------------------------- resuming


def weights_of(folder):
    state = checkpoint(folder)
    return state["step"], [*state["model"].values(), *state["ema"].values()]


def assert_same_run(a, b):
    (step_a, weights_a), (step_b, weights_b) = weights_of(a), weights_of(b)
    assert step_a == step_b
    assert all(torch.equal(x, y) for x, y in zip(weights_a, weights_b, strict=True))
    assert (a / "log.csv").read_text() == (b / "log.csv").read_text()


def test_resumed_run_equals_the_uninterrupted_run(trained, pictures, tmp_path, run):
    """To the bit, on a CPU: 5 steps, then the remaining 7, in processes of their own."""
    flags = ["train.py", "--data", pictures, *TINY]
    python(*flags, "--steps", 5, cwd=tmp_path)
    with open(tmp_path / "run" / "log.csv", "a") as log:
        log.write("6,0,0,0\n7,0,0,0\n1")  # what a killed run may log after its checkpoint
    python(*flags, "--steps", 12, cwd=tmp_path)
    assert_same_run(trained[0] / "run", tmp_path / "run")
    said = run(*flags, "--steps", 12, cwd=tmp_path)
    assert "done" in said and checkpoint(tmp_path / "run")["step"] == 12


@posix
def test_killed_repeatedly_it_ends_in_the_same_weights(pictures, tmp_path, run):
    """kill -9 at random moments, with a checkpoint at each step: mostly while one is written."""
    flags = ["--data", pictures, *TINY, "--steps", 100, "--preview-every", 50]
    run("train.py", *flags, "--out", "whole", cwd=tmp_path)
    flags += ["--out", "killed", "--save-minutes", 0]
    argv = [sys.executable, str(HERE / "train.py"), *map(str, flags)]
    random, steps, path = np.random.default_rng(0), [], tmp_path / "killed" / "checkpoint.pt"
    for _ in range(4):
        began = time.time()
        process = subprocess.Popen(argv, cwd=tmp_path, stdout=-3, stderr=-3)
        while process.poll() is None and time.time() - began < 60:
            if path.exists() and path.stat().st_mtime > began:  # a step further than before
                break
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.wait()
        steps.append(checkpoint(tmp_path / "killed")["step"])
        assert not train.picture_files(tmp_path / "killed") or steps[-1] < 50
    assert steps == sorted(steps) and len(set(steps)) > 2 and steps[-1] < 100
    run("train.py", *flags, cwd=tmp_path)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".*"))


def test_moments_are_restored_in_the_memory_format_of_the_device():
    """On CUDA the weights, and so Adam's moments, are channels_last; the values must stay."""
    model = UNet(8, 3, 8, (1, 2), 1, ())
    ema, optimizer = copy.deepcopy(model), torch.optim.Adam(model.parameters())
    PAPER.loss(model, randn(2, 3, 8, 8)).backward()
    optimizer.step()
    state = {"model": model.state_dict(), "ema": ema.state_dict(), "step": 1,
             "optimizer": copy.deepcopy(optimizer.state_dict())}  # fmt: skip
    for moments in state["optimizer"]["state"].values():
        if moments["exp_avg"].ndim == 4:
            moments["exp_avg"] = moments["exp_avg"].to(memory_format=torch.channels_last)
    before = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    train.restore(state, model, ema, optimizer)
    for p, moment in zip(model.parameters(), before, strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], moment)
        assert optimizer.state[p]["exp_avg"].stride() == p.stride()


def test_broken_checkpoint_is_refused_and_kept(trained, pictures, tmp_path, run):
    (tmp_path / "run").mkdir()
    whole = (trained[0] / "run" / "checkpoint.pt").read_bytes()
    others = []
    for step, optimizer in ((-2, None), ("3", None), (12, {"state": {}})):
        state = checkpoint(trained[0] / "run")
        state["step"] = step
        state["optimizer"] |= optimizer or {}
        torch.save(state, tmp_path / "other.pt")
        others.append((tmp_path / "other.pt").read_bytes())
    state = checkpoint(trained[0] / "run")
    del state["config"]["diffusion"]
    torch.save(state, tmp_path / "other.pt")
    others.append((tmp_path / "other.pt").read_bytes())
    for content in (b"", whole[:5000], whole[:-1], b"not a checkpoint", *others):
        (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
        said = run("train.py", "--data", pictures, *TINY, "--steps", 20, cwd=tmp_path, code=1)
        assert "is not a checkpoint of train.py" in said
        assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == content


@posix
def test_sigterm_saves_and_says_how_to_resume(pictures, tmp_path):
    out = tmp_path / "a run"
    args = [sys.executable, HERE / "train.py", "--data", pictures, *TINY, "--steps", "100000"]
    run = subprocess.Popen(
        [*args, "--out", out, "--restart"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "steps" not in (line := run.stdout.readline()) and line:
        pass
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    said, errors = run.communicate(timeout=60)
    step = checkpoint(out)["step"]
    assert f"stopped at step {step:,}" in said and f"'{out}'" in said and "--restart" not in said
    assert run.returncode == 0 and "Traceback" not in errors
    assert (out / "log.csv").read_text().splitlines()[-1].startswith(f"{step},")


@posix
def test_closed_terminal_saves(pictures, tmp_path):
    """The terminal goes away, as when a window or an ssh connection is closed."""
    import pty  # not on Windows

    argv = [str(HERE / "train.py"), "--data", str(pictures), *TINY, "--steps", "100000"]
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, *argv])
    said = b""
    while b"with a preview" not in said:
        said += os.read(terminal, 1000)
    time.sleep(0.5)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.WIFEXITED(status) and checkpoint(tmp_path / "run")["step"] > 0


# ----------------------------------------------------------------------------------- the run folder


def test_another_run_is_not_overwritten(trained, pictures, tmp_path, run):
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    flags = ["--data", pictures, *TINY, "--steps", 20]
    said = run("train.py", *flags, "--base-channels", 12, "--seed", 3, cwd=tmp_path, code=1)
    assert "base_channels was 8, now 12" in said and "seed was 0, now 3" in said
    assert "--restart" in said
    said = run("train.py", *flags, "--channels", 1, cwd=tmp_path, code=1)
    assert "in_channels was 3, now 1" in said
    said = run("train.py", *flags, "--schedule", "cosine", cwd=tmp_path, code=1)
    assert "other betas" in said
    shutil.copytree(pictures, tmp_path / "data")
    Image.new("RGB", (12, 9)).save(tmp_path / "data" / "3.png")
    said = run("train.py", "--data", "data", *TINY, "--steps", 20, cwd=tmp_path, code=1)
    assert "other images; now there are 12" in said
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    shutil.copytree(pictures, tmp_path / "moved")  # the same images, elsewhere
    run("train.py", "--data", "moved", *TINY, "--steps", 13, cwd=tmp_path)
    assert checkpoint(tmp_path / "run")["step"] == 13


def test_the_demo_is_called_by_its_name_and_few_differences_are_listed(pictures, tmp_path, run):
    run("train.py", "--steps", 1, cwd=tmp_path)
    said = run("train.py", "--data", pictures, cwd=tmp_path, code=1)
    assert "holds the demo: " in said and " more. Use another" in said and said.count(" was ") <= 4


def test_files_of_the_user_stay(pictures, tmp_path, run):
    flags = ["--data", pictures, *TINY, "--steps", 1]
    for name in ("log.csv", "loss.png", "pictures.u8", "pictures.json", "preview-0000001.png"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        said = run("train.py", *flags, "--out", name, cwd=tmp_path, code=1)
        assert "but no checkpoint.pt, so it is not a run" in said
        assert [p.read_text() for p in (tmp_path / name).iterdir()] == ["mine"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pictures-of-my-cats.zip").write_text("mine")
    said = run("train.py", *flags, "--restart", cwd=tmp_path)  # no run is there to be moved
    assert "is now in" not in said
    for out in (pictures, pictures.parent):
        said = run("train.py", *flags, "--out", out, cwd=tmp_path, code=2)
        assert "--out must be a folder of its own" in said


@posix
def test_restart_moves_the_old_run_aside(pictures, tmp_path, run):
    flags = ["--data", pictures, *TINY, "--steps", 1]
    run("train.py", *flags, cwd=tmp_path)
    (tmp_path / "run" / "log.csv").unlink()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("run")
    for k, (cwd, out) in enumerate(
        ((tmp_path, "run"), (tmp_path, "link"), (tmp_path / "run", "."))
    ):
        said = run("train.py", *flags, "--seed", k + 1, "--out", out, "--restart", cwd=cwd)
        assert f"is now in {tmp_path / f'run-{k + 1}'}" in said
        assert checkpoint(tmp_path / "run")["config"]["train"]["seed"] == k + 1
        assert checkpoint(tmp_path / f"run-{k + 1}")["config"]["train"]["seed"] == k
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine" and (tmp_path / "link").is_dir()


def test_restart_keeps_a_linked_checkpoint(pictures, tmp_path, run):
    flags = ["--data", pictures, *TINY, "--steps", 1]
    run("train.py", *flags, cwd=tmp_path)
    (tmp_path / "run" / "checkpoint.pt").rename(tmp_path / "run" / "best.pt")
    (tmp_path / "run" / "checkpoint.pt").symlink_to("best.pt")
    before = (tmp_path / "run" / "best.pt").read_bytes()
    run("train.py", *flags, "--restart", "--seed", 1, cwd=tmp_path)
    assert (tmp_path / "run-1" / "checkpoint.pt").read_bytes() == before
    assert checkpoint(tmp_path / "run")["config"]["train"]["seed"] == 1


def test_first_checkpoints_did_not_say_what_is_predicted(pictures, tmp_path, run):
    flags = ["--data", pictures, *TINY, "--steps"]
    run("train.py", *flags, 1, cwd=tmp_path)
    state = checkpoint(tmp_path / "run")
    del state["config"]["diffusion"]["predicts"]
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    run("train.py", *flags, 2, cwd=tmp_path)
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_old_run_returns_if_a_restart_never_begins(pictures, tmp_path, run):
    run("train.py", "--data", pictures, *TINY, "--steps", 1, cwd=tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_text("not an image")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    flags = ["--data", "bad", *TINY, "--steps", 1, "--restart"]
    said = run("train.py", *flags, cwd=tmp_path, code=1)
    assert "no image that can be read" in said and "x.png: it is not an image" in said
    assert f"the run in {tmp_path / 'run-1'} is now in {tmp_path / 'run'}" in said
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["bad", "run"]


def test_previews_of_other_runs_are_not_trained_on(pictures, trained, tmp_path, run):
    shutil.copytree(pictures, tmp_path / "data")
    shutil.copytree(trained[0] / "run", tmp_path / "data" / "old")
    run("train.py", "--data", "data", *TINY, "--steps", 2, "--preview-every", 1,
        "--out", "data/run", cwd=tmp_path)  # fmt: skip
    (tmp_path / "data" / "run" / "log.csv").unlink()
    assert len(train.picture_files(tmp_path / "data")) == 13  # with the broken one


@posix
@pytest.mark.parametrize("replaced", [True, False])
def test_folder_that_was_moved_or_replaced_is_not_written_to(replaced, pictures, tmp_path, run,
                                                             monkeypatch):  # fmt: skip
    """The user moves the run away while it trains, and perhaps another one has begun there."""
    step = train.train_step

    def moving(*args):
        if args[0] == 2:
            (tmp_path / "run").rename(tmp_path / "moved")
            if replaced:
                (tmp_path / "run").mkdir()
        return step(*args)

    monkeypatch.setattr(train, "train_step", moving)
    said = run("train.py", "--data", pictures, *TINY, "--steps", 4, cwd=tmp_path, code=1)
    assert "was moved or replaced" in said
    assert not replaced or not list((tmp_path / "run").iterdir())
    assert (tmp_path / "run").exists() == replaced and checkpoint(tmp_path / "moved")["step"] == 0


def test_damaged_rows_of_the_log_are_dropped(pictures, tmp_path, run):
    flags = ["--data", pictures, *TINY, "--steps"]
    run("train.py", *flags, 2, cwd=tmp_path)
    log = tmp_path / "run" / "log.csv"
    log.write_text(log.read_text().replace(",", ", ") + "2,--,1,1\nmy note\n3,0.5")
    before = log.read_text()
    assert "the old file is now log.old.csv" in run("train.py", *flags, 4, cwd=tmp_path)
    assert (tmp_path / "run" / "log.old.csv").read_text() == before
    rows = [[float(value) for value in row.split(",")] for row in log.read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == [1, 2, 3, 4]


def test_training_runs_in_a_thread(pictures, tmp_path, monkeypatch):
    """As in the server of a notebook, where no signal can be handled."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(pictures), *TINY, "--steps", "2"])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train.main).result()
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_failing_preview_loses_no_step(pictures, tmp_path, run):
    flags = ["--data", pictures, *TINY, "--preview-every", 2]
    run("train.py", *flags, "--steps", 1, cwd=tmp_path)
    (tmp_path / "run" / "preview-0000002.png").mkdir()
    run("train.py", *flags, "--steps", 3, cwd=tmp_path, code=1)
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_files_that_vanish_while_they_are_read_are_an_error(pictures, tmp_path, monkeypatch):
    listed = train.picture_files(pictures)
    monkeypatch.setattr(train, "picture_files", lambda *_: [*listed, tmp_path / "gone.png"])
    with pytest.raises(ValueError, match="files have vanished"):
        train.read_folder(pictures, 8)


@posix
def test_second_training_in_a_folder_is_refused(pictures, tmp_path, run):
    flags = ["--data", pictures, *TINY, "--steps", 1]
    with train.lock(tmp_path / "run"):
        for more in ([], ["--restart"]):
            said = run("train.py", *flags, *more, cwd=tmp_path, code=1)
            assert "a training is running in" in said
    run("train.py", *flags, cwd=tmp_path)


@posix
def test_full_disk_leaves_the_checkpoint_whole(pictures, tmp_path, run):
    flags = ["--data", pictures, *TINY, "--no-amp"]
    run("train.py", *flags, "--steps", 3, cwd=tmp_path)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    said = python("-c", FULL_DISK, 100_000, HERE / "train.py", *flags, "--steps", 6, cwd=tmp_path,
                  code=1)  # fmt: skip
    assert "checkpoint.pt can't be written, and is as it was" in said
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*"))


# -------------------------------------------------------------------------------- several processes

TORCHRUN = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split()]


@posix
def test_two_processes_and_accumulation_give_the_same_weights(pictures, tmp_path, run):
    flags = ["--data", pictures, *TINY, "--dropout", 0, "--no-amp", "--warmup", 0]
    run("train.py", *flags, "--steps", 16, "--out", "one", cwd=tmp_path)
    run("train.py", *flags, "--steps", 16, "--out", "parts", "--accumulate", 3, cwd=tmp_path)
    run("train.py", *flags, "--steps", 9, "--out", "two", cwd=tmp_path)  # resumed by two processes

    def torchrun(*args, code=0):  # over gloo, on the CPU
        command = [str(word) for word in (*TORCHRUN, HERE / "train.py", *args)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=170)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr + done.stdout

    said = torchrun(*flags, "--steps", 16, "--out", "two", "--accumulate", 2)
    assert said.count("steps    9 to 16") == said.count("done, two") == 1  # only one of them speaks
    one = checkpoint(tmp_path / "one")
    for other in ("parts", "two"):
        state = checkpoint(tmp_path / other)
        for part in ("model", "ema"):
            for name, value in one[part].items():
                torch.testing.assert_close(state[part][name], value, rtol=1e-5, atol=1e-6)
        losses = [np.loadtxt(tmp_path / name / "log.csv", delimiter=",", skiprows=1)
                  for name in ("one", other)]  # fmt: skip
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    before = (tmp_path / "two" / "checkpoint.pt").read_bytes()
    said = torchrun(*flags, "--lr", "1e30", "--steps", 40, "--restart", "--out", "one", code=1)
    assert "train.py, rank 0: the loss" in said and "train.py, rank 1: the loss" in said
    assert (tmp_path / "one-1" / "checkpoint.pt").exists()
    assert (tmp_path / "two" / "checkpoint.pt").read_bytes() == before


@posix
def test_two_processes_stop_together(pictures, tmp_path):
    run = subprocess.Popen(
        [*TORCHRUN, HERE / "train.py", "--data", pictures, *TINY, "--steps", "100000",
         "--preview-every", "5"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.time() + 60
    while time.time() < deadline and not list((tmp_path / "run").glob("preview*")):
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    step = checkpoint(tmp_path / "run")["step"]
    assert f"stopped at step {step:,}" in said and "torchrun ..." in said
    assert (tmp_path / "run" / "log.csv").read_text().splitlines()[-1].startswith(f"{step},")


# ----------------------------------------------------------------------------------- --init, --eval


def test_training_starts_from_the_weights_of_a_checkpoint(trained, pictures, tmp_path, run):
    """--init: no flag repeats the network's shape; the averaged weights are the start."""
    source = trained[0] / "run" / "checkpoint.pt"
    flags = ["--data", pictures, "--init", source, "--batch", 4, "--lr", 1e-12]
    run("train.py", *flags, "--steps", 1, cwd=tmp_path)
    state, start = checkpoint(tmp_path / "run"), checkpoint(trained[0] / "run")
    assert state["step"] == 1 and state["config"]["train"]["init"] == "run/checkpoint.pt"
    assert state["config"]["model"] == start["config"]["model"]
    for part in ("model", "ema"):
        for name, value in state[part].items():
            close(value, start["ema"][name], 1e-7)
    run("train.py", *flags, "--steps", 2, cwd=tmp_path)  # resumes, and does not start again
    assert checkpoint(tmp_path / "run")["step"] == 2
    said = run("train.py", "--data", pictures, "--init", source, "--base-channels", 16,
               "--out", "other", cwd=tmp_path, code=1)  # fmt: skip
    assert "does not match the other flags" in said
    said = run("train.py", "--data", pictures, "--init", "none.pt", cwd=tmp_path, code=1)
    assert "none.pt does not exist" in said or "holds another run" in said


def test_eval_prints_the_bound_and_saves_the_curve(trained, pictures, tmp_path, run):
    """The program against Diffusion.vlb, and the curve against the sums that define it."""
    state = checkpoint(trained[0] / "run")
    d = Diffusion(linear_betas(100, 1e-4, 0.2), "small")
    state["config"]["diffusion"] = {"betas": d.betas.tolist(), "variance": "small"}
    torch.save(state, tmp_path / "checkpoint.pt")
    said = run("train.py", "--data", pictures, "--eval", "checkpoint.pt", "--eval-images", 5,
               "--batch", 3, "--seed", 2, cwd=tmp_path)  # fmt: skip
    assert "on 5 images" in said and "500/500" in said  # passes of the network: 5 x T
    network = UNet(**state["config"]["model"]).eval()
    network.load_state_dict(state["ema"])
    images = train.read_folder(pictures, 8, most=5).float() / 127.5 - 1
    images = images[torch.randperm(5, generator=torch.Generator().manual_seed(2))]
    bounds = [
        d.vlb(network, x0, torch.Generator().manual_seed(train.seed_of(2, k)))
        for k, x0 in enumerate(images.split(3))
    ]
    L_T, L_t, total, mse = (torch.cat(part).mean(0) for part in zip(*bounds, strict=True))

    def printed(name):
        line = next(line for line in said.splitlines() if name in line)
        return float(line.split(name)[1].split()[0])

    assert printed("  L_T ") == pytest.approx(L_T.item(), abs=1e-6)
    assert printed("L_1 + .. + L_T-1") == pytest.approx(L_t[1:].sum().item(), abs=1e-3)
    assert printed("  L_0 ") == pytest.approx(L_t[0].item(), abs=1e-3)
    assert printed("  total ") == pytest.approx(total.item(), abs=1e-3)
    rmse = 127.5 * mse.sqrt()
    assert printed("  RMSE ") == pytest.approx(rmse[0].item(), abs=1e-2)
    rows = (tmp_path / "rate-distortion.csv").read_text().split()
    assert rows[0] == "t,L_t,rate,rmse" and len(rows) == 101
    table = np.array([row.split(",") for row in rows[1:]], float)
    assert table[:, 0].tolist() == list(range(100))
    np.testing.assert_allclose(table[:, 1], L_t, rtol=1e-3, atol=1e-6)
    for t in (0, 1, 50, 99):  # what is known before the step at t: L_T and the terms above t
        assert table[t, 2] == pytest.approx(L_T.item() + L_t[t + 1 :].sum().item(), rel=1e-3)
        assert table[t, 3] == pytest.approx(rmse[t].item(), rel=1e-3)
    assert Image.open(tmp_path / "rate-distortion.png").size == (640, 440)


def test_what_is_predicted_stays_with_the_weights(pictures, tmp_path, run):
    flags = ["--data", pictures, *TINY, "--steps", 2]
    run("train.py", *flags, "--predicts", "v", "--weighting", "native", cwd=tmp_path)
    assert train.load(tmp_path / "run").diffusion.predicts == "v"
    said = run("train.py", *flags, "--weighting", "native", cwd=tmp_path, code=1)
    assert "predicts was v, now eps" in said
    data = ["--data", pictures, "--batch", 4]
    said = run("train.py", *data, "--init", "run", "--steps", 1, "--predicts", "eps", "--out", "b",
               cwd=tmp_path, code=2)  # fmt: skip
    assert "--predicts must be v, as these weights do" in said
    run("train.py", *data, "--init", "run", "--steps", 1, "--out", "b", cwd=tmp_path)
    assert checkpoint(tmp_path / "b")["config"]["diffusion"]["predicts"] == "v"
    run("train.py", *data, "--eval", "run", "--eval-images", 2, cwd=tmp_path)
    run("export.py", cwd=tmp_path)
    run("sample.py", "-n", 2, "--steps", 3, cwd=tmp_path)


def test_eval_checks_first_where_its_curve_goes(trained, pictures, tmp_path, run, monkeypatch):
    monkeypatch.setattr(train.Diffusion, "vlb", None)
    (tmp_path / "file").write_text("mine")
    flags = ["--data", pictures, "--eval", trained[0] / "run", "--out", "file"]
    assert "file" in run("train.py", *flags, cwd=tmp_path, code=1)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "folder" / "rate-distortion.csv").mkdir(parents=True)
    flags[-1] = "folder"
    said = run("train.py", *flags, cwd=tmp_path, code=1)
    assert "folder/rate-distortion.csv can't be written" in said


def test_curve_of_eval_is_never_an_image(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / train.CURVE)
    assert [path.name for path in train.picture_files(tmp_path)] == ["a.png"]


def test_eval_without_data_is_of_the_demo(trained, tmp_path, run):
    """The tiny network happens to fit the demo. The folder of a run stands for its checkpoint."""
    said = run("train.py", "--eval", "run", "--eval-images", 1, "--out", tmp_path, cwd=trained[0])
    assert "on 1 images of the demo" in said
    assert {p.suffix for p in tmp_path.iterdir()} == {".csv", ".png"}


def test_interrupted_eval_prints_what_it_has(trained, pictures, tmp_path, monkeypatch, run):
    calls, vlb = [], Diffusion.vlb

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return vlb(*args)

    monkeypatch.setattr(Diffusion, "vlb", interrupted)
    flags = ["--eval", trained[0] / "run", "--data", pictures, "--batch", 1, "--out", "."]
    said = run("train.py", *flags, cwd=tmp_path, code=1)
    assert "on 2 images" in said and "rate" in said and "stopped after 2 of 12" in said
    assert not list(tmp_path.iterdir())


def test_broken_weights_are_not_called_good(trained, tmp_path, run):
    """One NaN: neither the comparison with torch nor the bound may pass it by."""
    state = checkpoint(trained[0] / "run")
    state["ema"]["conv_out.bias"][0] = float("nan")
    torch.save(state, tmp_path / "checkpoint.pt")
    said = run("export.py", "--checkpoint", "checkpoint.pt", cwd=tmp_path, code=1)
    assert "differs from torch's by nan" in said
    said = run("train.py", "--eval", ".", "--eval-images", 1, cwd=tmp_path, code=1)
    assert "is broken" in said
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


# ------------------------------------------------------------------------------- plots and messages


def test_loss_is_plotted_as_a_curve(tmp_path):
    log = tmp_path / "log.csv"
    rows = [f"{k + 1},{2.0 if k < 500 else 0.5},1,1" for k in range(1000)]
    log.write_text("\n".join(["step,loss,grad_norm,lr", *rows]) + "\n")
    train.save_loss_plot(log, tmp_path / "loss.png")
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).astype(int)
    rows, columns = np.nonzero(pixels[..., 2] - pixels[..., 0] > 100)
    middle = (columns.min() + columns.max()) / 2
    assert rows[columns < middle - 5].max() < rows[columns > middle + 5].min()  # 2, then 0.5
    log.write_text("step,loss,grad_norm,lr\n1,0.9,1,1\n")
    train.save_loss_plot(log, tmp_path / "one.png")
    assert not (tmp_path / "one.png").exists()  # one step is not a curve


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--image-size 28 --data .", "--image-size must be a multiple of 8"),
        ("--image-size 16", "without --data the images are those of the demo"),
        ("--base-channels 30", "--base-channels must be a multiple of 4"),
        ("--base-channels 4000000000", "--base-channels: must be a whole number from 1"),
        ("--base-channels 2000000000", "train.py: error: Storage size calculation overflowed"),
        ("--batch 0", "--batch: must be a whole number from 1 to 1048576"),
        ("--batch 1000000000000000000000000", "--batch: must be a whole number"),
        ("--batch 4 --accumulate 5", "--batch must have an image for each"),
        ("--steps 0", "--steps: must be a whole number"),
        ("--steps 1.5", "--steps: must be a whole number"),
        ("--channel-mults 1 0", "--channel-mults: must be a whole number"),
        ("--attention-resolutions 5", "--attention-resolutions must be among [4, 8]"),
        ("--num-res-blocks 0", "--num-res-blocks: must be"),
        ("--dropout 1", "--dropout: must be a number from 0"),
        ("--dropout nan", "--dropout: must be a number from 0"),
        ("--ema 1", "--ema: must be a number"),
        ("--lr 0", "--lr: must be a number"),
        ("--lr inf", "--lr: must be a number"),
        ("--warmup -1", "--warmup: must be"),
        ("--seed -1", "--seed: must be"),
        ("--seed 4294967296", "--seed: must be"),
        ("--save-minutes -1", "--save-minutes: must be"),
        ("--preview-every 0", "--preview-every: must be"),
        ("--eval run --init run", "--init is for training, not for --eval"),
        ("--eval run --schedule cosine", "--schedule is for training, not for --eval"),
        ("--eval run --eval-images 0", "--eval-images: must be"),
        ("--eval run --steps 5", "--steps is for training, not for --eval"),
        ("--eval-images 5", "--eval-images is for --eval"),
        ("--quick", "--quick is for --data"),
        ("--data x --eval run --quick", "--quick is for training, not for --eval"),
        ("--eval run --lr-decay", "--lr-decay is for training, not for --eval"),
        ("--predicts x0", "invalid choice"),
        ("--channels 2", "invalid choice"),
        ("--step 5", "unrecognized arguments"),
    ],
)
def test_impossible_flags_are_refused(flags, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    with pytest.raises(SystemExit) as refused:
        train.arguments()
    assert refused.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_quick_is_the_flags_that_it_prints(pictures, tmp_path, run):
    flags = ["--data", pictures, "--image-size", 8, "--batch", 4, "--steps", 2]
    said = run("train.py", *flags, "--quick", "--out", "quick", cwd=tmp_path)
    (shown,) = re.findall("^--quick  (--.*)", said, re.MULTILINE)
    assert shown.endswith(" --predicts v --batch 4 --lr 0.002 --lr-decay --steps 2")
    run("train.py", *flags[:4], *shown.split(), "--out", "spelt", cwd=tmp_path)
    quick, spelt = (checkpoint(tmp_path / name) for name in ("quick", "spelt"))
    assert quick["config"] == spelt["config"]
    assert all(torch.equal(w, spelt["ema"][name]) for name, w in quick["ema"].items())
    run("train.py", *flags, "--quick", "--out", "spelt", cwd=tmp_path)  # the same run: it resumes


def test_missing_or_empty_folders_are_one_line(tmp_path, run):
    assert "there is no such folder" in run("train.py", "--data", "none", cwd=tmp_path, code=1)
    (tmp_path / "empty").mkdir()
    assert "no image that can be read" in run("train.py", "--data", "empty", cwd=tmp_path, code=1)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
              RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")]
)  # fmt: skip
def test_out_of_memory_is_one_line_with_a_way_out(error, tmp_path, monkeypatch, run):
    def fail(*_):
        raise error

    monkeypatch.setattr(train, "train_step", fail)
    assert "out of memory; try --accumulate 2" in run("train.py", cwd=tmp_path, code=1)


@posix
def test_closed_stderr_is_no_failure(trained, tmp_path):
    out = tmp_path / "s.png"
    flags = f"--onnx '{trained[0] / 'model.onnx'}' -n 1 --steps 2 --out '{out}'"
    command = f"'{sys.executable}' '{HERE / 'sample.py'}' {flags} 2>&-"
    assert subprocess.run(command, shell=True).returncode == 0 and out.is_file()


@posix
def test_output_that_nobody_takes_loses_nothing(trained, pictures, tmp_path):
    """A full device as stdout, and Ctrl-C of a pipe, which ends the reader first."""
    words = [sys.executable, HERE / "sample.py", "--onnx", trained[0] / "model.onnx", "-n", 1]
    command = shlex.join(map(str, [*words, "--steps", 2, "--out", tmp_path / "s.png"]))
    command = f"env -u PYTHONUNBUFFERED {command} > /dev/full"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 1 and (tmp_path / "s.png").is_file()
    said = [line for line in done.stderr.splitlines() if "%" not in line]
    assert said == ["sample.py: [Errno 28] No space left on device"]

    words = [sys.executable, HERE / "train.py", "--data", pictures, *TINY, "--steps", 10**6]
    command = shlex.join(map(str, words)) + " 2>&1 | tee said"
    shell = subprocess.Popen(command, shell=True, cwd=tmp_path, start_new_session=True)
    log = tmp_path / "run" / "log.csv"
    while not (log.exists() and (tmp_path / "said").read_text().count("step")):
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(shell.pid, signal.SIGINT)
    shell.wait(60)
    with lock_when_free(tmp_path / "run"):
        step = checkpoint(tmp_path / "run")["step"]
    assert step > 0 and log.read_text().splitlines()[-1].startswith(f"{step},")


@contextlib.contextmanager
def lock_when_free(folder):
    """Wait until no training runs in the folder."""
    for _ in range(100):
        with contextlib.suppress(ValueError), train.lock(folder):
            yield
            return
        time.sleep(0.1)
    raise TimeoutError


@posix
def test_terminated_decoding_is_one_line(tmp_path):
    """The signal reaches the workers too, as from a terminal or a batch system."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (700, 700), "red").save(tmp_path / "images" / "0.png")
    for k in range(1, 600):
        os.link(tmp_path / "images" / "0.png", tmp_path / "images" / f"{k}.png")
    for number in (signal.SIGINT, signal.SIGTERM):
        words = [sys.executable, "-u", HERE / "train.py", "--data", "images", *TINY]
        process = subprocess.Popen(
            list(map(str, words)), cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True
        )
        while not list(tmp_path.glob("run/.pictures.u8.tmp-*/*")):
            time.sleep(0.1)
        time.sleep(0.5)
        os.killpg(process.pid, number)
        said = process.communicate(timeout=60)[1].decode()
        assert process.returncode == 1 and os.listdir(tmp_path / "run") == [], said
        assert [line for line in said.splitlines() if "%" not in line] == ["train.py: stopped"]


def test_progress_is_lines_where_stderr_is_not_a_terminal(capsys):
    for _ in sample.progress(range(5000), "counting"):
        pass
    said = capsys.readouterr().err
    assert "\r" not in said and 1 <= len(said.splitlines()) <= 3 and "5000/5000" in said


def test_errors_are_one_line_and_no_dump(tmp_path, run, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space\nleft")

    monkeypatch.setattr(train, "arguments", fail)
    assert "train.py: [Errno 28] No space left" in run("train.py", cwd=tmp_path, code=1)
