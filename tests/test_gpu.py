"""What holds on a CPU holds on a GPU, whose kernels are others: masks, units, precision, packing, resume.

Where a test can run on both it does, so that it is itself tried on a machine without a GPU. Two processes are in
``test_distributed.py``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.benchmarks.inference import calibrate
from experiments.data.create_data import create_data
from experiments.run_folder.random_states import deterministic_algorithms
from experiments.training.trainer import Trainer
from models import create_model, packing
from models.packing import attend_padded, attend_varlen, has_varlen_kernel, lay_out
from sparse_trainer import MaskUpdate, SparsityConfig, SparsityScheduler
from sparse_trainer.masks import prune_and_grow, replaceable
from tests.conftest import DEVICES, TINY
from tests.test_scheduler import assert_invariants
from tests.test_training import configure, equal, json_like

Factory = Callable[..., nn.Module]
Batch = tuple[Tensor, Tensor]
UNITS = SparsityConfig(density=0.35, head_density=0.67, neuron_density=0.5, update_every=2, swap="always")
ROUNDED = pytest.mark.filterwarnings("ignore:.*is rounded to", "ignore:.*growth changes nothing")


def batches(device: str, count: int = 8, channels: int = 1) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    while True:
        images = torch.randn(count, channels, 16, 16, generator=generator)
        yield images.to(device), torch.randint(5, (count,), generator=generator).to(device)


def train(
    model: nn.Module,
    config: SparsityConfig,
    device: str,
    *,
    steps: int = 7,
    scaler: torch.amp.GradScaler | None = None,
    forward: nn.Module | None = None,
    amp: torch.dtype | None = None,
    **options: Any,
) -> list[MaskUpdate]:
    """Steps after each of which the invariants are looked at."""
    model = model.to(device)
    scheduler = SparsityScheduler(model, config, total_steps=20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    scheduler.attach(optimizer)
    live, updates = scheduler.budget.live, []
    for _, (images, targets) in zip(range(steps), batches(device), strict=False):

        def loss(
            network: nn.Module = forward if forward is not None else model,
            images: Tensor = images,
            targets: Tensor = targets,
        ) -> Tensor:
            with torch.autocast(device, dtype=amp, enabled=amp is not None):
                return F.cross_entropy(network(images).float(), targets)

        if scaler is None:
            loss().backward()
            optimizer.step()
        else:
            scaler.scale(loss()).backward()
            scaler.step(optimizer)
            scaler.update()
        update = scheduler.step(lambda loss=loss: loss(model))  # type: ignore[misc]
        updates += [update] if update is not None else []
        assert_invariants(scheduler, optimizer, live)
        optimizer.zero_grad()
        assert all(mask.device.type == device for mask in scheduler.masks.values())
    return updates


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["fused", "foreach", "capturable"])
@pytest.mark.parametrize("distribution", ["erk", "global"])
def test_a_dead_weight_is_0_in_every_kernel(kernel: str, distribution: str, device: str, tiny_deit: Factory) -> None:
    if kernel == "capturable" and device == "cpu":
        kernel = "amsgrad"  # torch has no capturable optimizer for a CPU
    config = SparsityConfig(update_every=2, distribution=distribution)  # type: ignore[arg-type]
    updates = train(tiny_deit(), config, device, **{kernel: True})
    assert len(updates) == 3
    assert all(update.churn > 0 for update in updates)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_that_overflows_moves_nothing(fused: bool, device: str, tiny_deit: Factory) -> None:
    model = tiny_deit().to(device)
    scheduler = SparsityScheduler(model, SparsityConfig(update_every=2), total_steps=20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scheduler.attach(optimizer)
    scaler = torch.amp.GradScaler(device, init_scale=2.0)
    found = []
    for step, (images, targets) in zip(range(5), batches(device), strict=False):
        with torch.autocast(device, dtype=torch.float16, enabled=device == "cuda"):
            loss = F.cross_entropy(model(images).float(), targets)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(loss * (float("inf") if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(scheduler.step() is not None)
        moved = any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        assert moved == (step != 1)
        optimizer.zero_grad()
    assert found == [False, False, True, False, True]
    assert scheduler.step_number == 4
    assert scaler.get_scale() == 1.0


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_and_a_loss_scale(device: str, tiny_deit: Factory) -> None:
    assert len(train(tiny_deit(), SparsityConfig(update_every=2), device, amp=torch.bfloat16)) == 3
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    assert len(train(tiny_deit(), SparsityConfig(update_every=2), device, scaler=scaler, fused=True)) == 3


@pytest.mark.parametrize("device", DEVICES)
def test_what_grows_has_the_greatest_gradient(device: str, tiny_deit: Factory) -> None:
    """The masks after an update are what the pure functions say on a CPU of that device's weights and gradients."""
    model = tiny_deit().to(device)
    scheduler = SparsityScheduler(model, SparsityConfig(update_every=1, drop_fraction=0.3), total_steps=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin = copy.deepcopy(model)
    scheduler.attach(optimizer)
    images, targets = next(batches(device))
    with deterministic_algorithms(True):
        for network in (twin, model):
            F.cross_entropy(network(images), targets).backward()
    optimizer.step()
    before = {name: mask.clone().cpu() for name, mask in scheduler.masks.items()}
    weights = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    assert scheduler.step() is not None
    for name, mask in before.items():
        gradient = twin.get_parameter(name).grad
        assert gradient is not None
        expected = prune_and_grow(
            weights[name], mask, gradient.cpu().abs(), replaceable(mask, scheduler.schedule.fraction(1))
        )
        assert torch.equal(scheduler.masks[name].cpu(), expected.live), name


@ROUNDED
@pytest.mark.parametrize("device", DEVICES)
def test_heads_and_neurons(device: str, tiny_deit: Factory) -> None:
    model = tiny_deit()
    updates = train(model, UNITS, device, fused=True)
    assert len(updates) == 3
    assert sum(len(block.neurons_added) for update in updates for block in update.blocks.values()) > 0
    assert model.get_parameter("blocks.0.mlp.fc1.weight").shape == (48, 24)
    assert model.get_parameter("blocks.0.attn.qkv.weight").shape == (48, 24)  # 2 of 3 heads of 8, for q, k and v


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_compiled_again(device: str, tiny_deit: Factory) -> None:
    """A mask that changes is no other graph, and the masks see the gradients of what was compiled."""
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(len(graphs))
        return graph.forward

    torch._dynamo.reset()
    model = tiny_deit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about the machine
        updates = train(model, SparsityConfig(update_every=2), device, forward=torch.compile(model, backend=count))
        assert len(updates) == 3
        assert len(graphs) == 1
        if device == "cuda":
            torch._dynamo.reset()
            model = tiny_deit()
            compiled = torch.compile(model)
            assert len(train(model, SparsityConfig(update_every=2), device, forward=compiled)) == 3  # type: ignore[arg-type]


@pytest.mark.cuda
@pytest.mark.skipif(packing.varlen_attn is None, reason="this torch has no attention over unequal lengths")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 6])
def test_unequal_lengths_in_one_kernel(heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 198, (64,), generator=generator)
    layout = lay_out((torch.arange(197) < lengths[:, None]).cuda())[0]
    q, k, v = torch.randn(int(lengths.sum()), 3, heads, 64, generator=generator).cuda().to(dtype).unbind(1)
    assert has_varlen_kernel(v)
    expected = attend_padded(q.float(), k.float(), v.float(), layout)
    tolerance = 2e-3 if dtype == torch.float16 else 2e-2
    torch.testing.assert_close(attend_varlen(q, k, v, layout).float(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(attend_padded(q, k, v, layout).float(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_prediction_does_not_depend_on_its_batch(device: str) -> None:
    """With thresholds, where each image keeps its own number of patches."""
    torch.manual_seed(0)
    sizes = {**TINY, "embed_dim": 64, "num_heads": 2, "depth": 3}
    selector = {"kind": "threshold", "stages": (1,)}
    model = create_model("deit_tiny_patch16_224", selector=selector, **sizes).to(device).eval()
    images, _ = next(batches(device, 12))
    counts = calibrate(model, images, 0.5).counts[:, 0]
    assert counts.min() < counts.max()
    with torch.inference_mode():
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), alone, atol=1e-5 if device == "cpu" else 1e-3, rtol=0)


CHANGES: dict[str, Any] = {
    "data": {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.3, "crop_padding": 2},
    "model": {"drop_path": 0.2, "kwargs": {"embed_dim": 24, "depth": 2, "patch_size": 7}},
    "sparsity": {"density": 0.5, "updates": None, "update_every": 3, "growth_batches": 2},
    "training": {"epochs": 2, "clip_grad": 1.0, "ema_decay": 0.9},
}


def trainer_on(device: str, **training: Any) -> Trainer:
    config = configure(CHANGES, {"training": {"device": device, **training}})
    return Trainer(config, create_data(config.data, device=config.training.device, seed=0))


def stopped_and_not(device: str, **training: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What eight steps lead to, in one go, and with the state carried over after the fifth."""
    whole = trainer_on(device, **training)
    for step in range(8):
        if step == 5:
            saved = json_like(whole.state_dict())
        whole.train_step()
    resumed = trainer_on(device, **training)
    resumed.load_state_dict(saved)
    for _ in range(3):
        resumed.train_step()
    return whole.state_dict(), resumed.state_dict()


@pytest.mark.parametrize("amp", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_has_the_same_bits(device: str, amp: str) -> None:
    with deterministic_algorithms(True):
        whole, resumed = stopped_and_not(device, amp=amp)
    assert equal(whole, resumed)


@pytest.mark.parametrize("device", DEVICES)
def test_without_deterministic_algorithms_it_sees_the_same_images_and_draws(device: str) -> None:
    """Sums may be rounded in another order; three steps later the weights are still close, and as many are live."""
    whole, resumed = stopped_and_not(device, amp="float32")
    assert whole["random"] == resumed["random"]
    assert (whole["tried"], whole["step"]) == (resumed["tried"], resumed["step"]) == (8, 8)
    for name, value in whole["model"].items():
        torch.testing.assert_close(resumed["model"][name], value, atol=1e-2, rtol=0)
