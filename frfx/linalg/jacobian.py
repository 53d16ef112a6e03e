"""The derivative of a function that torch computes, as a linear operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from frfx.linalg.affine_layers import AffineLayers
from frfx.linalg.bidiagonal import unstructured


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
            with AffineLayers(self._leaf):
                self._output = function(self._leaf)
            # J^T u is linear in u: its derivative, transposed, is J, at the price of a backward.
            self._probe = torch.zeros_like(self._output, requires_grad=True)
            self._pulled: Tensor | None = None
            if self._output.requires_grad:
                (self._pulled,) = torch.autograd.grad(
                    self._output, self._leaf, self._probe, create_graph=True, allow_unused=True
                )
            if self._pulled is None:
                raise NotImplementedError("a derivative is not implemented: nothing flows back")
            if not self._pulled.requires_grad:  # of a function that is constant in steps
                self._pulled = None
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
        # With a leaf that asks for gradients: else attention takes a kernel that has no tangents.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            value = self._function(forward_ad.make_dual(self._leaf, tangent))
            product = forward_ad.unpack_dual(value).tangent
        if product is None:  # some ops drop it and say nothing
            raise NotImplementedError("the derivative in forward mode is not implemented")
        return product.detach()

    def rmv(self, cotangent: Tensor) -> Tensor:
        """Apply the transpose: (systems, m) -> (systems, n)."""
        cotangent = cotangent.reshape(self._output.shape)
        (product,) = torch.autograd.grad(self._output, self._leaf, cotangent, retain_graph=True)
        return product.reshape(self.systems, -1)

    def couples_samples(self) -> bool | None:
        """Tell whether some rows of the output depend on other rows of the feature.

        Returns:
            None if none is seen to, but the products of some rows are not finite.
        """
        rows = len(self._feature)
        if len(self._output) != rows:
            return True
        finite, index = True, torch.arange(rows, device=self._feature.device)
        vectors = [unstructured(t.reshape(rows, -1)) for t in (self._feature, self.output)]
        for bit in range((rows - 1).bit_length()):  # any two rows differ in some bit
            still = (index >> bit) % 2 == 1
            moved = [torch.where(still[:, None], 0, vector) for vector in vectors]
            for product in (self.mv(moved[0]), self.rmv(moved[1])):
                others = product.reshape(rows, -1)[still]
                known = others.isfinite()
                if bool((known & (others != 0)).any()):
                    return True
                finite = finite and bool(known.all())
        return False if finite else None
