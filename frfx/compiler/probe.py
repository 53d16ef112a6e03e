"""One look at every activation of the forward pass: shapes, hooks, and what is not finite."""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from frfx.compiler.bind import live_nodes
from frfx.compiler.trace import Traced
from frfx.errors import InputError, ModelError, NonFiniteError
from frfx.ops import Shape
from frfx.view import writable, writable_view, written_to

_FX_NOTE = "\n\nWhile executing"
"""Where fx begins to add to an exception's message."""


_UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""Functions and methods that return memory as they find it."""


class Probed(NamedTuple):
    """What a run of the forward graph has shown.

    Attributes:
        output: Its output.
        shapes: Every activation's shape, without the batch.
        hooked: The nodes whose modules compute something else because of a hook.
        sizes: What the nodes have given that compute with sizes, by name.
        complex: The nodes whose values are complex numbers.
    """

    output: Tensor
    shapes: dict[fx.Node, Shape]
    hooked: set[fx.Node]
    sizes: dict[str, Any]
    complex: set[fx.Node]


@torch.no_grad()
def run_forward(traced: Traced, x: Tensor) -> Probed:
    """Run the forward graph once, and look at every activation.

    Raises:
        InputError: If the forward pass cannot take the input; names the node.
        NonFiniteError: If the input, or the value of a node, is not finite; names the first.
        ModelError: If the forward pass would write to the model's own tensors.
    """
    check_finite(x, "the input batch")
    with torch.autocast(x.device.type, enabled=False):
        _check_writes(traced, x)
        probe = _Probe(traced)
        return Probed(probe.run(x), probe.shapes, probe.hooked, probe.sizes, probe.complex)


def _check_writes(traced: Traced, x: Tensor) -> None:
    """Raise `ModelError` if the forward pass would write to the model's tensors."""
    if not writable(traced.root):
        return
    view = writable_view(traced.root)
    with contextlib.suppress(Exception):  # whoever runs it in earnest tells of that
        fx.Interpreter(view, graph=traced.graph).run(x)
    written = written_to(view, traced.root)
    if written:
        raise ModelError(
            f"in evaluation mode, too, the model writes to {', '.join(written)}: it would not stay "
            "as it was. Switch that off, as torch.ao.quantization.disable_observer and "
            "max_norm=None do, or normalise a batch by statistics that are not kept"
        )


class _Probe(fx.Interpreter):
    """Runs the forward graph and records every activation's shape; stops at what is not finite.

    Minus infinity, which masks of attention write, may pass as long as what follows is finite.
    """

    def __init__(self, traced: Traced) -> None:
        super().__init__(traced.root, graph=traced.graph)
        self._masks: list[fx.Node] = []
        self.extra_traceback = False  # leaves messages as they are
        self.traced, self.live = traced, live_nodes(traced.graph)
        self.shapes: dict[fx.Node, Shape] = {}
        self.hooked: set[fx.Node] = set()
        self.sizes: dict[str, Any] = {}
        self.complex: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:  # whatever torch says of an input that does not fit
            shapes = [tuple(self.env[s].shape) for s in n.all_input_nodes if s in self.live]
            raise InputError(
                f"the forward pass fails at {self.traced.paths[n]!r} "
                f"(input shapes {shapes}): {str(error).partition(_FX_NOTE)[0]}"
            ) from error
        if n in self.live and isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape[1:])
            if value.is_complex():
                self.complex.add(n)
            if n.op != "placeholder" and not _is_unwritten(n):
                self._check(n, value)
        if n in self.live and n.op == "call_module" and self._is_changed_by_hooks(n, value):
            self.hooked.add(n)
        elif n not in self.live and n.op.startswith("call_") and not isinstance(value, Tensor):
            self.sizes[n.name] = value
        return value

    def _is_changed_by_hooks(self, node: fx.Node, value: Any) -> bool:
        module = self.traced.root.get_submodule(str(node.target))
        if not module._forward_pre_hooks and not module._forward_hooks:
            return False
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        plain = module.forward(*args, **kwargs)
        if not isinstance(value, tuple):
            plain, value = (plain,), (value,)
        return any(
            isinstance(part, Tensor) and not torch.allclose(part, seen)
            for part, seen in zip(plain, value, strict=True)
        )

    def _check(self, node: fx.Node, value: Tensor) -> None:
        if is_finite(value):
            return
        self._masks.append(node)
        if node is not self.traced.output and not bool((value.isnan() | value.isposinf()).any()):
            return
        node = self._masks[0]
        name = self.traced.paths[node]
        if node.op == "call_module":
            module = self.traced.root.get_submodule(str(node.target))
            weights = dict([*module.named_parameters(), *module.named_buffers()])
        else:
            sources = (s for s in node.all_input_nodes if s.op == "get_attr")
            weights = {source.name: self.fetch_attr(str(source.target)) for source in sources}
        bad = [weight for weight, tensor in weights.items() if not is_finite(tensor)]
        if bad:
            raise NonFiniteError(f"{name!r}: its {' and '.join(bad)} holds NaN or infinity")
        raise NonFiniteError(
            f"{name!r}: its output holds NaN or infinity, though its input and weights are finite"
        )


def _is_unwritten(node: fx.Node) -> bool:
    """Tell whether a value is memory that others write to, and may hold anything."""
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    return node.op.startswith("call_") and name in _UNWRITTEN


def is_finite(tensor: Tensor) -> bool:
    """Return whether no entry is NaN or infinite."""
    if not tensor.is_floating_point() or math.isfinite(float(tensor.detach().sum())):
        return True  # NaN and infinity do not leave a sum; it is ten times faster to ask
    return bool(torch.isfinite(tensor).all())  # the sum may have overflowed


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise `NonFiniteError` if an entry is; names the samples."""
    if not is_finite(tensor):
        samples = (~torch.isfinite(tensor.detach())).flatten(1).any(1).nonzero().flatten().tolist()
        raise NonFiniteError(f"{what} holds NaN or infinity, in the samples {_list(samples)}")


def _list(values: list[int]) -> str:
    shown = ", ".join(map(str, values[:5]))
    return f"{shown}, ... ({len(values)} in all)" if len(values) > 5 else shown
