"""The processes that torchrun starts. Without torchrun, there is one."""

import contextlib
import io
import os
import sys
from datetime import timedelta

import torch.distributed as dist

# torchrun sets these: the rank of this process, the number of all, and its rank on its machine.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
PATIENT = None  # the group that may wait long, for images that another process decodes


def join(device):
    """Connect the processes through gloo and, for gradients on a GPU, its maker's library.

    Exits if srun has started several processes without torchrun: each would train by itself.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # srun sets it, and sbatch does not
    if tasks != "1" and "WORLD_SIZE" not in os.environ:
        sys.exit(f"srun has started {tasks} processes, which can't find each other; let it start "
                 "torchrun, once on each machine (docs/guide.md), or set WORLD_SIZE=1 if each of "
                 "them is to train a network of its own")  # fmt: skip
    if WORLD == 1:
        return
    backend = "gloo"  # without a name, torch chooses by the accelerator that it was built for
    if device.type == "cuda" and dist.is_nccl_available():  # not on Windows
        backend = "cpu:gloo,cuda:nccl"
    elif device.type == "xpu":
        backend = "cpu:gloo,xpu:xccl"
    dist.init_process_group(backend)
    global PATIENT
    PATIENT = dist.new_group(backend="gloo", timeout=timedelta(hours=4))


def leave():
    """Disconnect the processes, which end together; one that ends first sometimes aborts."""
    if WORLD > 1:
        dist.barrier(PATIENT)
        dist.destroy_process_group()


def from_first(function, *args):
    """Return the first process's function(*args) in every process. If it exits, all of them do."""
    values, refusal = [None, False], None
    if RANK == 0:
        try:
            values[0] = function(*args)
        except SystemExit as error:
            values[1], refusal = True, error
    if WORLD > 1:
        dist.broadcast_object_list(values, group=PATIENT)
    if values[1]:
        leave()
        raise refusal or SystemExit(1)
    return values[0]


def from_all(value):
    """Return a list of the values of all processes."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value, group=PATIENT)
    return values


def sum_of_all(tensor):
    """Return the sum of the tensors of all processes, which may replace the values of `tensor`."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def first_of_machine_first():
    """Run the block in the first process of each machine, then, in silence, in the others.

    The others run it, too, if the first one exits, and they exit for the same reason.
    """
    if WORLD > 1 and LOCAL_RANK > 0:
        dist.barrier(PATIENT)
    try:
        with said_by(LOCAL_RANK == 0):
            yield
    finally:
        if WORLD > 1 and LOCAL_RANK == 0:
            dist.barrier(PATIENT)


@contextlib.contextmanager
def said_by(this):
    """Run a block in which several processes do the same, but print in one of them alone.

    this: whether this process prints. The others exit without a message.
    """
    if this:
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
        except SystemExit:
            sys.exit(1)
