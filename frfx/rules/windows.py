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


WINDOW = ("kernel_size", "stride", "padding", "dilation")
"""What describes the windows of max pooling."""


def window_sizes(op: Op, name: str) -> tuple[int, ...]:
    """Return what describes windows, by dimension; a stride that is not given is their size."""
    given = op.arguments[name] not in (None, (), [])
    return op.sizes(name if given else "kernel_size", spatial_dims(op))
