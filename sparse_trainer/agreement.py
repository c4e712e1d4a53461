"""What processes that train one network together must agree on, and how they notice that they do not.

All of it is by ``torch.distributed``'s default group; without one, a process agrees with itself. What is said here is
said at updates, or on the few steps before one: between updates no mask costs a byte.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_trainer.masks import pack_bits

NAMED = 3  #: differences that an error lists


class DisagreementError(RuntimeError):
    """Processes that should hold the same masks hold different ones; the run cannot go on from there."""


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """``tensor`` (contiguous), which becomes the sum of what every process has, in the same bits on each."""
    if process_count() > 1:
        dist.all_reduce(tensor)
    return tensor


def on_any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is True on at least one process."""
    if process_count() == 1:
        return flag
    return bool(sum_over_processes(torch.tensor(int(flag), device=device)))


def mask_digest(mask: Tensor) -> int:
    """64 bits of BLAKE2 over a packed bool mask of any shape: different masks have different ones."""
    return _digest(pack_bits(mask).numpy().tobytes())


def order_digest(units: Sequence[int]) -> int:
    """The same over numbers in their order."""
    return _digest(",".join(map(str, units)).encode())


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def check_agreement(facts: Mapping[str, int], device: torch.device, when: str) -> None:
    """Compare what every process holds; called by all of them, with the same names.

    Args:
        facts: a digest (or any 64-bit number) by the name of what it stands for.
        device: where the processes' group can send from.
        when: for the message.

    Raises:
        DisagreementError: on every process, naming what differs on which.
    """
    if process_count() == 1:
        return
    table = torch.zeros(process_count(), len(facts), dtype=torch.int64, device=device)
    table[dist.get_rank()] = torch.tensor(list(facts.values()), dtype=torch.int64)
    # A sum of rows that are 0 but for one: every backend can add on every device, not all can gather.
    problems = differences(list(facts), sum_over_processes(table).tolist())
    if problems:
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise DisagreementError(f"{when} the processes differ: {'; '.join(problems[:NAMED])}{more}")


def differences(names: Sequence[str], table: Sequence[Sequence[int]]) -> list[str]:
    """What differs in the ``table`` ``[processes][names]``, and on which processes.

    Right is what most of them hold; where as many hold the one as the other, what the first of them holds.
    """
    problems = []
    for index, name in enumerate(names):
        column = [row[index] for row in table]
        ((right, _),) = Counter(column).most_common(1)  # of equally many the one that came first
        odd = [str(rank) for rank, value in enumerate(column) if value != right]
        if odd:
            processes = f"process {odd[0]} has" if len(odd) == 1 else f"processes {', '.join(odd)} have"
            problems.append(f"{processes} another {name} than process {column.index(right)}")
    return problems
