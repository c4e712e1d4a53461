from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from sparse_trainer.live_units import LiveUnits, Swap
from sparse_trainer.optimizer_state import (
    SUPPORTED,
    Optimizers,
    carry_over,
    check_supported,
    factored,
    moments,
    multiplied_out,
)
from sparse_trainer.scheduler import SparsityScheduler
from sparse_trainer.sparsity_config import SparsityConfig
from sparse_trainer.unit_exchange import exchange
from sparse_trainer.unit_reshaping import grow, nothing_else, shrink
from sparse_trainer.units import find_blocks, keep

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


def changes_in_training(
    model: nn.Module, name: str, config: SparsityConfig, images: Tensor, targets: Tensor, steps: int
) -> int:
    """Train, and check after each step that dead weights and their moments are 0.

    Returns:
        how many updates changed masks, heads or neurons.
    """
    scheduler = SparsityScheduler(model, config, total_steps=2 * steps)
    optimizer = created(name, model)
    scheduler.attach(optimizer)
    changed = 0

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(images), targets)

    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        update = scheduler.step(loss)
        if update is not None:
            moved = [block.heads_removed or block.neurons_removed for block in update.blocks.values()]
            changed += any(moved) or any(layer.grown for layer in update.layers.values())
        for key, parameter in model.named_parameters():
            assert bool(parameter.isfinite().all()), key
            mask = scheduler.masks.get(key)
            for moment, value in moments(optimizer, parameter):
                assert value.shape == parameter.shape
                assert mask is None or bool((value[~mask] == 0).all()), (key, moment)
            assert mask is None or bool((parameter[~mask] == 0).all()), key
    scheduler.detach()
    return changed


UNITS = {
    "uniform": SparsityConfig(density=0.3, head_density=0.67, neuron_density=0.5, update_every=2, swap="always"),
    "global": SparsityConfig(
        density=0.3,
        head_density=0.67,
        neuron_density=0.5,
        update_every=2,
        drop_fraction=0.5,
        swap="always",
        unit_distribution="global",
        unit_moments="mean",
    ),
    "falls": SparsityConfig(density=0.3, head_density=0.67, neuron_density=0.5, update_every=2, unit_falls=2),
    "units alone": SparsityConfig(
        density=None, head_density=0.67, neuron_density=0.5, update_every=2, drop_fraction=0.5, swap="always"
    ),
}


@pytest.mark.filterwarnings("ignore:(the schedule was not reached|head_density|neuron_density|what came back)")
@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("name", [*NAMES, "muon"])
def test_every_optimizer_trains_a_vit_whose_heads_and_neurons_change(
    name: str, units: str, tiny_deit: Callable[..., nn.Module], tiny_batch: tuple[Tensor, Tensor]
) -> None:
    assert changes_in_training(tiny_deit(depth=3), name, UNITS[units], *tiny_batch, steps=9) >= 3


@pytest.mark.filterwarnings("ignore:the schedule was not reached")
@pytest.mark.parametrize("name", [*NAMES, "muon"])
def test_every_optimizer_trains_convolutions_of_any_shape(name: str) -> None:
    """Kernels of 1x1, depthwise ones of one row and of one column, a layer of one output, biases of one element."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, (3, 1), groups=8),
        nn.Conv2d(8, 8, (1, 3), groups=8),
        nn.Conv2d(8, 1, 1),
        nn.Flatten(),
        nn.Linear(16, 1),
        nn.Linear(1, 5),
    )
    config = SparsityConfig(density=0.5, distribution="uniform", update_every=2, drop_fraction=0.5, regrow=False)
    images, targets = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
    assert changes_in_training(model, name, config, images, targets, steps=8) >= 3


def test_factors_are_multiplied_out_by_hand() -> None:
    """Squared gradients of rank one are known from their rows and columns alone."""
    squares = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    state = {"row_var": torch.tensor([[2.0], [4.0]]), "col_var": torch.tensor([[1.5, 3.0, 4.5]])}
    assert torch.allclose(multiplied_out(state), squares)
    again = factored(squares)
    assert all(torch.equal(again[key], state[key]) for key in state)
    tiny = {key: value * 1e-30 for key, value in state.items()}  # whose products a float32 does not hold
    assert torch.allclose(multiplied_out(tiny) * 1e30, squares)
    nothing = {key: torch.zeros_like(value) for key, value in state.items()}
    assert torch.equal(multiplied_out(nothing), torch.zeros(2, 3))


def test_factors_of_a_layer_stay_as_they_are_when_weights_change() -> None:
    layer = nn.Linear(4, 3)
    optimizer = torch.optim.Adafactor(layer.parameters())
    layer.weight.grad, layer.bias.grad = torch.randn(3, 4), torch.randn(3)
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[layer.weight].items()}
    live = torch.rand(3, 4) < 0.5
    carry_over(optimizer, layer.weight, live, torch.zeros_like(live), "mean")
    assert all(torch.equal(before[key], value) for key, value in optimizer.state[layer.weight].items())


@pytest.mark.parametrize("kernel", [(1, 1), (3, 1), (1, 3)])
def test_a_factor_with_a_value_per_weight_follows_the_mask(kernel: tuple[int, int]) -> None:
    """One weight of each kernel dies: what is left of its squares is 0, and the other factor is their mean again."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, kernel, groups=4 if max(kernel) > 1 else 1)
    optimizer = torch.optim.Adafactor(layer.parameters())
    gradient = torch.randn_like(layer.weight)
    layer.weight.grad, layer.bias.grad = gradient.clone(), torch.randn(4)
    optimizer.step()
    live = torch.ones_like(layer.weight, dtype=torch.bool)
    live[:, :1, :1, :1] = False
    carry_over(optimizer, layer.weight, live, torch.zeros_like(live), "zero")
    torch.testing.assert_close(multiplied_out(optimizer.state[layer.weight]), gradient.square() * live)


class Block:
    """The six neurons of a tiny block, of which the first ones are live, and an optimizer that has stepped once."""

    def __init__(self, model: nn.Module, kind: str, live: int = 5) -> None:
        self.model = model
        self.group = find_blocks(model)["blocks.0"].neurons
        self.units = LiveUnits(model, self.group, range(live))
        keep(model, self.group, range(live), fold_biases=False)
        self.parameters = dict(model.named_parameters())
        self.optimizer = created(kind, model)
        for parameter in self.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizers = Optimizers([self.optimizer])

    def squares(self) -> dict[str, Tensor]:
        """What the optimizer takes for the squared gradients of each tensor that knows of the neurons."""
        states = {part.name: self.optimizer.state[self.parameters[part.name]] for part in self.group.slices}
        return {name: s["variance"].clone() if "variance" in s else multiplied_out(s) for name, s in states.items()}

    def check(self, expected: dict[str, Tensor]) -> None:
        """Factors are the means over rows and columns of the expected squares; a vector has them as they are."""
        for name, squares in expected.items():
            state = self.optimizer.state[self.parameters[name]]
            wanted = factored(squares) if squares.ndim > 1 else {"variance": squares}
            for key, value in wanted.items():
                torch.testing.assert_close(state[key], value)
            assert state["step"] == 1

    def swap(self, seed_moments: bool) -> None:
        exchange(
            self.units,
            Swap(slots=(1,), removed=(1,), added=(5,), writing=(1,)),
            self.parameters,
            optimizer=self.optimizers,
            ema={},
            masks={},
            seed_moments=seed_moments,
        )

    def shrink(self, slots: Sequence[int] = (0, 2, 3, 4)) -> None:
        shrink(self.units, slots, self.parameters, optimizer=self.optimizers, ema=None, others=nothing_else)

    def grow(self) -> None:
        grow(self.units, [0], self.parameters, writing=[0], optimizer=self.optimizers, ema=None, others=nothing_else)


@pytest.fixture
def block(tiny_deit: Callable[..., nn.Module]) -> Callable[..., Block]:
    return lambda kind, live=5: Block(tiny_deit(mlp_ratio=0.25), kind, live)


ADAFACTOR = "torch.optim.Adafactor"


@pytest.mark.parametrize("seed_moments", [False, True])
def test_squares_of_a_unit_that_came_begin_anew(block: Callable[..., Block], seed_moments: bool) -> None:
    made = block(ADAFACTOR)
    squares = made.squares()
    made.swap(seed_moments)
    for part in made.group.slices:
        by_unit = part.units(squares[part.name])
        by_unit[1] = by_unit[[0, 2, 3, 4]].mean(dim=0) if seed_moments else 0.0
    made.check(squares)
    after = made.squares()
    for part in made.group.slices:
        torch.testing.assert_close(
            part.take(after[part.name], [0, 2, 3, 4]), part.take(squares[part.name], [0, 2, 3, 4])
        )


def test_squares_of_a_unit_that_left_are_gone(block: Callable[..., Block]) -> None:
    made = block(ADAFACTOR)
    squares = made.squares()
    made.shrink()
    made.check({part.name: part.take(squares[part.name], [0, 2, 3, 4]) for part in made.group.slices})


def test_squares_of_a_unit_in_a_new_slot_begin_at_zero(block: Callable[..., Block]) -> None:
    made = block(ADAFACTOR)
    squares = made.squares()
    made.grow()
    made.check(
        {
            part.name: part.join(squares[part.name], torch.zeros_like(part.take(squares[part.name], [0])))
            for part in made.group.slices
        }
    )


COPIES = {"schedulefree.AdamWScheduleFree": "z", "madgrad": "x0"}
"""State that the weight is computed from: with 0 there, the next step takes a unit that came back to 0."""


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("change", ["swap", "grow"])
def test_a_copy_of_the_weights_is_that_of_the_unit_that_came(
    kind: str, change: str, block: Callable[..., Block]
) -> None:
    made = block(kind)
    coming = {part.name: part.take(made.units.candidates[part.name], [0]) for part in made.group.slices}
    if change == "swap":
        made.swap(False)
    else:
        made.grow()
    for part in made.group.slices:
        parameter = made.parameters[part.name]
        slot = 1 if change == "swap" else 5
        assert torch.equal(part.take(parameter.data, [slot]), coming[part.name])
        assert torch.equal(part.take(made.optimizer.state[parameter][COPIES[kind]], [slot]), coming[part.name])


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("change", ["swap", "shrink"])
def test_a_copy_of_the_output_bias_takes_the_constant_too(kind: str, change: str, block: Callable[..., Block]) -> None:
    made = block(kind)
    with torch.no_grad():  # a neuron that reads nothing adds a constant
        part = made.group.inputs[0]
        part.units(made.parameters[part.name].data)[1] = 0
    bias = made.parameters[made.group.output_bias or ""]
    copy = made.optimizer.state[bias][COPIES[kind]]
    before = bias.detach().clone(), copy.clone()
    made.swap(False) if change == "swap" else made.shrink()
    assert not torch.equal(bias, before[0])
    torch.testing.assert_close(copy - before[1], bias - before[0])


@pytest.mark.parametrize("name", [*NAMES, "muon"])
def test_moments_of_one_neuron_are_no_scalars(name: str, block: Callable[..., Block]) -> None:
    """A bias of one element has moments of shape ``[1]``, and they become two when a second neuron comes."""
    made = block(name, live=1)
    bias = made.parameters[made.group.inputs[-1].name]
    assert bias.shape == (1,)
    if "step" in made.optimizer.state[bias] and isinstance(made.optimizer.state[bias]["step"], Tensor):
        made.optimizer.state[bias]["step"] = made.optimizer.state[bias]["step"].reshape(1)  # as some have it
    made.grow()
    for parameter in made.parameters.values():
        parameter.grad = torch.randn_like(parameter)
    assert all(value.shape == (2,) for _, value in moments(made.optimizer, bias))
    step = made.optimizer.state[bias].get("step")
    assert not isinstance(step, Tensor) or step.numel() == 1
    made.optimizer.step()
    made.shrink([1])
    assert all(value.shape == (1,) for _, value in moments(made.optimizer, bias))


@pytest.mark.filterwarnings("ignore:(the schedule was not reached|neuron_density|what came back)")
def test_a_block_of_one_neuron_grows_again(
    tiny_deit: Callable[..., nn.Module], tiny_batch: tuple[Tensor, Tensor]
) -> None:
    config = SparsityConfig(
        density=None,
        neuron_density=0.5,
        unit_distribution="global",
        update_every=1,
        drop_fraction=0.5,
        swap="always",
    )
    changes_in_training(tiny_deit(depth=3, mlp_ratio=0.25), "adamw", config, *tiny_batch, steps=30)
