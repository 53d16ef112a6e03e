"""Images that hold a number several times, as max pooling run backwards leaves them.

Where the next step reads such an image once, it can read the numbers, and nobody writes it out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Copies:
    """An image (..., *size) whose tiles hold a number each.

    Attributes:
        values: The numbers, (..., *count).
        tile: The entries of a tile along every dimension of the image.
    """

    values: Tensor
    tile: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers."""
        return self.values.dtype

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of a tile; an image of one dimension has one row."""
        return self.tile[-2] if len(self.tile) > 1 else 1, self.tile[-1]

    def grouped(self, groups: int) -> Copies:
        """Return the same with its channels in groups, (N, G, c, *size) of (N, C, *size)."""
        return Copies(self.values.unflatten(1, (groups, -1)), self.tile)

    def written_out(self) -> Tensor:
        """Return the image."""
        image = self.values
        for dim, n in enumerate(self.tile, image.ndim - len(self.tile)):
            image = image.repeat_interleave(n, dim)
        return image


def written_out(image: Tensor | Copies) -> Tensor:
    """Return an image as a tensor."""
    return image.written_out() if isinstance(image, Copies) else image
