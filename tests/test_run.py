"""The promises about the run folder: resuming, refusals, what is written, and signals."""

import os
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from conftest import FULL_DISK, HERE, TINY, posix, python, read, restoring_signals
from PIL import Image

import train
from support import cli, run
from support.plot import figure_class
from support.trained import load

# ----------------------------------------------------------------------------------------- resuming


def assert_same_run(a, b):
    one, other = read(a), read(b)
    assert one["step"] == other["step"]
    for part in ("model", "ema"):
        assert all(torch.equal(w, other[part][name]) for name, w in one[part].items())
    assert (a / "log.csv").read_text() == (b / "log.csv").read_text()


def test_resumed_run_equals_the_uninterrupted_run(trained, tiny, tmp_path):
    """On a CPU, 5 and then 7 steps are bit-identical to 12. Then the command changes nothing."""
    tiny("--steps", 5)
    with open(tmp_path / "run" / "log.csv", "a") as log:
        log.write("6,0,0,0\n7,0,0,0\n1")  # what a killed run may log after its checkpoint
    tiny("--steps", 12)
    assert_same_run(trained[0] / "run", tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").stat()
    said = tiny("--steps", 12)
    assert "no step was taken: the run is finished; for a new run, use another --out" in said
    assert "done: run/checkpoint.pt is at step 12" in said
    assert (tmp_path / "run" / "checkpoint.pt").stat() == before


@posix
def test_killed_repeatedly_it_ends_in_the_same_weights(image_folder, tiny, tmp_path, start):
    """kill -9 comes at random moments, mostly while the checkpoint of a step is written."""
    words = ["--optimizer", "muon", "--steps", 60, "--preview-every", 60]
    tiny(*words, "--out", "whole")
    words += ["--out", "killed", "--save-minutes", 0]
    random, steps, path = np.random.default_rng(0), [], tmp_path / "killed" / "checkpoint.pt"
    for _ in range(2):
        began = time.time()
        process = start("train.py", "--data", image_folder, *TINY, *map(str, words), cwd=tmp_path)
        while process.poll() is None and time.time() - began < 60:
            if path.exists() and path.stat().st_mtime > began:  # a step further than before
                break
            time.sleep(0.001)
        time.sleep(random.uniform(0.05, 0.2))
        process.kill()
        process.wait()
        steps.append(read(tmp_path / "killed")["step"])
    assert 0 < steps[0] <= steps[1] and steps[0] < 60
    tiny(*words)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def images_that_take_time(folder):
    """Make a folder of images that take long enough to decode to be interrupted; one is whole."""
    folder.mkdir()
    for k in range(4000):
        (folder / f"{k}.png").write_bytes(b"")
    Image.new("L", (2000, 2000)).save(folder / "0.png")


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signal_while_decoding(number, tmp_path, run, start):
    """The program removes unfinished files. After kill -9, the next one does, and trains."""
    images_that_take_time(tmp_path / "images")
    process = start("train.py", "--data", "images", *TINY, cwd=tmp_path)
    while not list(tmp_path.glob("run/.images-*.tmp")):
        assert process.poll() is None
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    if number != signal.SIGKILL:
        assert process.returncode == -signal.SIGINT and said.endswith("stopped\n")
        assert "Traceback" not in said and not (tmp_path / "run").exists()
        return
    assert list(tmp_path.glob("run/.images-*.tmp"))
    run("train.py", "--data", "images", *TINY, "--steps", 1, cwd=tmp_path)
    assert not list(tmp_path.glob("run/.*.tmp")) and read(tmp_path / "run")["step"] == 1


@pytest.mark.parametrize("left", [None, "", "step,lo", "step,loss,grad_norm,lr\n1,0.5,0.5,0.1\n"])
def test_run_without_a_step_blocks_nobody(left, tiny, tmp_path, monkeypatch):
    """The run failed before its first step, and then the command is corrected.

    Beside its log, there may be a folder of another program, such as TensorBoard's.
    """
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(train, "algorithm_1", lambda *_: (_ for _ in ()).throw(MemoryError()))
        tiny("--steps", 3)
    if left is not None:
        (tmp_path / "run" / "log.csv").write_text(left)
    (tmp_path / "run" / "tensorboard").mkdir()
    tiny("--steps", 3, "--lr", 1e-4)
    rows = np.loadtxt(tmp_path / "run" / "log.csv", delimiter=",", skiprows=1)
    assert rows[:, 0].tolist() == [1, 2, 3]


def test_reading_losses_together_changes_nothing(tiny, tmp_path, monkeypatch):
    """An accelerator's losses are read together, ten steps at a time."""
    for out, every in (("a", 1), ("b", 3)):
        monkeypatch.setitem(train.LOG_EVERY, "cpu", every)
        for steps in (7, 13):
            tiny("--save-minutes", 0, "--preview-every", 9, "--steps", steps, "--out", out)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_longer_run_keeps_its_warmup(tiny, tmp_path):
    tiny("--steps", 20)
    tiny("--steps", 60)
    assert read(tmp_path / "run")["config"]["train"]["warmup"] == 1  # 20 / 20, not 60 / 20


# ----------------------------------------------------------------------------------------- refusals


def test_other_settings_are_refused_in_one_line(trained, tiny, image_folder, tmp_path, run):
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    for more, said in (
        (["--base-channels", 12, "--seed", 3], "base_channels was 8, now 12; seed was 0, now 3"),
        (["--in-channels", 1], "in_channels was 3, now 1"),
        (["--schedule", "cosine"], "betas was one schedule, now another"),
        (["--lr-decay"], "What differs: lr_decay was False, now True\n"),
        (["--steps", 5], "run is at step 12 already, so --steps must be larger"),
    ):
        assert said in tiny("--steps", 20, *more, code=1)
    said = run("train.py", cwd=tmp_path, code=1)  # whatever else the demo has
    assert f"What differs: data was {image_folder.name}, now the built-in demo\n" in said
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_run_with_lr_decay_is_not_made_longer(tmp_path, run):
    """Its learning rate has fallen towards 0, and would jump."""
    said = run("train.py", "--steps", 3, cwd=tmp_path)  # the demo decays
    assert said.rstrip().endswith("sample.py --checkpoint run")  # in 1000 steps
    said = run("train.py", "--steps", 6, cwd=tmp_path, code=1)
    assert "steps was 3, now 6; the learning rate falls to 0 at the last" in said
    assert "--init run starts from its weights" in said
    rates = np.loadtxt(tmp_path / "run" / "log.csv", delimiter=",", skiprows=1)[:, 3]
    assert rates == pytest.approx([3e-3, 2e-3, 1e-3])


def test_other_images_of_another_folder_are_refused(tmp_path, run):
    """The same images may move, and the images in the same folder may change."""
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / name / "images" / "0.png")

    def train_on(folder, steps, code=0):
        words = ["--data", f"{folder}/images", *TINY, "--steps", steps]
        return run("train.py", *words, cwd=tmp_path, code=code)

    train_on("a", 2)
    for steps in (2, 3):
        decoded = set((tmp_path / "run").glob("images-*"))
        said = train_on("b", steps, code=1)
        assert decoded <= set((tmp_path / "run").glob("images-*"))
        assert "data was images, now another folder, images, with other images" in said
    (tmp_path / "a").rename(tmp_path / "moved")
    assert "changed" not in train_on("moved", 3)
    Image.new("RGB", (8, 8), "green").save(tmp_path / "moved" / "images" / "1.png")
    said = train_on("moved", 4)
    assert "the images have changed since step 3; training continues" in said
    assert "images   2 of" in said
    assert len(list((tmp_path / "run").glob("images-*"))) == 2  # the old ones are removed
    Image.new("RGB", (8, 8), "grey").save(tmp_path / "moved" / "images" / "1.png")
    assert "changed" not in train_on("moved", 4)  # no step is taken


def test_changed_code_is_said(trained, tiny, tmp_path):
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    assert "changed" not in tiny("--steps", 13)
    state = read(tmp_path / "run")
    state["config"]["train"]["code"] = "another"
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    said = tiny("--steps", 14)
    assert "the code of the method has changed since step 13; training continues with the" in said


def test_folder_of_other_files_is_refused(tiny, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    said = tiny(code=1)
    assert "--out run holds thesis.txt, but no checkpoint.pt, so it is not a run folder" in said
    assert os.listdir(tmp_path / "run") == ["thesis.txt"]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log.csv").write_text("step,accuracy\n1,0.9\n")
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    for out, said in (("run/thesis.txt", "is not a folder"), ("run/thesis.txt/x", "is not a f"),
                      ("logs", "holds log.csv, but no checkpoint.pt"),
                      ("classes", "holds cat, but no checkpoint.pt")):  # fmt: skip
        assert said in tiny("--out", out, code=1)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert "checkpoint.pt can't be written" in tiny("--out", "new", code=1)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "logs", "classes"}


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
    for content in (b"", whole[:-1], b"not a checkpoint", (tmp_path / "other.pt").read_bytes()):
        path.write_bytes(content)
        said = run("train.py", "--steps", 20, cwd=tmp_path, code=1)
        assert "run/checkpoint.pt is damaged, or not a checkpoint of train.py" in said
        assert path.read_bytes() == content


def test_second_start_beside_the_first_is_one_line(tiny, tmp_path, image_folder, start):
    """This holds for any settings, and the first run goes on. kill -9 frees the folder."""
    words = ["--data", image_folder, *TINY, "--steps", 100_000, "--save-minutes", 0]
    process = start("train.py", *map(str, words), cwd=tmp_path)
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    said = tiny("--steps", 1, code=1)
    assert "another process trains in run; wait for it, or use another --out" in said
    assert process.poll() is None
    process.kill()
    process.wait()
    (tmp_path / "run" / f".images-0123.npy.{'0' * 16}.tmp").touch()  # as killed while writing
    step = read(tmp_path / "run")["step"]
    tiny("--steps", step + 1)
    assert not list(tmp_path.glob("run/.*.tmp")) and read(tmp_path / "run")["step"] == step + 1


# ---------------------------------------------------------------------------------- what is written


def log_of(folder, step=0):
    return run.Log(folder / "log.csv", step, lambda k: 0.1)


def test_shown_loss_continues_and_the_curve_has_equal_parts(tmp_path, monkeypatch):
    log, curves = log_of(tmp_path), []
    assert log.add(450, [(k / 450, 1.0) for k in range(450)]) == pytest.approx(399.5 / 450)
    monkeypatch.setattr(run, "save_plot", lambda path, x, y, *_, **__: curves.append((x, y)))
    log = log_of(tmp_path, 440)  # resumed from an older checkpoint
    assert log.add(441, [(439.5 / 450, 1.0)]) == pytest.approx(390.495 / 450)
    log.plot(tmp_path / "loss.png", 441)
    ((steps, losses),) = curves
    assert len(steps) == 147 and {*np.diff(steps)} == {3.0}
    assert losses == pytest.approx((steps - 1) / 450, abs=1e-3)


SPREADSHEET = "4;0,5;0,25;0,001\n5;0,5;0,25;0,001\n"


@pytest.mark.parametrize("foreign", ["\n \n", SPREADSHEET])
def test_foreign_line_in_the_log_stops_no_run(foreign, tiny, tmp_path):
    """A line may also appear during the run. A row that appears twice is kept once."""
    path = tmp_path / "run" / "log.csv"
    tiny("--steps", 3)
    rows = path.read_text()
    path.write_text(rows + rows.splitlines(keepends=True)[-1] + foreign)
    tiny("--steps", 5)
    assert path.read_text().startswith(rows)
    assert [row.split(",")[0] for row in path.read_text().split()] == ["step", *"12345"]
    log = log_of(tmp_path / "run", 5)
    path.write_text(path.read_text() + foreign)
    log.plot(tmp_path / "loss.png", 5)


def test_locked_log_delays_its_rows(tmp_path, monkeypatch):
    """On Windows, Excel locks a file that it shows."""
    log = log_of(tmp_path)
    log.add(1, [(0.5, 1.0)])
    with monkeypatch.context() as locked:
        locked.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(PermissionError()))
        log.add(2, [(0.25, 1.0)])
    log.add(3, [(0.125, 1.0)])
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert [row[:6] for row in rows] == ["step,l", "1,0.5,", "2,0.25", "3,0.12"]


def test_previews_take_a_25th_of_the_steps_and_follow_a_checkpoint(
    tiny, tmp_path, monkeypatch, wrap_step
):
    """This holds unless --preview-every is given."""
    wrap_step(lambda step, k: torch.ones(2))
    preview, seen = run.preview, []

    def look(path, *args):
        seen.append((int(path.stem[-7:]), read(path.parent)["step"]))
        preview(path, *args)

    monkeypatch.setattr(run, "preview", look)
    for words, steps in (([], [11, 22, 33]), (["--preview-every", 30], [30, 33])):
        seen.clear()
        tiny(*words, "--batch", 512, "--steps", 33, "--out", f"run{len(words)}")
        assert seen == [(step, 33 if step == 33 else steps[0]) for step in steps]
        assert len([*(tmp_path / f"run{len(words)}").glob("preview*")]) == len(steps)


def test_without_matplotlib_a_run_ends_without_its_curve(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    figure_class.cache_clear()
    said = tiny("--steps", 4, "--preview-every", 2)
    figure_class.cache_clear()
    assert said.count("matplotlib is missing: pip install matplotlib") == 1
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoint.pt", "log.csv", "preview-0000004.png"} <= names and "loss.png" not in names


@posix
def test_link_of_a_stranger_is_not_followed(trained, tiny, tmp_path):
    """The link is in somebody else's run folder, which is resumed."""
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    (tmp_path / "mine.txt").write_text("mine")
    for name in ("loss.png", "preview-0000013.png", ".checkpoint.pt.tmp", ".log.csv.tmp"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine.txt")
    tiny("--steps", 13)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert Image.open(tmp_path / "run" / "loss.png").size == (640, 440)


@posix
@pytest.mark.parametrize("limit", [500, 100_000])
def test_full_disk_is_one_line_and_leaves_the_checkpoint_whole(
    limit, trained, image_folder, tmp_path
):
    """The disk is full while images are decoded, or while the checkpoint is written."""
    before = b""
    if limit > 500:
        shutil.copytree(trained[0] / "run", tmp_path / "run")
        before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    words = ["--data", image_folder, *TINY, "--steps", 13]
    code = FULL_DISK.replace("100_000", str(limit))
    said = python("-c", code, HERE / "train.py", *words, cwd=tmp_path, code=1)
    what = r"checkpoint\.pt" if before else r"images-\w+\.npy"
    assert re.search(rf"run/{what} can't be written.*: File too large", said)
    assert "Traceback" not in said and not list((tmp_path / "run").glob(".*"))
    if before:
        assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    else:
        assert not (tmp_path / "run").exists()


def test_full_disk_ends_the_log_in_one_line(tmp_path, monkeypatch):
    log = log_of(tmp_path)
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(SystemExit, match=r"log.csv can't be written, so training ends: No space$"):
        log.add(1, [(0.5, 1.0)])


# -------------------------------------------------------------------------- signals, time, losses


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_training_after_a_step_that_is_saved(number, tiny, tmp_path, wrap_step):
    """The signal may come twice, from torchrun or a nervous finger."""

    def interrupted(step, k):
        if k == 5:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return step(k)

    wrap_step(interrupted)
    with restoring_signals():
        # They may be ignored, as in a script's background job. SIGHUP is, by nohup, on purpose:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.SIG_IGN)
        said = tiny("--steps", 13, code=130)
    assert "stopped at step 6; to resume:\n  python train.py --data" in said
    assert read(tmp_path / "run")["step"] == 6
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert rows[-1].startswith("6,") and len(rows) == 7


@posix
def test_under_nohup_a_closed_terminal_stops_nothing():
    with restoring_signals():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = cli.StopRequest()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not stop.made
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.made


def test_ctrl_c_is_noted_also_if_it_has_ended_the_pipe(monkeypatch):
    with restoring_signals():
        stop = cli.StopRequest()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(BrokenPipeError()))
            stop.receive(signal.SIGINT, None)
        assert stop.made


@pytest.mark.parametrize("every", [1, 10])
def test_loss_that_is_not_finite_reaches_no_checkpoint(
    every, tiny, tmp_path, monkeypatch, wrap_step
):
    monkeypatch.setitem(train.LOG_EVERY, "cpu", every)
    wrap_step(lambda step, k: step(k) * (float("nan") if k == 5 else 1))
    said = tiny("--save-minutes", 0, "--steps", 9, code=1)
    assert "the loss or its gradient became infinite or NaN" in said and "Try a lower --lr" in said
    if every == 1:
        assert read(tmp_path / "run")["step"] == 5
    else:
        assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "name, said", [("posix", "--data 'my images'"), ("nt", '--data "my images"')]
)
def test_printed_commands_are_quoted_for_the_shell(name, said, monkeypatch):
    monkeypatch.setattr("support.cli.os.name", name)
    assert cli.command("train.py", "--data", "my images") == f"train.py {said}"


@pytest.mark.parametrize("program", ["train", "evaluate", "export"])
def test_missing_package_and_early_ctrl_c_are_one_line(program, tmp_path):
    """This holds while the program imports, too."""
    for package, fault in (("torch", "None"), ("numpy", "None"), ("torch", "Interrupt()")):
        code = f"""
import sys
class Interrupt:
    def __getattr__(self, name):
        raise KeyboardInterrupt
sys.path.insert(0, {str(HERE)!r})
sys.modules[{package!r}] = {fault}
import {program}
"""
        said = python("-c", code, cwd=tmp_path, code=-signal.SIGINT if fault != "None" else 1)
        one_line = f"{package} is missing: pip install -r requirements.txt\n"
        assert said == (one_line if fault == "None" else "stopped\n")


def test_flag_that_is_given_twice_is_refused(image_folder, tmp_path, run):
    for program in "train.py", "evaluate.py":
        said = run(program, "--data", image_folder, "--data", ".", cwd=tmp_path, code=2)
        assert "--data is given twice" in said


def test_mistyped_path_is_not_looked_up_on_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "support.pretrained", None)
    for name in ("run1/chekpoint", "runs/best", "mine"):
        with pytest.raises(SystemExit, match=f"^{name} does not exist; python train.py writes"):
            load(name)
    with pytest.raises(ModuleNotFoundError):
        load("hf:runs/best")
