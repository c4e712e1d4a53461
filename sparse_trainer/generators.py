"""The state of a random generator, from a file that may be a stranger's."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

#: Where torch keeps the position of its CPU generator (Mersenne Twister) in the bytes of its state: the seed, how many
#: of the 624 words are left, whether it was seeded, and the number of the next word.
_POSITION = struct.Struct("<QiiQ")
_WORDS = 624


def restore_generator(generator: torch.Generator, state: Tensor) -> None:
    """Put a generator on the CPU into a saved state.

    torch checks the two numbers of the position one by one, but not that they belong together; it would read beyond
    its words.

    Raises:
        ValueError: if it is no state of such a generator.
    """
    expected = generator.get_state()
    if state.dtype != torch.uint8 or state.shape != expected.shape:
        raise ValueError(f"a random state of {state.dtype} {tuple(state.shape)}, not uint8 {tuple(expected.shape)}")
    state = state.cpu()
    _, left, seeded, following = _POSITION.unpack(bytes(state[: _POSITION.size].numpy()))
    fresh = (left, following) == (1, 0)
    if seeded != 1 or not (fresh or (1 <= left <= _WORDS and left + following == _WORDS + 1)):
        raise ValueError(f"a random state at word {following} of {_WORDS} with {left} left, which cannot be")
    generator.set_state(state)
