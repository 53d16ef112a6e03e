"""Tracing with torch.export: follows what symbolic tracing cannot, for an example input."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.nn import functional as F
from torch.utils._pytree import tree_unflatten

from frfx.compiler.constants import has_path, keep_constants, scratch_to_trace

aten = torch.ops.aten

_VALUES_ONLY: dict[Any, Callable[..., Any]] = {
    aten.max_pool1d_with_indices.default: F.max_pool1d,
    aten.max_pool2d_with_indices.default: F.max_pool2d,
    aten.max_pool3d_with_indices.default: F.max_pool3d,
    aten.adaptive_max_pool1d.default: F.adaptive_max_pool1d,
    aten.adaptive_max_pool2d.default: F.adaptive_max_pool2d,
    aten.adaptive_max_pool3d.default: F.adaptive_max_pool3d,
}
"""Overloads that return indices beside the values, asked for or not, and the op without them."""


Sizes = tuple[int | None, ...]
"""The sizes of an input that a graph fits; None for those that may change."""


def trace_by_export(view: nn.Module, example: Tensor) -> tuple[fx.Graph, Sizes]:
    """Trace with `torch.export`, and rewrite its lifted parameters as attributes of the view.

    Returns:
        The graph, and the only sizes of the input that it fits, None for those that may change.
    """
    scratch = scratch_to_trace(view)
    if example.shape[0] == 1:
        example = example.expand(2, *example.shape[1:])  # export takes a size of 1 for a constant
    program = _export(scratch, example).run_decompositions({})
    graph, signature = program.graph, program.graph_signature
    graph.owning_module = None  # its attributes are the view's from here on
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    fresh = {}
    for name, value in program.constants.items():
        if name in lifted.values() and not has_path(scratch, name):
            fresh[name] = name.replace(".", "_")  # a submodule may have lifted it
            while hasattr(scratch, fresh[name]):
                fresh[name] += "_"
            setattr(scratch, fresh[name], value)  # a buffer would be the model's own
    sizes: Sizes = ()
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in lifted:
            with graph.inserting_before(node):
                name = lifted[node.name]
                attribute = graph.get_attr(fresh.get(name, name))
            attribute.meta.update(node.meta)
            node.replace_all_uses_with(attribute)
            graph.erase_node(node)
        elif node.op == "placeholder":
            shape = node.meta["val"].shape
            sizes = tuple(int(size) if is_concrete_int(size) else None for size in shape)
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            _restore_batch_norm(graph, node)
        elif node.target in _VALUES_ONLY:
            _drop_indices(graph, node)
        elif node.op == "output":  # what the forward writes to buffers is an output, too
            kinds = [spec.kind for spec in signature.output_specs]
            pairs = zip(node.args[0], kinds, strict=True)
            outputs = [value for value, kind in pairs if kind is OutputKind.USER_OUTPUT]
            node.args = (tree_unflatten(outputs, program.call_spec.out_spec),)
    keep_constants(graph, scratch, view)
    return graph, sizes


def _export(scratch: nn.Module, example: Tensor) -> ExportedProgram:
    """Export for every size of the input that export can reason about, the channels excepted."""
    images = dict.fromkeys(range(2, example.ndim), Dim.AUTO)
    try:
        return _export_for(scratch, example, {0: Dim.AUTO, **images})
    except Exception:  # arithmetic with the image sizes may be beyond its solvers
        if not images:
            raise
        return _export_for(scratch, example, {0: Dim.AUTO})


def _export_for(scratch: nn.Module, example: Tensor, sizes: dict[int, Any]) -> ExportedProgram:
    return torch.export.export(scratch, (example,), dynamic_shapes=(sizes,), strict=False)


def _restore_batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    x, weight, bias, mean, var, momentum, eps = node.args
    with graph.inserting_before(node):
        norm = graph.call_function(F.batch_norm, (x, mean, var, weight, bias, False, momentum, eps))
    norm.meta.update(node.meta)
    for user in list(node.users):
        user.replace_all_uses_with(norm)
        graph.erase_node(user)
    graph.erase_node(node)


def _drop_indices(graph: fx.Graph, node: fx.Node) -> None:
    """Replace max pooling whose indices nobody reads by what returns the values alone."""
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return
    with graph.inserting_before(node):
        values = graph.call_function(_VALUES_ONLY[node.target], node.args, node.kwargs)
    values.meta.update({**node.meta, "val": node.meta["val"][0]})
    for user in list(node.users):
        user.replace_all_uses_with(values)
        graph.erase_node(user)
    graph.erase_node(node)
