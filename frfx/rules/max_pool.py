"""Max pooling of any geometry, and adaptive max pooling."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from frfx import vocabulary
from frfx.kernels import Windows
from frfx.ops import Op, Shape
from frfx.registry import register_rule
from frfx.rules.axis import (
    Axis,
    RegularAxis,
    adaptive_axes,
    fold,
    frame,
    highest,
    lowest,
    regular_axes,
    taps,
)
from frfx.rules.base import Inversion, Rule, one_input
from frfx.rules.windows import WINDOW, spatial_dims, unbatched, window_sizes

_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)

# Masks are numbers here, 0 and 1: on a CPU, booleans and torch.where take several times as long.

_SMALL = 9
"""Up to how many entries a window is read entry by entry on a CPU, where torch's own search for the
maximum is slow for small windows and fast for large ones."""

_CHUNK = 1 << 19
"""How many entries are inverted at once on a CPU, so that they stay in its caches. On other devices
32 times as many: there it only bounds the memory."""


class MaxPoolInversion(Inversion):
    """Inverse of max pooling.

    Args:
        geometry: Returns the windows for the spatial sizes of the input and of the output.
    """

    def __init__(self, geometry: Callable[[Shape, Shape], tuple[Axis, ...]]) -> None:
        super().__init__()
        self.geometry = geometry

    def axes(self, x: Tensor, output: Tensor) -> tuple[Axis, ...]:
        """Return the windows along every spatial dimension."""
        return self.geometry(tuple(x.shape[2:]), tuple(output.shape[2:]))

    def by_kernel(
        self, target: Tensor, x: Tensor, axes: tuple[Axis, ...], *, minimal: bool
    ) -> Tensor | None:
        """Return the image from one kernel; None if there is none for these windows and tensors."""
        kernels = self.backend.kernels_for(target, x)
        windows = kernel_windows(axes) if kernels else None
        if kernels is None or windows is None:
            return None
        return kernels.max_unpool(
            target, x, *windows, minimal=minimal,
            disjoint=all(axis.disjoint for axis in axes),
            complete=all(axis.complete for axis in axes),
        )  # fmt: skip


def kernel_windows(axes: tuple[Axis, ...]) -> tuple[Windows, Windows] | None:
    """Return the windows as the kernels take them, of rows and of columns; None if they cannot."""
    windows = [
        Windows(axis.size, axis.count, axis.kernel, axis.stride, axis.padding, axis.dilation)
        for axis in axes
        if isinstance(axis, RegularAxis)
    ]
    if len(windows) < len(axes) or len(windows) > 2 or math.prod(a.size for a in axes) >= 1 << 31:
        return None
    return (windows[0] if len(windows) == 2 else Windows(1, 1, 1, 1, 0, 1)), windows[-1]


class CopyToWindow(MaxPoolInversion):
    """Every entry takes the least target of the windows that read it; what none reads stays."""

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        axes = self.axes(x, output)
        image = self.by_kernel(target, x, axes, minimal=False)
        if image is not None:
            return image
        copies = lowest(target, axes)
        if all(axis.complete for axis in axes):
            return copies
        return torch.where(copies < math.inf, copies, x)


class MinimalMaxUnpool(MaxPoolInversion):
    """The nearest image whose windows have the target as their maximum."""

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        axes = self.axes(x, output)
        entries = _CHUNK if x.is_cpu else 32 * _CHUNK
        if torch.compiler.is_compiling() or x.numel() <= entries:
            return self._unpool(target, output, x, axes)
        chunk = max(entries // math.prod(x.shape[2:]), 1)
        parts = (v.reshape(-1, 1, *v.shape[2:]).split(chunk) for v in (target, output, x))
        images = [self._unpool(t, y, v, axes) for t, y, v in zip(*parts, strict=True)]
        return torch.cat(images).view(x.shape)

    def _unpool(self, target: Tensor, output: Tensor, x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
        disjoint = all(axis.disjoint for axis in axes)
        if not disjoint and not all(axis.free for axis in axes):
            target = _nearest_reachable(target, x, axes)
        image = self.by_kernel(target, x, axes, minimal=True)
        if image is not None:
            return image
        size = math.prod([axis.kernel for axis in axes])
        if disjoint and size <= _SMALL and x.is_cpu and all(axis.inside for axis in axes):
            return _unpool_small_tiles(target, output, x, axes)
        bound = lowest(target, axes)
        place = _argmax(x, axes) if disjoint else _select(target, bound, x, axes)
        raised = x.flatten(2).scatter(2, place, math.inf).view(x.shape)
        return torch.minimum(raised, bound)


def _unpool_small_tiles(
    target: Tensor, output: Tensor, x: Tensor, axes: tuple[Axis, ...]
) -> Tensor:
    """Return the nearest image for disjoint windows: their first maximum takes the target."""
    exact = all(axis.complete for axis in axes)
    image = x.new_empty(x.shape, dtype=target.dtype) if exact else x.to(target.dtype, copy=True)
    most = torch.finfo(target.dtype).max
    waiting, first = torch.full_like(target, most), torch.empty_like(target)
    entries, places = (taps(frame(each, axes, 0), axes) for each in (x, image))
    for entry, place in zip(entries, places, strict=True):
        value = entry.to(target.dtype).clone(memory_format=torch.contiguous_format)
        with torch.no_grad():
            torch.eq(value.detach(), output.detach(), out=first)
            first *= waiting  # not 0 at the maximum, if it has not come before
            waiting -= first
        # The target is the least at the first maximum, which is raised to infinity.
        place.copy_(torch.minimum(value.add(first, alpha=2), target))
    return image


@torch.no_grad()
def _argmax(x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Return where every window has its first maximum, as an index (N, C, windows)."""
    framed = x if all(axis.inside for axis in axes) else frame(x, axes, -math.inf)
    pool = _MAX_POOL[len(axes) - 1]
    kernel, stride, dilation = (
        tuple(getattr(axis, name) for axis in axes) for name in ("kernel", "stride", "dilation")
    )
    _, place = pool(framed, kernel, stride, 0, dilation, return_indices=True)
    if framed is not x:
        place = frame(_indices(x), axes, 0).flatten()[place]
    return place.flatten(2)


@torch.no_grad()
def _select(top: Tensor, bound: Tensor, x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Return which entry brings every window to its target: among those whose bound is the
    target, the one with the largest forward value.

    Args:
        top: The largest bound in every window, (N, C, *count).
        bound: What no entry may exceed, (N, C, *size).
        x: The forward image.
        axes: The windows.

    Returns:
        Indices (N, C, windows).
    """
    most = torch.full_like(top, -math.inf)
    chosen = torch.zeros_like(top)  # the number of the offset
    bounds, values = (taps(frame(image, axes, -math.inf), axes) for image in (bound, x))
    for offset, (limit, value) in enumerate(zip(bounds, values, strict=True)):
        excluded = limit.clone().eq_(top).reciprocal_().sub_(1)  # infinite, or 0 at the target
        value = value - excluded
        better = value.clone().gt_(most)
        most = torch.maximum(most, value)
        chosen.addcmul_(better, offset - chosen)
    places = torch.stack([*taps(frame(_indices(x), axes, 0), axes)]).flatten()
    count = math.prod([axis.count for axis in axes])
    window = torch.arange(count, device=x.device)
    return places[chosen.flatten(2).long() * count + window]


def _nearest_reachable(target: Tensor, x: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Return the pooled values that stand in for a target that no image may have.

    Windows demand their target of the entry with the highest bound. Where that bound is short of
    it, the entry rises to `u + sum_J (t_j - u) / (|J| + sum_k w_k^2)`: J are the windows that
    demand more of it than its bound u, m is the mean of their targets, and k runs over the other
    windows that read it, with `w_k = max(m - t_k, 0) / (m - u)`. That is the minimum of a quadratic
    function above the sum of squared errors that the entry causes, which touches it at u; so the
    errors together are at most those of `u` alone, and fewer if anything is short.
    """
    bound = lowest(target, axes)
    place = _select(highest(bound, axes), bound, x, axes)
    shape, bound, wanted = bound.shape, bound.flatten(2), target.flatten(2)
    lacking = wanted - bound.gather(2, place)
    short = (lacking > 0).to(target.dtype)
    none = torch.zeros_like(bound)
    demands = none.scatter_add(2, place, short)
    total = none.scatter_add(2, place, lacking)
    rise = total / demands.clamp(min=1)
    scale = torch.where(rise > 0, rise, 1)
    level = bound + rise

    def weight(level: Tensor, scale: Tensor, target: Tensor) -> Tensor:
        return ((level - target) / scale).clamp(0, 1).square()

    levels = frame(level.view(shape), axes, -math.inf)
    scales = frame(scale.view(shape), axes, 1)
    others = torch.zeros_like(levels)
    for sums, at, by in zip(*(taps(f, axes) for f in (others, levels, scales)), strict=True):
        sums += weight(at, by, target)
    own = short * weight(level.gather(2, place), scale.gather(2, place), wanted)
    slope = demands + fold(others, axes).flatten(2) - none.scatter_add(2, place, own)
    return highest((bound + total / slope.clamp(min=1)).view(shape), axes)


def _indices(x: Tensor) -> Tensor:
    """Return the index of every entry in its flattened image, (1, 1, *size)."""
    return torch.arange(x[0, 0].numel(), device=x.device).view(1, 1, *x.shape[2:])


@register_rule(vocabulary.max_pool, principle="paper")
@register_rule(vocabulary.adaptive_max_pool, principle="paper")
@dataclass(frozen=True)
class MaxPoolCopyRule(Rule):
    """Copy every value to its whole window; where windows overlap, the least of their values.

    With more, an entry would exceed the target of a window that reads it. So every target that
    some image has is met, and of the others the largest pooled values below them.
    """

    equation = "Sec. 3.4 (b)"
    accuracy = "approximate: the whole window takes the target, where one entry would do"

    def supports(self, op: Op) -> str | None:
        return _refusal(op)

    def build(self, op: Op) -> Inversion:
        return CopyToWindow(geometry(op))


@register_rule(vocabulary.max_pool, principle="minimal")
@register_rule(vocabulary.adaptive_max_pool, principle="minimal")
@dataclass(frozen=True)
class MaxPoolMinimalRule(Rule):
    """The nearest image whose windows have the target as their maximum.

    No entry may exceed `u`, the least target of the windows that read it, and a window has its
    target t where an entry is at `u = t`. So the image is `min(x^, u)`, but for one entry of every
    window, which is at u: of those with `u = t`, the one with the largest forward value. That is
    the nearest image, unless windows that overlap have the same target and more than one has to
    raise an entry. An entry that serves several of them is raised once, but whether another would
    have served more of them is not asked: finding the cheapest set of entries is a set cover
    problem. The squared deviation is then at most that of the nearest image times the number of
    windows that read an entry.

    Where overlapping windows disagree, no image has the target: all of a window's entries are held
    down by others. Such windows share an entry's error with those that hold it down, in a step of
    least squares from u (`_nearest_reachable`); what comes of it is the target in place of the
    given one. Targets that some image has stay as they are.
    """

    equation = "Eq. 4 for max pooling"
    accuracy = (
        "exact, but for overlapping windows with equal or contradicting targets: within a bound"
    )

    def supports(self, op: Op) -> str | None:
        return _refusal(op)

    def build(self, op: Op) -> Inversion:
        return MinimalMaxUnpool(geometry(op))


def _refusal(op: Op) -> str | None:
    """Return why an op cannot be inverted, or None."""
    reason = one_input(op, *(WINDOW if op.type is vocabulary.max_pool else ()))
    if reason:
        return reason
    if op.arguments.get("return_indices") or op.arguments.get("indices"):
        return "it returns the indices beside the values"
    if unbatched(op, spatial_dims(op)):
        return f"its input has no batch dimension: {op.show_shapes()}"
    return None


def geometry(op: Op) -> Callable[[Shape, Shape], tuple[Axis, ...]]:
    """Return what makes an op's windows from the spatial sizes of its input and its output."""
    if op.type is vocabulary.adaptive_max_pool:
        return adaptive_axes
    return functools.partial(regular_axes, *(window_sizes(op, name) for name in WINDOW))
