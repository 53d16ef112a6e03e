"""What pooling ops have in common."""

from __future__ import annotations

from frfx.ops import Op, describe


def unbatched(op: Op, dims: int) -> bool:
    """Return whether the input is known to have no batch dimension."""
    return op.input_shapes is not None and len(op.input_shapes[0]) != dims + 1


def spatial_dims(op: Op) -> int:
    """Return how many spatial dimensions a pooling op has: every spelling of it says so."""
    spelling = describe(op.spelling).lower()
    return next(dims for dims in (1, 2, 3) if f"{dims}d" in spelling)
