from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from experiments.evaluation.precision import precision_context


@pytest.mark.parametrize("amp", ["bfloat16", "float32"])
def test_attention_trains_in_float32_on_a_cpu(amp: str) -> None:
    """The same values as of float32 attention over what autocast gives it, in the type that autocast expects."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 3 * 16)
    tokens = torch.randn(2, 7, 16)
    seen = []

    def mix(x: torch.Tensor, cast: bool) -> torch.Tensor:
        query, key, value = linear(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        seen.append(query.dtype)
        if cast:
            with torch.autocast("cpu", enabled=False):
                return functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
        return functional.scaled_dot_product_attention(query, key, value)

    with precision_context(torch.device("cpu"), amp)():
        mixed = mix(tokens, False)
    wanted = torch.bfloat16 if amp == "bfloat16" else torch.float32
    assert mixed.dtype == seen[0] == wanted
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp == "bfloat16"):
        expected = mix(tokens, True)
    assert torch.equal(mixed, expected.to(wanted))
    (gradient,) = torch.autograd.grad(mixed.float().square().sum(), linear.weight)
    (wanted_gradient,) = torch.autograd.grad(expected.to(wanted).float().square().sum(), linear.weight)
    assert torch.equal(gradient, wanted_gradient)
