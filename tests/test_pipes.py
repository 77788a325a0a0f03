"""What happens to the work if the terminal is closed, or if the reader of a pipe ends.

Each command runs in a session with a terminal of its own, in which Ctrl-C reaches every process.
"""

import os
import shlex
import struct
import subprocess
import sys
import time

import pytest
from conftest import HERE, TINY, posix, read

if sys.platform != "win32":
    import fcntl
    import termios

pytestmark = posix


def in_terminal(words, pipe, cwd, until, then):
    """Run a program with a pipe behind it, then do something; return what the terminal shows.

    until: the condition. then: "Ctrl-C", "close" the terminal, or "wait" for the end.
    """
    ours, theirs = os.openpty()

    def attach():
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))

    program = shlex.join(map(str, [sys.executable, HERE / words[0], *words[1:]]))
    process = subprocess.Popen(
        ["bash", "-c", f"{program} {pipe}" if pipe else f"exec {program}"],
        cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=attach,
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    said, began, waits = b"", time.monotonic(), then != "wait"
    while process.poll() is None:
        assert time.monotonic() - began < 120, said
        try:
            said += os.read(ours, 65536)
        except OSError:
            time.sleep(0.05)
        if waits and until():
            waits = False
            if then == "close":
                os.close(ours)
                process.wait(timeout=60)
            else:
                os.write(ours, b"\x03")
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:  # the terminal shows no more
        pass
    return said.decode()


UNTIL_LOGGED = "until [ -s run/log.csv ]; do sleep 0.1; done"


@pytest.mark.parametrize(
    "pipe, then",
    [("2>&1 | tee log.txt", "Ctrl-C"), (f"2>&1 | ({UNTIL_LOGGED})", "wait"), ("", "close")],
)
def test_training_saves_its_step(pipe, then, image_folder, tmp_path):
    """The command that resumes is printed on the terminal, unless that is closed."""
    words = ["train.py", "--data", image_folder, *TINY, "--steps", 100_000]
    log = tmp_path / "run" / "log.csv"
    said = in_terminal(
        words, pipe, tmp_path, lambda: log.exists() and "\n5," in log.read_text(), then
    )
    assert read(tmp_path / "run")["step"] == int(log.read_text().split()[-1].split(",")[0]) > 0
    assert then == "close" or "to resume:\r\n  python" in said
    assert ("the reader of the pipe has ended" in said) == bool(pipe)


@pytest.mark.parametrize("pipe", ["2>&1 | tee log.txt", "| tee log.txt"])
def test_sampling_saves_the_batches_that_are_finished(pipe, trained, tmp_path):
    words = ["sample.py", "--onnx", trained[0] / "model.onnx", "-n", 256, "--batch", 2]
    words += ["--steps", 200, "--dir", "all"]
    third = tmp_path / "all" / "000003.png"
    said = in_terminal(words, pipe, tmp_path, third.exists, "Ctrl-C")
    drawn = len(list((tmp_path / "all").glob("*.png")))
    assert (tmp_path / "samples.png").exists() and "Traceback" not in said
    assert f"sample.py: stopped after {drawn} of 256 images" in said


def test_reader_that_ends_before_the_last_line_leaves_the_samples_whole(trained, tmp_path):
    words = ["sample.py", "--onnx", trained[0] / "model.onnx", "-n", 2, "--steps", 20]
    said = in_terminal(words, "| head -n 1", tmp_path, None, "wait")
    assert (tmp_path / "samples.png").exists() and "samples.png: 2 images" in said
    assert "stopped" not in said


def test_evaluation_reports_the_batches_that_are_finished(trained, image_folder, tmp_path):
    words = ["evaluate.py", "--data", image_folder, "--checkpoint", trained[0] / "run"]
    words += ["--batch", 1, "--out", "."]
    log = tmp_path / "log.txt"
    for _ in range(2):  # on a loaded machine, tee may still read a line after Ctrl-C, and lose it
        log.unlink(missing_ok=True)
        said = in_terminal(words, "2>&1 | tee log.txt", tmp_path,
                           lambda: log.exists() and "in the last batch" in log.read_text(),
                           "Ctrl-C")  # fmt: skip
        assert list(tmp_path.glob("rate-distortion-*.csv"))
        if "the distortion" in said:
            break
    assert "the distortion" in said and "evaluate.py: stopped after" in said
