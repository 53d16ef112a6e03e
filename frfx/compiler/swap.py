"""An increasing activation and the max pooling behind it, in the other order, there and back.

They commute: what is largest in a window before the activation is so behind it. So the activation
is computed, and inverted, of one entry a window: of a quarter of them where windows are 2x2.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from frfx import vocabulary
from frfx.compiler.forward import call_of, calls_plainly, without_hooks
from frfx.compiler.pooling import INCREASING, Pooling, windows
from frfx.compiler.stage import Shorter, Stage, Walk
from frfx.linalg.copies import Copies
from frfx.recording import is_recorded
from frfx.rules.activation import ElementwiseInversion
from frfx.rules.axis import Axis, RegularAxis
from frfx.rules.base import AffineInversion, Inversion
from frfx.rules.max_pool import CopyToWindow, MinimalMaxUnpool, kernel_windows
from frfx.rules.shape import PassThrough
from frfx.rules.where import where

Parts = tuple[Tensor, Tensor | None, Tensor | None]


class SwappedForward(Pooling):
    """What is pooled of the activation, and what the inversion reads beside it.

    That is what is pooled before the activation; or where the model's own calls run in their order,
    or windows leave entries that the inversion needs, the activation, all of it.

    Attributes:
        passes: Whether the inversion passes targets through the activation.
    """

    passes = False

    def forward(self, x: Tensor) -> Parts:  # type: ignore[override]
        """Return the pooled activation, and either of the two; None for the other."""
        _, activation, pool = self._calls
        assert activation is not None
        left = self.passes and not all(axis.complete for axis in self._axes(tuple(x.shape[2:])))
        if left or not self._commutes(x):
            activated = activation(x)
            return pool(activated), None, activated
        pooled = self._pooled(x, None)
        return activation(pooled), pooled, None


class SwappedInversion(Inversion):
    """Inverts the activation of what is pooled, then pooling: in turn it would be the other way.

    The answer is the same to rounding. Only of entries that the activation rounds to one value,
    pooling raises the first in turn, and the largest here.

    Args:
        pool: The inversion of pooling.
        activation: That of the activation.
        call: Calls the activation.
        as_copies: Whether what reads the answer takes an image that is not written out.
    """

    def __init__(
        self,
        pool: CopyToWindow | MinimalMaxUnpool,
        activation: ElementwiseInversion | PassThrough,
        call: Callable[[Tensor], Tensor],
        as_copies: bool,
    ) -> None:
        super().__init__()
        self._parts, self._call = (pool, activation), (call,)  # in tuples: registered elsewhere
        self._as_copies = as_copies
        self._ends = functools.cache(self._find_ends)

    def forward(  # type: ignore[override]
        self, target: Tensor, output: Tensor, *inputs: Tensor | None
    ) -> Tensor | Copies:
        x, pooled, activated = inputs
        assert x is not None
        if pooled is not None and not is_recorded(target, output, x):
            answer = self._of_pooled(target, output, pooled, x)
            if answer is not None:
                return answer
        if activated is None:
            (call,) = self._call
            activated = without_hooks(call)(x)
        pool, activation = self._parts
        return activation(pool(target, output, activated), activated, x)

    def _of_pooled(
        self, target: Tensor, output: Tensor, pooled: Tensor, x: Tensor
    ) -> Tensor | Copies | None:
        """Return the answer; None if what is pooled does not tell it."""
        pool, activation = self._parts
        axes = pool.axes(x, output)
        if isinstance(activation, PassThrough):
            if self._as_copies and all(map(_is_tiled, axes)) and pool.backend.kernels_for(target):
                return Copies(target, tuple(axis.kernel for axis in axes))
            # What no window reads would be the activation's value.
            return pool(target, pooled, x) if all(axis.complete for axis in axes) else None
        if type(pool) is not CopyToWindow:
            return pool(activation(target, output, pooled), pooled, x)
        kernels = pool.backend.kernels_for(target, output, pooled, x)
        # A GPU is not asked: the host would wait for it.
        if kernels is None and x.is_cpu and not self._at_an_end(target):
            return pool(activation(target, output, pooled), pooled, x)
        if not self._bounded(target):
            return None
        apart = all(axis.disjoint for axis in axes)
        windows = kernel_windows(axes) if kernels and activation.functor and apart else None
        if kernels and activation.functor and windows:
            return kernels.unpool_preimages(
                activation.functor, activation.limits, target, output, pooled, x, *windows,
                complete=all(axis.complete for axis in axes),
            )  # fmt: skip
        return self._between(target, activation(target, output, pooled), pooled, x)

    def _at_an_end(self, target: Tensor) -> bool:
        """Tell whether a target is at an end of the range: it has more preimages than one."""
        (low, high), _ = self._ends(target.dtype)
        return not low < float(target.amin()) <= float(target.amax()) < high

    def _find_ends(self, dtype: torch.dtype) -> tuple[list[float], list[float]]:
        """Return the ends of the range, as targets of a type are limited to them, and what these
        are inverted to."""
        _, activation = self._parts
        assert isinstance(activation, ElementwiseInversion)
        ends = torch.tensor(activation.limits, dtype=dtype, device="cpu")
        preimages: Tensor = activation.function.nearest(ends, ends, **activation.arguments)
        return ends.tolist(), preimages.tolist()

    def _bounded(self, target: Tensor) -> bool:
        """Tell whether ends that targets may reach have finite preimages: not without a margin."""
        both = zip(*self._ends(target.dtype), strict=True)
        return all(math.isfinite(end) or not math.isfinite(limit) for limit, end in both)

    def _between(self, target: Tensor, answer: Tensor, pooled: Tensor, x: Tensor) -> Tensor:
        """Return the entries nearest to the forward ones between the ends of their preimages."""
        pool, _ = self._parts
        most = torch.full_like(answer, torch.finfo(answer.dtype).max)
        (low, high), (least, largest) = self._ends(target.dtype)
        floor = where(target <= low, -most, answer.clamp(max=largest))
        ceiling = where(target >= high, most, answer.clamp(min=least))
        return x.clamp(pool(floor, pooled, x), pool(ceiling, pooled, x))


def find(walk: Walk, stage: Stage) -> tuple[Stage, Stage] | None:
    """Return the stages of pooling and of the activation in front, if this is one of the latter."""
    op, pool = stage.step.op, walk.before(stage)
    if pool is None or pool.step.node is None or stage.step.node is None:
        return None
    if not calls_plainly(pool.step.node) or not calls_plainly(stage.step.node):
        return None
    unpool, inversion = type(walk.inversion(pool)), walk.inversion(stage)
    if unpool not in (CopyToWindow, MinimalMaxUnpool):
        return None  # a subclass may do something else
    if type(inversion) is PassThrough:
        if unpool is not CopyToWindow:
            return None
    elif type(inversion) is not ElementwiseInversion or not inversion.function.increases:
        return None
    if pool.step.op.type is not vocabulary.max_pool:
        return None
    if op.type not in INCREASING:  # a policy may invert it as if it were another
        return None
    if set(op.inputs) != {"input"} or op.computed or not walk.answers(stage):
        return None
    apart = all(d * (k - 1) < s for k, s, _, d in windows(pool.step.op))
    if unpool is MinimalMaxUnpool and not apart:
        return None  # windows that share entries make up for one another, by how far they are off
    behind = walk.copies[pool.step.node]
    readers = {behind, walk.nodes[pool.results[0]], walk.nodes[stage.results[0]]}
    return (pool, stage) if set(walk.copies[stage.step.node].users) == readers else None


def write(chain: Sequence[Stage], walk: Walk, shorter: Shorter) -> None:
    """Swap the two that have been found."""
    pool, stage = chain
    assert pool.step.node is not None
    assert stage.step.node is not None
    call = call_of(stage.step.node, walk.root)
    op = pool.step.op
    unpool, activation = walk.inversion(pool), walk.inversion(stage)
    forward = SwappedForward(op, call_of(pool.step.node, walk.root), call)
    forward.backend, forward.passes = unpool.backend, isinstance(activation, PassThrough)
    x, y = (shorter.copy(walk.copies[n]) for n in (stage.step.inputs[0], pool.step.node))
    with shorter.graph.inserting_before(y):
        both = shorter.graph.call_module(shorter.add_forward(op.name, forward), (x,))
        output, pooled, activated = (
            shorter.graph.call_function(operator.getitem, (both, i)) for i in range(3)
        )
    y.replace_all_uses_with(output)
    assert isinstance(unpool, CopyToWindow | MinimalMaxUnpool)
    assert isinstance(activation, ElementwiseInversion | PassThrough)
    target = shorter.copy(walk.nodes[pool.results[0]]).args[0]
    shorter.replace(
        walk.nodes[stage.results[0]], f"{op.name}_swapped",
        SwappedInversion(unpool, activation, call, _is_solved_for(stage, walk)),
        target, output, x, pooled, activated,
    )  # fmt: skip


def _is_tiled(axis: Axis) -> bool:
    """Tell whether the windows are tiles of the image."""
    plain = isinstance(axis, RegularAxis) and axis.padding == 0 and axis.disjoint
    return plain and axis.complete and axis.count * axis.kernel == axis.size


def _is_solved_for(stage: Stage, walk: Walk) -> bool:
    """Tell whether a convolution that is solved is all that reads the answer of a stage."""
    readers = [walk.stages.get(str(user.target)) for user in walk.nodes[stage.results[0]].users]
    return (
        len(readers) == 1
        and readers[0] is not None
        and readers[0].target == stage.results[0]
        and readers[0].step.op.type is vocabulary.conv
        and type(walk.inversion(readers[0])) is AffineInversion
    )
