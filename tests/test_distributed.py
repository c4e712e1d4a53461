"""Two processes with half of each batch hold the same masks, and the same as one process with all of it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models import create_model
from sparse_trainer import SparsityConfig, SparsityScheduler
from tests.conftest import DEVICES, TINY

CONFIGS: dict[str, dict[str, Any]] = {
    "weights": {"density": 0.5},
    "joint": {"density": 0.35, "head_density": 0.67, "neuron_density": 0.5, "swap": "always"},
    "tokens": {"density": 0.35, "head_density": 0.67, "neuron_density": 0.5, "swap": "always"},
}
SELECTORS = {"tokens": {"kind": "threshold", "stages": (1,), "thresholds": (0.005,)}}


def train(kind: str, rank: int, world: int, device: str = "cpu") -> dict[str, Any]:
    """Six steps with three updates; in float64, so that the order of summation decides nothing."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = create_model("deit_tiny_patch16_224", selector=SELECTORS.get(kind), **TINY).double().to(device)
    config = SparsityConfig(update_every=2, drop_fraction=0.6, **CONFIGS[kind])
    scheduler = SparsityScheduler(model, config, total_steps=12)
    thresholds = [p for name, p in model.named_parameters() if name == "selector.thresholds"]
    others = [p for name, p in model.named_parameters() if name != "selector.thresholds"]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": thresholds, "lr": 1e-5}], lr=1e-2)
    scheduler.attach(optimizer)
    parallel: nn.Module = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    generator = torch.Generator().manual_seed(1)
    updates = 0
    for _ in range(6):
        images = torch.randn(8, 1, 16, 16, generator=generator, dtype=torch.float64)
        targets = torch.randint(5, (8,), generator=generator)
        images, targets = images.to(device), targets.to(device)
        part = slice(rank * 8 // world, (rank + 1) * 8 // world)

        def loss(network: nn.Module, images: Tensor = images[part], targets: Tensor = targets[part]) -> Tensor:
            return F.cross_entropy(network(images), targets)

        loss(parallel).backward()
        optimizer.step()
        updates += scheduler.step(lambda loss=loss: loss(model)) is not None  # type: ignore[misc]
        optimizer.zero_grad()
    assert updates == 3
    return {
        "masks": dict(scheduler.masks),
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "heads": scheduler.live_heads,
        "neurons": scheduler.live_neurons,
    }


def work(rank: int, folder: str, device: str = "cpu") -> None:
    """Two processes on one GPU talk by gloo, since NCCL wants one each."""
    many = device == "cuda" and torch.cuda.device_count() > 1
    if many:
        torch.cuda.set_device(rank)
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("nccl" if many else "gloo", init_method=place, rank=rank, world_size=2)
    torch.save({kind: train(kind, rank, 2, device) for kind in CONFIGS}, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=DEVICES)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, by kind."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(work, args=(str(folder), request.param), nprocs=2)
    found = [folder / f"{rank}.pt" for rank in range(2)]
    return [torch.load(file, weights_only=True, map_location=request.param) for file in found]


@pytest.mark.filterwarnings("ignore:.*is rounded to", "ignore:.*growth changes nothing")
@pytest.mark.parametrize("kind", CONFIGS)
def test_two_processes_equal_one(kind: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[kind] for rank in ranks)
    alone = train(kind, 0, 1, first["weights"]["cls_token"].device.type)
    for name, mask in alone["masks"].items():
        assert torch.equal(first["masks"][name], second["masks"][name])
        assert torch.equal(first["masks"][name], mask), name
    assert first["heads"] == second["heads"] == alone["heads"]
    assert first["neurons"] == second["neurons"] == alone["neurons"]
    for name, weight in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], weight, atol=1e-6, rtol=0)
