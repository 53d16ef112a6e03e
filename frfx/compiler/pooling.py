"""Max pooling in the forward part of a reconstruction graph: in slices, before activations.

torch pools contiguous images on a CPU entry by entry, for which the paper's networks pay a third of
their forward pass; the largest of a few slices is found ten times as fast. On a GPU it writes where
the largest are, too, which nobody reads; a kernel does not. And an increasing function commutes
with the maximum: where nothing reads an activation but the pooling behind it, pooling first leaves
it the fewer entries. Where nothing but these reads a convolution of few channels, it gives the rows
of a window as channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from frfx import vocabulary
from frfx.compiler.bind import bind, live_nodes, op_type
from frfx.compiler.forward import add_child, call_of, calls_plainly, is_hooked
from frfx.compiler.rows import in_rows, most_rows
from frfx.compiler.trace import Traced
from frfx.linalg.backend import Backend, torch_backend
from frfx.ops import Op, Shape
from frfx.recording import is_recorded
from frfx.rules.axis import Axis, RegularAxis, highest
from frfx.rules.max_pool import MaxPoolMinimalRule, geometry, kernel_windows
from frfx.rules.windows import WINDOW, spatial_dims, window_sizes

INCREASING = frozenset(
    {
        vocabulary.tanh,
        vocabulary.sigmoid,
        vocabulary.relu,
        vocabulary.relu6,
        vocabulary.hardsigmoid,
        vocabulary.selu,
        vocabulary.softsign,
        vocabulary.atan,
        vocabulary.asinh,
        vocabulary.sinh,
        vocabulary.logsigmoid,
    }
)
"""Functions of single entries that increase, whatever their arguments."""


class Pooling(nn.Module):
    """Max pooling of the forward pass, and what is in front of it if nothing else reads that.

    Where autograd records, a compiler traces or a module has hooks, the model's own calls run in
    their order.

    Args:
        op: The pooling.
        pool: Calls it.
        activation: Calls the activation; None if it stays where it is.
        convolution: Calls the convolution; None if it stays where it is.
        before: That convolution, if it can give several rows at once; None if it stays where it is.

    Attributes:
        backend: What has kernels for it, if there are any.
    """

    backend: Backend = torch_backend

    def __init__(
        self,
        op: Op,
        pool: Callable,
        activation: Callable | None = None,
        convolution: Callable | None = None,
        before: Op | None = None,
    ) -> None:
        super().__init__()
        self._calls = (convolution, activation, pool)  # in a tuple: they are modules of the model
        self._before, self._kernel = before, _rows_of(op)
        self._geometry, self._dims = geometry(op), spatial_dims(op)
        self._windows = windows(op)
        self._ceil = bool(op.arguments["ceil_mode"])

    def forward(self, x: Tensor) -> Tensor:
        """Return what the model's own calls return, to rounding."""
        if not self._commutes(x):
            for call in filter(None, self._calls):
                x = call(x)
            return x
        convolution, activation, _ = self._calls
        pooled = self._pooled(x, convolution)
        return pooled if activation is None else activation(pooled)

    def _pooled(self, x: Tensor, convolution: Callable | None) -> Tensor:
        rows = None if self._before is None else most_rows(self._before, x, self._kernel)
        if rows is None:
            x = x if convolution is None else convolution(x)
            axes, kernels = self._axes(tuple(x.shape[2:])), self.backend.kernels_for(x)
            windows = kernel_windows(axes) if kernels else None
            return kernels.max_pool(x, *windows) if kernels and windows else highest(x, axes)
        groups = rows(x).unflatten(2, (-1, self._kernel))
        x = functools.reduce(torch.maximum, groups.unbind(3)).transpose(2, 3).flatten(2, 3)
        height, width = x.shape[2:]
        columns = self._axes((height * self._kernel, width))[1]
        return highest(x, (RegularAxis(height, height, 1, 1, 1, 0), columns))

    def _commutes(self, x: Tensor) -> bool:
        """Tell whether it is faster, and the order of the calls is nobody's business."""
        weights = [] if self._before is None else self._before.tensors()
        return (
            (x.is_cpu or self._by_kernel(x))
            and x.ndim == self._dims + 2
            and x.is_contiguous()  # channels last, torch pools fast
            and not is_recorded(x, *weights)
            and not any(map(is_hooked, self._calls))
        )

    def _by_kernel(self, x: Tensor) -> bool:
        """Tell whether a kernel pools, and not slices."""
        return self._dims <= 2 and self.backend.kernels_for(x) is not None

    def _axes(self, size: Shape) -> tuple[Axis, ...]:
        counts = []
        for n, (kernel, stride, padding, dilation) in zip(size, self._windows, strict=True):
            span = n + 2 * padding - dilation * (kernel - 1) - 1
            count = span // stride + 1
            # A last window that is cut off counts if it begins within the image or in front of it.
            partial = self._ceil and span % stride and count * stride < n + padding
            counts.append(count + bool(partial))
        return self._geometry(size, tuple(counts))


def windows(op: Op) -> tuple[tuple[int, ...], ...]:
    """Return kernel size, stride, padding and dilation along every dimension."""
    return tuple(zip(*(window_sizes(op, name) for name in WINDOW), strict=True))


def _rows_of(op: Op) -> int:
    """Return how many rows a window reads that no other window reads; 1 if it is not as simple."""
    kernel, *others = windows(op)[0]
    simple = spatial_dims(op) == 2 and others == [kernel, 0, 1] and not op.arguments["ceil_mode"]
    return kernel if simple else 1


def pool_first(
    traced: Traced,
    graph: fx.Graph,
    copies: Mapping[fx.Node, fx.Node],
    backend: Backend,
    replaced: nn.Module,
) -> None:
    """Rewrite the max pooling in the forward part of a reconstruction graph.

    Args:
        traced: The network.
        graph: The reconstruction graph, without what nothing reads. Its pooling nodes call
            `replaced.<name>` afterwards, under the names that they have; what they compute within
            is read no more.
        copies: The forward nodes in that graph.
        backend: What runs it.
        replaced: The children of `replaced`, to which those for pooling are added.
    """
    live, there = live_nodes(traced.graph), set(graph.nodes)
    for node, copy in copies.items():
        if copy not in there or op_type(node, traced.root) is not vocabulary.max_pool:
            continue
        if not calls_plainly(node):
            continue
        op = bind(node, traced, live)
        if MaxPoolMinimalRule().supports(op) is not None:
            continue
        source, reader = node.all_input_nodes[0], copy
        activation = convolution = first = None
        if set(copies[source].users) == {reader} and _is_increasing(source, traced, live):
            activation, reader = call_of(source, traced.root), copies[source]
            source = source.all_input_nodes[0]
        if set(copies[source].users) == {reader} and _rows_of(op) > 1:
            before = bind(source, traced, live)
            if in_rows(before) and calls_plainly(source):
                convolution, first = call_of(source, traced.root), before
                source = source.all_input_nodes[0]
        pooling = Pooling(op, call_of(node, traced.root), activation, convolution, first)
        pooling.backend = backend
        name = add_child(replaced, copy.name, pooling)
        copy.op, copy.target = "call_module", f"replaced.{name}"
        copy.args, copy.kwargs = (copies[source],), {}


def _is_increasing(node: fx.Node, traced: Traced, live: set[fx.Node]) -> bool:
    if op_type(node, traced.root) not in INCREASING or not calls_plainly(node):
        return False
    op = bind(node, traced, live)
    return op.type in INCREASING and set(op.inputs) == {"input"} and not op.computed
