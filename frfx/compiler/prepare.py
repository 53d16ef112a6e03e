"""What happens before and after the walk back: checks, and factors that fit weights and sizes."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from frfx.compiler.constants import has_constants
from frfx.compiler.plan import Plan
from frfx.compiler.probe import check_finite, run_forward
from frfx.compiler.trace import Traced, check_batch, is_output
from frfx.errors import (
    ConditionWarning,
    InputError,
    TargetError,
    TraceMismatchError,
    first_line,
)
from frfx.linalg.pseudo_inverse import solve_dtype
from frfx.ops import Shape
from frfx.recording import is_capturing
from frfx.rules.base import FactoredInversion, Inversion
from frfx.rules.label import check_labels
from frfx.rules.sized import SizedInversion
from frfx.weights import Weights

KEPT_FACTORS = 1 << 30
"""Default bound, in bytes, on the factors that an inverse keeps for other image sizes."""

_Size = tuple[Shape, torch.dtype, torch.device]


class Preparation(nn.Module):
    """The first node of a reconstruction graph: checks the arguments and readies the factors.

    Attributes:
        factor_memory: Bound in bytes on what is kept for image sizes other than the current one;
            the least recently used go first.
    """

    def __init__(
        self, traced: Traced, plan: Plan, inversions: Mapping[str, FactoredInversion]
    ) -> None:
        super().__init__()
        self.factor_memory = KEPT_FACTORS
        self.traced, self.plan = traced, plan
        self.factored = dict(inversions)  # a plain dict: registered elsewhere in the graph
        self.shapes: OrderedDict[_Size, dict[fx.Node, Shape]] = OrderedDict()
        self.sizes: dict[_Size, dict[str, Any]] = {}
        self.used: OrderedDict[tuple[str, Shape], None] = OrderedDict()
        self.weights: dict[str, Weights] = {}
        self.place: tuple[torch.dtype, torch.device] | None = None
        self.baked_from: Weights | None = None

    @torch.compiler.disable
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Return the target, checked and in the precision that the inverse computes in.

        One of the caller's own is copied: the walk back may be no step but reshaping it.
        """
        if not isinstance(x, Tensor) or not is_capturing(x.device):  # a graph asks the host nothing
            self.ready(x)
            self._check_target(x, target, self.shapes[self._size(x)])
        return target.to(solve_dtype(x.dtype), copy=True) if target.is_floating_point() else target

    @torch.no_grad()
    def ready(self, x: Tensor) -> None:
        """Make the factors that an input of this size needs and that are not there or stale.

        Raises:
            InputError: If the forward pass cannot take the input.
            NonFiniteError: If the input or a forward value is not finite.
            TraceMismatchError: If the graph does not compute what the model computes.
            UnsupportedOpsError: If an op cannot be inverted at these shapes.
        """
        check_batch(x, self.traced.sizes)
        size = self._size(x)
        self._move_to(x)
        if has_constants(self.traced.root):  # tracing may have computed them from buffers
            buffers = list(self.traced.root.buffers())
            if self.baked_from is None or not self.baked_from.match(buffers):
                self.shapes.clear()  # so that the graph is checked anew
                self.baked_from = Weights(buffers)
        changed = [
            name
            for name, inversion in self.factored.items()
            if name not in self.weights or not self.weights[name].match(inversion.op.tensors())
        ]
        if size in self.shapes and not changed:
            check_finite(x, "the input batch")
        else:
            self.shapes[size] = self.probe(x)
            for name in changed:
                self._forget(name)
                self.weights[name] = Weights(self.factored[name].op.tensors())
        self.shapes.move_to_end(size)
        self._factorize(self.shapes[size], self.sizes[size])

    def _move_to(self, x: Tensor) -> None:
        """Forget the factors for another dtype or device: not all have weights that tell of it."""
        if self.place == (x.dtype, x.device):
            return
        self.place = (x.dtype, x.device)
        self.weights.clear()
        with torch.inference_mode(False):
            like = torch.empty(0, dtype=x.dtype, device=x.device)
        for inversion in self.factored.values():
            inversion.like = like

    def clear(self) -> None:
        """Forget every factor: the next call makes them anew."""
        for name in self.factored:
            self._forget(name)
        self.shapes.clear()
        self.sizes.clear()
        self.weights.clear()

    @property
    def nbytes(self) -> int:
        """The memory that all factors hold, in bytes."""
        return sum(f.nbytes for inv in self.factored.values() for f in inv.factors.values())

    def _size(self, x: Tensor) -> _Size:
        return tuple(x.shape[1:]), x.dtype, x.device

    def _forget(self, name: str) -> None:
        self.factored[name].factors.clear()
        for key in [key for key in self.used if key[0] == name]:
            del self.used[key]

    def _factorize(self, shapes: dict[fx.Node, Shape], sizes: dict[str, Any]) -> None:
        needed = set()
        by_name = {node.name: shape for node, shape in shapes.items()}
        for name, inversion in self.factored.items():
            op = inversion.op
            given = tuple(by_name.get(source, ()) for source in op.inputs.values())
            gave = by_name.get(op.name, ())  # () for a tuple
            if isinstance(inversion, SizedInversion):
                inversion.settle(op.with_shapes(given, gave).with_sizes(sizes))
            key = inversion.key(given[0], gave)
            needed.add((name, key))
            if key not in inversion.factors:
                # Factors outlive the call: outside of inference mode, autograd may use them.
                with torch.inference_mode(False), torch.no_grad():
                    inversion.factors[key] = inversion.factorize(key)
                self._warn(inversion, key)
            self.used[name, key] = None
            self.used.move_to_end((name, key))
        for name, key in list(self.used):
            if self.nbytes <= self.factor_memory:
                break
            if (name, key) not in needed:
                del self.factored[name].factors[key]
                del self.used[name, key]

    def _warn(self, inversion: FactoredInversion, key: Shape) -> None:
        spectrum = getattr(inversion.factors[key], "spectrum", None)
        if spectrum is not None and spectrum.deficient:
            op = inversion.op
            warnings.warn(
                f"{op.path} ({op.show_shapes()}) is rank-deficient to working precision: "
                f"condition number {spectrum.condition:.3g}. Its small singular values are cut "
                f"off; policy.override(node={op.path!r}, damping=...) weighs them down instead",
                ConditionWarning,
                stacklevel=2,
            )

    def probe(self, x: Tensor) -> dict[fx.Node, Shape]:
        """Run the forward graph once: shapes, finite values, and agreement with the model."""
        probed = run_forward(self.traced, x)
        if self._size(x) not in self.shapes:
            self._verify(probed.output, x)
        sizes = self._sizes_of_images(x, probed.sizes)
        self.plan.check(probed.shapes, probed.hooked, sizes, probed.complex)
        self.sizes[self._size(x)] = sizes
        return probed.shapes

    def _sizes_of_images(self, x: Tensor, sizes: dict[str, Any]) -> dict[str, Any]:
        """Return those of the sizes that do not depend on how many samples there are."""
        if not any(step.op.size_of for step in self.plan.steps) or self.traced.batch is not None:
            return sizes
        other = torch.cat([x, x]) if len(x) == 1 else x[:1]
        again = run_forward(self.traced, other).sizes
        return {name: size for name, size in sizes.items() if again.get(name) == size}

    def _verify(self, output: Tensor, x: Tensor) -> None:
        try:
            with torch.autocast(x.device.type, enabled=False):
                same = is_output(output, self.traced, x)
        except Exception as error:  # a check in its forward, which the graph does not hold
            raise InputError(
                f"the model itself refuses a batch of shape {tuple(x.shape)}: {first_line(error)}"
            ) from error
        if not same:
            exported = self.traced.front_end == "torch.export"
            raise TraceMismatchError(
                f"the graph that {self.traced.front_end} traced does not compute what the model "
                "computes: its forward probably depends on the input's values or type, draws "
                "random numbers in evaluation mode, switches autocast on, or computes with a "
                "buffer that has changed since; or a hook of the model changes what it returns. "
                + ("Rewrite" if exported else "Give example_input to invert, or rewrite")
                + " that part of the forward"
            )

    def _check_target(self, x: Tensor, target: Any, shapes: Mapping[fx.Node, Shape]) -> None:
        if not isinstance(target, Tensor):
            raise TargetError(f"expected a tensor as the target, got {type(target).__name__}")
        if target.device != x.device:
            raise TargetError(f"the target is on {target.device}, the input on {x.device}")
        logits = shapes[self.plan.tail.logits]
        batch = x.shape[0]
        if not target.is_floating_point():
            dim = self.plan.class_dim
            if not -len(logits) <= dim <= len(logits):
                raise TargetError(
                    f"labels need an output of shape (N, K, ...), but this network's is "
                    f"{(batch, *logits)}: give a float target of that shape"
                )
            check_labels(target, (batch, *logits), dim)
            return
        if not self.plan.takes_scores:
            raise TargetError("the network ends in argmax: give integer labels")
        expected = (batch, *shapes[self.traced.output])
        if tuple(target.shape) != expected:
            raise TargetError(
                f"a float target has the shape of the output, {expected}, not "
                f"{tuple(target.shape)}; labels have an integer dtype"
            )
        check_finite(target, "the target")


class Finish(nn.Module):
    """The last node of a reconstruction graph: `a*` in the type of the forward feature.

    Args:
        inversions: Those whose solvers may not have converged.
    """

    def __init__(self, inversions: Iterable[Inversion] = ()) -> None:
        super().__init__()
        self.inversions = tuple(inversions)  # registered elsewhere in the graph

    def forward(self, feature: Tensor, forward_feature: Tensor) -> Tensor:
        """Return the reconstructed feature.

        Raises:
            NonFiniteError: If it holds NaN or infinity (not asked when compiled or captured).
            ConvergenceError: If a solver has not converged and its rule is to raise (likewise).
        """
        feature = feature.to(forward_feature.dtype)
        if not torch.compiler.is_compiling() and not is_capturing(feature.device):
            check_finite(feature, "the reconstructed feature")
            self.check_convergence()
        return feature

    def check_convergence(self) -> None:
        """Warn or raise, as each rule asks, about what has not converged since the last check."""
        for inversion in self.inversions:
            inversion.check_convergence()
