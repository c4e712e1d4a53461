from __future__ import annotations

import importlib

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from sparse_trainer.optimizer_state import SUPPORTED, carry_over, check_supported, moments

NAMES = [
    *("sgd", "momentum", "sgdw", "sgdp", "adam", "adamw", "adamwlegacy", "nadam", "nadamw", "radam", "adamp"),
    *(
        "lamb",
        "lars",
        "lion",
        "adan",
        "adopt",
        "laprop",
        "mars",
        "madgrad",
        "rmsprop",
        "adadelta",
        "novograd",
    ),
    *("cadamw", "clion", "nadamlegacy", "radamlegacy", "torch.optim.Adafactor"),
    *("schedulefree.AdamWScheduleFree", "schedulefree.RAdamScheduleFree", "schedulefree.SGDScheduleFree"),
]


def created(name: str, layer: nn.Module) -> torch.optim.Optimizer:
    """By its name in timm, or by a full name."""
    if "." not in name:
        return create_optimizer_v2(layer, opt=name, lr=1e-2, weight_decay=0.05)
    package, _, kind = name.rpartition(".")
    optimizer = getattr(importlib.import_module(package), kind)(layer.parameters(), lr=1e-2)
    if package == "schedulefree":
        optimizer.train()
    return optimizer


@pytest.mark.parametrize("name", NAMES)
def test_a_supported_optimizer_leaves_dead_weights_alone(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 6)
    mask = torch.rand(6, 8) < 0.5
    layer.weight.data.mul_(mask)
    optimizer = created(name, layer)
    check_supported(optimizer)
    for _ in range(4):
        layer.weight.grad, layer.bias.grad = torch.randn(6, 8) * mask, torch.randn(6)
        optimizer.step()
    assert (layer.weight[~mask] == 0).all()
    assert (layer.weight[mask] != 0).all()
    for _, value in moments(optimizer, layer.weight):
        assert (value[~mask] == 0).all()


def test_every_supported_class_is_covered() -> None:
    layer = nn.Linear(2, 2)
    classes = {type(created(name, layer)).__name__ for name in NAMES}
    assert classes == {name for names in SUPPORTED.values() for name in names}


@pytest.mark.parametrize("name", ["adafactor", "adahessian", "adabelief", "rmsproptf", "adamax"])
def test_others_are_refused_by_name(name: str) -> None:
    optimizer = create_optimizer_v2(nn.Linear(2, 2), opt=name, lr=0.1)
    with pytest.raises(ValueError, match=f"{type(optimizer).__name__}: its state is not understood"):
        check_supported(optimizer)


def test_a_subclass_with_state_of_its_own_is_caught() -> None:
    class Odd(torch.optim.SGD):
        pass

    layer = nn.Linear(2, 2)
    optimizer = Odd(layer.parameters(), lr=0.1)
    check_supported(optimizer)
    optimizer.state[layer.weight]["secret"] = torch.ones(2, 2)
    with pytest.raises(ValueError, match="'secret' holds one value per weight"):
        list(moments(optimizer, layer.weight))


@pytest.mark.parametrize(
    ("start", "expected"),
    [("mean", [1.0, 0.0, 3.0, 2.0]), ("gradient", [1.0, 0.0, 3.0, 25.0]), ("zero", [1.0, 0.0, 3.0, 0.0])],
)
def test_moments_follow_the_mask_by_hand(start: str, expected: list[float]) -> None:
    """The second of four weights dies, the last one grows by a gradient of 5; those that stay have 1 and 3."""
    layer = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.state[layer.weight] = {
        "step": torch.tensor(7.0),
        "exp_avg": torch.tensor([[0.1, 0.2, 0.3, 0.0]]),
        "exp_avg_sq": torch.tensor([[1.0, 9.0, 3.0, 0.0]]),
    }
    live, added = torch.tensor([[True, False, True, True]]), torch.tensor([[False, False, False, True]])
    carry_over(optimizer, layer.weight, live, added, start, torch.tensor([[0.0, 0.0, 0.0, -5.0]]))
    state = optimizer.state[layer.weight]
    assert torch.equal(state["exp_avg"], torch.tensor([[0.1, 0.0, 0.3, 0.0]]))
    assert torch.equal(state["exp_avg_sq"], torch.tensor([expected]))


def test_moments_where_nothing_stays() -> None:
    layer = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.state[layer.weight] = {"exp_avg_sq": torch.tensor([[4.0, 0.0]])}
    live = torch.tensor([[False, True]])
    carry_over(optimizer, layer.weight, live, live.clone(), "mean")
    assert torch.equal(optimizer.state[layer.weight]["exp_avg_sq"], torch.zeros(1, 2))
