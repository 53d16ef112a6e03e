"""Tensors that the graph computes from the model's own: to everything else, tensors of the model.

Such are the weights of parametrized modules (weight, spectral and orthogonal normalisation), and
parameters that are viewed, scaled or normalised before they are used.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from frfx.weights import Weights

_KEPT = "frfx.computed"
"""Where a node keeps what `Computed.of` has found."""


class Computed:
    """A tensor that no activation has a part in; computed anew when what it is made of changes.

    Args:
        node: Its node.
        made_of: What it is computed from, itself among them, in forward order.
        root: The network.
    """

    def __init__(self, node: fx.Node, made_of: list[fx.Node], root: nn.Module) -> None:
        self._node, self._made_of, self._root = node, made_of, root
        self._value: Tensor | None = None
        self._seen: Weights | None = None

    @classmethod
    def of(cls, node: fx.Node, root: nn.Module) -> Computed | None:
        """Return what a node computes; None if that depends on the input, or is no tensor."""
        if _KEPT not in node.meta:
            node.meta[_KEPT] = cls._find(node, root)
        found: Computed | None = node.meta[_KEPT]
        return found

    @classmethod
    def _find(cls, node: fx.Node, root: nn.Module) -> Computed | None:
        found, waiting = {node}, [node]
        while waiting:
            source = waiting.pop()
            if source.op not in ("get_attr", "call_module", "call_function", "call_method"):
                return None
            waiting += set(source.all_input_nodes) - found
            found.update(source.all_input_nodes)
        made = cls(node, [n for n in node.graph.nodes if n in found], root)
        if not made.tensors():  # a tensor that the forward makes itself, as torch.ones does
            return None
        return made if isinstance(made._compute(), Tensor) else None

    def tensors(self) -> list[Tensor]:
        """Return the model's tensors that it is made of."""
        tensors: list[Tensor] = []
        for node in self._made_of:
            if node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(self._root)
                tensors += [value] if isinstance(value, Tensor) else []
            elif node.op == "call_module":
                module = self._root.get_submodule(str(node.target))
                tensors += [*module.parameters(), *module.buffers()]
        return tensors

    def __call__(self) -> Tensor:
        """Return its value now."""
        tensors = self.tensors()
        if self._value is None or self._seen is None or not self._seen.match(tensors):
            self._value, self._seen = self._compute(), Weights(tensors)
        return self._value

    @torch.no_grad()
    def _compute(self) -> Any:
        interpreter = fx.Interpreter(
            self._root, garbage_collect_values=False, graph=self._node.graph
        )
        with torch.inference_mode(False), torch.autocast(self._device, enabled=False):
            for node in self._made_of:
                interpreter.env[node] = interpreter.run_node(node)
        return interpreter.env[self._node]

    @property
    def _device(self) -> str:
        return next((t.device.type for t in self.tensors()), "cpu")
