"""What the network is: timm Vision Transformers that may hold a token selector."""

from models.selection import Selection, tokens_per_block
from models.selector_config import SelectorConfig
from models.sparse_deit import create_model, resolve

__all__ = ["Selection", "SelectorConfig", "create_model", "resolve", "tokens_per_block"]
