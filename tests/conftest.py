"""A tiny two-block DeiT, and data for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from sparse_trainer.kernels import library

TINY = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "in_chans": 1,
    "num_classes": 5,
}
"""Arguments that make timm's DeiT names tiny: 16 patches, 3 heads of 8, 96 neurons."""

VITS: dict[str, dict[str, Any]] = {
    "deit": {},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "deit3": {"name": "deit3_small_patch16_224"},
    "qk_norm": {"name": "vit_tiny_patch16_224", "qkv_bias": False, "qk_norm": True},
    "registers": {"name": "vit_tiny_patch16_224", "reg_tokens": 4, "class_token": True},
    "swiglu_packed": {"name": "vit_tiny_patch16_224", "mlp_layer": timm.layers.SwiGLUPacked},
    "swiglu": {"name": "vit_tiny_patch16_224", "mlp_layer": timm.layers.SwiGLU},
    "dinov2": {"name": "vit_small_patch14_dinov2"},
    "rope": {"name": "vit_small_patch16_rope_224"},
}
"""Arguments of ``tiny_deit`` for each kind of ViT whose heads and neurons may come and go."""


# A GPU's matrix products look for it once, at the first of them; without it none is deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
"""For tests that hold on both; on a machine without a GPU the second one is skipped."""

TARGETS = {
    "native": ("", library.NATIVE),
    "avx2": ("", ("-mavx2", "-mfma", "-mno-avx512f")),
    "sse": ("", ("-mno-avx",)),
    **({"clang": ("clang++", library.NATIVE)} if shutil.which("clang++") else {}),
}
"""Compilers (the usual one if empty), and instructions to compile kernels for: this processor's, registers of 8
numbers, registers of 4."""


@pytest.fixture(scope="session", params=list(TARGETS))
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> library.Library:
    """The compiled kernels; processes that share the tests share them too."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "kernels"
    folder.mkdir(mode=0o700, exist_ok=True)
    compiler, flags = TARGETS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        if compiler:
            patch.setenv("CXX", compiler)
        return library.open_library(library.build(flags, folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny_deit() -> Callable[..., nn.Module]:
    """Factory of the tiny DeiT: the same seed gives the same weights."""

    def create(seed: int = 0, name: str = "deit_tiny_patch16_224", **arguments: Any) -> nn.Module:
        torch.manual_seed(seed)
        return timm.create_model(name, **{**TINY, **arguments})

    return create


@pytest.fixture
def tiny_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[8, 1, 16, 16]`` and targets ``[8]``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 1, 16, 16, generator=generator), torch.randint(5, (8,), generator=generator)
