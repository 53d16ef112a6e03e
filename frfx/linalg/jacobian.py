"""The derivative of a function that torch has computed, as a linear operator."""

from __future__ import annotations

import torch
from torch import Tensor

from frfx.linalg.cgls import unstructured


class Jacobian:
    """The Jacobian of an output with respect to a feature, as two products.

    Where the samples depend on each other, or do not lie along the first dimension, the whole batch
    is one system: `systems` is 1.

    Args:
        leaf: The feature (N, ...), which `output` was computed from under autograd.
        output: Shape (N, ...).

    Attributes:
        systems: How many independent systems there are, the first dimension of every vector.
    """

    def __init__(self, leaf: Tensor, output: Tensor, systems: int | None = None) -> None:
        self._leaf, self._output = leaf, output
        self.systems = len(leaf) if systems is None else systems
        with torch.enable_grad():
            # J^T u is linear in u: its derivative, transposed, is J, at the price of a backward.
            self._probe = torch.zeros_like(output, requires_grad=True)
            (self._pulled,) = torch.autograd.grad(output, leaf, self._probe, create_graph=True)

    def mv(self, tangent: Tensor) -> Tensor:
        """Apply the Jacobian: (systems, n) -> (systems, m)."""
        tangent = tangent.reshape(self._leaf.shape)
        (product,) = torch.autograd.grad(self._pulled, self._probe, tangent, retain_graph=True)
        return product.reshape(self.systems, -1)

    def rmv(self, cotangent: Tensor) -> Tensor:
        """Apply the transpose: (systems, m) -> (systems, n)."""
        cotangent = cotangent.reshape(self._output.shape)
        (product,) = torch.autograd.grad(self._output, self._leaf, cotangent, retain_graph=True)
        return product.reshape(self.systems, -1)

    def couples_samples(self) -> bool:
        """Tell whether some rows of the output depend on other rows of the feature."""
        rows = len(self._leaf)
        if len(self._output) != rows:
            return True
        others = torch.arange(rows, device=self._leaf.device) >= rows // 2
        moved = [unstructured(t.detach().flatten(1)).clone() for t in (self._leaf, self._output)]
        for tensor in moved:
            tensor[others] = 0
        forward, back = self.mv(moved[0]), self.rmv(moved[1])
        return bool(forward.reshape(rows, -1)[others].any() | back.reshape(rows, -1)[others].any())
