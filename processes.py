"""The processes of a data-parallel run. torchrun starts one for each GPU, or for each share of the cores.

All of them take the same steps; the first one writes files and prints.
"""

import contextlib
import datetime
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def join_processes() -> None:
    """Connect with the other processes of this run, if torchrun started it."""
    if not dist.is_torchelastic_launched():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # Long, since the others wait while the first one tags and downloads. A process that ends is
    # noticed at once all the same.
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=3))
    if rank():
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")


def leave_processes() -> None:
    """Wait for the other processes and end this one, if torchrun started it. For a run without errors."""
    # By os._exit, since gloo's threads sometimes abort a process that ends in the usual way.
    if dist.is_initialized():
        agree(True)
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def n_processes() -> int:
    """Return the number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, counted from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_processes(tensors: list[Tensor]) -> None:
    """Replace the values of each tensor by their sum over all processes, with one message."""
    if n_processes() == 1:
        return
    total = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(total)
    parts = total.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.detach().copy_(part.view_as(tensor))


def sum_gradients(model: nn.Module, values: list[Tensor]) -> None:
    """Sum `.grad` and `values` over all processes. The graph of `.grad`, if there is one, remains that
    of this process. (It makes the hooks of PyTorch's DistributedDataParallel useless.)"""
    if n_processes() == 1:
        return
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A process may have no row of a task. A weight that no process used must keep no gradient.
    used = agree(*(param.grad is not None for param in params))
    for param, used_by_any in zip(params, used, strict=True):
        if used_by_any and param.grad is None:
            param.grad = torch.zeros_like(param)
    gradients = [param.grad for param in params if param.grad is not None]
    sum_over_processes([*gradients, *values])


def copy_from_first(tensors: list[Tensor]) -> None:
    """Replace the values of each tensor by those in the first process."""
    if n_processes() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def gather(mine: T) -> list[T]:
    """Return what each process gives, in the order of their ranks. All processes get all of it."""
    given = [mine] * n_processes()
    if len(given) > 1:
        dist.all_gather_object(given, mine)
    return given


def agree(*wishes: bool) -> list[bool]:
    """Return, for each wish, whether at least one process has it. All processes wait for each other."""
    if n_processes() == 1:
        return list(wishes)
    together = torch.tensor(wishes, dtype=torch.uint8)
    dist.all_reduce(together, dist.ReduceOp.MAX)
    return together.bool().tolist()


def by_first(function: Callable[[], T]) -> T:
    """Call `function` in the first process only, and return its result in all processes."""
    result: Any = None if rank() else function()
    return gather(result)[0]


@contextlib.contextmanager
def one_first_on_each_node():
    """Let one process of each node do the block first, so that the others find what it has cached."""
    later = int(os.environ["LOCAL_RANK"]) > 0 if n_processes() > 1 else False
    if later:
        agree(True)
    yield
    if not later:
        agree(True)


def wait_for_first_process() -> None:
    """Before this process prints an error: give the first process time to print the same error and to
    end the run."""
    if rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)


def is_lost_connection(error: Exception) -> bool:
    """Return whether the error means that another process of this run has ended."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "refused", "imed out")
    lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
    return n_processes() > 1 and lost
