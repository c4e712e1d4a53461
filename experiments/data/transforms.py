"""What happens to one image of any size before it is one of a batch: resized, cut or padded to a square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data import create_transform
from torchvision import transforms

from experiments.data.data_config import DataConfig

CROP_MODES = {"crop": "center", "pad": "border", "squash": "squash"}
"""``data.fit`` in timm's words."""


def eval_transform(config: DataConfig, size: int | tuple[int, int]) -> transforms.Compose:
    """PIL image to uint8 [C, H, W]: resized to size / crop_pct, the centre of it.

    What is not square loses its ends (``fit: crop``), gets black borders (``pad``) or is squashed (``squash``).

    Args:
        size: of the square, or height and width.
    """
    return create_transform(
        size,
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        crop_mode=CROP_MODES[config.fit],
        mean=(0.0,),  # timm's name for the colour of borders
        use_prefetcher=True,
    )


def train_transform(config: DataConfig, size: int, mean: tuple[float, ...]) -> Callable[[Any], Any]:
    """PIL image to uint8 [C, size, size]: what must be done to single images of full resolution.

    That is the resized crop and the policy. All the rest happens to whole batches, as it does in memory.
    """
    try:
        crop, policy, last = create_transform(
            size,
            is_training=True,
            separate=True,
            scale=(config.crop_scale, 1.0),
            hflip=0.0,
            color_jitter=None,  # type: ignore[arg-type]  # timm's own check is "is not None"
            auto_augment=config.auto_augment,
            interpolation=config.interpolation,
            mean=mean,
            use_prefetcher=True,
        )
    # timm asserts on the text of a policy, and fails in many ways on its parts.
    except Exception as error:
        raise ValueError(
            f"data.auto_augment is {config.auto_augment!r} ({error or type(error).__name__}); "
            "it must be one of timm's policies, as 'rand-m9-mstd0.5-inc1', 'augmix-m3-w3' or 'original'"
        ) from error
    resize = crop if config.crop_scale < 1 else transforms.Compose(eval_transform(config, size).transforms[:2])
    return transforms.Compose([*resize.transforms, *policy.transforms, *last.transforms])
