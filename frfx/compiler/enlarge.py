"""Average pooling that enlarges, and the linear layer behind it, as one map there and one back.

Networks for large images are used for small ones: VGG pools whatever comes to 7x7 pixels, and of
images of 64x64 that is 2x2. What the linear layer reads are then copies and means of a twelfth as
many entries, and a map of those is a twelfth of its size. Layer by layer the answers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from frfx import vocabulary
from frfx.compiler.forward import call_of, calls_plainly, is_hooked, without_hooks
from frfx.compiler.stage import Shorter, Stage, Walk
from frfx.linalg import Matrix, Separable
from frfx.linalg.auto import Choice
from frfx.linalg.dense import GramFactor, MatrixFactor
from frfx.linalg.products import linear
from frfx.linalg.pseudo_inverse import solve_dtype
from frfx.ops import Op, Shape
from frfx.rules.base import AffineInversion, FactoredInversion, Inversion
from frfx.rules.pool import AdaptiveInversion
from frfx.rules.shape import PassThrough, Reshape

_KEEPING = {
    vocabulary.identity,
    vocabulary.dropout,
    vocabulary.stochastic_depth,
    vocabulary.reshape,
}
"""Ops that leave all entries as they are, and in their order."""


@dataclass(frozen=True)
class Maps:
    """What is made once for images of one size.

    Attributes:
        there: The weight of the linear layer times the matrix of pooling.
        back: The pseudo-inverses of both, the one times the other.
    """

    there: Tensor
    back: MatrixFactor

    @property
    def nbytes(self) -> int:
        """The memory that they hold, in bytes."""
        return self.there.nbytes + self.back.nbytes


@dataclass(frozen=True)
class Apart:
    """In the place of maps, where there are none: both are inverted in turn."""

    nbytes = 0


class MergedInversion(FactoredInversion):
    """`a* = a^ + P+ W+ (y* - y^)`, which is what pooling P and the layer W are inverted to in turn.

    Args:
        inversions: Theirs and of what is between, as the walk back comes to them.
        op: The linear layer, which reads what is pooled here.
        calls: What computes the values between the two in the forward pass, from pooling on.
    """

    def __init__(
        self, inversions: Sequence[Inversion], op: Op, calls: Sequence[Callable[[Tensor], Tensor]]
    ) -> None:
        super().__init__(op)
        self._inversions, self._calls = tuple(inversions), tuple(calls)  # registered elsewhere

    def key(self, input_shape: Shape, output_shape: Shape) -> Shape:
        """Return how many dimensions the layer's output has, and the shape of what is pooled."""
        return (len(output_shape), *input_shape)

    def maps(self, x: Tensor) -> Maps | None:
        """Return the maps for what is pooled; None if both are inverted in turn."""
        maps = self.factors.get((1, *x.shape[1:]))
        return maps if isinstance(maps, Maps) else None

    def factorize(self, key: Shape) -> Maps | Apart:
        """Merge the factors of both, which have been made before."""
        linear, *_, pool = self._inversions
        assert isinstance(linear, AffineInversion)
        assert isinstance(pool, AdaptiveInversion)
        (dims, *size), layer = key, linear.linear_part(())
        before, pooled = tuple(size), pool.onto(tuple(size))
        choice = linear.factors[()]
        factor = choice.factor if isinstance(choice, Choice) else choice
        if not isinstance(layer, Matrix) or not isinstance(factor, MatrixFactor | GramFactor):
            return Apart()
        if dims != 1 or not math.prod(before) < math.prod(pooled) == layer.matrix.shape[1]:
            return Apart()
        by_pool = pool.key(before, pooled)
        averages, spread = pool.linear_part(by_pool), pool.factors[by_pool]
        assert isinstance(averages, Separable)
        weight = layer.matrix.to(solve_dtype(layer.matrix.dtype)).unflatten(1, pooled)
        there = averages.rmv(weight).flatten(1).to(layer.matrix.dtype)
        back = factor.followed_by(lambda rows: spread.solve(rows.unflatten(1, pooled)).flatten(1))
        return Maps(there, back)

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        maps = self.maps(x)
        if maps is not None:
            with torch.autocast(x.device.type, enabled=False):
                flat = maps.back.correct(x.flatten(1), target, output)
            return flat.unflatten(1, x.shape[1:])
        values = [x]
        for call in self._calls:
            values.append(without_hooks(call)(values[-1]))
        for inversion, value in zip(self._inversions, reversed(values), strict=True):
            target, output = inversion(target, output, value), value
        return target


class MergedForward(nn.Module):
    """The linear layer of what is pooled; the model's own calls where that is no larger.

    Where autograd records the weights or a module has hooks, these run, too.

    Args:
        calls: The model's own calls, from pooling to the layer.
        inversion: Has the maps.
    """

    def __init__(
        self, calls: Sequence[Callable[[Tensor], Tensor]], inversion: MergedInversion
    ) -> None:
        super().__init__()
        self._calls, self._parts = tuple(calls), (inversion,)  # in tuples: registered elsewhere

    def forward(self, x: Tensor) -> Tensor:
        """Return what the linear layer gives, to rounding."""
        (inversion,) = self._parts
        maps, layer = inversion.maps(x), inversion.op.module
        assert isinstance(layer, nn.Linear)
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in layer.parameters())
        if maps is None or recorded or any(map(is_hooked, self._calls)):
            for call in self._calls:
                x = call(x)
            return x
        return linear(x.flatten(1), maps.there, layer.bias)


def find(walk: Walk, pool: Stage) -> list[Stage] | None:
    """Return the stages from a linear layer to pooling that may enlarge, if there is nothing else.

    Between the two, entries keep their order; and nothing else reads what is answered there.
    """
    inversion = walk.inversion(pool)
    if type(inversion) is not AdaptiveInversion or not inversion.may_enlarge:
        return None  # a subclass may do something else
    if not walk.answers(pool) or not _calls_one(pool.step.node):
        return None
    chain = [pool]
    while (stage := walk.before(chain[-1])) is not None and _calls_one(stage.step.node):
        chain.append(stage)
        inversion = walk.inversion(stage)
        if stage.step.op.spelling is nn.Linear and type(inversion) is AffineInversion:
            return chain[::-1]
        if stage.step.op.type not in _KEEPING or type(inversion) not in (PassThrough, Reshape):
            return None  # what is passed through may still be changed on the way there, as by ReLU
    return None


def write(chain: Sequence[Stage], walk: Walk, shorter: Shorter) -> None:
    """Merge the stages that have been found."""
    linear, pool = chain[0], chain[-1]
    forward = [stage.step.node for stage in chain[::-1] if stage.step.node is not None]
    calls = [call_of(node, walk.root) for node in forward]
    image, op = pool.step.inputs[0], linear.step.op
    inversion = MergedInversion(
        [walk.inversion(stage) for stage in chain],
        replace(op, inputs={"input": image.name}),
        calls[:-1],
    )
    x, y = shorter.copy(walk.copies[image]), shorter.copy(walk.copies[forward[-1]])
    y.op, y.args, y.kwargs = "call_module", (x,), {}
    y.target = shorter.add_forward(op.name, MergedForward(calls, inversion))
    first = shorter.copy(walk.nodes[linear.results[0]])
    shorter.replace(walk.nodes[pool.results[0]], f"{op.name}_merged", inversion, *first.args[:2], x)


def _calls_one(node: fx.Node | None) -> bool:
    """Tell whether a node reads one value and nothing else, not even sizes."""
    return node is not None and len(node.all_input_nodes) == 1 and calls_plainly(node)
