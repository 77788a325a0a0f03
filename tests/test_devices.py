"""The promises about accelerators and several processes, as far as a CPU can show them."""

import argparse
import contextlib
import copy
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import HERE, TINY, checkpoint
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import devices
import sample
import train
from ddpm import Diffusion, UNet, linear_betas
from test_ddpm import PAPER

FLAGS = argparse.Namespace(
    seed=0, batch=8, accumulate=2, no_flip=False, weighting="simple", amp=False, lr=1e-3, warmup=0,
    lr_decay=False, steps=9, ema=0.9999,
)  # fmt: skip


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


# --------------------------------------------------------------------------------------- the device


@pytest.mark.parametrize("weighting", ["simple", "vlb"])
def test_ddpm_needs_no_float64_on_the_device_and_mixes_none(weighting):
    diffusion = Diffusion(linear_betas(9, 0.01, 0.2))
    with torch.device("meta"):
        model, x0 = UNet(8, 3, 8, (1, 2), 1, (4,)), torch.zeros(2, 3, 8, 8)
    with StandIn() as device:
        diffusion.loss(model, x0, weighting=weighting).backward()
        for steps, eta in ((None, None), (4, None), (4, 0.0), (4, 1.0)):
            out = diffusion.sample(model, x0.shape, steps, eta, device="meta")
            assert out.is_meta and out.shape == x0.shape
        assert device.reads == 0
        bound = diffusion.vlb(model, x0)
    assert device.reads < 9  # not one for each t
    assert all(part.dtype == torch.float64 and part.is_cpu for part in bound)


def test_step_never_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # no meta
    with torch.device("meta"):
        model, images = UNet(8, 3, 8, (1, 2), 1, (4,)), torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    with StandIn() as device:
        for step in range(2):
            status = train.train_step(step, model, ema, optimizer, PAPER, images, FLAGS)
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
        for name, value in (("RANK", rank), ("WORLD", world)):
            monkeypatch.setattr(devices, name, value)
            monkeypatch.setattr(devices, f"LOCAL_{name}", value)
        return indices

    return pretend


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_auto_is_the_accelerator_of_the_machine(kind, machine):
    assert machine(kind, 1) == []
    for name in ("auto", kind, f"{kind}:0"):
        assert devices.choose_device(name) == torch.device(kind, 0)
    assert devices.choose_device("cpu") == torch.device("cpu")
    indices = machine(kind, 4)
    assert devices.choose_device(f"{kind}:3") == torch.device(kind, 3) and indices == [3]
    indices = machine(kind, 4, rank=2, world=4)
    assert devices.choose_device("auto") == torch.device(kind, 2) and indices == [2]


def test_devices_that_are_not_there_are_refused(machine):
    assert machine(None, 0) == [] and devices.choose_device("auto") == torch.device("cpu")
    for kind, count, rank, world, name, said in (
        (None, 0, 0, 1, "cuda", "torch sees only a CPU here"),
        ("mps", 1, 0, 1, "cuda", "torch sees only mps here"),
        ("cuda", 2, 0, 1, "cuda:2", "--device cuda:2: torch sees 2 cuda devices here"),
        ("cuda", 2, 0, 1, "cuda:-1", "torch sees 2 cuda devices here"),
        ("cuda", 2, 0, 3, "auto", "3 processes: torch sees 2 cuda devices here"),
        ("cuda", 2, 2, 3, "auto", "3 processes: torch sees 2 cuda devices here"),
        ("cuda", 2, 0, 1, "quantum", "torch sees only cuda here"),
    ):
        machine(kind, count, rank, world)
        with pytest.raises(ValueError, match=said):
            devices.choose_device(name)


def test_bfloat16_is_asked_of_the_device(monkeypatch):
    for answer in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda a=answer: {"amx_bf16": not a})
        for module in (torch.cuda, torch.xpu):
            monkeypatch.setattr(
                module, "is_bf16_supported", lambda including_emulation, a=answer: a
            )
        assert devices.has_bfloat16(torch.device("cpu")) is not answer
        assert devices.has_bfloat16(torch.device("cuda", 1)) is answer
        assert devices.has_bfloat16(torch.device("xpu")) is answer
    assert not devices.has_bfloat16(torch.device("mps"))


# --------------------------------------------------------------------------------------- the loop


def test_reading_the_loss_later_changes_nothing(pictures, tmp_path, monkeypatch, run):
    """As on CUDA, where the loss of a step is read while the next one computes."""
    flags = ["--data", pictures, *TINY, "--save-minutes", 0, "--preview-every", 4]
    for out, ahead in (("now", 0), ("later", 1)):
        monkeypatch.setattr(devices, "AHEAD", {"cpu": ahead})
        run("train.py", *flags, "--steps", 7, "--out", out, cwd=tmp_path)
        run("train.py", *flags, "--steps", 13, "--out", out, cwd=tmp_path)
    logs = [(tmp_path / out / "log.csv").read_text() for out in ("now", "later")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 14
    now, later = checkpoint(tmp_path / "now"), checkpoint(tmp_path / "later")
    for part in ("model", "ema"):
        assert all(torch.equal(later[part][name], value) for name, value in now[part].items())


@pytest.mark.parametrize("ahead", [0, 1])
def test_loss_that_is_not_finite_leaves_the_checkpoint(ahead, pictures, tmp_path, monkeypatch, run):
    monkeypatch.setattr(devices, "AHEAD", {"cpu": ahead})
    flags = ["--data", pictures, *TINY, "--save-minutes", 0]
    step = train.train_step

    def fails(k, *args):
        return step(k, *args) * (float("nan") if k == 5 else 1)

    monkeypatch.setattr(train, "train_step", fails)
    said = run("train.py", *flags, "--steps", 9, cwd=tmp_path, code=1)
    assert "the loss of step 6 is not finite; the checkpoint is as it was" in said
    assert checkpoint(tmp_path / "run")["step"] == 5
    assert (tmp_path / "run" / "log.csv").read_text().splitlines()[-1].startswith("5,")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("ahead", [0, 1])
def test_signal_ends_training_after_a_step_that_is_saved(ahead, pictures, tmp_path, monkeypatch,
                                                         run):  # fmt: skip
    monkeypatch.setattr(devices, "AHEAD", {"cpu": ahead})
    step = train.train_step

    def interrupted(k, *args):
        if k == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(k, *args)

    monkeypatch.setattr(train, "train_step", interrupted)
    said = run("train.py", "--data", pictures, *TINY, "--steps", 13, cwd=tmp_path)
    assert f"stopped at step {6 + ahead}; to resume" in said
    assert checkpoint(tmp_path / "run")["step"] == 6 + ahead
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert rows[-1].startswith(f"{6 + ahead},") and len(rows) == 7 + ahead


HANGS = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import sample, train
train.train_step = lambda *_: time.sleep(100)
sample.run_program(train.main, "train.py")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_second_ctrl_c_ends_a_step_that_hangs(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", HANGS, str(HERE)], cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while "steps" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    for pause in (0.2, 1.5):  # the second one may be torchrun's
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 1 and "train.py: stopped" in said and "Traceback" not in said


def test_failure_to_compile_is_a_line_and_training_goes_on(pictures, tmp_path, monkeypatch, run):
    def fails(*_):
        raise AssertionError("no C compiler\nwas found")

    compile = torch.compile
    monkeypatch.setattr(devices, "is_worth_compiling", lambda *_: True)
    monkeypatch.setattr(torch, "compile", lambda net: compile(net, backend=fails))
    flags = ["--data", pictures, *TINY, "--steps", 3, "--out"]
    said = run("train.py", *flags, "tried", cwd=tmp_path)
    assert "torch.compile fails, so training goes on without it" in said and "no C compiler" in said
    run("train.py", *flags, "plain", "--no-compile", cwd=tmp_path)
    tried, plain = (checkpoint(tmp_path / out)["model"] for out in ("tried", "plain"))
    assert all(torch.equal(tried[name], value) for name, value in plain.items())

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(torch, "compile", lambda net: full)
    assert "out of memory; try" in run("train.py", *flags, "full", cwd=tmp_path, code=1)


def test_state_of_the_optimizer_is_laid_out_like_the_weights():
    """After a checkpoint of contiguous tensors is resumed in channels_last."""
    model = UNet(8, 3, 8, (1, 2), 1, (4,))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)).sum().backward()
    optimizer.step()
    parts = {"model": model, "ema": model, "optimizer": optimizer}
    state = copy.deepcopy({name: part.state_dict() for name, part in parts.items()} | {"step": 1})
    model = UNet(8, 3, 8, (1, 2), 1, (4,)).to(memory_format=torch.channels_last)
    ema = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters())
    train.restore(state, model, ema, optimizer)
    model(torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)).sum().backward()
    formats = set()
    for p, average in zip(model.parameters(), ema.parameters(), strict=True):
        moments = optimizer.state[p]
        for tensor in (average, p.grad, moments["exp_avg"], moments["exp_avg_sq"]):
            assert tensor.stride() == p.stride()
        formats.add(p.is_contiguous())
    assert formats == {True, False}


# -------------------------------------------------------------------------------- several processes

ALIKE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import torch, devices, sample, train
compile = torch.compile
torch.compile = lambda net: compile(net, backend="aot_eager")
devices.is_worth_compiling = lambda *_: True
sample.run_program(train.main, "train.py")
"""


def test_compiled_processes_with_parts_of_batches_give_the_same_weights(pictures, tmp_path, run):
    (tmp_path / "compiled.py").write_text(ALIKE)
    flags = ["--data", pictures, *TINY, "--dropout", 0, "--no-amp", "--steps", 4, "--warmup", 0]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "compiled.py"]
    command += [HERE, *flags, "--accumulate", 2, "--out", "two"]
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    run("train.py", *flags, "--out", "one", cwd=tmp_path)
    one, two = (checkpoint(tmp_path / out)["model"] for out in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


def machines(folders, flags):
    """torchrun as on two machines, one in each folder: [(exit status, what it printed)]."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    runs = []
    for rank, folder in enumerate(folders):
        words = ["-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}"]
        words += ["--nproc_per_node=1", "--master_addr=localhost", f"--master_port={port}"]
        words += [HERE / "train.py", "--data", "images", *TINY, *flags]
        runs.append(
            subprocess.Popen([sys.executable, *map(str, words)], cwd=folder, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[0] for process in runs]
    finally:
        for process in runs:
            process.kill()
    return [(process.returncode, text) for process, text in zip(runs, said, strict=True)]


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun on Windows is untried")
def test_two_machines_train_as_one_or_say_why_not(tmp_path, run):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        (folder / "images").mkdir(parents=True)
        for k in range(9):
            Image.new("RGB", (8, 8), (20 * k, 90, 30)).save(folder / "images" / f"{k}.png")
    flags = ["--no-amp", "--dropout", 0, "--warmup", 0]
    data = ["--data", "images", *TINY, *flags, "--steps"]
    run("train.py", *data, 6, "--out", "alone", cwd=a)
    run("train.py", *data, 3, cwd=a)  # which the two resume
    run("train.py", *data, 1, "--seed", 5, cwd=b)  # a stale run, which is left alone
    stale = (b / "run" / "checkpoint.pt").read_bytes()
    (one, said), (other, silent) = machines((a, b), [*flags, "--steps", 6])
    assert one == other == 0, said + silent
    assert "steps    3 to 6" in said and "steps" not in silent
    assert (b / "run" / "checkpoint.pt").read_bytes() == stale
    together, alone = (checkpoint(a / out)["model"] for out in ("run", "alone"))
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-3, atol=1e-5)

    Image.new("RGB", (8, 8), "red").save(b / "images" / "9.png")  # only on the second machine
    for out, rank, said in (
        ("run", 1, "holds another run, of 9 other images; now there are 10"),
        ("fresh", 0, "ranks 0 and 1 would train differently: pictures is 9 and 10"),
        ("fresh", 1, "images: there is no such folder"),
    ):
        if "no such folder" in said:
            shutil.rmtree(b / "images")
        done = machines((a, b), [*flags, "--steps", 9, "--out", out])
        assert done[0][0] and done[1][0], done
        assert f"train.py, rank {rank}: " in done[rank][1] and said in done[rank][1]
        assert rank == 0 or "stopped because of rank 1: " in done[0][1]
    assert checkpoint(a / "run")["step"] == 6

    # A file of the user's on the second machine stays.
    (a / "images").rename(b / "images")
    (a / "images").symlink_to(b / "images")
    (b / "mine").mkdir()
    (b / "mine" / "pictures.u8").write_text("mine")
    done = machines((a, b), [*flags, "--steps", 1, "--out", "mine"])
    assert "train.py, rank 1: " in done[1][1] and "holds pictures.u8 but no" in done[1][1]
    assert done[0][0] and (b / "mine" / "pictures.u8").read_text() == "mine"


# ---------------------------------------------------------------------------- ONNX Runtime on CUDA


@pytest.fixture
def cuda(monkeypatch):
    """Make ONNX Runtime claim CUDA, which is the CPU under another name."""
    real, allocate = ort.InferenceSession, ort.OrtValue.ortvalue_from_shape_and_type
    failures = {}

    class Session(real):
        def __init__(self, path, providers):
            self.claims = isinstance(providers[0], tuple)
            if self.claims and "open" in failures:
                raise failures["open"]
            super().__init__(path, providers=["CPUExecutionProvider"])

        def get_providers(self):
            claims = self.claims and "load" not in failures
            return ["CUDAExecutionProvider"] * claims + ["CPUExecutionProvider"]

        def run_with_iobinding(self, *args):
            if self.claims and "run" in failures:
                raise failures["run"]
            super().run_with_iobinding(*args)

    def anywhere(shape, dtype, device, index):
        return allocate(shape, dtype, "cpu", index)

    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", anywhere)
    return failures


def test_cuda_is_used_where_it_works(cuda, trained):
    network = sample.Network(trained[0] / "model.onnx", 2)
    assert network.device == "cuda" and network.no_cuda is None
    assert sample.Network(trained[0] / "model.onnx", 2, "cpu").device == "cpu"


@pytest.mark.parametrize(
    "where, error, said",
    [
        ("open", RuntimeError("CUDA failure 100: no CUDA-capable device"), "no CUDA-capable"),
        ("load", None, "does not load"),
        ("run", RuntimeError("libcudnn.so.9: cannot open"), "libcudnn.so.9"),
        ("run", RuntimeError("an illegal memory access was encountered"), "illegal memory access"),
    ],
)
def test_cuda_that_fails_is_not_blamed_on_the_file(where, error, said, cuda, trained, tmp_path):
    cuda[where] = error
    network = sample.Network(trained[0] / "model.onnx", 2)
    assert network.device == "cpu" and said in network.no_cuda
    with pytest.raises(RuntimeError, match=f"if CUDA is missing, run:.*{said}"):
        sample.Network(trained[0] / "model.onnx", 2, "cuda")
    (tmp_path / "x.onnx").write_text("not a model")
    with pytest.raises(ValueError, match=r"x.onnx is not a model of export.py"):
        sample.Network(tmp_path / "x.onnx", 2, "cuda")


@pytest.mark.parametrize("where", ["open", "run"])
def test_full_card_is_not_a_broken_file(where, cuda, trained):
    cuda[where] = RuntimeError("CUDA failure 2: out of memory")
    with pytest.raises(
        MemoryError, match="2 images at once do not fit into the memory of the card"
    ):
        sample.Network(trained[0] / "model.onnx", 2)


def test_eps_that_overflows_on_cuda_is_an_error(cuda, trained, monkeypatch):
    network = sample.Network(trained[0] / "model.onnx", 1)
    nan = np.full(network.shape, np.nan, np.float32)
    monkeypatch.setattr(network, "_eps", argparse.Namespace(numpy=lambda: nan))
    with pytest.raises(RuntimeError, match="eps is not finite at t = 7"):
        network(np.zeros(network.shape, np.float32), np.array([7]))


@pytest.mark.parametrize(
    "message, is_memory",
    [
        ("CUDA out of memory. Tried to allocate 20 MiB", True),
        ("MPS backend out of memory", True),
        ("Available memory of 5 is smaller than requested bytes of 9", True),
        ("Failed to allocate memory for requested buffer of size 9", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("Error while creating shared memory segment /dev/shm/nccl-1", False),
    ],
)
def test_only_a_lack_of_memory_is_called_so(message, is_memory):
    assert sample.is_out_of_memory(RuntimeError(message)) is is_memory


@pytest.mark.parametrize("n", [3, 270])
def test_batches_drawn_at_a_time_are_the_same_images(n, trained, tmp_path, monkeypatch, run):
    for lanes in (1, 2, 3):
        monkeypatch.setattr(sample, "LANES", {"cpu": lanes})
        run("sample.py", "--onnx", trained[0] / "model.onnx", "-n", n, "--batch", (n + 6) // 7,
            "--steps", 3, "--out", f"{lanes}.png", "--gif", f"{lanes}.gif", "--dir", f"{lanes}",
            cwd=tmp_path)  # fmt: skip
    for lanes in (2, 3):
        for kind in ("png", "gif"):
            same = (tmp_path / f"{lanes}.{kind}").read_bytes()
            assert same == (tmp_path / f"1.{kind}").read_bytes()
        names = sorted(os.listdir(tmp_path / "1"))
        assert names == sorted(os.listdir(tmp_path / f"{lanes}")) and len(names) == n
        for name in names:
            same = (tmp_path / f"{lanes}" / name).read_bytes()
            assert same == (tmp_path / "1" / name).read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")])
def test_error_in_one_lane_ends_the_others(error, trained, tmp_path, monkeypatch, run):
    steps = []

    def slow(*args):
        for result in chain(*args):
            steps.append(0)
            if len(steps) == 9:
                raise error
            time.sleep(0.01)
            yield result

    chain = sample.sample_progressive
    monkeypatch.setattr(sample, "sample_progressive", slow)
    monkeypatch.setattr(sample, "LANES", {"cpu": 2})
    run("sample.py", "--onnx", trained[0] / "model.onnx", "-n", 8, "--batch", 2, "--steps", 500,
        cwd=tmp_path, code=1)  # fmt: skip
    assert len(steps) < 30 and not (tmp_path / "samples.png").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_while_one_lane_waits_for_another_ends_it(trained, tmp_path, monkeypatch, run):
    steps = []

    def slow_twin(*args):
        is_twin = threading.current_thread() is not threading.main_thread()
        for result in chain(*args):
            if is_twin:
                steps.append(0)
                time.sleep(0.1)
            yield result
        if not is_twin:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    chain = sample.sample_progressive
    monkeypatch.setattr(sample, "sample_progressive", slow_twin)
    monkeypatch.setattr(sample, "LANES", {"cpu": 2})
    said = run("sample.py", "--onnx", trained[0] / "model.onnx", "-n", 4, "--batch", 2, "--steps",
               100, cwd=tmp_path, code=1)  # fmt: skip
    assert "stopped" in said and len(steps) < 60
