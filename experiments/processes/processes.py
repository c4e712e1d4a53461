"""The processes that train together: who this one is among them, and the little that they say to each other.

``torchrun`` starts them and tells each in environment variables who it is; whoever is started alone is one process
of one, and nothing here makes it wait or talk.
"""

from __future__ import annotations

import gc
import json
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from experiments.errors import ConfigError

PATIENCE = timedelta(minutes=30)
"""How long one process waits for another before it gives up; the first may decode a whole data set meanwhile."""
GRACE = timedelta(seconds=10)
"""How long a process that is about to end waits for the others."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train one network together; by default the only one.

    Every method is called by all of them, in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  #: among those on the same machine

    @property
    def is_main(self) -> bool:
        """Whether this is the first process: it alone writes and speaks."""
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """The device of this process: of several GPUs its own.

        Raises:
            ConfigError: this machine has fewer GPUs than processes, or all would use the same one.
        """
        kind, _, number = wanted.partition(":")
        if self.size > 1 and (number or kind not in ("cpu", "cuda")):
            raise ConfigError(
                f"training.device: {wanted} is one device for {self.size} processes; use cuda, of which each process "
                "takes its own, or cpu"
            )
        if wanted != "cuda":
            return wanted
        here = torch.cuda.device_count()
        if self.local_rank >= here:
            raise ConfigError(
                f"training.device: process {self.local_rank} of this machine has no GPU, there are {here}; "
                f"start torchrun with --nproc-per-node {max(here, 1)}, or train on another device"
            )
        return f"cuda:{self.local_rank}"

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.any(False)

    def part(self) -> None:
        """Return when all processes have come here, or one is gone, or in :data:`GRACE`: nobody needs another any more.

        Whoever leaves while another still hears the last answer takes that one down too. This answer nobody needs.
        """
        with suppress(RuntimeError):
            self.lowest(0)

    def lowest(self, value: int) -> int:
        """The least ``value`` of all processes, which come here in :data:`GRACE` or not at all.

        Raises:
            RuntimeError: they do not, or one is gone; nothing can be said to the others any more.
        """
        found = torch.tensor([value])
        if self.size > 1:
            group = dist.group.WORLD
            assert group is not None
            options = dist.AllreduceOptions()
            # A limit to the waiting alone would leave a thread that keeps this process from ending.
            options.reduceOp, options.timeout = dist.ReduceOp.MIN, GRACE
            group.allreduce([found], options).wait(GRACE)
        return int(found)

    def share(self, value: Any) -> Any:
        """What the first process has as ``value``: numbers, strings, lists and dictionaries, as JSON knows them."""
        return self.gather(value if self.is_main else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """What each process has as ``value``, by rank; numbers, strings, lists and dictionaries, as JSON knows them."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(own)]))
        longest = int(max(lengths))
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, functional.pad(own, (0, longest - len(own))))
        pairs = zip(texts, lengths, strict=True)
        return [json.loads(text[: int(length)].numpy().tobytes()) for text, length in pairs]

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is True on at least one process."""
        return bool(self.sum(torch.tensor(int(flag))))

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` (contiguous, without gradient), which becomes the sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of every process's ``tensor`` ``[n, ...]`` in the order of the ranks: ``[N, ...]``."""
        if self.size == 1:
            return tensor
        counts = self.gather(len(tensor))
        most = max(counts)
        parts = [tensor.new_empty(most, *tensor.shape[1:]) for _ in counts]
        own = tensor.new_zeros(most, *tensor.shape[1:])
        own[: len(tensor)] = tensor
        dist.all_gather(parts, own)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes, with the gradient of this one's own share.

        A loss that is not linear in a mean over the batch needs that of the whole batch; the gradients of the
        shares are averaged with all others when the backward pass is done.
        """
        if self.size == 1:
            return value
        whole = self.sum(value.detach().clone()) / self.size
        return whole + (value - value.detach())


ALONE = Processes()


def find_processes(environment: Mapping[str, str]) -> Processes:
    """Who this process is, as ``torchrun`` says it.

    Raises:
        ConfigError: it says a part of it only, or what cannot be.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return ALONE
    numbers = {}
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = environment.get(name, default)
        if not text.isdecimal():
            raise ConfigError(f"{name}: the environment variable is {text!r}; torchrun sets it to a number")
        numbers[name] = int(text)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if not 0 <= rank < size:
        raise ConfigError(f"RANK: the environment variable is {rank}, which is no process of {size} (WORLD_SIZE)")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if size > 1 and missing:
        raise ConfigError(
            f"{' and '.join(missing)}: not set, though WORLD_SIZE is {size}; start the processes by torchrun, or "
            "unset WORLD_SIZE to train in one"
        )
    return Processes(rank, size, numbers["LOCAL_RANK"])


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Meet the other processes that ``torchrun`` started, and part from them at the end.

    The group is gone after the block, and its threads with it: one that is left while the interpreter ends, and gives
    back a tensor then, aborts the process.

    Args:
        device: "cpu", or "cuda" for one GPU a process.

    Raises:
        ConfigError: the environment or the GPUs do not suit, or the others cannot be reached.
    """
    processes = find_processes(os.environ)
    if processes.size == 1:
        yield processes
        return
    own = torch.device(processes.device(device))
    # What is small and on the host goes by gloo, so that it waits for no GPU.
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    if own.type == "cuda":
        torch.cuda.set_device(own)
    try:
        dist.init_process_group(backend, timeout=PATIENCE, device_id=own if own.type == "cuda" else None)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"process {processes.rank} of {processes.size} cannot meet the others at {address}: {error}"
        ) from error
    try:
        yield processes
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # what they hold holds the group
        raise
    finally:
        dist.destroy_process_group()
        gc.collect()  # torch's DistributedDataParallel holds it too, in a circle
