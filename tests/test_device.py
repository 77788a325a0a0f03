"""Accelerators, real and mock, and several processes."""

import contextlib
import copy
import os
import signal
import socket
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
from closed_forms import PAPER
from conftest import HERE, TINY, posix, read
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from beyond import as_eps, loss_weights, sample, weighted_loss
from ddpm import Diffusion, UNet, linear_betas
from support import device, ranks, settings

CPU = torch.device("cpu")
EXACT = ["--dropout", 0, "--no-amp", "--warmup", 0]  # one and two processes differ by rounding

# ------------------------------------------------------------------------------------- accelerators


class MockDevice(TorchDispatchMode):
    """A mode that makes the meta device a mock accelerator, which has no float64, like Apple's.

    Only a copy may mix it with the CPU. reads and writes count the copies from and to it.
    """

    reads = writes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_copy = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if is_copy and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            self.reads += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if is_copy and not args[0].is_meta and kwargs.get("device") == torch.device("meta"):
            self.writes += 1
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
    with MockDevice() as device:
        eps, weights = as_eps(model, diffusion, "v"), loss_weights(diffusion, weighting, "v")
        t, noise = torch.ones(2, dtype=torch.int64, device="meta"), torch.zeros_like(x0)
        weighted_loss(diffusion, eps, x0, t, noise, weights).backward()
        image = x0, x0 > 0
        for steps, sampler, eta, known in (
            (None, "ddpm", None, None), (4, "ddpm", None, image), (4, "sa-solver", None, None),
            (4, "ddim", 1.0, image),
        ):  # fmt: skip
            out = sample(diffusion, eps, x0.shape, steps, sampler, eta, device="meta", known=known)
            assert out.is_meta and out.shape == x0.shape
        assert device.reads == 0
        bound = diffusion.vlb(model, x0)
    assert device.reads < 9  # not one for each t
    assert all(part.dtype == torch.float64 and part.is_cpu for part in bound)


def test_step_never_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # no meta
    monkeypatch.setattr(train, "set_seed", lambda *_: None)
    with torch.device("meta"):
        model, images = UNet(8, 3, 8, (1, 2), 1, (4,)), torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    args = train.Settings(batch=8, accumulate=2, predicts="v", weighting="min-snr", warmup=0,
                          device=torch.device("meta"))  # fmt: skip
    with MockDevice() as device:
        step = train.algorithm_1(model, ema, optimizer, PAPER, images, None, args)
        device.writes = 0  # do not count the tables
        for k in range(2):
            status = step(k)
    assert device.reads == device.writes == 0 and status.is_meta and status.shape == (2,)
    with pytest.raises(RuntimeError), MockDevice():
        status.sum().item()  # so that a read would not have passed


@pytest.fixture
def machine(monkeypatch):
    """Pretend that torch sees accelerators; return a list of the indices that are set."""

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


NEEDS = {None: "", "triton": "Triton", "gcc": "a C compiler", "Python.h": "Python.h"}


@pytest.mark.parametrize("system", ["linux", "win32"])
@pytest.mark.parametrize("lacks", NEEDS)
def test_compiling_needs_triton_and_a_c_compiler_and_its_header(
    lacks, system, tmp_path, monkeypatch, capsys
):
    """On Windows, Triton contains a compiler. The program says what is missing."""
    monkeypatch.setattr(device, "find_spec", lambda name: name != lacks)
    monkeypatch.setattr(device.shutil, "which", lambda name: name == "gcc" != lacks)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(device.sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    (tmp_path / ("Python.h" if lacks != "Python.h" else "other.h")).touch()
    monkeypatch.setattr(device.sys, "platform", system)
    can = lacks is None or (system == "win32" and lacks != "triton")
    assert device.can_compile(torch.device("cuda", 0)) is can
    said = "" if can else f"torch.compile is not used: {NEEDS[lacks]} can't be found\n"
    assert capsys.readouterr().out == said
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert not device.can_compile(torch.device("cuda", 0))  # Pascal
    assert not device.can_compile(CPU)
    assert not capsys.readouterr().out


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
    monkeypatch.setattr(ranks, "WORLD", 2)
    monkeypatch.setattr(ranks.dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(ranks, "PATIENT", None)
    monkeypatch.setattr(ranks.dist, "init_process_group", used.append)
    monkeypatch.setattr(ranks.dist, "new_group", lambda backend, timeout: (backend, timeout))
    ranks.join(torch.device(kind))
    assert used == [backend] and ("gloo", timedelta(hours=4)) == ranks.PATIENT


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
        for kind in ("cuda", "xpu"):  # which emulate it if they are old
            given = {"data": ".", "device": torch.device(kind), "steps": 1}
            assert train.decide(given).amp is answer
            assert not train.decide(given | {"amp": False}).amp
            refused = pytest.raises(SystemExit, match=f"^{kind} can only emulate bfloat16")
            with contextlib.nullcontext() if answer else refused:
                assert train.decide(given | {"amp": True}).amp
    for kind in ("cpu", "mps"):
        assert train.decide({"device": torch.device(kind), "amp": True}).amp
    assert not device.has_bfloat16(torch.device("mps"))


# -------------------------------------------------------------------------------- several processes

TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2 --local-addr=127.0.0.1".split()


def assert_same_weights(a, b, rtol=1e-5, atol=1e-6):
    for part in ("model", "ema"):
        for name, value in a[part].items():
            torch.testing.assert_close(b[part][name], value, rtol=rtol, atol=atol)


@pytest.fixture
def two(start):
    """Train with two processes, as under torchrun; return [(exit status, what it printed)].

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


def test_processes_of_srun_without_torchrun_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    said = tiny("--steps", 1, code=1)
    assert "srun has started 4 processes" in said and "let it start torchrun" in said
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")  # as torchrun does, also for one process
    tiny("--steps", 1)


@posix
def test_two_processes_and_accumulation_give_the_same_weights(image_folder, tmp_path, tiny, two):
    tiny(*EXACT, "--steps", 16, "--out", "one")
    tiny(*EXACT, "--steps", 16, "--out", "parts", "--accumulate", 3)
    tiny(*EXACT, "--steps", 9, "--out", "two")  # resumed by two processes
    words = ["--data", image_folder, *TINY, *EXACT, "--steps", 16, "--out", "two"]
    (one, said), (other, silent) = two([tmp_path, tmp_path], *words, "--accumulate", 2)
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
@pytest.mark.parametrize("out, mistake", [("run", "nowhere: no such folder"),
                                          ("file", "file is not a folder")])  # fmt: skip
def test_mistake_of_all_processes_is_said_once(out, mistake, tmp_path, two):
    """It is said whichever process notices it, and without a traceback of the others."""
    (tmp_path / "file").touch()
    ended = two([tmp_path, tmp_path], "--data", "nowhere", "--out", out, *TINY)
    said = "".join(text for _, text in ended)
    assert [code for code, _ in ended] == [1, 1]
    assert said.count(mistake) == 1 and "Traceback" not in said


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
        ({"images": "b"}, "rank 1 differs from rank 0 in images"),
        ({"steps": 8, "seed": 1}, "rank 1 differs from rank 0 in seed and steps"),
    ):
        with pytest.raises(SystemExit, match=said):
            settings.refuse_other_ranks([mine, mine | {"train": mine["train"] | other}])
    settings.refuse_other_ranks([mine, mine | {"train": mine["train"] | {"data": "y"}}])
