"""Convolutions of few channels in the forward part: several rows at once, as channels.

On a CPU a convolution computes as many channels at once as a vector register holds, 16 where 5 are
asked for as well. Neighbouring rows may be such channels: of a kernel that is moved by as many
rows, and higher by as many.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frfx.compiler.forward import is_hooked
from frfx.ops import Op
from frfx.recording import is_recorded
from frfx.rules.base import one_input

_REGISTER = {"AVX512": 64, "AVX2": 32}
"""The bytes of a vector register, as `torch.backends.cpu` names what there is."""

_FEW = 8
"""Channels of which two rows are as many as a register holds, at most."""

_WORTH = 1.4
"""How many times fewer multiplications are worth it: the rows have to be put in order."""


class Rows:
    """A convolution in two dimensions that gives groups of rows.

    Args:
        op: The convolution.
        rows: How many rows there are in a group.
    """

    def __init__(self, op: Op, rows: int) -> None:
        self.op, self.rows = op, rows
        self._stride, self._padding = op.sizes("stride", 2), _padding(op)

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


def most_rows(op: Op, x: Tensor, multiple: int = 1) -> Rows | None:
    """Return as many rows at once as a register holds, if that is worth it.

    Args:
        op: The convolution.
        x: What it is applied to.
        multiple: They come in groups of so many; a rest, at the lower end of the image, is dropped.
    """
    layer = op.module
    assert isinstance(layer, nn.Conv2d)
    on_cpu = x.is_cpu and x.ndim == 4 and x.is_contiguous()  # channels last, torch convolves fast
    by_onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    if not on_cpu or not by_onednn or not x.dtype == layer.weight.dtype == torch.float32:
        return None
    kernel, stride = layer.weight.shape[2], op.sizes("stride", 2)[0]
    height = (x.shape[2] + 2 * _padding(op)[0] - kernel) // stride + 1
    for count in range(multiple * (_lanes() // layer.out_channels // multiple), 1, -multiple):
        fewer = count * kernel / (kernel + stride * (count - 1))  # products, by so many times
        if fewer >= _WORTH and count <= height and height // multiple * multiple % count == 0:
            return Rows(op, count)
    return None


def _lanes() -> int:
    """Return how many channels oneDNN convolves at once."""
    return _REGISTER.get(torch.backends.cpu.get_cpu_capability(), 0) // torch.float32.itemsize


class InRows(nn.Module):
    """A convolution of the model, as many rows at once as a register holds.

    Where autograd records, a compiler traces or a module has hooks, it is called itself.

    Args:
        op: The convolution.
    """

    def __init__(self, op: Op) -> None:
        super().__init__()
        self._op = op

    @classmethod
    def of(cls, op: Op) -> InRows | None:
        """Return one for a convolution of few channels; None for anything else."""
        few = in_rows(op) and cast(nn.Conv2d, op.module).out_channels <= _FEW
        return cls(op) if few else None

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer gives, to rounding."""
        layer = self._op.module
        assert isinstance(layer, nn.Conv2d)
        own = not x.is_cpu or is_hooked(layer) or is_recorded(x, layer.weight, layer.bias)
        rows = None if own else most_rows(self._op, x)
        if rows is None:
            result: Tensor = layer(x)
            return result
        return rows(x).transpose(2, 3).flatten(2, 3)


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
