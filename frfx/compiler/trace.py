"""nn.Module -> fx graph: symbolic tracing first, `torch.export` where that cannot follow."""

from __future__ import annotations

import functools
import inspect
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import OutputKind
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from frfx import ops
from frfx.compiler.view import redirect, scratch_view, writes_in_place
from frfx.errors import InputError, TraceError, TraceMismatchError

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
        batch: The only batch size that the graph fits; None for all.
    """

    graph: fx.Graph
    root: nn.Module
    paths: dict[fx.Node, str]
    front_end: str
    batch: int | None = None

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
        example_input: A batch, needed only where symbolic tracing fails or is wrong.

    Raises:
        TraceError: If neither front end can follow the model; says why for each.
    """
    _input_name(view)
    try:
        graph = _symbolic(view)
    except Exception as error:  # a model's forward may raise anything when it meets a proxy
        if example_input is None:
            raise TraceError(
                f"torch.fx cannot trace {type(view).__name__}: {_first_line(error)}\n"
                "Give example_input, a batch of the model's input, and torch.export will be used."
            ) from error
        return _export(view, example_input, error)
    traced = _finish(graph, view, "torch.fx")
    if example_input is None or _fits(traced, example_input):
        return traced
    return _export(
        view, example_input, TraceMismatchError("its graph does not compute what the model does")
    )


def _finish(graph: fx.Graph, view: nn.Module, front_end: str, batch: int | None = None) -> Traced:
    _functionalize(graph, view)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return Traced(graph, view, _qualified_names(graph), front_end, batch)


def _fits(traced: Traced, x: Tensor) -> bool:
    """Tell whether the graph computes what the model does, if the model takes the batch at all."""
    if traced.output is None:
        return True
    try:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            output = fx.Interpreter(traced.root, graph=traced.graph).run(x)
            return is_output(output, traced, x)
    except Exception:  # the caller runs the batch, too, and says what is wrong with it
        return True


def is_output(output: Tensor, traced: Traced, x: Tensor) -> bool:
    """Tell whether a value is what the model itself gives for a batch, to rounding."""
    expected = scratch_view(traced.root, inplace=True)(x.clone())
    if not isinstance(expected, Tensor) or expected.shape != output.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(output, expected)
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * len(traced.graph.nodes) ** 0.5
    difference = (output.double() - expected.double()).norm()
    return bool(difference <= tolerance * expected.double().norm())


class _Tracer(fx.Tracer):
    """Keeps modules and functions that spell an op whole; leaves optional arguments at defaults."""

    def __init__(self) -> None:
        functions = ops.functions()
        super().__init__(autowrap_functions=functions)
        # A function is replaced where it is called by name: in the module that calls it, which fx
        # sees to, and as an attribute of the one that defines it.
        homes = {f.__module__ for f in functions if not f.__module__.startswith("torch.")}
        self._autowrap_search += [sys.modules[home] for home in homes if home in sys.modules]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in ops.module_classes():
            return True
        return not is_parametrized(m) and super().is_leaf_module(m, module_qualified_name)

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
    named = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    ]
    required = [p.name for p in named if p.default is kinds.empty]
    if len(required) > 1:
        raise TraceError(
            f"{type(model).__name__}.forward needs {', '.join(required)}; only models of one input "
            "tensor can be inverted: wrap the model in one that fixes the other arguments"
        )
    return named[0].name if named else "input"


def _scratch(view: nn.Module) -> nn.Module:
    """Return a view to trace, without what an earlier trace of it has kept."""
    scratch = scratch_view(view)
    scratch._modules.pop(_CONSTANTS, None)
    return scratch


def _symbolic(view: nn.Module) -> fx.Graph:
    scratch = _scratch(view)
    kept = [f for f in ops.functions() if not f.__module__.startswith("torch.")]
    redirect(scratch, {id(function): _recording(function) for function in kept})
    graph = _Tracer().trace(scratch)
    _keep_constants(graph, scratch, view)
    return graph


def _recording(function: Callable) -> Callable:
    """Return a function for attributes to hold: where it meets a proxy, it is kept whole."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, fx.Proxy):
                return value.tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    return call


def _keep_constants(graph: fx.Graph, scratch: nn.Module, view: nn.Module) -> None:
    """Give the view the tensors that the forward made itself, in a module of their own."""
    view._modules.pop(_CONSTANTS, None)
    constants = nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr" and not _has(view, node.target):
            name = node.target.replace(".", "_")
            value = operator.attrgetter(node.target)(scratch)
            constants.register_buffer(name, value, persistent=False)
            node.target = f"{_CONSTANTS}.{name}"
    if constants._buffers:
        view.add_module(_CONSTANTS, constants)


_CONSTANTS = "_frfx_constants"


def has_constants(view: nn.Module) -> bool:
    """Tell whether some tensors of the forward were computed once, while it was traced."""
    return _CONSTANTS in view._modules


def _export(view: nn.Module, example: Tensor, symbolic_error: Exception) -> Traced:
    """Trace with `torch.export`, and rewrite its lifted parameters as attributes of the view."""
    scratch = _scratch(view)
    if example.shape[0] == 1:
        example = example.expand(2, *example.shape[1:])  # export takes a size of 1 for a constant
    sizes = {dim: Dim.AUTO for dim in range(example.ndim) if dim != 1}
    try:
        program = torch.export.export(
            scratch, (example,), dynamic_shapes=(sizes,), strict=False
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
        if name in lifted.values() and not _has(scratch, name):
            scratch.register_buffer(name, value, persistent=False)
    batch = None
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in lifted:
            with graph.inserting_before(node):
                attribute = graph.get_attr(lifted[node.name])
            attribute.meta.update(node.meta)
            node.replace_all_uses_with(attribute)
            graph.erase_node(node)
        elif node.op == "placeholder":
            size = node.meta["val"].shape[0]
            batch = int(size) if is_concrete_int(size) else None
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            _restore_batch_norm(graph, node)
        elif node.op == "output":  # what the forward writes to buffers is an output, too
            kinds = [spec.kind for spec in signature.output_specs]
            pairs = zip(node.args[0], kinds, strict=True)
            outputs = tuple(value for value, kind in pairs if kind is OutputKind.USER_OUTPUT)
            node.args = outputs if len(outputs) == 1 else (outputs,)
    _keep_constants(graph, scratch, view)
    return _finish(graph, view, "torch.export", batch)


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
            _redirect_later_uses(node.args[0], node)


def _redirect_later_uses(overwritten: fx.Node, node: fx.Node) -> None:
    def is_later(user: fx.Node) -> bool:
        return user > node

    overwritten.replace_all_uses_with(node, delete_user_cb=is_later)


def _qualified_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """Name every node as `torchvision.models.feature_extraction` does."""
    names: dict[fx.Node, str] = {}
    closing = _last_of_modules(graph)
    for node in graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]) if stack else ""
        if path.startswith("_empty"):
            path = ""
        if node.op == "call_module":
            name = str(node.target)
        elif node in closing and ops.lookup(node.target) and _is_leaf(stack[-1][1]):
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


def _last_of_modules(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that give an exported module's value."""
    last, following = set(), None
    for node in reversed(graph.nodes):
        stack = list(node.meta.get("nn_module_stack") or ())
        if node.op == "call_function" and stack:
            if stack[-1] != following:
                last.add(node)
            following = stack[-1]
    return last


def _is_leaf(module_type: Any) -> bool:
    """Tell whether an exported node came out of one of torch's own modules."""
    name = module_type if isinstance(module_type, str) else module_type.__module__
    return name.startswith("torch.nn.modules") and not name.startswith("torch.nn.modules.container")


def check_batch(x: Any, size: int | None = None) -> None:
    """Raise `InputError` for what cannot be a batch of inputs, or has not this size."""
    if not isinstance(x, Tensor):
        raise InputError(f"expected a tensor as the input batch, got {type(x).__name__}")
    if x.is_meta:
        raise InputError("the input batch is on the meta device and holds no values")
    if not x.is_floating_point():
        raise InputError(f"the input batch has dtype {x.dtype}; give a floating-point tensor")
    if x.ndim == 0 or x.shape[0] == 0:
        raise InputError(f"the input batch of shape {tuple(x.shape)} is empty")
    if size not in (None, x.shape[0]):
        raise InputError(
            f"torch.export has fixed the batch size of this model to {size}, for its forward reads "
            f"it as a number, as len(x) does; got a batch of {x.shape[0]}. Read x.shape[0] there "
            "instead, or give batches of that size"
        )
