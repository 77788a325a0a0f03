"""The promises about the run folder: resuming, refusals, what is written, signals and pipes."""

import contextlib
import math
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same_run, posix, python, read, restoring_signals

import train
from arguments import choose_settings
from folder import Folder
from images import DECODED
from program import replacing
from run import FREE, NAMES, NETWORK, read_checkpoint

CPU = torch.device("cpu")


def logged(folder):
    """Return the steps in the log of a run, whose rows must be whole."""
    rows = np.loadtxt(folder / "log.csv", delimiter=",", skiprows=1, ndmin=2)
    assert rows.shape[1] == 4 and np.isfinite(rows).all()
    return rows[:, 0].astype(int).tolist()


@pytest.fixture
def wrap_step(monkeypatch):
    """Replace the (loss, norm) of each step k of train.py by function(loss, norm, k)."""
    algorithm_1 = train.algorithm_1

    def call(function):
        def wrapped(*args):
            for k, (loss, norm) in enumerate(algorithm_1(*args)):
                yield function(loss, norm, k) or (loss, norm)

        monkeypatch.setattr(train, "algorithm_1", wrapped)

    return call


# ----------------------------------------------------------------------------------------- resuming


def test_resumed_run_equals_the_uninterrupted_run(class_folder, program, tmp_path):
    """Saved settings are the defaults of the next command, wherever it is started."""
    words = ["--data", "classes", *TINY, "--classes", "--parts", "v", "muon"]
    words += "--accumulate 2 --dropout 0.2 --preview-every 50 --save-minutes 0 --warmup 3".split()
    (tmp_path / "classes").symlink_to(class_folder)
    program("train.py", *words, "--steps", 12, "--out", "whole", cwd=tmp_path)
    program("train.py", *words, "--steps", 5, cwd=tmp_path)
    with open(tmp_path / "run" / "log.csv", "a") as log:
        log.write("6,0,0,0\n7,0,0,0\n1")  # what a killed run may log after its checkpoint
    (tmp_path / "other").mkdir()
    said = program("train.py", "--out", "../run", "--steps", 7, cwd=tmp_path / "other")
    assert "steps    5 to 7; a preview every 50\n" in said
    program("train.py", *words, "--steps", 12, cwd=tmp_path)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    whole, parts = read(tmp_path / "whole"), read(tmp_path / "run")
    assert whole["settings"] == parts["settings"] and whole["names"] == parts["names"]
    before = (tmp_path / "run" / "checkpoint.pt").stat()
    said = program("train.py", "--out", "run", cwd=tmp_path)
    assert "the run is finished; a larger --steps continues it" in said
    assert (tmp_path / "run" / "checkpoint.pt").stat() == before


# Starts a run four times, and kills it at a random moment, often while it writes a checkpoint.
KILL = """
import os, random, signal, sys, time, torch._dynamo, train
for k in range(4):
    began, path = time.time(), "run/checkpoint.pt"
    child = os.fork()
    if not child:
        train.main()
    while not os.path.exists(path) or os.stat(path).st_mtime < began:
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("saved", torch.load(path)["step"])
"""


@posix
def test_killed_repeatedly_it_ends_in_the_same_weights(image_folder, program, tmp_path):
    words = ["--data", image_folder, *TINY, "--steps", 30, "--preview-every", 30]
    said = python("-c", KILL, *words, "--save-minutes", 0, cwd=tmp_path)
    steps = [int(step) for step in re.findall(r"saved (\d+)", said)]
    assert len(steps) == 4 and steps == sorted(steps) and 0 < steps[0] < steps[-1]
    program("train.py", *words, cwd=tmp_path)
    program("train.py", *words, "--out", "whole", cwd=tmp_path)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*.tmp"))


# ----------------------------------------------------------------------------------------- refusals

OTHER = dict(  # a value for each setting that must not change
    image_size=16, in_channels=1, base_channels=12, channel_mults=(1,), num_res_blocks=2,
    attention_resolutions=(8,), patch_size=2, classes=True, variance="small", parts=("v",),
    batch=4, lr=1e-3, warmup=3, cooldown=0.5, ema=0.5, flip=False, seed=1,
)  # fmt: skip


def test_settings_that_contradict_the_run_are_refused(tiny, tmp_path, monkeypatch):
    """A few may change, for example the number of steps; bfloat16 stays as it was decided."""
    assert {*NAMES} == OTHER.keys() | {*FREE, "data", "betas", "norm_groups"}
    tiny("--steps", 4, "--no-amp")
    monkeypatch.setattr("arguments.has_bfloat16", lambda _: True)
    tiny("--steps", 4, "--in-channels", 3)  # as detected
    content = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    state = read_checkpoint("run")
    state["settings"]["parts"], published = ("v", "muon"), state | {"images": None}
    for name, value in OTHER.items():
        line = re.escape(f"run has {name} = {state['settings'][name]}, not {value}; omit the flag")
        refused = pytest.raises(SystemExit, match=line)
        with refused:
            choose_settings({name: value}, state, CPU)
        with refused if name in {*NETWORK, "classes", "parts"} else contextlib.nullcontext():
            choose_settings({name: value}, published, CPU)
        same = {name: state["settings"][name]}
        assert vars(choose_settings(same, state, CPU)) == state["settings"]
    free = dict(steps=9, dropout=0.3, accumulate=2, amp=True, preview_every=3, save_minutes=1.0)
    assert free.keys() == {*FREE}
    assert vars(choose_settings(free, state, CPU)) == state["settings"] | free
    published["settings"] = state["settings"] | {"data": None}
    with pytest.raises(SystemExit, match="run has been trained on no images yet; give --data"):
        choose_settings({}, published, CPU)
    assert "run has parts = (), not ('v', 'weights', 'muon'); omit" in tiny("--quick", code=1)
    choose_settings({"quick": True, "parts": (), "data": "."}, read_checkpoint("run"), CPU)
    assert "at step 4; --steps can't be smaller" in tiny("--steps", 3, code=1)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == content


def test_other_images_of_another_folder_are_refused(class_folder, image_folder, tmp_path, program):
    """The same images may move, and the images in the same folder may change."""

    def train_on(folder, steps, *words, code=0):
        words = ["--data", folder, *TINY, "--steps", steps, *words]
        return program("train.py", *words, cwd=tmp_path, code=code)

    images, again = tmp_path / "moved", ("--classes", "--out", "c")
    shutil.copytree(class_folder, tmp_path / "a")
    train_on("a", 2)
    before = {*(tmp_path / "run").iterdir()}
    (cache,) = (tmp_path / "run").glob(DECODED)
    assert "run was trained on other images; use another --out" in train_on(image_folder, 3, code=1)
    assert {*(tmp_path / "run").iterdir()} == before
    (tmp_path / "a").rename(images)
    assert cache.exists() and "changed" not in train_on("moved", 3)
    (images / "red" / "0.png").unlink()
    said = train_on("moved", 4)
    assert "the images have changed since step 3; training uses the new ones" in said
    assert "images   59 of" in said
    assert len([*(tmp_path / "run").glob(DECODED)]) == 1 and not cache.exists()
    train_on("moved", 2, *again)
    (images / "blue" / "deeper" / "9.png").rename(images / "green" / "-.png")
    assert "changed since step 2" in train_on("moved", 3, *again)  # the labels
    shutil.copytree(images / "red", images / "yellow")
    assert "c is for images of (3, 8, 8) and the classes ('blue', 'green', 'red')" in (
        train_on("moved", 4, *again, code=1))  # fmt: skip
    said = train_on("moved", 1, "--init", "run", "--classes", "--out", "new", code=1)
    assert "train.py: run has classes = False, not True; omit the flag" in said
    assert not (tmp_path / "new").exists()
    said = train_on("moved", 1, "--init", "c", "--out", "new", code=1)
    assert said.endswith("'red'), not (3, 8, 8) and ('blue', 'green', 'red', 'yellow')")


def test_folder_of_a_run_may_hold_other_files_and_be_among_the_images(
    image_folder, program, tmp_path
):
    """But log.csv must be a log, and the images are not the folder of the run, or below it."""
    data, mine = tmp_path / "data", ("train.log", ".notes.tmp", ".images-list", "log.csv")
    shutil.copytree(image_folder, data)
    (data / "run" / "logs").mkdir(parents=True)
    for name in mine:
        (data / "run" / name).write_text("mine")
    words = ["--data", ".", *TINY, "--steps"]
    said = program("train.py", *words, 1, cwd=data, code=1)
    assert "run/log.csv is not a log of train.py; rename" in said
    (data / "run" / "log.csv").unlink()
    for steps in 1, 2:
        said = program("train.py", *words, steps, cwd=data)
        assert "changed" not in said and "images   12 of" in said
    assert logged(data / "run") == [1, 2]
    assert all((data / "run" / name).read_text() == "mine" for name in mine[:-1])
    (tmp_path / "link").symlink_to(tmp_path)
    for images, out in (".", "."), (".", ".."), ("../link/data", "."):
        said = program("train.py", "--data", images, "--out", out, *TINY, cwd=data, code=1)
        assert "must not be or contain the folder of the images" in said


def test_second_process_in_a_folder_is_one_line(tiny, tmp_path):
    """test_killed_repeatedly shows that a killed process frees the folder."""
    folder = Folder(tmp_path / "run")
    with folder, Folder(tmp_path / "run") as other:
        other.open()  # at the same moment
        folder.open()
        folder.begin()
        with other, pytest.raises(SystemExit, match="another process is training in "):
            other.begin()
        assert "another process is training in run; wait, or" in tiny("--steps", 1, code=1)
        folder.still_hold()
    tiny("--steps", 1)


@posix
@pytest.mark.parametrize("other", [True, False])
def test_moved_run_ends(other, tiny, tmp_path, wrap_step):
    """A process never overwrites a run that another one began in the place of its own."""
    folder, moved = tmp_path / "run", tmp_path / "moved"

    def move(loss, norm, k):
        if k == 2:
            folder.rename(moved)
            if other:
                folder.mkdir()
                (folder / "checkpoint.pt").write_text("new")
                (folder / ".lock").touch()

    wrap_step(move)
    said = tiny("--steps", 5, "--save-minutes", 0, code=1)
    assert "run or its .lock was moved or replaced; the last steps aren't saved" in said
    assert read(moved)["step"] == 2
    if other:
        assert (folder / "checkpoint.pt").read_text() == "new"


# ---------------------------------------------------------------------------- full disks and losses


@posix
@pytest.mark.parametrize("name, size", [("log.csv", None), ("checkpoint.pt", 20_000)])
def test_full_disk_ends_the_run_in_a_line(name, size, tiny, tmp_path):
    """The last checkpoint is whole, and the run resumes when there is space again."""
    import resource  # of POSIX

    tiny("--steps", 2)
    size = size or (tmp_path / "run" / "log.csv").stat().st_size + 9  # in the middle of a row
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # of a file
    try:
        said = tiny("--steps", 4, "--preview-every", 9, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"run/{name} can't be written: [Errno 27] File too large" in said
    assert read(tmp_path / "run")["step"] == 2 and not [*(tmp_path / "run").glob(".*.tmp")]
    tiny("--steps", 4)
    assert read(tmp_path / "run")["step"] == 4 and logged(tmp_path / "run") == [1, 2, 3, 4]


@pytest.mark.parametrize("bad, amp", [([math.nan, 1], True), ([1, math.inf], False)])
def test_loss_or_gradient_that_is_not_finite_reaches_no_checkpoint(
    bad, amp, tiny, tmp_path, wrap_step
):
    wrap_step(lambda loss, norm, k: (loss * bad[0], norm * bad[1]) if k == 5 else None)
    said = tiny("--save-minutes", 0, "--steps", 9, "--amp" if amp else "--no-amp", code=1)
    lost = "the steps since the last checkpoint are lost; begin another run with a lower --lr"
    assert f"infinite or NaN at or before step 6; {lost}" in said
    assert said.endswith("a lower --lr" + amp * ", or repeat the command with --no-amp")
    assert read(tmp_path / "run")["step"] == 5 and logged(tmp_path / "run") == [*range(1, 6)]


# ---------------------------------------------------------------------------- signals and terminals


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_ends_training_after_a_saved_step(
    name, tiny, tmp_path, wrap_step, monkeypatch, capfd
):
    """A second Ctrl-C ends it at once; an ignored signal, as SIGHUP under nohup, stops nothing."""
    number, ended = getattr(signal, name), []
    ignored = signal.SIGTERM if name == "SIGHUP" else signal.SIGHUP

    def interrupted(loss, norm, k):
        if k == 2:
            os.kill(os.getpid(), ignored)
        if k == 5:
            os.kill(os.getpid(), number)
            assert (signal.getsignal(number) == signal.SIG_DFL) == (name == "SIGINT")

    wrap_step(interrupted)
    monkeypatch.setattr(signal, "raise_signal", lambda n: ended.append((n, signal.getsignal(n))))
    with restoring_signals():
        signal.signal(ignored, signal.SIG_IGN)
        signal.signal(number, signal.SIG_DFL)  # the shell ignores Ctrl-C for what runs behind `&`
        said = tiny("--steps", 13)
    assert "stopped at step 6; to go on, repeat the command\n" in said
    assert ended == [(number, signal.SIG_DFL)]
    assert ("Ctrl-C again ends without saving\n" in capfd.readouterr().err) == (name == "SIGINT")
    assert read(tmp_path / "run")["step"] == 6 and logged(tmp_path / "run") == [*range(1, 7)]


GUARD = """
import os, signal, sys; signal.signal(signal.SIGINT, getattr(signal, sys.argv[1]))
from program import guard_output; guard_output()
try:
    signal.raise_signal(signal.SIGINT)
finally:
    print("\u2026")
os._exit(0)
"""


@posix
@pytest.mark.parametrize("handler, code", [("default_int_handler", -2), ("SIG_IGN", 0)])
def test_each_line_is_printed_at_once_in_any_encoding(handler, code, tmp_path, monkeypatch):
    """Ctrl-C leaves no traceback, but runs each `finally`; behind `&`, it is ignored."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert python("-c", GUARD, handler, cwd=tmp_path, code=code) == "\\u2026\n"


def test_bug_while_a_file_is_replaced_keeps_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), replacing(tmp_path / "new" / "file"):
        raise RuntimeError("a bug")
    assert not [*(tmp_path / "new").iterdir()]


@posix
def test_end_of_a_pipe_saves_the_step(start, image_folder, tmp_path):
    """bash adds 128 to the number of a signal."""
    words, pipe = [*TINY, "--steps", 999], "2>&1 | head -n 3; exit ${PIPESTATUS[0]}"
    process = start("train.py", "--data", image_folder, *words, cwd=tmp_path, pipe=pipe)
    process.communicate(timeout=170)
    assert process.returncode == 128 + signal.SIGPIPE
    step = read(tmp_path / "run")["step"]
    assert logged(tmp_path / "run") == [*range(1, step + 1)] and step < 999
