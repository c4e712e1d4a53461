"""When a run gives up it says what was not finite first, and until then a bad step moves nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.processes.processes import ALONE
from experiments.training.numerical_trouble import Recording, explain, listed
from experiments.training.objective import Objective
from experiments.training.trainer import Trainer, TrainingError
from tests.test_training import Sick, equal, make_trainer

IMPATIENT: dict[str, Any] = {"training": {"max_bad_steps": 2}, "optimizer": {"name": "sgd", "lr": 1e-4}}


def reason(trainer: Trainer) -> str:
    """What the error says was the first thing."""
    trainer.train_step()
    with pytest.raises(TrainingError) as caught:
        trainer.train_step()
    before, _, after = str(caught.value).partition("; first not finite: ")
    assert before.startswith("step 2: loss or gradient was not finite in 2 steps in a row (loss ")
    return after.partition("; a lower optimizer.lr")[0]


@torch.no_grad()
def poison_weight(trainer: Trainer) -> None:
    trainer.model.get_parameter("blocks.1.mlp.fc1.weight")[3, 4] = math.inf
    trainer.model.get_parameter("head.bias")[0] = math.nan


@torch.no_grad()
def overflow_in_a_module(trainer: Trainer) -> None:
    """Finite numbers whose product is not."""
    trainer.model.get_parameter("blocks.0.mlp.fc1.bias").fill_(1e30)
    trainer.model.get_parameter("blocks.0.mlp.fc2.weight").fill_(1e20)


@torch.no_grad()
def overflow_between_modules(trainer: Trainer) -> None:
    """In the products of queries and keys, which no module gives and the next one takes."""
    trainer.model.get_parameter("blocks.0.attn.qkv.bias").fill_(1e25)


def poison_images(trainer: Trainer) -> None:
    images = trainer.data.train

    class Poisoned:
        def __getattr__(self, name: str) -> Any:
            return getattr(images, name)

        def batches(self, *arguments: int) -> Any:
            for pictures, targets in images.batches(*arguments):
                pictures[0, 0, 0, 0] = math.nan
                yield pictures, targets

    object.__setattr__(trainer.data, "train", Poisoned())


class Lost(nn.Module):
    """Finite for finite logits, with a gradient that is not."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits * 0).sum().sqrt()


def poison_loss(trainer: Trainer) -> None:
    trainer.objective.loss = Sick(trainer.objective.loss, lambda call: True)


def poison_gradient(trainer: Trainer) -> None:
    trainer.objective.loss = Lost()


def poison_twice(trainer: Trainer) -> None:
    trainer.objective.loss = Sick(trainer.objective.loss, lambda call: call <= 2)


@pytest.mark.parametrize(
    ("poison", "first"),
    [
        (poison_weight, "the weights blocks.1.mlp.fc1.weight, head.bias"),
        (overflow_in_a_module, "the output of blocks.0.mlp.fc2"),
        (overflow_between_modules, "the input of blocks.0.attn.norm"),
        (poison_images, "the images or targets of the batch"),
        (poison_loss, "the loss, of outputs that are finite"),
        (poison_gradient, "the gradient at head's output"),
        (
            poison_twice,
            "the gradients of cls_token, pos_embed, patch_embed.proj.weight and 29 more, but nothing when the step "
            "was run again",
        ),
    ],
)
def test_what_was_first_is_named(poison: Callable[[Trainer], None], first: str) -> None:
    trainer = make_trainer(IMPATIENT, {"sparsity": None})
    poison(trainer)
    assert reason(trainer) == first


class Watching(Objective):
    """Remembers what it found."""

    losses: list[Tensor]

    def terms(self, *arguments: Any) -> Any:
        found = super().terms(*arguments)
        self.losses.append(found[0]["loss_ce"].detach())
        return found


def test_the_step_is_run_again_as_it_was() -> None:
    """An accumulated step in which a selector and drop path draw; it leaves nothing behind."""
    changes = {
        "training": {"accumulate": 2},
        "model": {"drop_path": 0.3},
        "selector": {"keep_ratio": 0.5, "noise": 1.0},
    }
    trainer, other = (make_trainer(changes) for _ in range(2))
    for one in (trainer, other):
        one.objective.__class__ = Watching
        one.objective.losses = []  # type: ignore[attr-defined]
        torch.manual_seed(7)
        if one is trainer:
            one.train_step()
    model: Any = other.model
    recording = Recording(model, other.device, [other.feed.next() for _ in range(2)])
    torch.rand(5)
    torch.rand(5, generator=model.selector.generator)
    before = torch.get_rng_state(), model.selector.get_extra_state()
    text = explain(recording, other.objective, ALONE, lambda loss: loss)
    assert text == "first not finite: the loss, but nothing when the step was run again"
    assert equal(other.objective.losses, trainer.objective.losses)  # type: ignore[attr-defined]
    assert equal(before, (torch.get_rng_state(), model.selector.get_extra_state()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_names_are_listed_up_to_a_few() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_bad_step_does_not_shorten_the_collecting_of_the_growth_gradient(clip: float | None) -> None:
    """Its backward passes are not those of the step after it: eight passes are four steps of two, before and after."""
    settings = {"sparsity": {"updates": None, "update_every": 9, "growth_batches": 8}, "training": {"accumulate": 2}}
    trainer = make_trainer({**settings, "training": {"accumulate": 2, "epochs": 4, "clip_grad": clip}})
    trainer.objective.loss = Sick(trainer.objective.loss, lambda call: call in (2, 13))
    sparsity = trainer.sparsity
    assert sparsity is not None
    assert sparsity._weights is not None
    collecting = []
    while True:
        collecting.append(sparsity._weights.growth.collecting)
        result = trainer.train_step()
        if result.update is not None:
            break
    # Of eleven steps the first and the seventh are bad; the last four good ones, and what is bad between them, collect.
    assert trainer.tried == 11
    assert collecting == [False] * 2 + [False] * 4 + [True] * 5
    assert trainer.state_dict()["sparsity"]["passes_per_step"] == 2
