"""The loss of post-training and its two parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Losses(NamedTuple):
    """The terms of Eq. 1-3 for one batch.

    Attributes:
        total: `(1 - alpha) L_cls + alpha L_rec` (Eq. 3), or with the weighing ``"relative"``
            `(1 - alpha) L_cls + alpha L_rec / D`; a scalar.
        classification: `L_cls` (Eq. 1); None where alpha is 1, for the tail is not run then.
        reconstruction: `L_rec` (Eq. 2); None where alpha is 0.
        output: The logits; None where alpha is 1.
    """

    total: Tensor
    classification: Tensor | None
    reconstruction: Tensor | None
    output: Tensor | None


class Scale:
    """What the reconstruction loss of the network before training comes to: the mean `D` over the
    samples seen.

    Divided by it, the loss is 1 where training begins, however far the targets lie from the
    features: alpha weighs the terms alike for a policy that asks for much and one that asks for
    little.
    """

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def update(self, loss: Tensor, samples: int) -> None:
        """Take in a batch's loss."""
        self._sum = self._sum + loss.detach().double() * samples
        self._count += samples

    def divide(self, loss: Tensor) -> Tensor:
        """Return the loss over the scale; as it is while all targets have been the features."""
        mean = torch.as_tensor(
            self._sum / max(self._count, 1), dtype=loss.dtype, device=loss.device
        )
        return loss / torch.where(mean > 0, mean, 1)


def combine(alpha: float, classification: Tensor | None, reconstruction: Tensor | None) -> Tensor:
    """Return Eq. 3 of the terms that are there."""
    if reconstruction is None:
        assert classification is not None
        return classification
    if classification is None:
        return reconstruction
    return (1 - alpha) * classification + alpha * reconstruction
