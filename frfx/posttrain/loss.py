"""The loss of post-training and its two parts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Losses(NamedTuple):
    """The terms of Eq. 1-3 for one batch.

    Attributes:
        total: `(1 - alpha) L_cls + alpha L_rec` (Eq. 3), a scalar.
        classification: `L_cls` (Eq. 1); None where alpha is 1, for the tail is not run then.
        reconstruction: `L_rec` (Eq. 2); None where alpha is 0.
        output: The logits; None where alpha is 1.
    """

    total: Tensor
    classification: Tensor | None
    reconstruction: Tensor | None
    output: Tensor | None


def combine(alpha: float, classification: Tensor | None, reconstruction: Tensor | None) -> Tensor:
    """Return Eq. 3 of the terms that are there."""
    if reconstruction is None:
        assert classification is not None
        return classification
    if classification is None:
        return reconstruction
    return (1 - alpha) * classification + alpha * reconstruction
