"""Products of two tensors: matmul and einsum, affine in one operand while the other is held."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from frfx import vocabulary
from frfx.linalg import Matrix
from frfx.linalg.pseudo_inverse import pseudo_inverses, solve_dtype
from frfx.ops import Op, Shape
from frfx.registry import register_rule
from frfx.rules.base import AffineInversion, AffineRule, Inversion, check_choice

Labels = tuple[str, ...]

_HELD_DAMPING = 1e-2
"""Damping where what is held would in truth move with the feature: the longer the step, the less is
left of it. In self-attention an undamped step leaves a residual 5 to 40 times that of no step."""


class Contraction(NamedTuple):
    """A sum of products of two tensors, as einsum writes it.

    Attributes:
        left: The label of every dimension of the first operand.
        right: Those of the second; none for a product with the number 1.
        output: Those of the result. Labels that are not among them are summed over.
    """

    left: Labels
    right: Labels
    output: Labels


def solve_contraction(
    held: Tensor,
    held_labels: Labels,
    residual: Tensor,
    labels: Labels,
    shape: Sequence[int],
    output_labels: Labels,
    *,
    rcond: float | None = None,
    damping: float = 0.0,
) -> Tensor:
    """Return the deviation of the other operand that a deviation of the result asks for.

    For every index of the labels that both operands and the result have, the map from the other
    operand to the result is the matrix H of the held operand, once for every index of the labels
    that H lacks: `d = H+ r`. A label that the other operand has alone is summed over, which
    `1 / n` of the answer at each of its n places undoes. In a dimension where the other operand
    has size 1 and is repeated, its copies have the rows of H in common.

    Args:
        held: The operand that keeps its value.
        held_labels: The labels of its dimensions.
        residual: `y* - y^`.
        labels: The labels of the other operand.
        shape: Its shape.
        output_labels: The labels of the residual.
        rcond: See `pseudo_inverses`.
        damping: See `pseudo_inverses`.

    Returns:
        Of this shape.
    """
    sizes: dict[str, int] = {}
    for names, extents in ((held_labels, held.shape), (labels, shape)):
        for name, extent in zip(names, extents, strict=True):
            sizes[name] = max(extent, sizes.get(name, 1))

    def size(names: list[str]) -> list[int]:
        return [sizes[name] for name in names]

    # A dimension of size 1 that is repeated is none.
    own = [name for name, n in zip(labels, shape, strict=True) if n == sizes[name]]
    there = [name for name, n in zip(held_labels, held.shape, strict=True) if n == sizes[name]]
    held = held.reshape(size(there))
    batch = [name for name in own if name in there and name in output_labels]
    columns = [name for name in own if name in there and name not in output_labels]
    free = [name for name in own if name not in there and name in output_labels]
    summed = [name for name in own if name not in there and name not in output_labels]
    rows = [name for name in there if name not in own and name in output_labels]
    constant = [name for name in there if name not in own and name not in output_labels]
    if constant:
        held = held.sum([there.index(name) for name in constant])
        there = [name for name in there if name not in constant]
    matrices = held.permute([there.index(name) for name in batch + rows + columns]).reshape(
        *size(batch), math.prod(size(rows)), math.prod(size(columns))
    )
    right = residual.permute([output_labels.index(name) for name in batch + rows + free]).reshape(
        *size(batch), math.prod(size(rows)), math.prod(size(free))
    )
    dtype = torch.promote_types(solve_dtype(matrices.dtype), right.dtype)
    found = pseudo_inverses(matrices, rcond, damping).to(dtype) @ right.to(dtype)
    found = found.reshape([*size(batch + columns + free), *[1] * len(summed)])
    found = found.expand(size(batch + columns + free + summed)) / math.prod(size(summed))
    order = batch + columns + free + summed
    return found.permute([order.index(name) for name in own]).reshape(tuple(shape))


def matmul_labels(left: int, right: int) -> Contraction:
    """Return the labels of a matrix product of operands of so many dimensions."""
    batch = [string.ascii_letters[i] for i in range(max(left, right) - 2)][::-1]
    first = (*batch[len(batch) - max(left - 2, 0) :], *(["row"] if left > 1 else []), "inner")
    last = (*batch[len(batch) - max(right - 2, 0) :], "inner", *(["column"] if right > 1 else []))
    output = (*batch, *(["row"] if left > 1 else []), *(["column"] if right > 1 else []))
    return Contraction(first, last, output)


def einsum_labels(equation: str, dims: Sequence[int]) -> Contraction:
    """Return the labels of an einsum of one or two operands.

    Args:
        equation: As `torch.einsum` takes it; `...` stands for the dimensions that are not named.
        dims: How many dimensions each operand has.
    """
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    rest = [n - len(term.replace("...", "")) for term, n in zip(terms, dims, strict=True)]
    dots = [f"...{i}" for i in range(max(rest))][::-1]

    def expand(term: str, count: int) -> Labels:
        before, ellipsis, after = term.partition("...")
        return (*before, *(dots[len(dots) - count :] if ellipsis else []), *after)

    left, *others = [expand(term, n) for term, n in zip(terms, rest, strict=True)]
    named = sorted(c for c in set(inputs) if c.isalpha() and inputs.count(c) == 1)
    output = expand(result, len(dots)) if arrow else (*dots, *named)
    return Contraction(left, others[0] if others else (), output)


def held_damping(
    damping: float | None, op: Op, held: Iterable[str], rcond: float | None = None
) -> float:
    """Return the damping of a rule that holds some inputs of an op.

    Args:
        damping: As the policy has it; None for a small one where holding is an approximation, for
            the layer reaches what is held, and for 0 where it is none.
        op: The op.
        held: The names of the inputs that the rule holds.
        rcond: As the policy has it: a cutoff takes the place of the small damping.
    """
    if damping is not None or rcond is not None:
        return damping or 0.0
    return _HELD_DAMPING if any(name in op.free for name in held) else 0.0


class HeldOperand(Inversion):
    """`x* = x^ + H+ (y* - y^)` with the matrices H of the operand that is held.

    Args:
        op: A product.
        rule: Says which operand is solved.
    """

    solver = "dense"

    def __init__(self, op: Op, rule: BilinearRule) -> None:
        super().__init__()
        self.op = op
        self.names = operands(op)
        self.solved = rule.solved(op)
        self.rcond = rule.rcond
        self.damping = held_damping(rule.damping, op, {*self.names} - {self.solved}, rule.rcond)

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        values: dict[str, Tensor | None] = dict(zip(self.op.inputs, inputs, strict=True))
        known = [values.get(name, self.op.tensor(name)) for name in self.names]
        tensors = [tensor for tensor in known if tensor is not None]
        place = self.names.index(self.solved)
        x = tensors[place]
        labels = _labels(self.op, [tensor.ndim for tensor in tensors])
        with torch.autocast(x.device.type, enabled=False):
            if len(tensors) == 1:
                held = torch.ones((), dtype=x.dtype, device=x.device)
            else:
                held = tensors[1 - place] * self.op.arguments.get("alpha", 1)
            deviation = solve_contraction(
                held,
                labels[1 - place],
                target - output,
                labels[place],
                x.shape,
                labels.output,
                rcond=self.rcond,
                damping=self.damping,
            )
            return x + deviation


@register_rule(vocabulary.matmul)
@register_rule(vocabulary.addmm)
@register_rule(vocabulary.einsum)
@dataclass(frozen=True)
class BilinearRule(AffineRule):
    """`x* = x^ + H+ (y* - y^)`: a product of two tensors is affine in each while the other is held.

    That is a choice: a product that may move both operands has nearer preimages. Where an operand
    is one of the model's tensors, or the layer does not reach it, there is none. What is held is
    not reconstructed. As H comes with the samples, it is factored at every call; the one that does
    not, a matrix of the model on the right, is factored once.

    Attributes:
        hold: Which of two activations keeps its forward value: ``"left"``, as in attention the
            weights (`weights @ values`), or ``"right"``.
        rcond: Singular values up to this share of their matrix's largest count as zero.
        damping: Tikhonov's parameter relative to the squared largest singular value of each
            matrix; None for 1e-2 where an activation is held that the layer reaches and no rcond is
            given, else for 0.
    """

    equation = "Eq. 4 with one operand held"
    accuracy = "exact in one operand; of two free ones, the other is held"
    solvers = ("dense",)
    hold: Literal["left", "right"] = "left"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("hold", self.hold, ("left", "right"))

    def supports(self, op: Op) -> str | None:
        names = operands(op)
        reason = _not_einsum(op) if op.type is vocabulary.einsum else None
        if reason is not None:
            return reason
        known = {*op.inputs, *op.tensor_of}
        missing = [name for name in names if name not in known]
        if missing:
            return f"its {missing[0]} is computed in the graph, not read from the model"
        if any(name in op.computed for name in ("alpha", "beta")):
            return "its alpha or beta is computed in the graph, not read from the model"
        if not any(name in op.free for name in names):
            asked = " and ".join(op.free)
            return f"it would have to reconstruct its {asked}, which it does not multiply"
        return None

    def solved(self, op: Op) -> str:
        """Return which operand is reconstructed."""
        free = [name for name in operands(op) if name in op.free]
        return free[-1 if self.hold == "left" else 0]

    def reconstructs(self, op: Op) -> tuple[str, ...]:
        return (self.solved(op),)

    def build(self, op: Op) -> Inversion:
        weight = None if op.type is vocabulary.einsum else op.tensor(operands(op)[1])
        if weight is not None and weight.ndim == 2 and len(op.inputs) == 1:
            return AffineInversion(op, _right_matrix, self.dense)
        return HeldOperand(op, self)


def operands(op: Op) -> tuple[str, ...]:
    """Return the names of the arguments that are multiplied."""
    given = [*op.inputs, *op.tensor_of, *op.computed]
    if op.type is vocabulary.einsum:
        listed = sorted(name for name in given if name.startswith("left["))
        return tuple(listed or (name for name in ("left", "right") if name in given))
    if op.type is vocabulary.addmm:
        return ("mat1", "mat2") if "mat1" in given or "mat2" in given else ("batch1", "batch2")
    return ("input", "mat2" if "mat2" in given else "other")


def _labels(op: Op, dims: Sequence[int]) -> Contraction:
    if op.type is vocabulary.einsum:
        return einsum_labels(op.arguments["equation"], dims)
    return matmul_labels(*dims)


def _not_einsum(op: Op) -> str | None:
    """Return why an einsum is no product of two tensors, or None."""
    equation = op.arguments.get("equation")
    if not isinstance(equation, str):
        return "its equation is no string"
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    if len(terms) > 2:
        return f"it multiplies {len(terms)} tensors: write it as products of two"
    if len(terms) != len(operands(op)):
        return "one of its operands is computed in the graph, not read from the model"
    for term in terms:
        twice = [c for c in term if c.isalpha() and term.count(c) > 1]
        if twice:
            return f"it takes a diagonal: {twice[0]!r} stands twice in {term!r}"
    return None


def _right_matrix(op: Op, key: Shape) -> Matrix:
    del key
    weight = op.tensor(operands(op)[1])
    assert weight is not None  # `build` has seen to it
    return Matrix(weight.mT * op.arguments.get("alpha", 1))
