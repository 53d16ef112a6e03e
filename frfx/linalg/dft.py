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
        parts: 2 for real and imaginary part at every frequency, 3 for their sum, too: a product of
            complex matrices is then three real ones, whose sums the matrices of the way back hold.

    Attributes:
        tables: The real matrices of the transforms there, then of those back, of the last
            dimension and of the others.
    """

    def __init__(
        self,
        grid: Grid,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
        parts: int = 2,
    ) -> None:
        self._grid, self._xp, self._parts = grid, backend.namespace, parts
        self.tables = tuple(map(backend.constant, _tables(grid, dtype, device, parts)))

    def there(self, x: Any, scratch: Scratch | None = None) -> Any:
        """Transform (N, G, c, *source) to (G, F, parts * c, N)."""
        xp, grid, (n, groups, channels) = self._xp, self._grid, x.shape[:3]
        product, copy = _steps(scratch)
        *leading, last = grid.source
        table, *others = self.tables[: len(grid.size)]
        x = xp.permute_dims(xp.reshape(x, (n, -1, last)), (1, 2, 0))
        parts = 2 if others else self._parts  # the last step gives what the product takes
        x = xp.reshape(product(table, x), (groups, channels, -1, grid.half[-1], parts, n))
        x = copy(xp.permute_dims(x, (0, 3, 4, 2, 1, 5)))  # (G, F, parts, *leading, c, N)
        done = groups * grid.half[-1]
        for table, source, count in zip(others, leading, grid.size[:-1], strict=True):
            x = product(table, xp.reshape(x, (done, 2 * source, -1)))
            done *= count
        return xp.reshape(x, (groups, done // groups, self._parts * channels, n))

    def back(self, x: Any, scratch: Scratch | None = None) -> Any:
        """Transform (G, F, parts * c, N) to (N, G, c, *result)."""
        xp, grid, (groups, frequencies, channels, n) = self._xp, self._grid, x.shape
        product, copy = _steps(scratch)
        *leading, last = grid.result
        table, *others = self.tables[len(grid.size) :]
        done, parts = groups * frequencies, self._parts
        channels //= parts
        for other, count in zip(others[::-1], grid.size[-2::-1], strict=True):
            done //= count
            x = product(other, xp.reshape(x, (done, parts * count, -1)))
            parts = 2
        x = xp.reshape(x, (groups, grid.half[-1], parts, -1, channels, n))
        x = copy(xp.permute_dims(x, (0, 4, 3, 1, 2, 5)))  # (G, c, *leading, F, parts, N)
        x = xp.permute_dims(xp.reshape(x, (-1, table.shape[0], n)), (0, 2, 1))
        x = xp.permute_dims(xp.reshape(product(x, table), (-1, n, last)), (1, 0, 2))
        return xp.reshape(x, (n, groups, channels, *leading, last))


def _steps(scratch: Scratch | None) -> tuple[Any, Any]:
    """Return what multiplies, and what copies if that is to be in the scratch."""
    if scratch is None:
        return operator.matmul, lambda x: x
    return scratch.matmul, scratch.copy


def _tables(grid: Grid, dtype: torch.dtype, device: torch.device, parts: int) -> list[Tensor]:
    """Return the real matrices of the transforms there, then of those back.

    The last dimension's come first.

    There: the first takes (source,) to (F, 2), the others (2, source) to (F, 2); the pair is real
    and imaginary part. Back: the others take (F, 2) to (2, result); the first is transposed, and
    takes rows of (F, 2) to rows of (result,). The last step there gives (F, parts), which the first
    one back takes.
    """
    there, back = [], []
    last = len(grid.size) - 2  # -1 in one dimension, as it is counted here
    for i in (-1, *range(len(grid.size) - 1)):
        n, f, source, result = grid.size[i], grid.half[i], grid.source[i], grid.result[i]
        frequency, place, found = (
            torch.arange(count, dtype=torch.float64, device="cpu") for count in (f, source, result)
        )
        angle = -2 * math.pi / n * torch.outer(frequency, place)
        cosine, sine = angle.cos(), angle.sin()
        rows = torch.stack([cosine, sine], 1)
        if i != -1:
            rows = torch.cat([rows, torch.stack([-sine, cosine], 1)], 2)
        if parts == 3 and i == last:
            rows = torch.cat([rows, rows.sum(1, keepdim=True)], 1)
        there.append(rows.flatten(0, 1))
        angle = 2 * math.pi / n * torch.outer(found, frequency)
        cosine, sine = angle.cos() / n, angle.sin() / n
        columns = torch.stack([cosine, -sine], 2)
        if i == -1:  # the other half of the spectrum is the conjugate
            columns *= torch.where((frequency == 0) | (2 * frequency == n), 1.0, 2.0)[:, None]
        else:
            columns = torch.cat([columns, torch.stack([sine, cosine], 2)])
        if parts == 3 and i == last:  # of A p, B q and (A + B)(p + q): real and imaginary part
            real, imaginary = columns.unbind(2)
            columns = torch.stack([real - imaginary, -real - imaginary, imaginary], 2)
        columns = columns.flatten(1)
        back.append(columns.T if i == -1 else columns)
    return [table.to(device, dtype).contiguous() for table in (*there, *back)]
