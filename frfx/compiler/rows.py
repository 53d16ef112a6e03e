"""Convolutions of few channels in the forward part: several rows at once, as channels.

On a CPU a convolution computes as many channels at once as a vector register holds, 16 where 5 are
asked for as well. Rows that pooling takes the largest of may be such channels: of a kernel that is
moved by as many rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frfx.ops import Op
from frfx.rules.base import one_input

_REGISTER = {"AVX512": 64, "AVX2": 32}
"""The bytes of a vector register, as `torch.backends.cpu` names what there is."""


class Rows:
    """A convolution in two dimensions that gives groups of rows.

    Args:
        op: The convolution.
        rows: How many rows there are in a group.
    """

    def __init__(self, op: Op, rows: int) -> None:
        self.op, self.rows = op, rows
        self._stride, self._padding = op.sizes("stride", 2), _padding(op)

    def fit(self, x: Tensor) -> bool:
        """Tell whether a register holds the channels of a group, so that it is faster."""
        assert isinstance(self.op.module, nn.Conv2d)
        weight = self.op.module.weight
        register = _REGISTER.get(torch.backends.cpu.get_cpu_capability(), 0)
        return (
            x.dtype == weight.dtype == torch.float32  # the type that oneDNN convolves
            and torch.backends.mkldnn.is_available()
            and bool(torch.backends.mkldnn.enabled)
            and len(weight) * self.rows * weight.itemsize <= register
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Return the convolution of (N, C, H, W), of shape (N, C', rows, H' // rows, W')."""
        assert isinstance(self.op.module, nn.Conv2d)
        weight, bias = self.op.module.weight.detach(), self.op.module.bias
        down, across = self._stride
        height = down * (self.rows - 1)
        shifted = [F.pad(weight, (0, 0, i, height - i)) for i in range(0, height + 1, down)]
        found = F.conv2d(
            x,
            torch.stack(shifted, 1).flatten(0, 1),
            None if bias is None else bias.detach().repeat_interleave(self.rows),
            (down * self.rows, across),
            self._padding,
        )
        return found.unflatten(1, (len(weight), self.rows))


def in_rows(op: Op) -> bool:
    """Tell whether an op is a convolution that `Rows` takes the place of: a plain module."""
    return (
        op.spelling is nn.Conv2d
        and one_input(op) is None
        and op.arguments["padding"] != "same"
        and op.arguments["padding_mode"] == "zeros"
        and op.arguments["groups"] == 1
        and op.sizes("dilation", 2) == (1, 1)
    )


def _padding(op: Op) -> tuple[int, ...]:
    return (0, 0) if op.arguments["padding"] == "valid" else op.sizes("padding", 2)
