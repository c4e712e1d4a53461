"""Train networks that are sparse from the first step, under one exact parameter budget."""

from sparse_trainer.agreement import DisagreementError
from sparse_trainer.budget import Budget
from sparse_trainer.construction import LiveNetwork
from sparse_trainer.files.checkpoint import (
    CheckpointError,
    SparseInfo,
    expand,
    live_network,
    load_sparse,
    read_info,
    save_sparse,
)
from sparse_trainer.kernels.accelerate import accelerate
from sparse_trainer.report import BlockUpdate, LayerUpdate, MaskUpdate
from sparse_trainer.scheduler import SparsityScheduler
from sparse_trainer.sparsity_config import SparsityConfig

__all__ = [
    "BlockUpdate",
    "Budget",
    "CheckpointError",
    "DisagreementError",
    "LayerUpdate",
    "LiveNetwork",
    "MaskUpdate",
    "SparseInfo",
    "SparsityConfig",
    "SparsityScheduler",
    "accelerate",
    "expand",
    "live_network",
    "load_sparse",
    "read_info",
    "save_sparse",
]
