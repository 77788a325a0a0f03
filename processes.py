"""The processes that torchrun starts. Without torchrun, there is one, and nothing happens here."""

import contextlib
import os
import sys
import time
from datetime import timedelta

import torch.distributed as dist

# torchrun sets these: the rank of this process, the number of processes, the rank on its machine.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


def join(device):
    """Connect the processes through gloo and, for gradients on a GPU, NCCL or XCCL.

    If one of them fails, torchrun ends the others, which save nothing.
    """
    if WORLD > 1:
        if RANK > 0:  # only the first process prints
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        gpu = {"cuda": ",cuda:nccl", "xpu": ",xpu:xccl"}.get(device.type, "")
        # The timeout is long because the others wait while one process decodes the images.
        dist.init_process_group(f"cpu:gloo{gpu}", timeout=timedelta(hours=4))


def leave():
    """Disconnect the processes, once each of them has called this.

    A process that ends first can abort the others.
    """
    if WORLD > 1:
        wait()
        time.sleep(1)  # gloo's threads and the end of Python can otherwise wait for each other
        dist.destroy_process_group()


def mean(values):
    """Return the mean of the processes' tensors, which change in place."""
    if WORLD > 1:
        dist.all_reduce(values)
    return values / WORLD


@contextlib.contextmanager
def first_on_each_machine():
    """Let the first process on each machine run the block before the others."""
    if LOCAL_RANK > 0:
        wait()
    yield
    if LOCAL_RANK == 0:
        wait()


def from_all(value):
    """Return a list of the values of all processes."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def wait():
    """Wait until each process has called this, on the CPU, unlike dist.barrier with NCCL."""
    from_all(None)


def from_first(function, *args):
    """Return the first process's function(*args) in every process."""
    values = [function(*args) if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(values)
    return values[0]
