"""A view of a model: the same parameters and buffers, but always in evaluation mode.

Everything that frfx runs or traces is a view, so the user's modules are never switched, flagged,
moved or written to. A view reads a parameter through the very dictionary in which the model keeps
it: a weight that is changed, or replaced, is the new one here too.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from frfx.errors import ModelError
from frfx.linalg.pseudo_inverse import solve_dtype

_INPLACE = "_frfx_inplace"
"""Marks modules of a view that write in place in the model."""


def evaluation_view(
    model: nn.Module,
    own: Collection[Tensor] | Mapping[int, Tensor] = (),
    *,
    inplace: bool = False,
) -> nn.Module:
    """Return modules of the same classes that share the model's tensors, in evaluation mode.

    Args:
        model: Any module, a view among them; it is not changed.
        own: Parameters and buffers that the view keeps as copies of what they are now; or, by their
            ids, the tensors that it has in their place.
        inplace: Whether modules write in place where the model's do. Otherwise they do not: an
            inverse needs the values that would be overwritten.
    """
    views: dict[int, nn.Module] = {}
    made = dict(own) if isinstance(own, Mapping) else {}
    view = _view(model, {*own} if isinstance(own, Mapping) else {*map(id, own)}, views, made)
    redirect(view, {**views, **made})
    for module in view.modules():
        if inplace and writes_in_place(module):
            module.__dict__["inplace"] = True
    return view


def scratch_view(view: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Return a view with tensors of its own, for running or tracing the model's own `forward`.

    Whatever that writes to attributes, containers, buffers or parameters is lost with the view.
    """
    scratch = evaluation_view(view, inplace=inplace)
    unlink(scratch)
    return scratch


def writable(view: nn.Module) -> list[Tensor]:
    """Return what calls may write to: buffers, and embeddings that are renormalised when read."""
    bounded = [m for m in view.modules() if getattr(m, "max_norm", None) is not None]
    weights = [parameter for module in bounded for parameter in module.parameters(recurse=False)]
    return [*view.buffers(), *weights]


def writable_view(view: nn.Module) -> nn.Module:
    """Return a view with copies of what its calls may write to, as `written_to` then tells."""
    return evaluation_view(view, own=writable(view))


def written_to(copied: nn.Module, view: nn.Module) -> list[str]:
    """Return the names of the tensors that a view's writable view no longer has as they were."""
    before = dict[str, Tensor]([*view.named_buffers(), *view.named_parameters()])
    now = [*copied.named_buffers(), *copied.named_parameters()]
    return [
        name
        for name, tensor in now
        if tensor is not before[name]
        and not torch.allclose(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    ]


def writes_in_place(module: nn.Module) -> bool:
    """Tell whether a module of a view stands for one that writes in place."""
    return _INPLACE in module.__dict__


def _view(
    module: nn.Module,
    own: set[int],
    modules: dict[int, nn.Module],
    tensors: dict[int, Tensor],
) -> nn.Module:
    if id(module) in modules:
        return modules[id(module)]
    view = modules[id(module)] = object.__new__(type(module))
    state = dict(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        if any(id(tensor) in own for tensor in state[kind].values()):
            state[kind] = {
                name: _copy(tensor, tensors) if id(tensor) in own else tensor
                for name, tensor in state[kind].items()
            }
    state["_modules"] = {
        name: None if child is None else _view(child, own, modules, tensors)
        for name, child in module._modules.items()
    }
    state["training"] = False
    if state.get("inplace") is True:
        state["inplace"] = False
        state[_INPLACE] = True
    view.__dict__.update(state)
    return view


_MODULE_STATE = frozenset(nn.Module().__dict__)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def redirect(view: nn.Module, stand_ins: Mapping[int, Any]) -> None:
    """Let the attributes and hooks of a view refer to other objects.

    Args:
        view: A view. Containers that a forward may write to become copies.
        stand_ins: By the id of an object, what stands in for it.
    """
    for module in view.modules():
        state = module.__dict__
        for name in state.keys() - _MODULE_STATE:
            state[name] = _redirected(state[name], stand_ins)
        for name in _HOOKS:
            hooks = {key: _redirected(hook, stand_ins) for key, hook in state[name].items()}
            if any(hook is not state[name][key] for key, hook in hooks.items()):
                state[name] = OrderedDict(hooks)  # else shared, so that a removal is noticed


def _redirected(value: Any, stand_ins: Mapping[int, Any]) -> Any:
    if id(value) in stand_ins:
        return stand_ins[id(value)]
    if isinstance(value, types.MethodType) and id(value.__self__) in stand_ins:
        return types.MethodType(value.__func__, stand_ins[id(value.__self__)])
    if isinstance(value, functools.partial):
        function, *args = (_redirected(item, stand_ins) for item in (value.func, *value.args))
        return functools.partial(function, *args, **_redirected(value.keywords, stand_ins))
    if type(value) is tuple:
        return tuple(_redirected(item, stand_ins) for item in value)
    if isinstance(value, (list, deque, dict)):
        twin: Any = copy.copy(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            twin[key] = _redirected(item, stand_ins)
        return twin
    return copy.copy(value) if isinstance(value, set) else value


def _copy(tensor: Tensor, made: dict[int, Tensor]) -> Tensor:
    """Return an independent copy of a parameter or buffer; the same one for the same tensor."""
    if id(tensor) not in made:
        twin = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
        made[id(tensor)] = twin
    return made[id(tensor)]


def unlink(view: nn.Module) -> None:
    """Give the view tensors of its own, so that moving it leaves the model where it is."""
    made: dict[int, Tensor] = {}
    for module in view.modules():
        for kind in ("_parameters", "_buffers"):
            module.__dict__[kind] = {
                name: None if tensor is None else _copy(tensor, made)
                for name, tensor in module.__dict__[kind].items()
            }
        for name, value in module.__dict__.items():
            if isinstance(value, Tensor):
                module.__dict__[name] = _copy(value, made)
    redirect(view, made)


def in_precision(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the module, or where it holds half types a view of it with these in another type."""

    def low(tensors: nn.Module) -> list[Tensor]:
        found = (*tensors.parameters(), *tensors.buffers())
        return [t for t in found if t.is_floating_point() and solve_dtype(t.dtype) != t.dtype]

    if not low(module):
        return module
    view = evaluation_view(module, own=low(module))
    for tensor in low(view):
        tensor.data = tensor.data.to(dtype)
    return view


def check_model(model: nn.Module) -> None:
    """Raise `ModelError` for a model whose weights cannot be computed with."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a scripted model has no Python to trace; give the module it came from")
    if hasattr(model, "_orig_mod"):
        raise ModelError("a compiled model cannot be traced; give the module it came from")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in tensors if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise ModelError(f"{_names(lazy)} not initialised yet; run the model on a batch first")
    meta = [name for name, tensor in tensors if tensor.is_meta]
    if meta:
        raise ModelError(
            f"{_names(meta)} on the meta device and hold no values; "
            "call model.to_empty(device=...) and load the weights first"
        )


def _names(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" * (len(names) > 3))
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def mode_dependent(model: nn.Module) -> list[str]:
    """Return the names of submodules that are in training mode and compute something else there."""
    kinds = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    return [
        name
        for name, module in model.named_modules()
        if module.training and isinstance(module, kinds) and getattr(module, "p", 1) != 0
    ]
