"""What a test needs to know of a network from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

CLASSES = 5


@dataclass(frozen=True)
class Foreign:
    """A network written the way its family is written in public, at a small width.

    Attributes:
        build: Makes it with random weights.
        shape: Its input, without the batch.
        layers: Nodes to reconstruct, deep ones first; names as `frfx.layers` lists them.
        front_end: Which front end can follow it.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layers: tuple[str, ...]
    front_end: str = "torch.fx"
