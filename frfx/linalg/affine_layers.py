"""Convolutions and batch norm inside of a function that is differentiated twice.

The second derivative of a convolution has a part of the weight's, which torch makes whoever asks:
more than half of the time. With constant weights the layer is affine, and its products are torch's
convolution and the first derivative of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from frfx import recording
from frfx.linalg.linear_function import Map, linear_function

_aten = torch.ops.aten

Products = tuple[Map, Map]
Numbers = int | Sequence[int]


class AffineLayers(TorchFunctionMode):
    """Records layers with constant weights as affine maps; their values stay torch's own.

    Args:
        leaf: What the function is differentiated by.
    """

    def __init__(self, leaf: Tensor) -> None:
        super().__init__()
        self._leaf = leaf

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, or record it as an affine map."""
        del types
        kwargs = kwargs or {}
        find, products = _PRODUCTS.get(func), None
        if find is not None and args and self._is_affine(args[0], *args[1:], *kwargs.values()):
            with torch.no_grad():
                products = find(*args, **kwargs)
        if products is None:
            return func(*args, **kwargs)
        x, *weights = args
        return linear_function(*products, x, value=lambda x: func(x, *weights, **kwargs))

    def _is_affine(self, x: Any, *arguments: Any) -> bool:
        """Tell whether a layer is the affine map that it is called, and its weights are constant.

        Subclasses, function modes and autocast may compute something else; a checkpoint counts what
        torch saves; and not all products of complex numbers are there. Weights that are computed
        may be of the leaf.
        """
        weights = [value for value in arguments if isinstance(value, Tensor)]
        return (
            all(type(t) in recording.PLAIN and not t.is_complex() for t in (x, *weights))
            and all(t.grad_fn is None and t is not self._leaf for t in weights)
            and not torch._C._functorch.is_functorch_wrapped_tensor(x)
            and not torch.is_autocast_enabled(x.device.type)
            and not _counts_saved_tensors()
            and all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
        )


def _counts_saved_tensors() -> bool:
    """Tell whether a hook of autograd may look at what is saved, as that of a checkpoint does."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None  # torch 2.7 does not tell


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Products | None:
    del bias
    if isinstance(padding, str):
        if padding == "same":
            return None  # before and after the image it may differ
        padding = 0
    return _convolution(x, weight, stride, padding, dilation, False, 0, groups)


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
) -> Products | None:
    del bias
    return _convolution(x, weight, stride, padding, dilation, True, output_padding, groups)


def _convolution(x: Tensor, weight: Tensor, *geometry: Any) -> Products | None:
    """Return the products; None without a batch.

    Args:
        x: The operand.
        weight: The kernel.
        *geometry: As `aten.convolution` takes it, but for numbers in the place of lists.
    """
    if x.ndim != weight.ndim:
        return None
    *steps, groups = geometry
    dims = weight.ndim - 2
    steps = [s if isinstance(s, bool) else _each(s, dims) for s in steps]
    operand = x.detach()

    def mv(tangent: Tensor) -> Tensor:
        return _aten.convolution(tangent, weight, None, *steps, groups)

    def rmv(cotangent: Tensor) -> Tensor:
        return _aten.convolution_backward(
            cotangent, operand, weight, None, *steps, groups, (True, False, False)
        )[0]

    return mv, rmv


def _each(numbers: Numbers, dims: int) -> tuple[int, ...]:
    given = (numbers,) if isinstance(numbers, int) else tuple(numbers)
    return given * dims if len(given) == 1 else given


def _batch_norm(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Products | None:
    del bias, momentum
    if training or mean is None or variance is None:
        return None
    scale = torch.rsqrt(variance + eps) if weight is None else weight * torch.rsqrt(variance + eps)
    scale = scale.view(-1, *[1] * (x.ndim - 2))
    return scale.mul, scale.mul


def _aten_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    *options: Any,
) -> Products | None:
    training, momentum, eps, _ = options
    return _batch_norm(x, mean, variance, weight, bias, training, momentum, eps)


_PRODUCTS: dict[Any, Callable[..., Products | None]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _conv),
    **dict.fromkeys((_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default), _conv),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _conv_transpose),
    _aten.conv_transpose1d.default: _conv_transpose,
    _aten.conv_transpose2d.input: _conv_transpose,
    _aten.conv_transpose3d.input: _conv_transpose,
    F.batch_norm: _batch_norm,
    _aten.batch_norm.default: _aten_batch_norm,
}
