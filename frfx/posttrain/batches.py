"""What a loader yields: batches of inputs and labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from torch import Tensor

from frfx.errors import TargetError

Batch: TypeAlias = tuple[Tensor, Tensor]


def pairs(loader: Iterable[Any]) -> Iterator[Batch]:
    """Yield what a loader yields.

    Raises:
        TargetError: If that is anything else than pairs of tensors.
    """
    for batch in loader:
        given = list(batch) if isinstance(batch, (tuple, list)) else []
        if len(given) != 2 or not all(isinstance(part, Tensor) for part in given):
            raise TargetError(
                f"a loader yields pairs (x, y) of tensors, not {_describe(batch)}: give one that "
                "makes pairs of it, anew every epoch"
            )
        yield given[0], given[1]


def _describe(batch: Any) -> str:
    kind = type(batch).__name__
    if isinstance(batch, dict):
        return f"a {kind} of {', '.join(map(repr, batch))}"
    if isinstance(batch, (tuple, list)):
        return f"a {kind} of {', '.join(type(part).__name__ for part in batch) or 'nothing'}"
    return f"a {kind}"
