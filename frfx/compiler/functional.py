"""A traced graph without writes in place."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from frfx.view import writes_in_place

_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def _copied(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Return what `x.copy_(source)` leaves in x."""
    return source.to(x.device, x.dtype, non_blocking).expand_as(x)


_METHODS: dict[str, Callable[..., Tensor]] = {
    "copy_": _copied,
    "fill_": torch.full_like,
    "zero_": torch.zeros_like,
}
"""Methods that write in place and have no twin of the name without its end."""


def functionalize(graph: fx.Graph, view: nn.Module) -> None:
    """Replace writes in place, which would destroy forward values that the inverse needs.

    What reads the overwritten value later reads the new one instead.
    """
    for node in list(graph.nodes):
        written = node.op == "call_module" and writes_in_place(view.get_submodule(node.target))
        if node.op == "call_function" and inspect.isfunction(node.target):
            _name_inplace(node)
        if node.op in ("call_function", "call_method") and node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
            written = True
        if node.op == "call_method" and node.target == "requires_grad_":  # no value changes
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        if node.op == "call_method" and node.target in _METHODS:
            node.op, node.target, written = "call_function", _METHODS[node.target], True
        elif node.op == "call_method" and _has_twin(node.target):
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
            if not node.users and node.op != "call_module":  # as where a buffer was written to
                graph.erase_node(node)


def _has_twin(method: str) -> bool:
    """Tell whether a method writes in place, and another does the same out of place."""
    twin = getattr(torch.Tensor, method[:-1], None)
    return re.fullmatch(r"[a-z]\w*_", method) is not None and callable(twin)


def _name_inplace(node: fx.Node) -> None:
    """Give the argument `inplace` by name, as in `F.elu(x, 1.0, True)`."""
    parameters = inspect.signature(node.target).parameters  # type: ignore[arg-type]
    place = list(parameters).index("inplace") if "inplace" in parameters else len(node.args)
    if place < len(node.args):
        node.kwargs = {**node.kwargs, "inplace": node.args[place]}
        node.args = node.args[:place]


def _redirect_later_uses(overwritten: fx.Node, node: fx.Node) -> None:
    def is_later(user: fx.Node) -> bool:
        return user > node

    overwritten.replace_all_uses_with(node, delete_user_cb=is_later)
