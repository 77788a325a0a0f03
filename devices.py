"""What train.py needs for accelerators, and for several processes that train one network.

This module chooses the device, compiles the network where that pays, reads the loss without making
the device wait, and keeps the processes of torchrun in step. Training on a CPU needs little of it.
"""

import os
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sample import is_out_of_memory, one_line

# Rank and number of processes: of all, and of those on this machine. torchrun sets them.
RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = 0, 1, 0, 1
NAMES = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
if {"TORCHELASTIC_RUN_ID", *NAMES} <= set(os.environ):
    RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = (int(os.environ[name]) for name in NAMES)
RESTARTED = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # torchrun --max-restarts
patient = None  # the process group whose members wait for each other for hours
# How many steps a device may start before the loss of a step is read. At most 1: with more, the
# processes would stop after different steps.
AHEAD = {"cuda": 1}

# --------------------------------------------------------------------------------------- the device


def choose_device(name):
    """The torch.device that --device names; "auto" is the accelerator of this machine, if any.

    Under torchrun, each process of a machine has an accelerator of its own. Raises ValueError.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    kind, _, index = name.partition(":")
    if kind == "auto":
        kind = found.type if found else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if found is None or found.type != kind:
        seen = found.type if found else "a CPU"
        raise ValueError(f"--device {name}: torch sees only {seen} here")
    index = str(LOCAL_RANK) if WORLD > 1 else index or "0"
    count = torch.accelerator.device_count()
    if not index.isdecimal() or max(int(index), LOCAL_WORLD - 1) >= count:
        wanted = f"{LOCAL_WORLD} processes" if WORLD > 1 else f"--device {name}"
        raise ValueError(f"{wanted}: torch sees {count} {kind} devices here")
    if count > 1:
        torch.accelerator.set_device_index(int(index))
    return torch.device(kind, int(index))


def has_bfloat16(device):
    """Whether the device computes in bfloat16 natively; emulating it would only cost time."""
    if device.type == "cpu":
        return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    if device.type == "mps":  # nobody has measured it
        return False
    return torch.get_device_module(device).is_bf16_supported(including_emulation=False)


def is_worth_compiling(device, steps):
    """torch.compile needs CUDA, Triton, and a run long enough to win back a minute or more."""
    return device.type == "cuda" and steps >= 5000 and find_spec("triton") is not None


def try_to_compile(model, shape, amp):
    """torch.compile(model), tried on a batch of the given shape; if it fails, model and a line.

    If it fails in one process, none of them compiles. On NVIDIA it makes the model channels_last.
    (Without compiling, each norm would return to the other format and back; on AMD, channels_last
    is slower.)
    """
    device = next(model.parameters()).device
    x = torch.zeros(shape, device=device)
    t = torch.zeros(len(x), dtype=torch.int64, device=device)
    if torch.version.hip is None:
        model.to(memory_format=torch.channels_last)
    network, works = torch.compile(model), True
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            network(x, t).square().mean().backward()
    except Exception as error:  # of many kinds: no compiler, an old card, a bug
        if is_out_of_memory(error):
            raise
        print(f"torch.compile fails, so training goes on without it: {one_line(error)}")
        works = False
    model.zero_grad()
    if all(from_all_processes(works)):
        return network
    return model.to(memory_format=torch.contiguous_format)


def read_later(values):
    """Start to copy a tensor to the host. Returns a function that waits for it: values.tolist()."""
    host, copied = values.to("cpu", non_blocking=values.is_cuda), None
    if values.is_cuda:
        copied = torch.cuda.Event()
        copied.record()

    def read():
        if copied is not None:
            copied.synchronize()
        return host.tolist()

    return read


# -------------------------------------------------------------------------------- several processes


def start_processes(device):
    """Join the other processes of torchrun. NCCL itself starts with its first tensor on CUDA."""
    global patient
    backend = dist.get_default_backend_for_device(device)
    if not dist.is_backend_available(backend):  # as NCCL on Windows
        backend = "gloo"
    if device.type != "cpu":
        backend = f"cpu:gloo,{device.type}:{backend}"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # decoding may take hours


def from_all_processes(value):
    """The values that the processes pass, in a list, in each of them."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value, group=patient)
    return values


def from_first_process(*values):
    """The values that the first process passes, as a list, in every process."""
    values = list(values)
    if WORLD > 1:
        dist.broadcast_object_list(values)
    return values


def in_all_processes(function, *args):
    """function(*args), in each process. If it fails in one, an exception is raised in all."""
    result = error = None
    try:
        result = function(*args)
    except Exception as e:
        error = e
    for rank, line in enumerate(from_all_processes(error and one_line(error))):
        if line and not error:
            raise RuntimeError(f"stopped because of rank {rank}: {line}")
    if error:
        raise error
    return result


def refuse_differences(values):
    """Raise ValueError in every process unless all of them have the same {name: value}."""
    first, *others = from_all_processes(values)
    for rank, theirs in enumerate(others, 1):
        for name, value in theirs.items():
            if value != first[name]:
                what = f"ranks 0 and {rank} would train differently: {name}"
                raise ValueError(f"{what} is {first[name]} and {value}")


def distribute(model, compiled):
    """The model in a DistributedDataParallel, compiled if asked for."""
    distributed = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if not compiled:
        return distributed
    torch.compiler.reset()  # compiled again, so that gradients are sent while others are computed
    return torch.compile(distributed)
