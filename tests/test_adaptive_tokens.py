"""Training on a sheet of kept and borderline tokens against masked training of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models import Selection, create_model, tokens_per_block
from sparse_trainer.unit_scores import gate_scores, probing
from sparse_trainer.units import find_blocks
from tests.conftest import TINY
from tests.masked_reference import masked_training
from tests.test_sparse_deit import THRESHOLD, VARIANTS, close, images, lively, tiny

#: With the second stage two blocks later, borderline tokens live on for a block.
APART = {"kind": "threshold", "stages": (1, 3), "thresholds": (0.0045, 0.0055)}
FUSED = {**APART, "dropped": "fused"}
SLOPE = {"temperature": 1000.0, "borderline": 0.0}


def gradients(model: Any, run: Callable[[], tuple[Tensor, Selection]]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)
    model.zero_grad()
    logits, selection = run()
    targets = torch.arange(len(logits)) % 5
    (F.cross_entropy(logits.double(), targets) + 0.01 * tokens_per_block(selection, 4).mean()).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("selector", [THRESHOLD, APART, FUSED])
@pytest.mark.parametrize("variant", VARIANTS)
def test_with_a_bound_of_0_it_is_masked_training(variant: str, selector: Any, drop_path: float) -> None:
    model = tiny({**selector, **SLOPE}, variant, drop_path_rate=drop_path).double().train()
    x = images(8, model).double()
    logits, found = gradients(model, lambda: model(x, return_selection=True))
    # With the epsilon of the paper, dropped tokens keep a millionth of the attention; without it they are equal.
    for epsilon, tolerance in ((1e-6, 1e-4), (1e-12, 1e-7)):
        expected_logits, expected = gradients(model, lambda epsilon=epsilon: masked_training(model, x, epsilon))
        close(logits, expected_logits, 1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            close(found[name], gradient, tolerance * max(1.0, float(gradient.norm())))
    assert bool((found["selector.thresholds"] != 0).all())


@pytest.mark.parametrize("selector", [THRESHOLD, APART])
def test_a_bound_changes_the_thresholds_gradient_alone_and_little(selector: Any) -> None:
    found = {}
    for bound in (0.0, 2.5e-4, 0.25):
        model = tiny({**selector, **SLOPE, "borderline": bound, "temperature": 3000.0}).double().train()
        # The first block's gradient has a part that comes through the scores; that of the last none.
        found[bound] = gradients(model, lambda model=model: model(images(16).double(), return_selection=True))
    for bound in (2.5e-4, 0.25):
        assert torch.equal(found[bound][0], found[0.0][0])
        for name, gradient in found[0.0][1].items():
            if name.startswith(("blocks.3", "head", "norm")):
                assert torch.equal(found[bound][1][name], gradient)
    exact, bounded, none = (found[bound][1]["selector.thresholds"] for bound in (0.0, 2.5e-4, 0.25))
    assert (bounded - exact).norm() < 0.01 * exact.norm()
    assert (none - exact).norm() > 0.01 * exact.norm()


def rows_seen(model: Any) -> list[list[int]]:
    """Fills with the number of rows that each block's MLP gets, one list a block."""
    seen: list[list[int]] = [[] for _ in model.blocks]
    for number, block in enumerate(model.blocks):
        block.mlp.register_forward_pre_hook(
            lambda _, inputs, number=number: seen[number].append(inputs[0].flatten(0, -2).shape[0])
        )
    return seen


def test_gone_tokens_are_not_computed() -> None:
    """Nor are borderline ones in the last block before the next stage, where all that is asked of them is the keys."""
    for bound, live_on in ((0.0, True), (0.25, False)):
        model = tiny({**APART, **SLOPE, "borderline": bound}).train()
        seen = rows_seen(model)
        _, selection = model(images(8), return_selection=True)
        first, second = (8 + int(count) for count in selection.counts.sum(dim=0))
        dropped = 8 * 17 - first
        assert dropped > 0
        assert seen == [[8 * 17], [first, dropped] if live_on else [first], [first], [second]]


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that a tensor made by an operation had."""

    elements = 0

    def __torch_dispatch__(self, function: Any, _: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, Tensor):
                self.elements = max(self.elements, made.numel())
        return result


def test_no_matrix_of_attention_is_held_at_224_pixels() -> None:
    """Eight images with 6 heads and 197 tokens, in a network so narrow that its matrices of attention stand out."""
    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 6, "mlp_ratio": 2, "num_classes": 5}
    selector = {"kind": "threshold", "stages": (1, 2), "thresholds": (0.004, 0.005), "borderline": 0.0}
    model = lively(create_model("deit_tiny_patch16_224", selector=selector, **sizes)).train()
    x = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with LargestTensor() as ours:
        logits, selection = model(x, return_selection=True)
        logits.square().sum().backward()
    assert 0.2 < selection.masks[0].mean() < 0.8
    with LargestTensor() as reference:
        masked_training(model, x)[0].square().sum().backward()
    assert reference.elements == 8 * 6 * 197**2
    assert ours.elements <= x.numel()


def test_half_precision_reaches_every_weight() -> None:
    """Autocast casts a weight once and takes it again: the borderline tokens' copy has no gradient."""
    model = tiny({**APART, **SLOPE}).train()
    x = images(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, found = gradients(model, lambda: model(x, return_selection=True))
    assert logits.dtype == torch.bfloat16
    _, expected = gradients(model, lambda: model(x, return_selection=True))
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        if not name.startswith(("selector", "blocks.0")):
            assert F.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.9, name


@pytest.mark.parametrize("selector", [THRESHOLD, APART, FUSED])
def test_recomputed_activations_change_nothing(selector: Any) -> None:
    found = []
    for recompute in (False, True):
        model = tiny({**selector, **SLOPE}, drop_path_rate=0.4).train()
        model.set_grad_checkpointing(recompute)
        found.append(gradients(model, lambda model=model: model(images(4), return_selection=True))[1])
    for name, gradient in found[0].items():
        close(found[1][name], gradient, 1e-6 * max(1.0, float(gradient.norm())))


# Where a graph ends between two operations, torch.compile looks at the gradient of what lies in between.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_what_runs_on_sheets_is_not_compiled_and_the_rest_once() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        run: Callable[..., Any] = graph.forward
        return run

    torch._dynamo.reset()
    model = tiny(THRESHOLD).train()
    compiled = torch.compile(model, backend=backend)
    reference = deepcopy(model)
    close(compiled(images(4)), reference(images(4)), 1e-5)
    compiled_graphs = len(graphs)
    assert compiled_graphs > 0
    for seed in range(2, 12):  # other images keep other numbers of patches
        close(compiled(images(4, seed=seed)), reference(images(4, seed=seed)), 1e-5)
    assert len(graphs) == compiled_graphs


def test_rows_are_named_while_a_block_runs() -> None:
    model = tiny({**APART, **SLOPE}).train()
    seen: list[tuple[int, Tensor]] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert model.sheet_rows is not None
        assert model.sheet_rows[1] == 4
        seen.append((inputs[0].shape[0], model.sheet_rows[0]))

    model.blocks[1].attn.proj.register_forward_pre_hook(look)
    _, selection = model(images(4), return_selection=True)
    assert [rows for rows, _ in seen] == [len(image) for _, image in seen]
    kept, dropped = (image.bincount(minlength=4) for _, image in seen)
    assert torch.equal(kept, 1 + selection.counts[:, 0])
    assert torch.equal(kept + dropped, torch.full((4,), 17))
    assert model.sheet_rows is None


def test_heads_and_neurons_are_probed_image_by_image_as_without_sheets() -> None:
    """The size of an image's gradient at a unit is that of a sum over its tokens, not the sum of their sizes."""
    model = tiny({**APART, **SLOPE}).double().train()
    x, targets = images(6).double(), torch.arange(6) % 5
    groups = [group for block in find_blocks(model).values() for group in (block.heads, block.neurons)]
    scores = []
    for run in (model, lambda x: masked_training(model, x, 1e-12)[0]):
        with probing(model, [(group, {}) for group in groups]) as gates:
            scores.append(gate_scores(lambda run=run: F.cross_entropy(run(x), targets), gates))
    for found, expected in zip(*scores, strict=True):
        assert bool((expected.size > 0).all())
        close(found.size, expected.size, 1e-6)


def test_what_cannot_be_traced_says_so() -> None:
    """In our words: torch.export, and torch.compile in one graph."""
    selector = {"kind": "threshold", "stages": [1]}
    model = create_model("deit_tiny_patch16_224", selector=selector, **TINY).eval()
    batch = torch.zeros(2, 1, 16, 16)
    with pytest.raises(ValueError, match=r"so torch\.export cannot trace the model.*--format onnx --tokens"):
        torch.export.export(model, (batch,))
    with pytest.raises(Exception, match="another number of patches of each image; compile without fullgraph"):
        torch.compile(model, fullgraph=True, backend="eager")(batch)
