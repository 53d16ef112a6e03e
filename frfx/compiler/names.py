"""Names of nodes, as torchvision's feature extraction spells them."""

from __future__ import annotations

import re
from typing import Any

from torch import fx

from frfx import ops


def qualified_names(graph: fx.Graph) -> dict[fx.Node, str]:
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
