"""Solve convolutions frequency by frequency."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from frfx.linalg.operators import Convolution
from frfx.linalg.pseudo_inverse import (
    Factor,
    Spectrum,
    default_rcond,
    nbytes,
    pseudo_inverse,
    solve_dtype,
)


@dataclass(frozen=True)
class SpectralFactor(Factor):
    """`inverse` has the shape (frequencies, C_in, C_out), the half spectrum of a real transform.

    Attributes:
        size: The spatial shape of the solution.
        dtype: The real type that is solved in.
    """

    inverse: Tensor
    spectrum: Spectrum
    size: tuple[int, ...]
    dtype: torch.dtype

    def solve(self, residual: Tensor) -> Tensor:
        """Map residuals (N, C_out, *valid) to deviations (N, C_in, *size)."""
        residual = residual.to(self.dtype)
        dims = tuple(range(2, residual.ndim))
        margins = [
            pad
            for whole, valid in zip(self.size[::-1], residual.shape[:1:-1], strict=True)
            for pad in (whole - valid, 0)
        ]
        spectrum = torch.fft.rfftn(F.pad(residual, margins), dim=dims)
        half = spectrum.shape[2:]
        by_frequency = spectrum.flatten(2).permute(2, 1, 0)
        solution = (self.inverse @ by_frequency).permute(2, 1, 0).unflatten(2, half)
        return torch.fft.irfftn(solution, s=self.size, dim=dims)

    @property
    def nbytes(self) -> int:
        """The memory that the factor holds, in bytes."""
        return nbytes(self.inverse)


@dataclass(frozen=True)
class Spectral:
    """Pseudo-inverses of the transformed kernel at every frequency (Eq. 12-20).

    With F the discrete Fourier transform over the feature's spatial shape, the linear part of
    Eq. 17 with `G` taken from the forward feature is the circular convolution
    `F(K~)(u, v) F(d)(u, v) = F(pad(z* - z^))(u, v)`, padding on the left and top: the terms `G`
    and `b` cancel against `F(z^)`. One pseudo-inverse a frequency is Eq. 19 where C_in >= C_out and
    Eq. 20 where C_in < C_out, and the valid part of the result satisfies the convolution exactly
    in the first case, because a circular convolution does not wrap there.

    Attributes:
        rcond: Singular values up to this share of the largest of all frequencies count as zero;
            None for the machine epsilon of the weights times the larger channel count.
        damping: Tikhonov's parameter relative to the squared largest singular value.
    """

    rcond: float | None = None
    damping: float = 0.0
    name = "spectral"

    def prepare(self, operator: Convolution) -> SpectralFactor:
        """Factor a convolution for one spatial shape."""
        kernel, size = operator.kernel, operator.size
        dims = tuple(range(2, kernel.ndim))
        flipped = kernel.double().flip(dims)  # Eq. 10
        transformed = torch.fft.rfftn(flipped, s=size, dim=dims)
        cutoff = default_rcond(kernel.dtype, max(kernel.shape[:2]))
        inverse, spectrum = pseudo_inverse(
            transformed.flatten(2).permute(2, 0, 1),
            exact=kernel.dtype == torch.float64,
            rcond=cutoff if self.rcond is None else self.rcond,
            damping=self.damping,
        )
        dtype = solve_dtype(kernel.dtype)
        return SpectralFactor(inverse.to(dtype.to_complex()).contiguous(), spectrum, size, dtype)
