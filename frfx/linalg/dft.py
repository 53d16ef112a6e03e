"""Transforms as products with real matrices, the batch as the last dimension.

Real and imaginary parts are rows, so the product at every frequency is a real one, too, and what
lies off the corners of the grid is left out of the matrices. The products along the image's last
dimension also bring the samples to the back and to the front again.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from frfx.linalg.backend import Backend
from frfx.linalg.form import Grid
from frfx.linalg.scratch import Scratch


class Dft:
    """The transforms of a grid.

    Args:
        grid: The grid.
        dtype: The real type that is computed in.
        device: Where it is computed.
        backend: The array library.

    Attributes:
        tables: The real matrices of the transforms there, then of those back, of the last
            dimension and of the others.
    """

    def __init__(
        self, grid: Grid, dtype: torch.dtype, device: torch.device, backend: Backend
    ) -> None:
        self._grid, self._xp = grid, backend.namespace
        self.tables = tuple(map(backend.constant, _tables(grid, dtype, device)))

    def there(self, x: Any, scratch: Scratch | None = None) -> Any:
        """Transform (N, G, c, *source) to (G, F, 2 c, N)."""
        xp, grid, (n, groups, channels) = self._xp, self._grid, x.shape[:3]
        product, copy = _steps(scratch)
        *leading, last = grid.source
        table, *others = self.tables[: len(grid.size)]
        x = xp.permute_dims(xp.reshape(x, (n, -1, last)), (1, 2, 0))
        x = xp.reshape(product(table, x), (groups, channels, -1, table.shape[0] // 2, 2, n))
        x = copy(xp.permute_dims(x, (0, 3, 4, 2, 1, 5)))  # (G, F, 2, *leading, c, N)
        done = groups * table.shape[0] // 2
        for table, source in zip(others, leading, strict=True):
            x = product(table, xp.reshape(x, (done, 2 * source, -1)))
            done *= table.shape[0] // 2
        return xp.reshape(x, (groups, done // groups, 2 * channels, n))

    def back(self, x: Any, scratch: Scratch | None = None) -> Any:
        """Transform (G, F, 2 c, N) to (N, G, c, *result)."""
        xp, grid, (groups, frequencies, channels, n) = self._xp, self._grid, x.shape
        product, copy = _steps(scratch)
        *leading, last = grid.result
        table, *others = self.tables[len(grid.size) :]
        done, channels = groups * frequencies, channels // 2
        for other, count in zip(others[::-1], grid.size[-2::-1], strict=True):
            done //= count
            x = product(other, xp.reshape(x, (done, 2 * count, -1)))
        x = xp.reshape(x, (groups, table.shape[0] // 2, 2, -1, channels, n))
        x = copy(xp.permute_dims(x, (0, 4, 3, 1, 2, 5)))  # (G, c, *leading, F, 2, N)
        x = xp.permute_dims(xp.reshape(x, (-1, table.shape[0], n)), (0, 2, 1))
        x = xp.permute_dims(xp.reshape(product(x, table), (-1, n, last)), (1, 0, 2))
        return xp.reshape(x, (n, groups, channels, *leading, last))


def _steps(scratch: Scratch | None) -> tuple[Any, Any]:
    """Return what multiplies, and what copies if that is to be in the scratch."""
    if scratch is None:
        return operator.matmul, lambda x: x
    return scratch.matmul, scratch.copy


def _tables(grid: Grid, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return the real matrices of the transforms there, then of those back.

    The last dimension's come first.

    There: the first takes (source,) to (F, 2), the others (2, source) to (F, 2); the pair is real
    and imaginary part. Back: the others take (F, 2) to (2, result); the first is transposed, and
    takes rows of (F, 2) to rows of (result,).
    """
    there, back = [], []
    for i in (-1, *range(len(grid.size) - 1)):
        n, f, source, result = grid.size[i], grid.half[i], grid.source[i], grid.result[i]
        frequency = torch.arange(f, dtype=torch.float64)
        angle = -2 * math.pi / n * torch.outer(frequency, torch.arange(source).double())
        cosine, sine = angle.cos(), angle.sin()
        real = torch.stack([cosine, sine], 1).reshape(2 * f, source)
        imaginary = torch.stack([-sine, cosine], 1).reshape(2 * f, source)
        there.append(real if i == -1 else torch.cat([real, imaginary], 1))
        angle = 2 * math.pi / n * torch.outer(torch.arange(result).double(), frequency)
        cosine, sine = angle.cos() / n, angle.sin() / n
        real = torch.stack([cosine, -sine], 2)
        if i == -1:  # the other half of the spectrum is the conjugate
            real *= torch.where((frequency == 0) | (2 * frequency == n), 1.0, 2.0)[:, None]
            back.append(real.reshape(result, 2 * f).T)
        else:
            imaginary = torch.stack([sine, cosine], 2)
            back.append(torch.cat([real, imaginary]).reshape(2 * result, 2 * f))
    return [table.to(device, dtype).contiguous() for table in (*there, *back)]
