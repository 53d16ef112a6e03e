"""Between the rules: several answers for one feature, parts of a tuple, the trust region."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from frfx.rules.base import Inversion


def fan_out_inverse(
    forward: Tensor, answers: Sequence[Tensor], shares: Sequence[Tensor | None] = ()
) -> Tensor:
    """Return `x*` of a feature that several ops read, each of which has answered.

    The least-squares solution of the fan-out `x -> (x, ..., x)`, whose pseudo-inverse is the mean.
    Readers that select entries say how often they read each: with selections A_i, the `A_i^T A_i`
    are diagonal, and the pseudo-inverse of all together is the mean over those who read an entry.

    Args:
        forward: `x^`.
        answers: What each reader has answered.
        shares: How often each reads every entry; None for once. Empty if all read all.
    """
    total = torch.zeros_like(forward)
    count: Tensor | float = 0.0
    for answer, share in itertools.zip_longest(answers, shares):
        weight = 1 if share is None else share.to(answer.dtype)
        total = total + weight * (answer - forward)
        count = count + weight
    return forward + total / (count.clamp(min=1) if isinstance(count, Tensor) else count)


class Share(nn.Module):
    """Which entries the answer of an inversion speaks for, as a module of the graph.

    Args:
        inversion: It is registered elsewhere in the graph.
    """

    def __init__(self, inversion: Inversion) -> None:
        super().__init__()
        self._inversion = (inversion,)

    def forward(self, *inputs: Tensor) -> Tensor | None:
        """Return `inversion.share(*inputs)`."""
        return self._inversion[0].share(*inputs)


def replace_parts(
    parts: tuple[Tensor, ...], answers: Sequence[tuple[int, Tensor]]
) -> tuple[Tensor, ...]:
    """Return a tuple of forward values, with targets where there are some.

    Args:
        parts: The forward values.
        answers: Indices, which may be negative, with their answers; a part that a program takes
            several times has several.
    """
    wanted = defaultdict(list)
    for index, answer in answers:
        wanted[index % len(parts)].append(answer)
    return tuple(
        fan_out_inverse(part, wanted[index]) if index in wanted else part
        for index, part in enumerate(parts)
    )


def limit_deviation(target: Tensor, forward: Tensor, radius: float) -> Tensor:
    """Return the target, moved towards the forward value where it lies outside the trust region.

    Args:
        target: `x*`, shape (N, ...).
        forward: `x^`, of the same shape.
        radius: Bound on `||x* - x^|| / ||x^||` of every sample. The step keeps its direction: along
            it, the linearised residual only falls up to the whole step.
    """
    deviation = target - forward
    length = _norms(deviation)
    longest = radius * _norms(forward.to(deviation.dtype))
    share = torch.where(length > longest, longest / length, 1)
    return forward + share.view(-1, *[1] * (deviation.ndim - 1)) * deviation


def _norms(values: Tensor) -> Tensor:
    """Return the norm of every sample, shape (N,)."""
    return torch.linalg.vector_norm(values.reshape(len(values), -1), dim=1)
