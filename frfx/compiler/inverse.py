"""The emitted module: call it, look at every node of its walk, ask what it solves with."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from frfx.compiler.emit import Emitted
from frfx.compiler.plan import Plan
from frfx.compiler.prepare import Finish, Preparation
from frfx.compiler.trace import Traced
from frfx.errors import NonFiniteError
from frfx.joint import JointInversion, Report
from frfx.ops import Shape, show_shape
from frfx.rules.base import FactoredInversion, Inversion
from frfx.view import unlink


@dataclass(frozen=True)
class NodeValues:
    """A node of the walk back.

    Attributes:
        name: The forward node, as `frfx.layers` lists it.
        op: The name of its operation.
        target: `y*`, the value it should have had.
        forward: `y^`, the value it had.
    """

    name: str
    op: str
    target: Tensor
    forward: Tensor


class Reconstruction(Mapping[str, NodeValues]):
    """Target and forward value at every node, from the output back to the layer.

    Attributes:
        feature: `a*`, the reconstructed feature.
    """

    def __init__(self, nodes: Sequence[NodeValues]) -> None:
        self._nodes = {node.name: node for node in nodes}
        self.feature = nodes[-1].target

    def __getitem__(self, name: str) -> NodeValues:
        return self._nodes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def __repr__(self) -> str:
        rows = (f"  {n.name}: {n.op} {tuple(n.forward.shape)}" for n in self.values())
        return "Reconstruction(\n" + "\n".join(rows) + "\n)"


@dataclass(frozen=True)
class SummaryRow:
    """One op of the walk back.

    Attributes:
        node: The forward node, as `frfx.layers` lists it.
        op: The name of its operation.
        rule: The rule that inverts it, with its options.
        solver: What the rule solves with; ``"auto"`` before the first call.
        reason: Why this solver, where there was a choice, or what it solves at once; empty before
            the first call where that decides.
        shapes: Input and output, without the batch; empty before the first call.
        condition: The condition number of the linear part at the last size used; None for rules
            that solve nothing, and before the first call.
    """

    node: str
    op: str
    rule: str
    solver: str
    reason: str
    shapes: str
    condition: float | None


class Summary(Sequence[SummaryRow]):
    """The walk back, a row an op; prints as a table."""

    def __init__(self, rows: Sequence[SummaryRow], head: str) -> None:
        self._rows, self.head = tuple(rows), head

    def __getitem__(self, i):  # type: ignore[no-untyped-def]
        return self._rows[i]

    def __len__(self) -> int:
        return len(self._rows)

    def _cells(self) -> list[list[str]]:
        heading = ["node", "op", "rule", "solver", "shapes", "condition", "why"]
        rows = [
            [r.node, r.op, r.rule, r.solver, r.shapes or "at the first call", _show(r.condition)]
            + [r.reason]
            for r in self
        ]
        return [heading, *rows]

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        )
        return "\n".join([self.head, *lines])

    __repr__ = __str__


def _show_shape(shapes: Mapping[fx.Node, Shape], node: fx.Node) -> str:
    return show_shape(shapes[node]) if node in shapes else "tuple"


def _show(condition: float | None) -> str:
    return "" if condition is None else f"{condition:.3g}"


class Inverse(fx.GraphModule):
    """A network run backwards: from a target to the feature that a layer should have produced.

    Made by `frfx.invert`. Called as `inverse(x, target)` with a batch `x` and either integer
    labels (N,), dense ones (N, H, W) for an output (N, K, H, W), or a float target of the output's
    shape; returns `a*` of the shape, dtype and device of the layer's feature. It works on the
    model's own parameters: a weight that is changed is noticed at the next call (except a write
    through `.data`, which torch does not count: call `refresh` after one). Moving the inverse gives
    it parameters of its own and leaves the model where it is. It is always in evaluation mode.
    A submodule that takes the place of another in the model is not noticed: invert anew. One thread
    at a time may call an inverse; each has one of its own, if several do (`copy.copy`).

    Gradients flow to the input, the target, and the weights as far as the forward values depend on
    them; what is solved with (`A+`) counts as constant, and some steps give none (regions, joint
    inversion, attention by rules).

    A call raises `InputError` and `TargetError` for arguments that do not fit, `NonFiniteError`
    (names the first node), at an image size that is new `ModelError`, `TraceMismatchError` and
    `UnsupportedOpsError`, and where the policy asks for it `ConvergenceError` and `UnreachedError`;
    it warns with `ConditionWarning`, `ConvergenceWarning` and `UnreachedWarning`.

    Attributes:
        model: The network, as a view that shares the model's parameters.
        replaced: What computes some ops in its place, without parameters, a child a node.
        merged: What computes neighbours that are inverted together, likewise.
        inverse: The inversions, one a node.
        prepare: The first node: checks the arguments and readies the factors.
    """

    model: nn.Module
    replaced: nn.Module
    merged: nn.Module
    inverse: nn.Module
    prepare: Preparation
    finish: Finish

    def __init__(
        self, traced: Traced, plan: Plan, emitted: Emitted, recipe: functools.partial[Inverse]
    ) -> None:
        inversions = emitted.inversions
        factored = {
            name: child
            for name, child in inversions.named_children()
            if isinstance(child, FactoredInversion)
        }
        children = {
            "model": traced.root,
            "replaced": emitted.replaced,
            "merged": emitted.merged,
            "inverse": inversions,
            "prepare": Preparation(traced, plan, factored),
            "finish": Finish(c for c in inversions.children() if isinstance(c, Inversion)),
        }
        root = nn.Module()
        for name, child in children.items():
            root.add_module(name, child)
        super().__init__(root, emitted.graph, class_name="Inverse")
        for name, child in children.items():
            self.add_module(name, child)  # whole, where GraphModule copies the attributes it needs
        self.traced, self.plan = traced, plan
        self._stages, self._walk, self._recipe = emitted.stages, emitted.walk, recipe
        self._cut, self._feature = emitted.cut, emitted.feature
        self.graph.lint()
        self.training = False
        # The model's view is in evaluation mode already, and its train() may write to parameters.
        for name in ("replaced", "merged", "inverse", "prepare", "finish"):
            self.get_submodule(name).eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().__call__(*args, **kwargs)
        except NonFiniteError:
            self.reconstruct(*args, **kwargs)  # names the first node
            raise

    @property
    def layer(self) -> str:
        """The reconstructed node, as `frfx.layers` lists it."""
        return self.traced.paths[self.plan.tail.cut]

    @torch.no_grad()
    def reconstruct(self, x: Tensor, target: Tensor) -> Reconstruction:
        """Run the inverse and keep the target and the forward value of every node on the way.

        Args:
            x: The input batch, as for a call.
            target: The labels or the output target, as for a call.

        Returns:
            The nodes from the output to the layer, by name.

        Raises:
            NonFiniteError: If a value holds NaN or infinity; names the first node.
            ConvergenceError: If a solver has not converged and its rule is to raise.
        """
        values = _Recorder(self).run_to(x, target)
        self.finish.check_convergence()
        nodes = []
        for stage in self._stages:
            wanted, had = values[stage.target], values[stage.output]
            op = stage.step.op
            for part, part_wanted, part_had in stage.parts:
                path = self.traced.paths[part]
                nodes.append(NodeValues(path, "getitem", values[part_wanted], values[part_had]))
            if _is_comparable(wanted, had):
                nodes.append(NodeValues(op.path, op.type.name if op.type else "", wanted, had))
            for result in stage.results:
                self._check_finite(values[result], op.path, x)
        feature = values[self._cut]
        final = values[self._feature].to(feature.dtype)
        self._check_finite(final, self.layer, x)
        nodes.append(NodeValues(self.layer, "feature", final, feature))
        return Reconstruction(nodes)

    def _check_finite(self, value: Tensor, name: str, x: Tensor) -> None:
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            self.prepare.probe(x)  # names the node, if it is one of the forward pass
            raise NonFiniteError(
                f"the inverse of {name!r} gives NaN or infinity: its target is out of the reach of "
                "its weights or of the dtype. damping=... in the policy shortens every step, and "
                "trust_region=... bounds it"
            )

    @property
    def report(self) -> dict[str, Report]:
        """What became of every sample of the last call, by the node that was inverted jointly to.

        Empty before the first call, and for policies that are not joint.
        """
        reports = {}
        for stage in self._stages:
            inversion = self.get_submodule(stage.module)
            if isinstance(inversion, JointInversion) and inversion.report is not None:
                reports[self.traced.paths[stage.step.inputs[0]]] = inversion.report
        return reports

    def refresh(self) -> None:
        """Forget all factors, so that the next call makes them from the weights as they are."""
        self.prepare.clear()

    @property
    def factor_memory(self) -> int:
        """Bound in bytes on all factors, beyond which those of other image sizes go."""
        return self.prepare.factor_memory

    @factor_memory.setter
    def factor_memory(self, nbytes: int) -> None:
        self.prepare.factor_memory = nbytes

    def summary(self) -> Summary:
        """Return what is inverted, by which rule and solver, with shapes and condition numbers."""
        shapes = next(reversed(self.prepare.shapes.values()), None)
        rows = []
        for stage in self._stages:
            step = stage.step
            inversion = self.get_submodule(stage.module)
            factor = None
            if isinstance(inversion, FactoredInversion) and inversion.factors:
                factor = list(inversion.factors.values())[-1]
            spectrum = getattr(factor, "spectrum", None)
            known = ""
            if shapes:
                ins = ", ".join(_show_shape(shapes, node) for node in step.inputs)
                out = "label" if step.node is None else _show_shape(shapes, step.node)
                known = f"{ins} -> {out}"
            rows.append(
                SummaryRow(
                    step.op.path,
                    step.op.type.name if step.op.type else "",
                    str(step.rule),
                    str(getattr(factor, "solver", None) or inversion.solver),
                    str(getattr(factor, "reason", "") or inversion.reason),
                    known,
                    None if spectrum is None else spectrum.condition,
                )
            )
        head = f"Inverse up to {self.layer!r}, traced by {self.traced.front_end}"
        return Summary(rows, head)

    def train(self, mode: bool = True) -> Inverse:
        """Do nothing: an inverse is always in evaluation mode."""
        del mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Inverse:
        tensors = [*self.parameters(), *self.buffers()]
        if all(_unmoved(tensor, fn(tensor.detach())) for tensor in tensors):
            return self
        unlink(self.model)  # the model stays where it is
        self.prepare.clear()
        example = self._recipe.keywords["example_input"]
        if example is not None:
            self._recipe = functools.partial(self._recipe, example_input=fn(example))
        return super()._apply(fn, recurse)

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self._recipe, self.model, self.factor_memory)

    def __deepcopy__(self, memo: dict[int, Any]) -> Inverse:
        return _remake(self._recipe, copy.deepcopy(self.model, memo), self.factor_memory)

    def __copy__(self) -> Inverse:
        return _remake(self._recipe, self.model, self.factor_memory)


def _is_comparable(wanted: Any, had: Any) -> bool:
    """Tell whether a node has a target of its own kind: no label that passes, and no tuple."""
    if not isinstance(wanted, Tensor) or not isinstance(had, Tensor):
        return False
    return wanted.is_floating_point() == had.is_floating_point()


def _remake(recipe: functools.partial[Inverse], model: nn.Module, memory: int) -> Inverse:
    inverse = recipe(model)
    inverse.factor_memory = memory
    return inverse


def _unmoved(before: Tensor, after: Tensor) -> bool:
    return (
        before.data_ptr() == after.data_ptr()
        and before.dtype == after.dtype
        and before.device == after.device
    )


class _Recorder(fx.Interpreter):
    """Runs a reconstruction graph and keeps every value; skips the check at the end."""

    def __init__(self, inverse: Inverse) -> None:
        super().__init__(inverse, garbage_collect_values=False, graph=inverse._walk)
        self.extra_traceback = False  # leaves messages as they are

    def run_to(self, x: Tensor, target: Tensor) -> dict[str, Any]:
        self.run(x, target)
        return {node.name: value for node, value in self.env.items()}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target == "finish":
            return args[0]
        return super().call_module(target, args, kwargs)
