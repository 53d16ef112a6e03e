"""A part of the network as a function of one feature, for any subset of a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Region:
    """The network from one feature on, with every other input held at its forward value.

    Args:
        module: Takes the feature and the held values, returns the output.
        held: Values of the whole batch, which the feature does not reach.
        batch: The only batch size that the module takes; None for all.
    """

    def __init__(
        self,
        module: nn.Module,
        held: tuple[Tensor, ...],
        batch: int | None,
    ) -> None:
        self._module, self._held, self._batch = module, held, batch

    def __call__(self, feature: Tensor, rows: Tensor) -> Tensor:
        """Return the output for the features of some samples.

        Args:
            feature: Shape (L, ...), one feature a row.
            rows: To which samples of the batch they belong, shape (L,); any order, repeats too.
        """
        if self._batch is None:
            return self._run(feature, rows)
        count = len(rows)
        whole = math.ceil(count / self._batch) * self._batch
        order = torch.arange(whole, device=rows.device) % count  # fills up what is fixed
        feature, rows = feature[order], rows[order]
        parts = zip(feature.split(self._batch), rows.split(self._batch), strict=True)
        return torch.cat([self._run(*part) for part in parts])[:count]

    def _run(self, feature: Tensor, rows: Tensor) -> Tensor:
        return self._module(feature, *(value[rows] for value in self._held))
