"""What was trained is what is loaded: weights, heads, neurons and tokens, alone and together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models import create_model
from sparse_trainer import SparseInfo, SparsityConfig, SparsityScheduler, expand, load_sparse, save_sparse
from sparse_trainer.units import find_blocks
from tests.conftest import TINY

UNITS = {"head_density": 0.67, "neuron_density": 0.5}
TOP_K = {"kind": "top_k", "keep_ratio": 0.6, "noise": 1.0}
THRESHOLD = {"kind": "threshold", "stages": [1], "thresholds": [0.0045]}


@pytest.mark.filterwarnings("ignore:.*is rounded to", "ignore:.*growth changes nothing")
@pytest.mark.parametrize(
    ("sparsity", "selector"),
    [
        ({"density": 0.5}, None),
        ({"density": None, **UNITS}, None),
        ({"density": 0.4, **UNITS}, None),
        ({"density": 0.4, **UNITS, "start": "score", "unit_distribution": "by_score"}, None),
        ({"density": 0.5}, TOP_K),
        ({"density": 0.4, **UNITS}, TOP_K),
        ({"density": 0.4, **UNITS}, THRESHOLD),
    ],
    ids=["weights", "units", "weights_units", "by_score", "weights_tokens", "joint_top_k", "joint_threshold"],
)
def test_saved_loaded_and_expanded_agree(
    tmp_path: Path, sparsity: dict[str, Any], selector: dict[str, Any] | None
) -> None:
    torch.manual_seed(0)
    name = "deit_tiny_patch16_224"
    model = create_model(name, selector=selector, **TINY)
    config = SparsityConfig(**{"update_every": 1, "drop_fraction": 0.6, "swap": "always", **sparsity})
    images, targets = torch.randn(8, 1, 16, 16), torch.randint(5, (8,))
    closure = (lambda: F.cross_entropy(model(images), targets)) if config.start == "score" else None
    scheduler = SparsityScheduler(model, config, total_steps=20, closure=closure)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler.attach(optimizer)
    for _ in range(5):
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        assert scheduler.step(lambda: F.cross_entropy(model(images), targets)) is not None
        optimizer.zero_grad()
    info = SparseInfo(
        model=name,
        model_args=TINY,
        selector=selector,
        budget=scheduler.budget,
        macs=1,
        image_size=16,
        in_chans=1,
        mean=(0.5,),
        std=(0.5,),
    )
    path = tmp_path / "sparse.safetensors"
    save_sparse(
        path,
        model,
        masks=scheduler.masks,
        live_heads=scheduler.live_heads,
        live_neurons=scheduler.live_neurons,
        info=info,
        create_model=create_model,
    )
    model.eval()
    with torch.inference_mode():
        expected = model(images)
        assert torch.equal(load_sparse(path, create_model=create_model)(images), expected)
        dense = expand(path, create_model=create_model)
        torch.testing.assert_close(dense(images), expected, atol=1e-5, rtol=0)
    assert {block.heads.count() for block in find_blocks(dense).values()} == {3}
    assert {block.neurons.count() for block in find_blocks(dense).values()} == {96}
