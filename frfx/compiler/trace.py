"""nn.Module -> fx graph: symbolic tracing first, `torch.export` where that cannot follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from frfx.compiler.export import Sizes, trace_by_export
from frfx.compiler.functional import functionalize
from frfx.compiler.names import qualified_names
from frfx.compiler.outputs import Key, choose_output, follow
from frfx.compiler.symbolic import input_name, trace_symbolically
from frfx.errors import InputError, LayerError, TraceError, first_line
from frfx.view import scratch_view, writable_view


@dataclass(frozen=True)
class Traced:
    """A model as a graph.

    Attributes:
        graph: Reads one placeholder; modules and parameters are attributes of `root`. No node
            writes in place.
        root: An evaluation view of the model.
        paths: fx node to its name as torchvision's feature extraction spells it.
        front_end: ``"torch.fx"`` or ``"torch.export"``.
        sizes: The only sizes of the input that the graph fits, None for those that may change;
            empty where all may.
        where: The place of its output in what the model returns; empty where that is a tensor.
    """

    graph: fx.Graph
    root: nn.Module
    paths: dict[fx.Node, str]
    front_end: str
    sizes: Sizes = ()
    where: tuple[Key, ...] = ()

    @property
    def batch(self) -> int | None:
        """The only batch size that the graph fits; None for all."""
        return self.sizes[0] if self.sizes else None

    @property
    def input(self) -> fx.Node:
        """The placeholder of the input batch."""
        return next(node for node in self.graph.nodes if node.op == "placeholder")

    @property
    def output(self) -> fx.Node:
        """The node whose value the model returns, or that of its outputs which was chosen."""
        return next(iter(reversed(self.graph.nodes))).args[0]


def trace(
    view: nn.Module, example_input: Tensor | None = None, output: Key | None = None
) -> Traced:
    """Trace an evaluation view of a model.

    Args:
        view: What `evaluation_view` returned.
        example_input: A batch, needed only where symbolic tracing fails or is wrong.
        output: Which of several tensors that the model returns is the output: its key, index or
            name. None for the only one, or the one called ``"out"``.

    Raises:
        TraceError: If neither front end can follow the model; says why for each.
        LayerError: If the model has no such output, or it is not clear which one is meant.
    """
    input_name(view)
    try:
        traced = _finish(trace_symbolically(view), view, "torch.fx", output)
        if example_input is None or _fits(traced, example_input):
            return traced
        problem = "its graph does not compute what the model does"
    except LayerError:
        raise
    except Exception as error:  # a model's forward may raise anything when it meets a proxy
        problem = first_line(error)
        if example_input is None:
            raise TraceError(
                f"torch.fx cannot trace {type(view).__name__}: {problem}\n"
                "Give example_input, a batch of the model's input, and torch.export will be used."
            ) from error
    try:
        graph, sizes = trace_by_export(view, example_input)
    except Exception as error:  # export, too, fails in many ways
        raise TraceError(
            f"{type(view).__name__} can be traced neither by torch.fx ({problem}) nor by "
            f"torch.export ({first_line(error)})"
        ) from error
    return _finish(graph, view, "torch.export", output, sizes)


def _finish(
    graph: fx.Graph,
    view: nn.Module,
    front_end: str,
    output: Key | None,
    sizes: Sizes = (),
) -> Traced:
    functionalize(graph, view)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    paths = qualified_names(graph)  # by all outputs, so that names do not depend on the choice
    where = choose_output(graph, output)
    graph.lint()
    kept = {node: paths[node] for node in graph.nodes}
    return Traced(graph, view, kept, front_end, sizes, where)


def _fits(traced: Traced, x: Tensor) -> bool:
    """Tell whether the graph computes what the model does, if the model takes the batch at all."""
    try:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            output = fx.Interpreter(writable_view(traced.root), graph=traced.graph).run(x)
            return is_output(output, traced, x)
    except Exception:  # the caller runs the batch, too, and says what is wrong with it
        return True


def is_output(output: Tensor, traced: Traced, x: Tensor) -> bool:
    """Tell whether a value is what the model itself gives for a batch, to rounding."""
    expected = follow(scratch_view(traced.root, inplace=True)(x.clone()), traced.where)
    if not isinstance(expected, Tensor) or expected.shape != output.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(output, expected)
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * len(traced.graph.nodes) ** 0.5
    difference = (output.double() - expected.double()).norm()
    return bool(difference <= tolerance * expected.double().norm())


def check_batch(x: Any, sizes: Sizes = ()) -> None:
    """Raise `InputError` for what cannot be a batch of inputs, or has not these sizes."""
    if not isinstance(x, Tensor):
        raise InputError(f"expected a tensor as the input batch, got {type(x).__name__}")
    if x.is_meta:
        raise InputError("the input batch is on the meta device and holds no values")
    if not x.is_floating_point():
        raise InputError(
            f"the input batch has dtype {x.dtype}; give a floating-point tensor. Of a model that "
            "embeds what it reads, invert what is behind the embedding, as a module of its own"
        )
    if x.ndim == 0 or x.numel() == 0:
        raise InputError(f"the input batch of shape {tuple(x.shape)} is empty")
    if sizes and sizes[0] not in (None, x.shape[0]):
        raise InputError(
            f"torch.export has fixed the batch size of this model to {sizes[0]}, for its forward "
            f"reads it as a number, as len(x) does; got a batch of {x.shape[0]}. Read x.shape[0] "
            "there instead, or give batches of that size"
        )
    if any(size not in (None, n) for size, n in zip(sizes[2:], x.shape[2:], strict=False)):
        fixed = ", ".join("any" if size is None else str(size) for size in sizes)
        raise InputError(
            f"torch.export has fixed the input of this model to the shape ({fixed}), for it cannot "
            f"follow what its forward computes from these sizes; got {tuple(x.shape)}. Invert the "
            "model anew with an example_input of that shape"
        )
