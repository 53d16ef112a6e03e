"""nn.Module -> fx graph: symbolic tracing first, `torch.export` where that cannot follow."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn import functional as F

from frfx import ops
from frfx.compiler.view import writes_in_place
from frfx.errors import InputError, TraceError

aten = torch.ops.aten


@dataclass(frozen=True)
class Traced:
    """A model as a graph.

    Attributes:
        graph: Reads one placeholder; modules and parameters are attributes of `root`. No node
            writes in place.
        root: An evaluation view of the model.
        paths: fx node to its name as torchvision's feature extraction spells it.
        front_end: ``"torch.fx"`` or ``"torch.export"``.
    """

    graph: fx.Graph
    root: nn.Module
    paths: dict[fx.Node, str]
    front_end: str

    @property
    def input(self) -> fx.Node:
        """The placeholder of the input batch."""
        return next(node for node in self.graph.nodes if node.op == "placeholder")

    @property
    def output(self) -> fx.Node | None:
        """The node whose value the model returns, or None if it returns more than one tensor."""
        value = next(iter(reversed(self.graph.nodes))).args[0]
        return value if isinstance(value, fx.Node) else None


def trace(view: nn.Module, example_input: Tensor | None = None) -> Traced:
    """Trace an evaluation view of a model.

    Args:
        view: What `evaluation_view` returned.
        example_input: A batch, needed only where symbolic tracing fails.

    Raises:
        TraceError: If neither front end can follow the model; says why for each.
    """
    try:
        graph, front_end = _symbolic(view), "torch.fx"
    except Exception as error:  # a model's forward may raise anything when it meets a proxy
        if example_input is None:
            raise TraceError(
                f"torch.fx cannot trace {type(view).__name__}: {_first_line(error)}\n"
                "Give example_input, a batch of the model's input, and torch.export will be used."
            ) from error
        graph, front_end = _exported(view, example_input, error), "torch.export"
    _functionalize(graph, view)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return Traced(graph, view, _qualified_names(graph), front_end)


class _Tracer(fx.Tracer):
    """Keeps modules that spell an op whole, and leaves optional arguments at their defaults."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=ops.functions())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in ops.module_classes() or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable, list]:
        del root_fn, is_module, concrete_args
        name = _input_name(self.root)
        # Called through the instance: some models replace `forward` there.
        return lambda root, x: root.forward(x), [
            self.root,
            self.create_proxy("placeholder", name, (), {}, type_expr=Tensor),
        ]


def _input_name(model: nn.Module) -> str:
    """Return the name of the model's one required argument."""
    kinds = inspect.Parameter
    positional = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    if not positional:
        return "input"
    if len(positional) > 1 and positional[1].default is kinds.empty:
        raise TraceError(
            f"{type(model).__name__}.forward needs {[p.name for p in positional]}; "
            "only models of one input tensor can be inverted: wrap the model in one that fixes "
            "the other arguments"
        )
    return positional[0].name


def _symbolic(view: nn.Module) -> fx.Graph:
    return _Tracer().trace(view)


def _exported(view: nn.Module, example: Tensor, symbolic_error: Exception) -> fx.Graph:
    """Trace with `torch.export`, and rewrite its lifted parameters as attributes of the view."""
    if example.shape[0] == 1:
        example = example.expand(2, *example.shape[1:])  # export takes a size of 1 for a constant
    sizes = {dim: Dim.AUTO for dim in range(example.ndim) if dim != 1}
    try:
        program = torch.export.export(
            view, (example,), dynamic_shapes=(sizes,), strict=False
        ).run_decompositions({})
    except Exception as error:  # export, too, fails in many ways
        raise TraceError(
            f"{type(view).__name__} can be traced neither by torch.fx "
            f"({_first_line(symbolic_error)}) nor by torch.export ({_first_line(error)})"
        ) from error
    graph, signature = program.graph, program.graph_signature
    graph.owning_module = None  # its attributes are the view's from here on
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    for name, value in program.constants.items():
        if name in lifted.values() and not _has(view, name):
            view.register_buffer(name, value, persistent=False)
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in lifted:
            with graph.inserting_before(node):
                attribute = graph.get_attr(lifted[node.name])
            attribute.meta.update(node.meta)
            node.replace_all_uses_with(attribute)
            graph.erase_node(node)
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            _restore_batch_norm(graph, node)
        elif node.op == "output" and len(node.args[0]) == 1:
            node.args = tuple(node.args[0])
    return graph


def _restore_batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    x, weight, bias, mean, var, momentum, eps = node.args
    with graph.inserting_before(node):
        norm = graph.call_function(F.batch_norm, (x, mean, var, weight, bias, False, momentum, eps))
    norm.meta.update(node.meta)
    for user in list(node.users):
        user.replace_all_uses_with(norm)
        graph.erase_node(user)
    graph.erase_node(node)


def _has(module: nn.Module, path: str) -> bool:
    try:
        operator.attrgetter(path)(module)
    except AttributeError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def _functionalize(graph: fx.Graph, view: nn.Module) -> None:
    """Replace writes in place, which would destroy forward values that the inverse needs.

    What reads the overwritten value later reads the new one instead.
    """
    for node in list(graph.nodes):
        written = node.op == "call_module" and writes_in_place(view.get_submodule(node.target))
        if node.op in ("call_function", "call_method") and node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
            written = True
        if node.op == "call_method" and re.fullmatch(r"[a-z]\w*_", node.target):
            node.target, written = node.target[:-1], True
        elif node.op == "call_function" and node.target in _OUT_OF_PLACE:
            node.target, written = _OUT_OF_PLACE[node.target], True
        elif node.op == "call_function":
            name = getattr(node.target, "__name__", "")
            twin = next((getattr(m, name[:-1]) for m in (F, torch) if hasattr(m, name[:-1])), None)
            if re.fullmatch(r"[a-z]\w*_", name) and twin is not None:
                node.target, written = twin, True
        if written and node.args and isinstance(node.args[0], fx.Node):
            later = {n for n in graph.nodes if n > node}
            node.args[0].replace_all_uses_with(node, delete_user_cb=lambda n, later=later: n in later)


def _qualified_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """Name every node as `torchvision.models.feature_extraction` does."""
    names: dict[fx.Node, str] = {}
    for node in graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]) if stack else ""
        if path.startswith("_empty"):
            path = ""
        if node.op == "call_module":
            name = str(node.target)
        elif stack and ops.lookup(node.target) and _is_leaf(stack[-1][1]):
            name = path
        else:
            name = f"{path}.{node}" if path else str(node)
        # torchvision numbers repetitions anew within each module, and takes fx's own number off.
        if re.match(r".+_[0-9]+$", name):
            name = name.rsplit("_", 1)[0]
        for known in reversed(names.values()):
            if re.match(rf"{re.escape(name)}(_[0-9]+)?$", known):
                suffix = known[len(name) :]
                name += f"_{int(suffix[1:]) + 1}" if suffix else "_1"
                break
        names[node] = name
    return names


def _is_leaf(module_type: Any) -> bool:
    """Tell whether an exported node came out of one of torch's own modules."""
    name = module_type if isinstance(module_type, str) else module_type.__module__
    return name.startswith("torch.nn.modules") and not name.startswith("torch.nn.modules.container")


def check_batch(x: Any) -> None:
    """Raise `InputError` for what cannot be a batch of inputs."""
    if not isinstance(x, Tensor):
        raise InputError(f"expected a tensor as the input batch, got {type(x).__name__}")
    if not x.is_floating_point():
        raise InputError(f"the input batch has dtype {x.dtype}; give a floating-point tensor")
    if x.ndim == 0 or x.shape[0] == 0:
        raise InputError(f"the input batch of shape {tuple(x.shape)} is empty")
