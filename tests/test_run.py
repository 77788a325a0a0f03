"""The promises about the folder of a run: resuming, refusals, what is written, and signals."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import FULL_DISK, HERE, PAPER, TINY, posix, python, read
from PIL import Image

import train
from support import cli, device
from support.plot import figure_class
from support.run import RunFolder, duration, make_config
from support.trained import load

if sys.platform != "win32":
    import fcntl
    import termios

# ----------------------------------------------------------------------------------------- resuming


def assert_same_run(a, b):
    one, other = read(a), read(b)
    assert one["step"] == other["step"]
    for part in ("model", "ema"):
        assert all(torch.equal(w, other[part][name]) for name, w in one[part].items())
    assert (a / "log.csv").read_text() == (b / "log.csv").read_text()


def test_resumed_run_equals_the_uninterrupted_run(trained, tiny, tmp_path):
    """To the bit, on a CPU: 5 steps, then the remaining 7. Then the command changes nothing."""
    tiny("--steps", 5)
    with open(tmp_path / "run" / "log.csv", "a") as log:
        log.write("6,0,0,0\n7,0,0,0\n1")  # what a killed run may log after its checkpoint
    tiny("--steps", 12)
    assert_same_run(trained[0] / "run", tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").stat()
    said = tiny("--steps", 12)
    assert "no step was taken: to train again after a change to the code, use another --out" in said
    assert "done: run/checkpoint.pt is at step 12" in said
    assert (tmp_path / "run" / "checkpoint.pt").stat() == before


@posix
def test_killed_repeatedly_it_ends_in_the_same_weights(image_folder, tiny, tmp_path, start):
    """kill -9 at random moments, with a checkpoint at each step: mostly while one is written."""
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
    """Make a folder of images that are decoded long enough to be interrupted; one is whole."""
    folder.mkdir()
    for k in range(4000):
        (folder / f"{k}.png").write_bytes(b"")
    Image.new("L", (2000, 2000)).save(folder / "0.png")


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signal_while_decoding(number, tmp_path, run, start):
    """The program removes what it has begun. After kill -9, the next one does, and trains."""
    images_that_take_time(tmp_path / "images")
    process = start("train.py", "--data", "images", *TINY, cwd=tmp_path)
    while not list(tmp_path.glob("run/.images-*.tmp")):
        assert process.poll() is None
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    if number != signal.SIGKILL:
        assert process.returncode == 1 and said.rstrip().endswith("stopped before the first step")
        assert "Traceback" not in said and not list((tmp_path / "run").iterdir())
        return
    assert list(tmp_path.glob("run/.images-*.tmp"))
    run("train.py", "--data", "images", *TINY, "--steps", 1, cwd=tmp_path)
    assert not list(tmp_path.glob("run/.*")) and read(tmp_path / "run")["step"] == 1


@pytest.mark.parametrize("left", [None, "", "step,lo", "step,loss,grad_norm,lr\n1,0.5,0.5,0.1\n"])
def test_run_without_a_step_blocks_nobody(left, tiny, tmp_path, monkeypatch):
    """It failed before its first checkpoint, and the command is corrected."""
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(train, "train_step", lambda *_: (_ for _ in ()).throw(MemoryError()))
        tiny("--steps", 3)
    if left is not None:
        (tmp_path / "run" / "log.csv").write_text(left)
    tiny("--steps", 3, "--lr", 1e-4)
    rows = np.loadtxt(tmp_path / "run" / "log.csv", delimiter=",", skiprows=1)
    assert rows[:, 0].tolist() == [1, 2, 3]


def test_reading_losses_together_changes_nothing(tiny, tmp_path, monkeypatch):
    """As on an accelerator, where ten steps are read at once."""
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


def test_other_settings_are_refused_in_one_line(trained, tiny, tmp_path):
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    for more, said in (
        (["--base-channels", 12, "--seed", 3], "base_channels was 8, now 12; seed was 0, now 3"),
        (["--channels", 1], "in_channels was 3, now 1"),
        (["--schedule", "cosine"], "betas was one schedule, now another"),
        (["--steps", 5], "run is at step 12 already, so --steps must be larger"),
    ):
        assert said in tiny("--steps", 20, *more, code=1)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_run_with_lr_decay_is_not_made_longer(tmp_path, run):
    """Its learning rate has fallen towards 0 and would jump."""
    run("train.py", "--steps", 3, cwd=tmp_path)  # the demo decays
    said = run("train.py", "--steps", 6, cwd=tmp_path, code=1)
    assert "steps was 3, now 6" in said and "--init run starts from its weights" in said
    rates = np.loadtxt(tmp_path / "run" / "log.csv", delimiter=",", skiprows=1)[:, 3]
    assert rates == pytest.approx([3e-3, 2e-3, 1e-3])


def test_other_images_of_another_folder_are_refused(tmp_path, run):
    """The same images may move, and those of the same folder may change."""
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
    assert "ddpm.py or beyond.py has changed since step 13; training continues with the" in said


def test_folder_of_other_files_is_refused(tiny, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    said = tiny(code=1)
    assert "--out run holds thesis.txt, but no checkpoint.pt, so it is not the folder of a" in said
    assert os.listdir(tmp_path / "run") == ["thesis.txt"]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log.csv").write_text("step,accuracy\n1,0.9\n")
    for out, said in (("run/thesis.txt", "is not a folder"), ("run/thesis.txt/x", "is not a f"),
                      ("logs", "holds log.csv, but no checkpoint.pt")):  # fmt: skip
        assert said in tiny("--out", out, code=1)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert "checkpoint.pt can't be written" in tiny("--out", "new", code=1)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "logs"}


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


def test_second_start_beside_the_first_is_one_line(tiny, tmp_path, monkeypatch):
    """While the first one writes, for example the images that it decodes."""
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / f".images-0123.npy.{'0' * 16}.tmp"
    file.touch()
    monkeypatch.setattr("support.run.time.sleep", lambda _: file.write_text(file.read_text() + "x"))
    said = tiny("--steps", 1, code=1)
    assert "another process is writing into run; wait for it, or use another --out" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == [file.name]


@pytest.mark.parametrize("first", [0, 2])
def test_checkpoint_of_another_process_is_not_replaced(first, tiny, tmp_path, monkeypatch):
    """Two terminals, the default run: the process that saves last ends, whatever its settings."""
    path, step, other = tmp_path / "run" / "checkpoint.pt", train.train_step, []
    if first:
        tiny("--steps", first)

    def interfere(*args):
        if args[5] == 3:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"of another process")
            other.append(path.stat())
        return step(*args)

    monkeypatch.setattr(train, "train_step", interfere)
    said = tiny("--steps", 5, code=1)
    assert "run/checkpoint.pt was written by another process, which trains in the same" in said
    assert path.stat() == other[0] and not list(path.parent.glob(".*"))


# ---------------------------------------------------------------------------------- what is written


def run_folder(out, step=0):
    args = train.Settings(out=out, image_size=4)
    return RunFolder(args, make_config(args, 1), step, lambda k: 0.1)


def test_shown_loss_continues_and_the_curve_has_equal_parts(tmp_path, monkeypatch):
    run, curves = run_folder(tmp_path), []
    assert run.log(450, [(k / 450, 1.0) for k in range(450)]) == pytest.approx(399.5 / 450)
    monkeypatch.setattr("support.run.save_plot", lambda path, x, y, *_, **__: curves.append((x, y)))
    monkeypatch.setattr("support.run.save_image", lambda *_: None)
    run = run_folder(tmp_path, 440)  # resumed from an older checkpoint
    assert run.log(441, [(439.5 / 450, 1.0)]) == pytest.approx(390.495 / 450)
    run.preview(441, lambda x, t: x, PAPER)
    ((steps, losses),) = curves
    assert len(steps) == 147 and {*np.diff(steps)} == {3.0}
    assert losses == pytest.approx((steps - 1) / 450, abs=1e-3)


SPREADSHEET = "4;0,5;0,25;0,001\n5;0,5;0,25;0,001\n"


@pytest.mark.parametrize("foreign", ["\n \n", SPREADSHEET])
def test_foreign_line_in_the_log_stops_no_run(foreign, tiny, tmp_path):
    """Also one that appears while the run goes on. A row that stands twice is kept once."""
    path = tmp_path / "run" / "log.csv"
    tiny("--steps", 3)
    rows = path.read_text()
    edited = rows + rows.splitlines(keepends=True)[-1] + foreign
    path.write_text(edited)
    tiny("--steps", 5)
    assert path.read_text().startswith(rows)
    assert [row.split(",")[0] for row in path.read_text().split()] == ["step", *"12345"]
    kept = path.with_name("log-edited.csv")
    assert kept.read_text() == edited if foreign == SPREADSHEET else not kept.exists()
    writer = run_folder(tmp_path / "run", 5)
    path.write_text(path.read_text() + foreign)
    writer.preview(5, lambda x, t: x, PAPER)


def test_locked_log_delays_its_rows(tmp_path, monkeypatch):
    """Excel on Windows locks a file that it shows."""
    run = run_folder(tmp_path)
    run.log(1, [(0.5, 1.0)])
    with monkeypatch.context() as locked:
        locked.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(PermissionError()))
        run.log(2, [(0.25, 1.0)])
    run.log(3, [(0.125, 1.0)])
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert [row[:6] for row in rows] == ["step,l", "1,0.5,", "2,0.25", "3,0.12"]


def test_previews_take_a_25th_of_the_time_unless_their_steps_are_given(tiny, tmp_path, monkeypatch):
    """A step and a preview take a second each. There is always a checkpoint before a preview."""
    now, seen, preview = [0.0], [], RunFolder.preview

    def second(*_, **__):
        now[0] += 1
        return torch.ones(2)

    def look(self, step, *args):
        seen.append((step, read(self.out)["step"]))
        preview(self, step, *args)

    monkeypatch.setattr(train, "train_step", second)
    monkeypatch.setattr(RunFolder, "preview", look)
    monkeypatch.setattr("support.run.save_plot", second)
    monkeypatch.setattr("support.run.time.monotonic", lambda: now[0])
    for words, steps in (([], [11, 44, 65]), (["--preview-every", 30], [30, 60, 65])):
        seen.clear()
        tiny(*words, "--batch", 512, "--steps", 65, "--out", f"run{len(words)}")
        assert seen == [(step, 65 if step == 65 else steps[0]) for step in steps]
        previews = (tmp_path / f"run{len(words)}").glob("preview*")
        assert sorted(int(path.stem[-7:]) for path in previews) == steps


@pytest.mark.parametrize("kind, due", [("cpu", [False, False]), ("xpu", [True, False])])
def test_first_preview_that_may_tune_kernels_delays_no_other(kind, due, tmp_path, monkeypatch):
    """Each preview takes a minute here, and the gap is 25 minutes."""
    now = [0.0]

    def minute(*_, **__):
        now[0] += 60
        return torch.zeros(36, 3, 4, 4)

    monkeypatch.setattr("support.run.sample", minute)
    monkeypatch.setattr("support.run.torch.Generator", lambda _: torch.default_generator)
    monkeypatch.setattr("support.run.time.monotonic", lambda: now[0])
    args = train.Settings(out=tmp_path, image_size=4, device=torch.device(kind), preview_gap=25)
    run, seen = RunFolder(args, make_config(args, 3), 0, lambda k: 0.1), []
    monkeypatch.setattr(run, "plot_loss", lambda _: None)
    for step in range(2):
        run.preview(step, None, PAPER)
        now[0] += 24 * 60
        seen.append(run.preview_is_due())
    assert seen == due


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
    """In a run folder from somebody else, that is resumed."""
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
    """While images are decoded, and while the checkpoint is written."""
    before = b""
    if limit > 500:
        shutil.copytree(trained[0] / "run", tmp_path / "run")
        before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    words = ["--data", image_folder, *TINY, "--steps", 13]
    code = FULL_DISK.replace("100_000", str(limit))
    said = python("-c", code, HERE / "train.py", *words, cwd=tmp_path, code=1)
    what = r"checkpoint\.pt" if before else r"images-\w+\.npy"
    assert re.search(rf"run/{what} can't be written and stays as it was: File too large", said)
    assert "Traceback" not in said and not list((tmp_path / "run").glob(".*"))
    if before:
        assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    else:
        assert not list((tmp_path / "run").iterdir())


def test_full_disk_ends_the_log_in_one_line(tmp_path, monkeypatch):
    run = run_folder(tmp_path)
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(SystemExit, match=r"log.csv can't be written, so training ends: No space$"):
        run.log(1, [(0.5, 1.0)])


# -------------------------------------------------------------------------- signals, time, losses


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_training_after_a_step_that_is_saved(number, tiny, tmp_path, monkeypatch):
    draw = train.draw_batch

    def interrupted(k, *args):
        if k == 5:
            os.kill(os.getpid(), number)
        return draw(k, *args)

    monkeypatch.setattr(train, "draw_batch", interrupted)
    # Interrupts may be ignored, as in a script's background job. SIGHUP is, by nohup, on purpose:
    signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.SIG_IGN)
    said = tiny("--steps", 13, code=1)
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
    with pytest.raises(SystemExit, match="stopped mid-step"):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("kind, hint", [("cpu", "; --quick --out quick, a smaller"), ("xpu", "")])
def test_run_of_years_is_said_in_words(kind, hint, tmp_path, monkeypatch):
    now, first = [0.0], 0 if kind == "cpu" else 9  # on an accelerator, the first steps may compile
    monkeypatch.setattr("support.run.time.monotonic", lambda: now[0])
    args = train.Settings(out=tmp_path, device=torch.device(kind))
    slow, quick = (RunFolder(args, make_config(args, 3), 0, lambda k: 0.1) for _ in range(2))
    assert slow.time_left(first) is quick.time_left(first) is None
    now[0] = 15.0
    said = slow.time_left(first + 1)
    assert said.startswith("at 15 s per step, the run will take about 5 months" + hint)
    assert ("--quick" in said) == bool(hint)
    assert slow.time_left(100) is quick.time_left(10_000) is None  # once; and 20 minutes
    assert [duration(s) for s in (10_900, 3e5, 9e7)] == [
        "about 3 hours", "about 3 days", "about 3 years"]  # fmt: skip


@pytest.mark.parametrize("words, each", [([], "1e+02"), (["--compile"], "6")])
def test_time_of_a_run_is_said_as_soon_as_it_is_known(words, each, tiny, monkeypatch):
    """The first step takes 100 s here, and each of the others 6 s. To compile takes the first."""
    now = [0.0]

    def slow(*_):
        now[0] += 6 if now[0] else 100
        return torch.ones(2)

    monkeypatch.setattr(train, "train_step", slow)
    monkeypatch.setattr(device, "compiled", lambda network: network)
    monkeypatch.setattr("support.run.time.monotonic", lambda: now[0])
    monkeypatch.setattr("support.run.LONG", 0)
    assert re.findall("at (.*) s per step", tiny("--steps", 9, *words)) == [each]


@pytest.mark.parametrize("every", [1, 10])
def test_loss_that_is_not_finite_reaches_no_checkpoint(every, tiny, tmp_path, monkeypatch):
    step = train.train_step
    monkeypatch.setitem(train.LOG_EVERY, "cpu", every)
    monkeypatch.setattr(
        train, "train_step", lambda *args: step(*args) * (float("nan") if args[5] == 5 else 1)
    )
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


def test_mistyped_path_is_not_looked_up_on_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "support.pretrained", None)
    for name in ("run1/chekpoint", "runs/best", "mine"):
        with pytest.raises(SystemExit, match=f"^{name} does not exist; python train.py writes"):
            load(name)
    with pytest.raises(ModuleNotFoundError):
        load("hf:runs/best")
