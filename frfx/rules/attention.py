"""Attention: with its weights held at their forward values, the output is affine in the value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frfx import vocabulary
from frfx.linalg.cgls import damped_cgls
from frfx.linalg.conjugate_gradients import Convergence
from frfx.linalg.pseudo_inverse import solve_dtype
from frfx.ops import Op
from frfx.registry import register_rule
from frfx.rules.base import AffineRule, CGLSRule, Inversion, report_convergence
from frfx.rules.bilinear import held_damping, matmul_labels, solve_contraction

_OPERANDS = ("query", "key", "value")
_MASKS = ("attn_mask", "key_padding_mask")
_WEIGHING = ("query", "key", *_MASKS)
"""What the weights are made of."""


def _not_attention(op: Op) -> str | None:
    """Return why the value path of an attention cannot be solved, or None."""
    if op.computed:
        return f"its {' and '.join(op.computed)} is computed in the graph, not read from the model"
    if "value" in op.free:
        return None
    reached = [name for name in op.free if name not in _MASKS]
    verb = "is" if len(reached) == 1 else "are"
    return (
        "its value, the only input that moves while the weights are held, is out of the layer's "
        f"reach; its {' and '.join(reached)} {verb} not"
    )


class HeldWeights(Inversion):
    """`v* = v^ + W+ (y* - y^)` with the weights W of every head.

    Args:
        op: A scaled dot product attention.
        rule: Has the cutoff and the damping.
    """

    solver = "dense"

    def __init__(self, op: Op, rule: AffineRule) -> None:
        super().__init__()
        self.op = op
        self.rcond = rule.rcond
        self.damping = held_damping(rule.damping, op, _WEIGHING, rule.rcond)

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        values = dict(zip(self.op.inputs, inputs, strict=True))
        value = values["value"]
        dtype = solve_dtype(value.dtype)
        with torch.autocast(value.device.type, enabled=False):
            weights = self.weights(values, dtype)
            residual, shape = target - output, value.shape
            if self.op.arguments["enable_gqa"]:  # neighbouring heads have a value in common
                groups = (shape[-3], -1)
                weights, residual = weights.unflatten(-3, groups), residual.unflatten(-3, groups)
                shape = torch.Size([*shape[:-2], 1, *shape[-2:]])
            held, free, out = matmul_labels(weights.ndim, len(shape))
            deviation = solve_contraction(
                weights, held, residual, free, shape, out, rcond=self.rcond, damping=self.damping
            )
            return value + deviation.reshape(value.shape)

    @torch.no_grad()
    def weights(self, values: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the weights: what the op itself makes of unit vectors."""
        query, key, value = (
            cast(Tensor, values.get(name, self.op.tensor(name))) for name in _OPERANDS
        )
        mask = values.get("attn_mask", self.op.tensor("attn_mask"))
        if mask is not None and mask.is_floating_point():
            mask = mask.to(dtype)
        count = key.shape[-2]
        unit = torch.eye(count, dtype=dtype, device=key.device)
        return F.scaled_dot_product_attention(
            query.to(dtype),
            key.to(dtype),
            unit.expand(*value.shape[:-2], count, count),
            attn_mask=mask,
            is_causal=self.op.arguments["is_causal"],
            scale=self.op.arguments["scale"],
            enable_gqa=self.op.arguments["enable_gqa"],
        )


@register_rule(vocabulary.scaled_dot_product_attention)
@dataclass(frozen=True)
class AttentionRule(AffineRule):
    """`v* = v^ + W+ (y* - y^)` head by head: `y = W v` is affine in v once the weights W are held.

    Query and key keep their forward values, which is an approximation: moving the weights as well
    may bring the output nearer to its target, or the input less far away. What the residual
    reports is left of the target is out of the reach of these weights.

    Attributes:
        rcond: Singular values up to this share of their head's largest count as zero.
        damping: Tikhonov's parameter relative to the squared largest singular value of each head;
            None for 1e-2, or for 0 if the layer reaches neither query nor key or an rcond is given.
    """

    equation = "Eq. 4 with the weights held"
    accuracy = "approximate: the weights are held at their forward values"
    solvers = ("dense",)

    def supports(self, op: Op) -> str | None:
        reason = _not_attention(op)
        if reason is None and op.arguments["dropout_p"]:
            return "it drops weights at random in evaluation mode, too: pass dropout_p=0.0"
        return reason

    def reconstructs(self, op: Op) -> tuple[str, ...]:
        return ("value",)

    def build(self, op: Op) -> Inversion:
        return HeldWeights(op, self)


class HeldMultiheadWeights(Inversion):
    """`v* = v^ + A+ (y* - y^)` with A the path from the value to the output, weights held.

    It gives no gradient, and torch.compile leaves it out.

    Args:
        op: A multi-head attention.
        rule: Has the options of the solver.
    """

    def __init__(self, op: Op, rule: MultiheadAttentionRule) -> None:
        super().__init__()
        self.op, self.rule = op, rule
        self.solver = f"CGLS, {rule.max_steps} steps at most"
        self._convergence: Convergence | None = None

    @torch.compiler.disable
    @torch.no_grad()
    def forward(
        self,
        target: Sequence[Tensor],  # type: ignore[override]
        output: Sequence[Tensor],  # type: ignore[override]
        *inputs: Tensor,
    ) -> Tensor:
        values = dict(zip(self.op.inputs, inputs, strict=True))
        value = values["value"]
        with torch.autocast(value.device.type, enabled=False):
            path = self.path(values)
            residual = self.by_sample((target[0] - output[0]).to(path.weights.dtype)).flatten(1)
            deviation, self._convergence = damped_cgls(
                path.mv,
                path.rmv,
                residual,
                damping=held_damping(self.rule.damping, self.op, _WEIGHING),
                tolerance=self.rule.tolerance,
                max_steps=self.rule.max_steps,
            )
            return value + self.by_sample(path.value(deviation))

    def check_convergence(self) -> None:
        """Warn or raise, as asked, if the last solve has left samples unsolved.

        Raises:
            ConvergenceError: If it has, and `unconverged` is ``"raise"``.
        """
        convergence, self._convergence = self._convergence, None
        report_convergence(convergence, self.op, self.rule.unconverged)

    def by_sample(self, values: Tensor) -> Tensor:
        """Exchange the layouts (L, N, E) and (N, L, E), if the samples do not come first."""
        first = cast(nn.MultiheadAttention, self.op.module).batch_first
        return values if first else values.transpose(0, 1)

    def path(self, values: dict[str, Tensor]) -> ValuePath:
        """Return the path from the value to the output at the forward values, by name."""
        module = cast(nn.MultiheadAttention, self.op.module)
        arguments: dict[str, Any] = {
            name: values.get(name, self.op.tensor(name)) for name in (*_OPERANDS, *_MASKS)
        }
        arguments["is_causal"] = self.op.arguments["is_causal"]
        # Not by a call, which would run the module's hooks once more.
        _, weights = module.forward(**arguments, need_weights=True, average_attn_weights=False)
        # Where everything is masked, torch's weights are NaN, or 0 if nobody asks for them.
        weights = cast(Tensor, weights).nan_to_num(nan=0.0)
        if module.in_proj_weight is None:
            projection = module.v_proj_weight
        else:
            projection = module.in_proj_weight.chunk(3)[2]
        dtype = solve_dtype(weights.dtype)
        return ValuePath(weights.to(dtype), projection.to(dtype), module.out_proj.weight.to(dtype))


@dataclass(frozen=True)
class ValuePath:
    """`A v = sum_h O_h W_h (V_h v)`: the map from the value to the output once W is held.

    Written out, it would have as many columns as a sample's value has entries.

    Attributes:
        weights: W of every sample and head, shape (N, heads, L, S).
        into: The projection V of the value, shape (E, vdim).
        out: The projection O of the output, shape (E, E).
    """

    weights: Tensor
    into: Tensor
    out: Tensor

    def value(self, vectors: Tensor) -> Tensor:
        """Return values (N, S, vdim) that are given as vectors."""
        return vectors.unflatten(1, (-1, self.into.shape[1]))

    def mv(self, vectors: Tensor) -> Tensor:
        """Map values to outputs: (N, S * vdim) -> (N, L * E)."""
        heads = self._heads(F.linear(self.value(vectors), self.into))
        return F.linear((self.weights @ heads).transpose(1, 2).flatten(2), self.out).flatten(1)

    def rmv(self, vectors: Tensor) -> Tensor:
        """Apply the transpose: (N, L * E) -> (N, S * vdim)."""
        heads = self._heads(vectors.unflatten(1, (-1, len(self.out))) @ self.out)
        return ((self.weights.mT @ heads).transpose(1, 2).flatten(2) @ self.into).flatten(1)

    def _heads(self, values: Tensor) -> Tensor:
        return values.unflatten(2, (self.weights.shape[1], -1)).transpose(1, 2)


@register_rule(vocabulary.multi_head_attention)
@dataclass(frozen=True)
class MultiheadAttentionRule(CGLSRule):
    """`v* = v^ + A+ (y* - y^)` with A the whole path from the value to the output, weights held.

    Query and key keep their forward values, an approximation as in `AttentionRule`; and so does
    what the op returns of its weights. The value projection, the mixing by the weights and the
    output projection are solved at once: one after the other, each with its own pseudo-inverse,
    would only be the same where all of them are invertible.

    Attributes:
        damping: See `CGLSRule`; None as in `AttentionRule`.
        tolerance: See `CGLSRule`.
        max_steps: See `CGLSRule`.
        unconverged: See `CGLSRule`.
    """

    equation = "Eq. 4 with the weights held"
    accuracy = "approximate: the weights are held at their forward values"

    def supports(self, op: Op) -> str | None:
        reason = _not_attention(op)
        if reason is not None:
            return reason
        module = cast(nn.MultiheadAttention, op.module)
        if module.bias_k is not None or module.add_zero_attn:
            return "it attends to values of its own (add_bias_kv or add_zero_attn)"
        if op.input_shapes is not None:
            shapes = dict(zip(op.inputs, op.input_shapes, strict=True))
            if len(shapes["value"]) != 2:
                return f"its input has no batch dimension: {op.show_shapes()}"
        return None

    def reconstructs(self, op: Op) -> tuple[str, ...]:
        return ("value",)

    def build(self, op: Op) -> Inversion:
        return HeldMultiheadWeights(op, self)
