"""What a layer's solve is measured against: its floor, and the paper's systems as written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from frfx.linalg import Convolution
from frfx.linalg.polyphase import Polyphase
from solvers.stopwatch import Stopwatch


@dataclass(frozen=True)
class Rates:
    """What a GPU reaches: entries copied, in bytes read and written, and complex products.

    Attributes:
        bytes_per_ms: Of a large copy.
        products_per_ms: Complex multiplications and additions of a large batch of matrices.
    """

    bytes_per_ms: float
    products_per_ms: float

    @classmethod
    def measure(cls, device: torch.device, watch: Stopwatch) -> Rates:
        """Measure them."""
        source = torch.randn(1 << 28, device=device)
        result = torch.empty_like(source)
        a = torch.randn(64, 512, 512, dtype=torch.complex64, device=device)
        found = watch.captured(
            {"copy": lambda: result.copy_(source), "product": lambda: torch.bmm(a, a)}
        )
        return cls(2 * source.nbytes / found["copy"], a.shape[0] * 512**3 / found["product"])

    def floor(self, operator: Convolution, batch: int) -> tuple[float, str]:
        """Return the milliseconds that a layer's solve takes at least, and what of."""
        model = Polyphase(operator)
        entries = model.groups * model.rows * model.columns
        images = 4 * batch * 2 * (math.prod(operator.in_shape) + math.prod(operator.out_shape))
        if operator.disjoint:  # one real matrix for all windows
            windows = batch * math.prod(operator.out_size)
            moved, products = 4 * entries + images, windows * entries / 4
        else:
            half = math.prod(model.grid[:-1]) * (model.grid[-1] // 2 + 1)
            moved, products = 8 * half * entries + images, batch * half * entries
        moved /= self.bytes_per_ms
        products /= self.products_per_ms
        return max(moved, products), "bytes" if moved > products else "products"


def floor(
    operator: Convolution, batch: int, device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """Return the three parts of a layer's floor."""
    model = Polyphase(operator)
    rows, columns, groups = model.rows, model.columns, model.groups
    half = (*model.grid[:-1], model.grid[-1] // 2 + 1)
    frequencies = groups * math.prod(half)
    residual = torch.randn(batch, groups * rows, *model.grid, device=device)
    spectrum = torch.randn(batch, groups * columns, *half, dtype=torch.complex64, device=device)
    dims = tuple(range(2, residual.ndim))
    if rows == columns == 1:
        scale = torch.randn(groups, *half, dtype=torch.complex64, device=device)
        product = lambda: spectrum * scale  # noqa: E731
    else:
        matrices = torch.randn(frequencies, columns, rows, dtype=torch.complex64, device=device)
        vectors = torch.randn(frequencies, rows, batch, dtype=torch.complex64, device=device)
        product = lambda: torch.bmm(matrices, vectors)  # noqa: E731
    return {
        "there": lambda: torch.fft.rfftn(residual, dim=dims),
        "product": product,
        "back": lambda: torch.fft.irfftn(spectrum, s=model.grid, dim=dims),
    }


def literal_samples(operator: Convolution) -> int:
    """Return how many samples the literal systems are solved for: none where it takes too long."""
    plain = not any(map(any, operator.padding)) and set(operator.stride) == {1}
    if not plain or operator.groups > 1:
        return 0
    entries = math.prod(operator.size) * (operator.in_channels + operator.out_channels) ** 2
    return min(8, (1 << 24) // entries)


def literal(operator: Convolution, x: Tensor) -> Callable[[], Tensor]:
    """Return Eq. 19 or 20 as they are written: one system a sample and frequency.

    What depends on the kernel alone is made before; the right-hand sides are left out of the cost.
    """
    model = Polyphase(operator)
    half = (*model.grid[:-1], model.grid[-1] // 2 + 1)
    axes = [torch.arange(f, dtype=torch.float64) / n for f, n in zip(half, model.grid, strict=True)]
    kernel = model.matrices(torch.cartesian_prod(*axes))[0].to(x.device, torch.complex64)
    rows, columns = kernel.shape[1:]
    samples, frequencies = len(x), len(kernel)
    if columns >= rows:  # Eq. 19
        system = torch.zeros(
            frequencies, rows + columns, rows + columns, dtype=kernel.dtype, device=x.device
        )
        system[:, :columns, :columns] = torch.eye(columns, device=x.device)
        system[:, :columns, columns:] = kernel.mH
        system[:, columns:, :columns] = kernel
    else:  # Eq. 20
        system = kernel.mH @ kernel
    right = torch.randn(samples, frequencies, system.shape[-1], dtype=kernel.dtype, device=x.device)
    systems = system.expand(samples, *system.shape).contiguous()
    return lambda: torch.linalg.solve(systems, right)
