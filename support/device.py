"""The device that a process computes on, and its place among the processes of torchrun."""

import contextlib
import os
import shutil
import sys
import sysconfig
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

# torchrun sets these: the rank of this process, the number of all, and its rank on its machine.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


def choose_device(name):
    """Return the torch.device that --device names; "auto" is the accelerator, if there is one.

    Under torchrun, each process of a machine has an accelerator of its own. Exits with what torch
    says if the device is not there.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if WORLD > 1 and found and found.type == "mps":  # over which processes can't communicate
        found = None
    if name == "auto" and not found and RANK == 0:
        print("no accelerator is used; for a GPU, see Accelerators in docs/guide.md")
    try:
        device = torch.device((found or "cpu") if name == "auto" else name)
        if device.type != "cpu":
            index = device.index or 0
            if WORLD > 1:  # some launchers show each process only one card
                index = LOCAL_RANK % max(1, torch.accelerator.device_count())
            torch.accelerator.set_device_index(index)
            device = torch.device(device.type, index)
        torch.ones(1, device=device)  # runs a kernel, which the build may lack for an old card
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {name}: {str(error).splitlines()[0]}")
    return device


def has_bfloat16(device):
    """Return whether the device computes in bfloat16; emulating it would only cost time."""
    if device.type == "cpu":
        return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    if device.type == "mps":  # nobody has measured it
        return False
    return torch.get_device_module(device).is_bf16_supported(including_emulation=False)


def prefer_speed():
    """Use TF32 for products that stay float32, and let cuDNN choose algorithms by timing them."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # batches always have the same shape


def can_compile(device):
    """Return whether torch.compile has what it needs on CUDA.

    It needs Triton, a C compiler and Python.h, and a card of the Volta generation or newer.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    if device.type != "cuda" or not all((find_spec("triton"), compiler, header.is_file())):
        return False
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (7, 0)


def compiled(network):
    """Return torch.compile of a network whose inputs keep their shape."""
    # channels_last suits tensor cores. Without this option, torch often keeps a U-Net contiguous.
    return torch.compile(network, dynamic=False, options={"force_layout_optimization": True})


def join_processes(device):
    """Connect the processes through gloo and, for tensors on a GPU, its maker's library."""
    if WORLD == 1:
        return
    backend = "gloo"  # without a name, torch chooses by the accelerator that it was built for
    if device.type == "cuda" and dist.is_nccl_available():  # not on Windows
        backend = "cpu:gloo,cuda:nccl"
    elif device.type == "xpu":
        backend = "cpu:gloo,xpu:xccl"
    dist.init_process_group(backend, timeout=timedelta(hours=4))  # decoding images can take hours


def leave_processes():
    """Disconnect the processes, which end together; one that ends first sometimes aborts."""
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


def from_rank_0(value):
    """Return the first process's value in every process."""
    values = [value]
    if WORLD > 1:
        dist.broadcast_object_list(values)
    return values[0]


def from_all_ranks(value):
    """Return a list of the values of all processes."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def sum_over_ranks(tensor):
    """Return the sum of the tensors of all processes; `tensor` may hold it."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def first_process_first():
    """Run the block in the first process of each machine, then in the others."""
    if WORLD > 1 and LOCAL_RANK > 0:
        dist.barrier()
    yield
    if WORLD > 1 and LOCAL_RANK == 0:
        dist.barrier()


def to_device(x, device):
    """Return a tensor on the device. From pinned memory, the copy to CUDA is asynchronous."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=device.type == "cuda")
