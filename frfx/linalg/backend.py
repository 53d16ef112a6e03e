"""The array libraries that solvers run on: torch, and CuPy through the array API and DLPack."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Namespace:
    """The functions of the array API that solvers use, under its names.

    torch has most of them under other names; this spares every user a package that renames them.
    """

    reshape: Callable[[Any, tuple[int, ...]], Any]
    permute_dims: Callable[[Any, tuple[int, ...]], Any]
    concat: Callable[..., Any]
    rfftn: Callable[..., Any]
    irfftn: Callable[..., Any]


@dataclass(frozen=True)
class HandOver:
    """How arrays go to a library and come back, for one call.

    Attributes:
        array: Tensor -> array.
        tensor: Array -> tensor.
    """

    array: Callable[[Tensor], Any]
    tensor: Callable[[Any], Tensor]


class Backend:
    """An array library.

    Attributes:
        name: What users call it.
        namespace: Its array API.
    """

    name: str
    namespace: Namespace

    def constant(self, tensor: Tensor) -> Any:
        """Return a tensor that is kept, as an array of the library."""
        raise NotImplementedError

    def on(self, tensor: Tensor) -> contextlib.AbstractContextManager[HandOver]:
        """Return a context in which arrays of the tensor's device are computed with."""
        raise NotImplementedError

    def batch_last(self, x: Any) -> Any:
        """Move the batch and the channels back: (N, G, c, *s) -> (G, *s, c, N)."""
        raise NotImplementedError

    def batch_first(self, x: Any) -> Any:
        """Undo `batch_last`."""
        raise NotImplementedError


class TorchBackend(Backend):
    """torch, on the device of the tensors."""

    name = "torch"
    namespace = Namespace(
        reshape=torch.reshape,
        permute_dims=torch.permute,
        concat=lambda arrays, axis: torch.cat(arrays, axis),
        rfftn=lambda x, s, axes: torch.fft.rfftn(x, s, axes),
        irfftn=lambda x, s, axes: torch.fft.irfftn(x, s, axes),
    )

    def constant(self, tensor: Tensor) -> Tensor:
        return tensor

    def on(self, tensor: Tensor) -> contextlib.AbstractContextManager[HandOver]:
        del tensor
        return contextlib.nullcontext(_UNCHANGED)

    def batch_last(self, x: Tensor) -> Tensor:
        n, groups, channels, *size = x.shape
        if x.device.type != "cpu":
            return x.permute(1, *range(3, x.ndim), 2, 0).contiguous()
        # Transposing a matrix and then moving whole rows: faster than one permutation, which on
        # images of a power of two in size is several times slower still, as its reads collide.
        rows = x.reshape(n, -1).t().contiguous().view(groups, channels, *size, n)
        return rows.movedim(1, -2)

    def batch_first(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return x.permute(x.ndim - 1, 0, x.ndim - 2, *range(1, x.ndim - 2))
        rows = x.movedim(-2, 1).contiguous()
        return rows.view(-1, x.shape[-1]).t().contiguous().view(x.shape[-1], *rows.shape[:-1])


_UNCHANGED = HandOver(lambda tensor: tensor, lambda array: array)
torch_backend = TorchBackend()
