"""What the network is: timm Vision Transformers that may hold a token selector."""

from models.sparse_deit import create_model, resolve
from models.token_selector import Selection, SelectorConfig, tokens_per_block

__all__ = ["Selection", "SelectorConfig", "create_model", "resolve", "tokens_per_block"]
