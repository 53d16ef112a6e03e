"""The derivative of a function that torch computes, as a linear operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from frfx.linalg.cgls import unstructured


class Jacobian:
    """The Jacobian of a function at a feature, as two products.

    The samples are systems of their own, unless `systems` is set to 1: the whole batch is one then.

    Args:
        function: Maps features (N, ...) to outputs, without a state.
        feature: Where it is linearised, shape (N, ...).

    Attributes:
        output: The function's value there.
        systems: How many independent systems there are, the first dimension of every vector.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], feature: Tensor) -> None:
        self._function, self._feature = function, feature.detach()
        self.systems = len(feature)
        # The fused kernels of attention have neither a second derivative nor one in forward mode.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._leaf = self._feature.clone().requires_grad_()
            self._output = function(self._leaf)
            # J^T u is linear in u: its derivative, transposed, is J, at the price of a backward.
            self._probe = torch.zeros_like(self._output, requires_grad=True)
            self._pulled: Tensor | None = torch.autograd.grad(
                self._output, self._leaf, self._probe, create_graph=True
            )[0]
        self.output = self._output.detach()

    def mv(self, tangent: Tensor) -> Tensor:
        """Apply the Jacobian: (systems, n) -> (systems, m)."""
        tangent = tangent.reshape(self._feature.shape)
        if self._pulled is not None:
            try:
                (product,) = torch.autograd.grad(
                    self._pulled, self._probe, tangent, retain_graph=True
                )
                return product.reshape(self.systems, -1)
            except RuntimeError as error:  # a few ops have no second derivative
                if "not implemented" not in str(error):
                    raise
                self._pulled = None
        return self._forward_mode(tangent).reshape(self.systems, -1)

    def _forward_mode(self, tangent: Tensor) -> Tensor:
        """Apply the Jacobian by running the function anew, with a tangent."""
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            value = self._function(forward_ad.make_dual(self._feature, tangent))
            product = forward_ad.unpack_dual(value).tangent
        if product is None:  # some ops drop it and say nothing
            raise NotImplementedError("the derivative in forward mode is not implemented")
        return product

    def rmv(self, cotangent: Tensor) -> Tensor:
        """Apply the transpose: (systems, m) -> (systems, n)."""
        cotangent = cotangent.reshape(self._output.shape)
        (product,) = torch.autograd.grad(self._output, self._leaf, cotangent, retain_graph=True)
        return product.reshape(self.systems, -1)

    def couples_samples(self) -> bool:
        """Tell whether some rows of the output depend on other rows of the feature."""
        rows = len(self._feature)
        if len(self._output) != rows:
            return True
        others = torch.arange(rows, device=self._feature.device) >= rows // 2
        moved = [unstructured(t.flatten(1)).clone() for t in (self._feature, self.output)]
        for tensor in moved:
            tensor[others] = 0
        forward, back = self.mv(moved[0]), self.rmv(moved[1])
        return bool(forward.reshape(rows, -1)[others].any() | back.reshape(rows, -1)[others].any())


__all__ = ["Jacobian"]
