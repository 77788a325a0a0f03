"""The device that a process computes on, and what it can do."""

import copy
import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from support.ranks import LOCAL_RANK, RANK, WORLD


def choose_device(name):
    """Return the torch.device that --device names; "auto" is the accelerator, if there is one.

    Under torchrun, each process of a machine has an accelerator of its own. Exits with what torch
    says if the device is not there.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if WORLD > 1 and found and found.type == "mps":  # MPS processes can't communicate
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


def uses_bfloat16(predicts, device, asked=None):
    """Return whether to use bfloat16: as requested or, by default, if it is fast and exact enough.

    predicts: see beyond.py. A coefficient of up to 100 turns "mean" or "x0" into eps, and scales
    the rounding error, too. Exits if bfloat16 is requested on a device that would emulate it.
    """
    if asked is None:
        return predicts not in ("mean", "x0") and has_bfloat16(device)
    if asked and device.type not in ("cpu", "mps") and not has_bfloat16(device):
        sys.exit(f"{device} can only emulate bfloat16, which is slow; omit --amp")
    return asked


def prefer_speed():
    """Use TF32 for products that stay float32, and let cuDNN choose algorithms by timing them."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True  # batches always have the same shape


def prefer_accuracy():
    """Compute float32 as float32, whereas cuDNN's convolutions use TF32 by default."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True


def can_compile(device):
    """Return whether torch.compile has what it needs on CUDA, and say what is missing.

    It needs Triton, a C compiler and Python.h, and a card of the Volta generation or newer. On
    Windows, Triton's package contains a compiler, and Python's installer contains the header.
    """
    if device.type != "cuda":
        return False
    if not torch.version.hip and torch.cuda.get_device_capability(device) < (7, 0):
        return False
    has = {"Triton": find_spec("triton")}
    if sys.platform != "win32":
        has["a C compiler"] = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
        has["Python.h"] = header.is_file()
    missing = [name for name, found in has.items() if not found]
    if missing and RANK == 0:
        print(f"torch.compile is not used: {' and '.join(missing)} can't be found")
    return not missing


def compiled(network):
    """Return torch.compile of a network whose inputs keep their shape."""
    # channels_last suits tensor cores. Without this option, torch often keeps a U-Net contiguous,
    # as it does in any case on ROCm.
    return torch.compile(network, dynamic=False, options={"force_layout_optimization": True})


def to_device(x, device):
    """Return a tensor on the device. From pinned memory, the copy to CUDA is asynchronous."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=device.type == "cuda")


def with_tables_on(diffusion, device):
    """Return a copy of a Diffusion whose tables are float32 on the device.

    A look-up then copies nothing. On some accelerators, a copy waits for all pending work.
    """
    moved = copy.copy(diffusion)
    for name, table in vars(diffusion).items():
        if isinstance(table, torch.Tensor):
            setattr(moved, name, table.to(device, torch.float32))
    return moved
