"""Tensors that a forward makes itself: they are traced once and kept beside the model."""

from __future__ import annotations

import operator

from torch import fx, nn

from frfx.view import scratch_view

_CONSTANTS = "_frfx_constants"


def scratch_to_trace(view: nn.Module) -> nn.Module:
    """Return a view to trace, without what an earlier trace of it has kept."""
    scratch = scratch_view(view)
    scratch._modules.pop(_CONSTANTS, None)
    return scratch


def keep_constants(graph: fx.Graph, scratch: nn.Module, view: nn.Module) -> None:
    """Give the view the tensors that the forward made itself, in a module of their own."""
    view._modules.pop(_CONSTANTS, None)
    constants = nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr" and not has_path(view, node.target):
            name = node.target.replace(".", "_")
            value = operator.attrgetter(node.target)(scratch)
            constants.register_buffer(name, value, persistent=False)
            node.target = f"{_CONSTANTS}.{name}"
    if constants._buffers:
        view.add_module(_CONSTANTS, constants)


def has_constants(view: nn.Module) -> bool:
    """Tell whether some tensors of the forward were computed once, while it was traced."""
    return _CONSTANTS in view._modules


def has_path(module: nn.Module, path: str) -> bool:
    """Tell whether a module has an attribute at a dotted path."""
    try:
        operator.attrgetter(path)(module)
    except AttributeError:
        return False
    return True
