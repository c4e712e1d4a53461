"""The per-element state of optimizers: cleared where weights die, seeded where they grow.

An optimizer is accepted only if a weight whose gradient, state and value are 0 stays exactly 0 under its step,
and the meaning of each of its state tensors is known. Both were verified for the classes listed here
(``tests/test_optimizer_state.py`` repeats the check); any other raises, since a moment that is left behind moves
a dead weight without anyone noticing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_trainer.masks import count_live, zero_dead

SUPPORTED = {
    "torch.optim": ("SGD", "Adam", "AdamW", "Adafactor", "NAdam", "RAdam", "RMSprop", "Adadelta"),
    "timm.optim": (
        "AdamP",
        "AdamWLegacy",
        "Adan",
        "Adopt",
        "Lamb",
        "LaProp",
        "Lars",
        "Lion",
        "MADGRAD",
        "Mars",
        "NAdamLegacy",
        "NAdamW",
        "NvNovoGrad",
        "RAdamLegacy",
        "SGDP",
        "SGDW",
    ),
    "schedulefree": ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"),
}

FIRST_MOMENTS = frozenset(
    {
        "exp_avg",
        "exp_avg_diff",
        "neg_pre_grad",
        "last_grad",
        "momentum",
        "momentum_buffer",
        "grad_avg",
        "acc_delta",
        "s",
        "x0",
        "z",
    }
)
"""State that follows the gradient or the weight: 0 at a dead weight, and 0 where one has just grown."""

FACTORS = ("row_var", "col_var")
"""Second moments of a weight ``[..., rows, columns]`` in torch's Adafactor: the squared gradient as its means over the
columns, ``[..., rows, 1]``, and over the rows, ``[..., 1, columns]``."""

SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_sum_sq", "variance", *FACTORS})
"""State that follows the squared gradient: 0 at a dead weight, the squared growth gradient where one has grown."""

WEIGHT_COPIES = frozenset({"x0", "z"})
"""First moments that the optimizer computes the weight from: a unit that comes brings its weights there too."""

SCALARS = frozenset({"step", "mu_product", "exp_avg_lr_1", "exp_avg_lr_2"})
"""State of one value for a whole parameter, be that of one element or not."""


DENSE_UPDATES = {"torch.optim": ("Muon",), "timm.optim": ("Muon",)}
"""Optimizers that move a weight whose gradient is 0: their step is masked after it was taken.

Muon makes the momentum of a whole matrix orthogonal. Its step within the mask is that update's projection onto the live
weights; the momentum itself stays 0 where weights are dead.
"""


class Optimizers:
    """Several optimizers of one model as one: whose state a parameter has."""

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        self.members = tuple(members)

    def state_of(self, parameter: nn.Parameter) -> MutableMapping[str, Any]:
        """State of the optimizer that moves ``parameter``; empty if there is none yet."""
        for optimizer in self.members:
            if parameter in optimizer.state:
                return optimizer.state[parameter]
        return {}

    def parameters(self) -> set[int]:
        """Identities of all parameters."""
        return {id(p) for optimizer in self.members for group in optimizer.param_groups for p in group["params"]}

    @property
    def updates_are_dense(self) -> bool:
        """Whether a step may move a weight whose gradient is 0."""
        return any(_is_among(optimizer, DENSE_UPDATES) for optimizer in self.members)


def check_supported(optimizer: torch.optim.Optimizer) -> None:
    """Accept an optimizer whose state is understood.

    Raises:
        ValueError: naming the optimizer and the ones that work.
    """
    if _is_among(optimizer, SUPPORTED) or _is_among(optimizer, DENSE_UPDATES):
        return
    known = {package: (*names, *DENSE_UPDATES.get(package, ())) for package, names in SUPPORTED.items()}
    works = "; ".join(f"{package}: {', '.join(names)}" for package, names in known.items())
    raise ValueError(
        f"optimizer {type(optimizer).__module__}.{type(optimizer).__name__}: its state is not understood, so dead "
        f"weights could not be kept at 0. These work: {works}"
    )


def _is_among(optimizer: torch.optim.Optimizer, known: Mapping[str, Sequence[str]]) -> bool:
    return any(
        kind.__module__.startswith(package) and kind.__name__ in names
        for kind in type(optimizer).__mro__
        for package, names in known.items()
    )


def state_of(optimizer: torch.optim.Optimizer | Optimizers, parameter: nn.Parameter) -> MutableMapping[str, Any]:
    """What is kept for ``parameter``; empty if there is nothing yet."""
    if isinstance(optimizer, Optimizers):
        return optimizer.state_of(parameter)
    return optimizer.state.get(parameter, {})


def moments(optimizer: torch.optim.Optimizer | Optimizers, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """The state tensors that hold one value per element of ``parameter``, each with its name.

    Raises:
        ValueError: if one of them is of unknown meaning.
    """
    for key, value in state_of(optimizer, parameter).items():
        if not holds_one_per_element(key, value, parameter):
            continue
        if key not in FIRST_MOMENTS | SECOND_MOMENTS:
            raise ValueError(
                f"optimizer {type(optimizer).__name__}: state {key!r} holds one value per weight and is of unknown "
                f"meaning; known are {', '.join(sorted(FIRST_MOMENTS | SECOND_MOMENTS))}"
            )
        yield key, value


def holds_one_per_element(key: str, value: object, parameter: nn.Parameter) -> bool:
    """Whether a piece of state holds a value for each element of ``parameter``.

    The shape alone does not say so of a parameter of one element: its step may have that shape too.
    """
    return isinstance(value, Tensor) and value.shape == parameter.shape and key not in SCALARS


def is_second_moment(key: str) -> bool:
    return key in SECOND_MOMENTS


def weight_copies(optimizer: torch.optim.Optimizer | Optimizers, parameter: nn.Parameter) -> list[Tensor]:
    """State that the optimizer computes ``parameter`` from, in its shape."""
    return [value for key, value in moments(optimizer, parameter) if key in WEIGHT_COPIES]


def is_factored(state: Mapping[str, Any]) -> bool:
    """Whether the second moment is kept as rows and columns."""
    return all(isinstance(state.get(key), Tensor) for key in FACTORS)


def multiplied_out(state: Mapping[str, Any]) -> Tensor:
    """The second moment that Adafactor takes each weight to have, ``[..., rows, columns]`` in float32 or wider.

    Rows and columns have the same mean, so dividing the rows by theirs first gives the same product without underflow.
    """
    rows, columns = (state[key].to(torch.promote_types(state[key].dtype, torch.float32)) for key in FACTORS)
    mean = rows.mean(dim=-2, keepdim=True)
    return (rows / torch.where(mean > 0, mean, 1)) @ columns


def factored(second_moment: Tensor) -> dict[str, Tensor]:
    """Inverse of :func:`multiplied_out`: what rows and columns of a second moment are on average."""
    return {"row_var": second_moment.mean(dim=-1, keepdim=True), "col_var": second_moment.mean(dim=-2, keepdim=True)}


def change_factors(state: MutableMapping[str, Any], change: Callable[[Tensor], Tensor]) -> None:
    """Change a factored second moment as one of each weight is changed, and factor it again.

    Units are rows or columns. Those that neither came nor left keep the second moments that they had, up to rounding.
    """
    for key, value in factored(change(multiplied_out(state))).items():
        state[key] = value.to(state[key])


def carry_over(
    optimizer: torch.optim.Optimizer | Optimizers,
    parameter: nn.Parameter,
    live: Tensor,
    added: Tensor,
    second_moments: str,
    growth_gradient: Tensor | None = None,
) -> None:
    """Bring the moments of ``parameter`` in line with its new mask.

    Where a weight died all moments become 0. Where one grew the first moment is 0 already, and the second starts

    - ``mean``: at the mean of those that stay live. The grown weight then learns as fast as its neighbours.
    - ``gradient``: at the square of the gradient that grew it. That was the greatest of many noisy ones, so it is far
      above what the weight will see, and fades only over ``1 / (1 - beta2)`` steps: until then the weight moves little.
    - ``zero``: the bias correction of Adam, which knows only the step number, then makes the first step about 3.2 times
      the learning rate: the weight moves fast before it is judged by its magnitude.

    Factors of a matrix know of no single weight and stay as they are, but where a matrix has one row or one column:
    there one of them holds a value per weight.

    Args:
        live: bool, the mask after the update.
        added: bool, the weights that this update grew.
        second_moments: which of the three; without a gradient ``gradient`` means ``mean``.
        growth_gradient: mean gradient at the weights that this update grew, 0 at all others, in the units in
            which the optimizer sees gradients.
    """
    for key, value in moments(optimizer, parameter):
        zero_dead(value, live)
        if not is_second_moment(key) or second_moments == "zero":
            continue
        if second_moments == "gradient" and growth_gradient is not None:
            seed = growth_gradient.to(value.dtype)
            value.addcmul_(seed, seed)
        else:
            stay = (count_live(live) - count_live(added)) or 1
            value.add_(added * (value.sum() / stay))
    state = state_of(optimizer, parameter)
    # Adafactor divides by the mean of the rows. With one row it cancels, with one column it must be that of the other.
    if is_factored(state) and state["row_var"].shape == parameter.shape:
        state["col_var"].copy_(state["row_var"].mean(dim=-2, keepdim=True))
