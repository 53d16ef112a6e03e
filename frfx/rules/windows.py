"""What pooling and its like share: the windows that an op looks at."""

from __future__ import annotations

from torch import Tensor

from frfx.ops import Op, describe
from frfx.rules.base import Inversion, one_input


def tiling(op: Op) -> str | None:
    """Return why the windows of a pooling op do not tile the image, or None."""
    reason = one_input(op)
    if reason:
        return reason
    dims = spatial_dims(op)
    if unbatched(op, dims):
        return f"its input has no batch dimension: {op.show_shapes()}"
    kernel = op.sizes("kernel_size", dims)
    stride = kernel if op.arguments["stride"] in (None, (), []) else op.sizes("stride", dims)
    if stride != kernel:
        return f"kernel {kernel} with stride {stride}: only stride = kernel is covered"
    if any(op.sizes("padding", dims)):
        return f"padding {op.arguments['padding']}: only pooling without padding is covered"
    if "dilation" in op.arguments and any(size != 1 for size in op.sizes("dilation", dims)):
        return f"dilation {op.arguments['dilation']}: only dilation 1 is covered"
    if op.arguments.get("return_indices"):
        return "it returns the indices beside the values"
    if op.arguments["ceil_mode"]:
        shapes = op.input_shapes
        if shapes is None:
            return None
        size = shapes[0][1:]
        if any(s % k for s, k in zip(size, kernel, strict=True)):
            return f"ceil_mode with windows of {kernel} that reach beyond the image {size}"
    return None


def unbatched(op: Op, dims: int) -> bool:
    """Return whether the input is known to have no batch dimension."""
    return op.input_shapes is not None and len(op.input_shapes[0]) != dims + 1


def spatial_dims(op: Op) -> int:
    """Return how many spatial dimensions a pooling op has: every spelling of it says so."""
    spelling = describe(op.spelling).lower()
    return next(dims for dims in (1, 2, 3) if f"{dims}d" in spelling)


class TiledInversion(Inversion):
    """Inverse of an op over windows that tile the image; entries beyond the last window stay.

    Args:
        kernel: The size of a window.
    """

    def __init__(self, kernel: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel = kernel

    def spread(self, pooled: Tensor) -> Tensor:
        """Copy every pooled value to all of its window."""
        for dim, size in enumerate(self.kernel, start=2):
            pooled = pooled.repeat_interleave(size, dim)
        return pooled

    def covered(self, x: Tensor, spread: Tensor) -> Tensor:
        """Return the part of an image that the windows cover, as a view."""
        for dim in range(2, x.ndim):
            x = x.narrow(dim, 0, spread.shape[dim])
        return x

    def place(self, values: Tensor, x: Tensor) -> Tensor:
        """Return the image with its covered part replaced."""
        if values.shape == x.shape:
            return values
        image = x.to(values.dtype).clone()
        self.covered(image, values).copy_(values)
        return image
