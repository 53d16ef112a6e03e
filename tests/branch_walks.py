"""What tests of the walk over branches share: networks, exact policies, and an oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import frfx
from frfx import vocabulary
from tests.oracles import Array, minimal_affine_preimage, normal

A, B, C = (normal(seed, 6, 6) for seed in (101, 102, 103))


def exact(branches: Any = "region", **options: Any) -> frfx.policy.Policy:
    """Return the minimal policy with regions solved down to rounding, without damping."""
    policy = frfx.policy.minimal(branches=branches, **options)
    return policy.override(op=vocabulary.region, damping=0.0, tolerance=1e-13, max_steps=2000)


def by_sample(function: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Array:
    """Return `x + J+ (y* - f(x))` of every sample by NumPy's pseudo-inverse of its Jacobian."""
    rows = zip(x, target, strict=True)
    found = [minimal_affine_preimage(function, one[None], y[None], 1e-11) for one, y in rows]
    return np.concatenate(found)


def near(function: Callable[..., Tensor], x: Tensor, **tensors: Tensor) -> Tensor:
    """Return a target near to what the function gives."""
    output = function(x, **tensors)
    return output + 0.2 * normal(7, *output.shape)


def steps(inverse: frfx.Inverse) -> list[tuple[str, str]]:
    """Return the steps of a walk, by node and op."""
    return [(row.node, row.op) for row in inverse.summary()]


class Blocks(nn.Module):
    """A line, a residual block with another inside, a line, a gate, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("stem", "a", "b", "c", "mid", "gate", "fc"):
            self.add_module(name, nn.Linear(6, 6))
        self.double().requires_grad_(False)

    def block(self, x: Tensor) -> Tensor:
        """A residual block in a residual block."""
        h = torch.tanh(self.a(x))
        h = h + self.b(torch.tanh(h))
        return x + self.c(h)

    def gated(self, x: Tensor) -> Tensor:
        """A gate."""
        return x * torch.sigmoid(self.gate(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        return self.fc(self.gated(torch.tanh(self.mid(x))))


def residual_block(x: Tensor, a: Tensor) -> Tensor:
    """A residual block."""
    return x + torch.tanh(F.linear(x, a))
