"""Symbolic tracing with torch.fx: keeps the user's modules, fits any batch and image size."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from frfx import ops
from frfx.compiler.constants import keep_constants, scratch_to_trace
from frfx.compiler.transformers import is_open, no_fast_path, traceable
from frfx.errors import TraceError
from frfx.view import redirect


def trace_symbolically(view: nn.Module) -> fx.Graph:
    """Trace a view with torch.fx; the graph's attributes are the view's."""
    scratch = scratch_to_trace(view)
    kept = [f for f in ops.functions() if not f.__module__.startswith("torch.")]
    redirect(scratch, {id(function): _recording(function) for function in kept})
    with no_fast_path():
        graph = _Tracer().trace(scratch)
    for node in graph.nodes:  # else a module of the graph would wrap the function for all of fx
        node.meta.pop("is_wrapped", None)
        if getattr(node.target, "__globals__", None) is vars(fx._symbolic_trace):
            # A function of torch that an attribute held names itself by what stands in for it.
            node.target = node.target.__wrapped__  # type: ignore[union-attr]
        if node.target is getattr and node.args[1] in _PARTS:  # of what torch calls by names
            node.target, node.args = operator.getitem, (node.args[0], _PARTS[node.args[1]])
    keep_constants(graph, scratch, view)
    for module in scratch.modules():  # fx refers to it in circles: else its weights would stay
        module.__dict__ |= {"_parameters": {}, "_buffers": {}}
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


_PARTS = {"values": 0, "indices": 1}
"""The parts of what `max(dim)`, `topk`, `sort` and their like return."""

_FACTORIES: tuple[Callable, ...] = (torch.zeros, torch.ones, torch.full, torch.empty, torch.eye)
_FACTORIES += (torch.arange, torch.linspace, torch.rand, torch.randn)
"""What makes tensors out of sizes."""


class _Tracer(fx.Tracer):
    """Keeps modules and functions that spell an op whole; leaves optional arguments at defaults."""

    def __init__(self) -> None:
        self._classes = frozenset(ops.module_classes())
        functions = ops.functions()
        # Those of C take a proxy for a tensor themselves, but not every torch takes one for a size.
        builtin = tuple(f for f in ops.spellings() if isinstance(f, types.BuiltinFunctionType))
        super().__init__(autowrap_functions=functions + builtin + _FACTORIES)
        # A function is replaced where it is called by name: in the module that calls it, which fx
        # sees to, and as an attribute of the one that defines it.
        homes = {f.__module__ for f in functions if not f.__module__.startswith("torch.")}
        self._autowrap_search += [sys.modules[home] for home in homes if home in sys.modules]
        self._autowrap_search += [torch, F]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in self._classes:
            return True
        if is_open(m):
            return False
        return not is_parametrized(m) and super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if is_open(m) and type(m) not in self._classes:
            opened = traceable(m, forward, args, kwargs)
            if opened is None:
                return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
            forward = opened
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(
        self, root_fn: Callable, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable, list]:
        del root_fn, is_module, concrete_args
        name = input_name(self.root)
        # Called through the instance: some models replace `forward` there.
        return lambda root, x: root.forward(x), [
            self.root,
            self.create_proxy("placeholder", name, (), {}, type_expr=Tensor),
        ]


def input_name(model: nn.Module) -> str:
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
