"""Several processes, on one machine or two."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import HERE, TINY, assert_same_run, command, in_process, posix, read
from PIL import Image

from images import DECODED

# Does what torchrun does, but imports torch only once: forks a process for each rank.
SERVER = """
import json, os, signal, sys, torch._dynamo, processes, train
for line in sys.stdin:
    port, ranks = json.loads(line)
    for rank, (folder, local, words) in enumerate(ranks):
        if not os.fork():
            signal.alarm(150)
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(len(ranks))}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            processes.RANK, processes.LOCAL_RANK, processes.WORLD = rank, local, len(ranks)
            os.chdir(folder)
            sys.argv[1:] = words
            os.dup2(os.open(f"said{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            train.main()
            sys.exit()
    print(*(os.waitstatus_to_exitcode(os.wait()[1]) for _ in ranks), flush=True)
"""


@pytest.fixture(scope="module")
def together():
    """Train in a process for each (folder, local rank, flags); return what each has printed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(command("-c", SERVER), cwd=HERE, text=True, **pipes)

    def call(*ranks, refused=False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [(str(folder), local, [*map(str, words)]) for folder, local, words in ranks]
        print(json.dumps([str(port), ranks]), file=server.stdin, flush=True)
        status = server.stdout.readline().split()
        said = [Path(folder, f"said{k}.txt").read_text() for k, (folder, _, _) in enumerate(ranks)]
        assert [code != "0" for code in status] == [refused] * len(ranks), (status, said)
        return said

    yield call
    server.communicate()


WORDS = [*TINY, "--no-amp", "--warmup", 0, "--dropout", 0.3]


@pytest.fixture(scope="module")
def alone(image_folder, tmp_path_factory):
    """Train 3 and 8 steps in one process, in two parts for the same dropout; return the folders."""
    folder = tmp_path_factory.mktemp("alone")
    for steps in 3, 8:
        words = [*WORDS, "--accumulate", 2, "--out", folder / f"{steps}", "--steps", steps]
        in_process("train.py", "--data", image_folder, *words)
    return folder / "3", folder / "8"


@posix
def test_two_processes_train_as_one(together, alone, image_folder, tmp_path):
    """They resume what one process began."""
    shutil.copytree(alone[0], tmp_path / "run")
    words = ["--data", image_folder, *WORDS, "--accumulate", 1, "--steps", 8]
    said, silent = together((tmp_path, 0, words), (tmp_path, 1, words))
    assert "on 2 x cpu" in said and "steps    3 to 8" in said and "done: run" in said
    assert "steps" not in silent
    assert_same_run(alone[1], tmp_path / "run", rtol=1e-5)


@posix
@pytest.mark.parametrize("shared", [True, False])
def test_two_machines_train_as_one(shared, together, alone, image_folder, tmp_path):
    """The second one may have a run of its own, which is neither read nor written."""
    own = tmp_path / "b" / "run"
    own.mkdir(parents=True)
    (own / "checkpoint.pt").write_text("mine")
    words, other = [*WORDS, "--steps", 8, "--data"], tmp_path if shared else tmp_path / "b"
    data = image_folder if shared else shutil.copytree(image_folder, tmp_path / "images")
    together((tmp_path, 0, [*words, image_folder]), (other, 0, [*words, data]))
    assert_same_run(alone[1], tmp_path / "run", rtol=1e-5)
    assert (own / "checkpoint.pt").read_text() == "mine"
    assert len([*tmp_path.glob(f"run/{DECODED}")]) == 1 == len([*own.glob(DECODED)]) + shared


@posix
def test_machines_that_differ_are_refused_before_the_first_step(together, image_folder, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in a, b:
        shutil.copytree(image_folder, folder / "images")
    Image.new("RGB", (8, 8), "red").save(b / "images" / "9.png")
    words = ["--data", "images", *TINY, "--steps", 3]
    said = together((a, 0, words), (b, 0, [*words, "--lr", 1]), refused=True)
    assert all("the processes have different lr and images\n" in text for text in said)
    assert not (a / "run").exists() and not (b / "run").exists()


@posix
def test_ctrl_c_stops_all_processes_of_torchrun_and_saves(image_folder, tmp_path, start):
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --local-addr=127.0.0.1"
    words = ["--data", image_folder, *TINY, "--steps", 9999]
    process = start(*torchrun.split(), HERE / "train.py", *words, cwd=tmp_path)
    log = tmp_path / "run" / "log.csv"
    while not log.exists() or "\n5," not in log.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, _ = process.communicate(timeout=60)
    step = read(tmp_path / "run")["step"]
    assert said.count(f"stopped at step {step:,}; to go on, repeat the command") == 1, said
    assert log.read_text().splitlines()[step].startswith(f"{step},")
