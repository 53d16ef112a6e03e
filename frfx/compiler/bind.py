"""fx node -> Op: one vocabulary out of modules, functions, methods and ATen overloads."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from frfx import ops
from frfx.compiler.computed import Computed
from frfx.compiler.trace import Traced
from frfx.ops import Op

_SHAPE_METHODS = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "get_device", "type"}
)
_SHAPE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"})

_FRESH = frozenset(
    f"{how}_{what}" if how == "new" else f"{what}_{how}"
    for how in ("new", "like")
    for what in ("zeros", "ones", "full", "empty", "rand", "randn")
)


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that hold activations: they depend on the input's values.

    Sizes, and what is computed from sizes alone, are not among them.
    """
    live: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (
            node.op != "output"
            and not _is_shape_query(node)
            and any(source in live for source in node.all_input_nodes)
        ):
            live.add(node)
    return live


def _is_shape_query(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    return node.target is len or "sym_size" in str(node.target)


def is_fresh(node: fx.Node) -> bool:
    """Tell whether a node makes a tensor of the size and type of another, whatever its values."""
    if node.op == "call_method":
        return node.target in _FRESH
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, _, name = node.target.name().partition("::")
        return namespace == "aten" and name.partition(".")[0] in _FRESH
    name = getattr(node.target, "__name__", "")
    return name in _FRESH and node.target is getattr(torch, name, None)


def spelling(node: fx.Node, root: nn.Module) -> Hashable:
    """Return what the vocabulary knows the node's operation by."""
    if node.op == "call_module":
        return cast(Hashable, type(root.get_submodule(str(node.target))))
    return node.target


def op_type(node: fx.Node, root: nn.Module) -> ops.OpType | None:
    """Return the node's type, or None for a node that is no op or not in the vocabulary."""
    if not node.op.startswith("call_"):
        return None
    entry = ops.lookup(spelling(node, root))
    return None if entry is None else entry.type


def bind(node: fx.Node, traced: Traced, live: set[fx.Node]) -> Op:
    """Describe a node to rules and plans, its arguments by their canonical names."""
    key = spelling(node, traced.root)
    entry = ops.lookup(key)
    module = traced.root.get_submodule(str(node.target)) if node.op == "call_module" else None
    try:
        values = _arguments(node, entry, module)
    except TypeError:  # a call that does not fit the op's signature is none of the op
        entry = None
        values = _arguments(node, entry, module)
    inputs: dict[str, str] = {}
    constants: dict[str, Any] = {}
    computed: list[str] = []
    tensor_of: dict[str, Callable[[], Tensor]] = {}
    size_of: dict[str, Callable[[Mapping[str, Any]], Any]] = {}
    made_of: dict[str, Callable[[], list[Tensor]]] = {}

    def enter(name: str, value: Any) -> None:
        if isinstance(value, fx.Node) and value in live:
            inputs[name] = value.name
        elif _is_tensor(value, traced.root):
            tensor_of[name] = functools.partial(_read, traced.root, str(value.target))
        elif isinstance(value, Tensor) and module is not None:
            tensor_of[name] = functools.partial(_read, module, name)
        elif isinstance(value, fx.Node) and (made := Computed.of(value, traced.root)):
            tensor_of[name], made_of[name] = made, made.tensors
        elif nodes := _nodes(value):  # is one, or holds some, as a slice may
            computed.append(name)
            if all(map(_is_size, nodes)):
                size_of[name] = functools.partial(_resolve, value)
        else:
            constants[name] = value

    for name, value in values.items():
        if not isinstance(value, (list, tuple)) or not _nodes(value):
            enter(name, value)
            continue
        elements = {f"{name}[{i}]": element for i, element in enumerate(value)}
        named = {place: element for place, element in elements.items() if _nodes(element)}
        for place, element in named.items():
            enter(place, element)
        constants[name] = tuple(p if p in named else element for p, element in elements.items())
        unknown = [place for place in computed if place in named]
        if unknown:
            computed = [other for other in computed if other not in named] + [name]
            sizes = {place: size_of.pop(place) for place in unknown if place in size_of}
            if len(sizes) == len(unknown):
                size_of[name] = functools.partial(_fill_in, constants[name], sizes)
    return Op(
        type=entry.type if entry else None,
        name=node.name,
        path=traced.paths[node],
        spelling=key,
        inputs=inputs,
        arguments=constants,
        computed=tuple(computed),
        module=module,
        tensor_of=tensor_of,
        made_of=made_of,
        size_of=size_of,
    )


_NUMPY_NAMES = {"axis": "dim", "axis0": "dim0", "axis1": "dim1", "keepdims": "keepdim"}
"""Names that torch takes for its own, as NumPy spells them."""


def _arguments(
    node: fx.Node, entry: ops.Spelling | None, module: nn.Module | None
) -> dict[str, Any]:
    if entry is None:
        return {str(i): value for i, value in enumerate(node.args)} | dict(node.kwargs)
    parameters = entry.signature.parameters
    keywords = {_NUMPY_NAMES.get(name, name): value for name, value in node.kwargs.items()}
    bound = entry.signature.bind_partial(*node.args, **keywords)
    if module is None:
        bound.apply_defaults()
    given: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD and not name.startswith("_"):
            given |= value
        elif not name.startswith("_") and (value or kind is not inspect.Parameter.VAR_POSITIONAL):
            given[name] = value
    given.pop("inplace", None)  # the tracer has made everything out of place
    for name, parameter in parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.kind is parameter.VAR_POSITIONAL and name in keywords:
            given[name] = (keywords[name],)  # as in permute(dims=...)
        if module is not None and name not in given and not variadic:
            default = None if parameter.default is parameter.empty else parameter.default
            given[name] = getattr(module, name, default)
    return given


def _nodes(value: Any) -> list[fx.Node]:
    """Return the nodes in an argument, however nested."""
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def _is_size(node: fx.Node) -> bool:
    """Tell whether a node computes with sizes alone."""
    if _is_shape_query(node):
        return True
    sources = node.all_input_nodes
    return node.op.startswith("call_") and bool(sources) and all(map(_is_size, sources))


def _resolve(argument: Any, values: Mapping[str, Any]) -> Any:
    """Return an argument with the values of its nodes."""
    return fx.map_arg(argument, lambda node: values[node.name])


def _fill_in(
    sequence: tuple[Any, ...],
    sizes: Mapping[str, Callable[[Mapping[str, Any]], Any]],
    values: Mapping[str, Any],
) -> tuple[Any, ...]:
    """Return a sequence with the values of those of its elements that are named as sizes."""
    return tuple(
        sizes[element](values) if isinstance(element, str) and element in sizes else element
        for element in sequence
    )


def _is_tensor(value: Any, root: nn.Module) -> bool:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return False
    return isinstance(_read(root, str(value.target)), Tensor)


def _read(owner: nn.Module, path: str) -> Tensor:
    return operator.attrgetter(path)(owner)
