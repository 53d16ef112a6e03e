"""Three numbers judge a reconstruction: label consistency, relative deviation, residual by node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from frfx.compiler.inverse import Inverse, Reconstruction
from frfx.compiler.trace import Traced
from frfx.errors import InputError

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class NodeResidual:
    """How far an op of the reconstructed input stays from its target.

    Attributes:
        node: The forward node.
        op: The name of its operation.
        residual: `||f(x*) - y*||` of every sample, shape (N,).
        scale: `||y^||` of every sample, shape (N,).
    """

    node: str
    op: str
    residual: Tensor
    scale: Tensor

    @property
    def relative(self) -> float:
        """The mean over samples of `||f(x*) - y*|| / ||y^||`."""
        return float(_ratio(self.residual, self.scale).mean())


@dataclass(frozen=True)
class Measurement:
    """What a reconstruction is worth, sample by sample; prints as a table.

    Attributes:
        layer: The reconstructed node.
        consistent: Whether the rest of the network gives the label for `a*`, shape (N,); of dense
            labels, the share of them that it gives. None for float targets.
        deviation: `||a* - a^|| / ||a^||` of every sample, shape (N,).
        residuals: One record a node, from the output to the layer.
    """

    layer: str
    consistent: Tensor | None
    deviation: Tensor
    residuals: tuple[NodeResidual, ...]

    @property
    def label_consistency(self) -> float | None:
        """The share of samples, or of dense labels, where `argmax g(a*)` is the label."""
        return None if self.consistent is None else float(self.consistent.double().mean())

    @property
    def relative_deviation(self) -> float:
        """The mean over samples of `||a* - a^|| / ||a^||`."""
        return float(self.deviation.mean())

    def deviation_quantiles(self, q: Sequence[float] = QUANTILES) -> list[float]:
        """Return quantiles over samples of the relative deviation."""
        return torch.quantile(self.deviation, self.deviation.new_tensor(q)).tolist()

    @staticmethod
    def cat(parts: Sequence[Measurement]) -> Measurement:
        """Return the measurement of several batches of one inverse together.

        Raises:
            InputError: If there are none, or of several layers.
        """
        names = {part.layer for part in parts}
        if len(names) != 1:
            raise InputError(f"measurements of {len(names)} layers: expected one")
        first = parts[0]
        kept = [part.consistent for part in parts if part.consistent is not None]
        residuals = tuple(
            NodeResidual(
                rows[0].node,
                rows[0].op,
                torch.cat([row.residual for row in rows]),
                torch.cat([row.scale for row in rows]),
            )
            for rows in zip(*(part.residuals for part in parts), strict=True)
        )
        return Measurement(
            first.layer,
            torch.cat(kept) if kept else None,
            torch.cat([part.deviation for part in parts]),
            residuals,
        )

    def __str__(self) -> str:
        kept = self.label_consistency
        marks = ", ".join(
            f"{q:.0%} {value:.3g}"
            for q, value in zip(QUANTILES, self.deviation_quantiles(), strict=True)
        )
        lines = [
            f"layer               {self.layer}",
            f"label consistency   {'-' if kept is None else f'{kept:.4f}'}",
            f"relative deviation  {self.relative_deviation:.4g}  (quantiles {marks})",
            "residual            ||f(x*) - y*||, and relative to ||y^||",
        ]
        width = max((len(r.node) for r in self.residuals), default=0)
        lines += [
            f"  {r.node:<{width}}  {r.op:<12}  {float(r.residual.mean()):.3g}  {r.relative:.3g}"
            for r in self.residuals
        ]
        return "\n".join(lines)


def measure(inverse: Inverse, x: Tensor, labels: Tensor) -> Measurement:
    """Reconstruct a batch and judge it.

    Args:
        inverse: What `frfx.invert` returned.
        x: The input batch.
        labels: Integer labels (N,), dense ones (N, ...), or a float target of the output's shape.

    Returns:
        Label consistency, relative deviation and the residual at every node.

    Raises:
        InputError, TargetError, NonFiniteError: As a call of the inverse does.
    """
    return judge(inverse, inverse.reconstruct(x, labels), x, labels)


@torch.no_grad()
def judge(inverse: Inverse, nodes: Reconstruction, x: Tensor, labels: Tensor) -> Measurement:
    """Judge a reconstruction that is there already.

    Args:
        inverse: What `frfx.invert` returned.
        nodes: What its `reconstruct` returned for the batch and the labels.
        x: The input batch.
        labels: As `measure` takes them.

    Returns:
        Label consistency, relative deviation and the residual at every node.
    """
    feature = nodes[inverse.layer]
    traced, tail = inverse.traced, inverse.plan.tail
    consistent = None
    if not labels.is_floating_point():
        logits = _forward_value(traced, tail.logits, {traced.input: x, tail.cut: feature.target})
        consistent = logits.argmax(inverse.plan.class_dim) == labels
        if consistent.ndim > 1:
            consistent = consistent.flatten(1).double().mean(1)
    residuals = []
    for step in inverse.plan.steps:
        if step.node is None or step.op.path not in nodes:
            continue
        values = nodes[step.op.path]
        if not values.target.is_floating_point():
            continue
        known = (node for node in step.inputs if traced.paths[node] in nodes)  # not what is held
        reached = {node: nodes[traced.paths[node]].target for node in known}
        given = {node: value.to(values.forward.dtype) for node, value in reached.items()}
        again = _forward_value(traced, step.node, {traced.input: x, **given})
        residuals.append(
            NodeResidual(
                step.op.path,
                values.op,
                _norms(again.double() - values.target.double()),
                _norms(values.forward.double()),
            )
        )
    moved = _norms(feature.target.double() - feature.forward.double())
    deviation = _ratio(moved, _norms(feature.forward.double()))
    return Measurement(inverse.layer, consistent, deviation, tuple(residuals))


def _forward_value(traced: Traced, node: fx.Node, given: dict[fx.Node, Tensor]) -> Tensor:
    """Compute a value of the forward pass from other values of it."""
    run = fx.Interpreter(traced.root, garbage_collect_values=False, graph=traced.graph)
    run.env, needed, waiting = dict(given), set(), [node]
    while waiting:
        if (wanted := waiting.pop()) not in given and wanted not in needed:
            needed.add(wanted)
            waiting += wanted.all_input_nodes
    for step in traced.graph.nodes:
        if step in needed:
            run.env[step] = run.run_node(step)
    return run.env[node]


def _norms(values: Tensor) -> Tensor:
    """Return the norm of every sample, shape (N,)."""
    return values.reshape(len(values), -1).norm(dim=1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return `part / whole`; nothing of nothing is 0."""
    return torch.where(part == 0, 0, part / whole)
