"""Linear operators: what they do (`mv`), their transposes (`rmv`), and nothing of how to solve."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

_FOLDED = 16
"""Channels out for every one in, from which on a CPU's transposed convolution is slower than a
product and a sum over the windows: two to three times for an image of three channels."""


@dataclass(frozen=True)
class Matrix:
    """Multiplication of the last dimension by a matrix.

    Attributes:
        matrix: Shape (m, n); maps (..., n) to (..., m).
    """

    matrix: Tensor

    def to(self, dtype: torch.dtype) -> Matrix:
        """Return the operator in another type."""
        return Matrix(self.matrix.to(dtype))

    def mv(self, x: Tensor) -> Tensor:
        """Apply the operator: (..., n) -> (..., m)."""
        return x @ self.matrix.mT

    def rmv(self, y: Tensor) -> Tensor:
        """Apply the transpose: (..., m) -> (..., n)."""
        return y @ self.matrix


@dataclass(frozen=True)
class Diagonal:
    """Multiplication of every entry by a factor that broadcasts.

    Attributes:
        diagonal: Any shape that broadcasts to that of the operand.
    """

    diagonal: Tensor

    def mv(self, x: Tensor) -> Tensor:
        """Apply the operator."""
        return x * self.diagonal

    def rmv(self, y: Tensor) -> Tensor:
        """Apply the transpose, which is the operator itself."""
        return y * self.diagonal


@dataclass(frozen=True)
class Convolution:
    """Convolution in as many dimensions as the kernel has, as torch computes it.

    Attributes:
        kernel: Shape (C_out, C_in / groups, *k), torch's layout: the sum of Eq. 11, not flipped.
        size: The spatial shape of the operand.
        stride: Step between windows, by dimension; empty for 1.
        padding: Entries added before and after, by dimension; empty for none. Below zero they are
            left out (of zeros as the padding mode alone).
        dilation: Step between the taps of a window, by dimension; empty for 1.
        groups: How many parts of the channels are convolved apart.
        padding_mode: What is added: ``"zeros"``, ``"circular"``, ``"reflect"``, ``"replicate"``.
    """

    kernel: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        dims = len(self.size)
        for name, default in (("stride", 1), ("padding", (0, 0)), ("dilation", 1)):
            if not getattr(self, name):
                object.__setattr__(self, name, (default,) * dims)

    @property
    def in_channels(self) -> int:
        """The operand's channels."""
        return self.kernel.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """The result's channels."""
        return self.kernel.shape[0]

    @cached_property
    def padded_size(self) -> tuple[int, ...]:
        """The spatial shape of the operand with its padding."""
        return tuple(n + sum(p) for n, p in zip(self.size, self.padding, strict=True))

    @cached_property
    def extent(self) -> tuple[int, ...]:
        """The length of a window from its first tap to its last."""
        taps = self.kernel.shape[2:]
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, taps, strict=True))

    @cached_property
    def out_size(self) -> tuple[int, ...]:
        """The spatial shape of the result."""
        return tuple(
            (n - e) // s + 1
            for n, e, s in zip(self.padded_size, self.extent, self.stride, strict=True)
        )

    @cached_property
    def disjoint(self) -> bool:
        """Whether every entry of the operand is read by at most one window, and none is added."""
        apart = all(e <= s for e, s in zip(self.extent, self.stride, strict=True))
        return apart and not any(map(any, self.padding))

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The operand's shape without the batch."""
        return (self.in_channels, *self.size)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The result's shape without the batch."""
        return (self.out_channels, *self.out_size)

    def with_kernel(self, kernel: Tensor) -> Convolution:
        """Return the convolution with another kernel of the same shape."""
        return replace(self, kernel=kernel)

    def to(self, dtype: torch.dtype) -> Convolution:
        """Return the convolution in another type."""
        return self.with_kernel(self.kernel.to(dtype))

    def mv(self, x: Tensor) -> Tensor:
        """Apply the operator: (N, C_in, *size) -> (N, C_out, *out_size)."""
        symmetric = self._symmetric
        if symmetric is None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, [p for pair in self.padding[::-1] for p in pair], mode=mode)
        conv = _CONV[len(self.size) - 1]
        return conv(x, self.kernel, None, self.stride, symmetric or 0, self.dilation, self.groups)

    def rmv(self, y: Tensor) -> Tensor:
        """Apply the transpose: (N, C_out, *out_size) -> (N, C_in, *size)."""
        symmetric = self._symmetric
        if symmetric is not None and self._folds:
            columns = self.kernel.flatten(1).T @ y.flatten(2)
            taps = self.kernel.shape[2:]
            return F.fold(columns, self.size, taps, self.dilation, symmetric, self.stride)
        beyond = tuple(
            (n - e) % s for n, e, s in zip(self.padded_size, self.extent, self.stride, strict=True)
        )
        transposed = _CONV_TRANSPOSE[len(self.size) - 1]
        x = transposed(
            y, self.kernel, None, self.stride, symmetric or 0, beyond, self.groups, self.dilation
        )
        return x if symmetric is not None else self._unpad(x)

    @property
    def _folds(self) -> bool:
        """Whether one product and its sum over the windows is the faster transpose."""
        on_cpu, planes = self.kernel.device.type == "cpu", len(self.size) == 2
        few = _FOLDED * self.in_channels <= self.out_channels
        return on_cpu and planes and few and self.groups == 1

    @property
    def _symmetric(self) -> tuple[int, ...] | None:
        """The padding as torch's convolutions take it, if they do."""
        if self.padding_mode != "zeros" and any(map(any, self.padding)):
            return None
        if any(before != after for before, after in self.padding):
            return None
        return tuple(before for before, _ in self.padding)

    def _unpad(self, x: Tensor) -> Tensor:
        """Apply the transpose of the padding: what was copied outwards is added where it was."""
        if self.padding_mode == "zeros":
            return F.pad(x, [-p for pair in self.padding[::-1] for p in pair])
        for dim, (n, (before, after)) in enumerate(zip(self.size, self.padding, strict=True), 2):
            source = x
            x = source.narrow(dim, before, n)
            if not before + after:
                continue
            copied = _copied_from(n, before, after, self.padding_mode, x.device)
            x = x.clone()
            for start, length in ((0, before), (before + n, after)):
                if length:
                    piece = source.narrow(dim, start, length)
                    x.index_add_(dim, copied.narrow(0, start, length), piece)
        return x


def _copied_from(n: int, before: int, after: int, mode: str, device: torch.device) -> Tensor:
    """Return which entry of a dimension each entry of its padded form copies."""
    index = torch.arange(-before, n + after, device=device)
    if mode == "circular":
        return index % n
    if mode == "replicate":
        return index.clamp(0, n - 1)
    index = index.abs()  # reflect
    return torch.where(index >= n, 2 * (n - 1) - index, index)


@dataclass(frozen=True)
class Transposed:
    """The transpose of a convolution: a transposed convolution.

    Attributes:
        of: The convolution whose transpose it is.
    """

    of: Convolution

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The operand's shape without the batch."""
        return self.of.out_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The result's shape without the batch."""
        return self.of.in_shape

    @property
    def kernel(self) -> Tensor:
        """The kernel, in the layout of the convolution."""
        return self.of.kernel

    def with_kernel(self, kernel: Tensor) -> Transposed:
        """Return the operator with another kernel of the same shape."""
        return Transposed(self.of.with_kernel(kernel))

    def to(self, dtype: torch.dtype) -> Transposed:
        """Return the operator in another type."""
        return Transposed(self.of.to(dtype))

    def mv(self, x: Tensor) -> Tensor:
        """Apply the operator."""
        return self.of.rmv(x)

    def rmv(self, y: Tensor) -> Tensor:
        """Apply the transpose."""
        return self.of.mv(y)


def convolution_of(operator: Convolution | Transposed) -> Convolution:
    """Return the convolution that an operator is, or is the transpose of."""
    return operator.of if isinstance(operator, Transposed) else operator
