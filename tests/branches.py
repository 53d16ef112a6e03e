"""Rules of ops with several inputs, alone: an op made by hand, and what an oracle sees of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frfx.ops import Op, OpType
from frfx.rules import Rule
from tests.oracles import Array, damped_least_squares, jacobian


def op_of(kind: OpType, *inputs: str, held: tuple[str, ...] = (), **arguments: Any) -> Op:
    """Return an op that reads activations under these names, as the graph gives it to rules."""
    return Op(
        type=kind,
        name=kind.name,
        path=kind.name,
        spelling=kind.name,
        inputs={name: f"node_{name}" for name in inputs},
        arguments=arguments,
        held=frozenset(held),
    )


def answer(rule: Rule, op: Op, target: Any, output: Any, *inputs: Tensor) -> list[Tensor]:
    """Return what a rule reconstructs, as a list; the rule must support the op."""
    assert rule.supports(op) is None
    if isinstance(output, Tensor):
        shaped = op.with_shapes(tuple(tuple(x.shape[1:]) for x in inputs), tuple(output.shape[1:]))
        assert rule.supports(shaped) is None
    found = rule.build(op)(target, output, *inputs)
    return list(found) if isinstance(found, tuple) else [found]


def least_deviations(
    function: Callable[..., Tensor], free: list[Tensor], target: Tensor, damping: float = 0.0
) -> list[Array]:
    """Return the inputs of an affine function nearest to these among the best, by dense algebra.

    Args:
        function: Takes the free inputs.
        free: Their forward values, float64.
        target: What the function should give.
        damping: Tikhonov's parameter relative to the squared largest singular value.
    """
    sizes = [x.numel() for x in free]

    def joined(vector: Tensor) -> Tensor:
        parts = zip(vector.split(sizes), free, strict=True)
        return function(*(part.view(x.shape) for part, x in parts))

    start = torch.cat([x.flatten() for x in free])
    matrix = jacobian(joined, start)
    residual = (target - joined(start)).numpy().ravel()
    step = (
        damped_least_squares(matrix, residual, damping)
        if damping
        else np.linalg.pinv(matrix, rcond=1e-12) @ residual
    )
    parts = np.split(step, np.cumsum(sizes)[:-1])
    return [x.numpy() + part.reshape(x.shape) for x, part in zip(free, parts, strict=True)]
