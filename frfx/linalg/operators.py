"""Linear operators: what they do (`mv`), their transposes (`rmv`), and nothing of how to solve."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True)
class Matrix:
    """Multiplication of the last dimension by a matrix.

    Attributes:
        matrix: Shape (m, n); maps (..., n) to (..., m).
    """

    matrix: Tensor

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
    """Convolution of stride 1 without padding, in as many dimensions as the kernel has.

    Attributes:
        kernel: Shape (C_out, C_in, *k), torch's layout: the sum of Eq. 11, not flipped.
        size: The spatial shape of the operand.
    """

    kernel: Tensor
    size: tuple[int, ...]

    def mv(self, x: Tensor) -> Tensor:
        """Apply the operator: (N, C_in, *size) -> (N, C_out, *(size - k + 1))."""
        return _CONV[len(self.size) - 1](x, self.kernel)

    def rmv(self, y: Tensor) -> Tensor:
        """Apply the transpose: (N, C_out, *(size - k + 1)) -> (N, C_in, *size)."""
        return _CONV_TRANSPOSE[len(self.size) - 1](y, self.kernel)
