"""Nearest points of `{s x = t}` and `{a = t b}`, for factors that one of them may share."""

from __future__ import annotations

import torch
from torch import Tensor

from frfx.linalg.pseudo_inverse import solve_dtype

_STEPS = 24
"""Newton steps. Every start lies on the side of its root from which they are monotone."""

_POLISH = 1e-9
"""Bound on the last step: at a multiple root it would be made of rounding."""


def nearest_product(
    target: Tensor, output: Tensor, gate: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the factors nearest to the given ones whose product is the target.

    Given s, the best x is `t / s`, so the squared distance, with `T = sum t^2` and
    `B = sum t x^` over the entries that share s, is

        f(s) = (s - s^)^2 + T / s^2 - 2 B / s + sum x^^2,

    and `s^3 f'(s) / 2 = p(s) = s^4 - s^ s^3 + B s - T`. Where `t = 0` either s or x is zero,
    whichever is nearer.

    Args:
        target: `t`, shape (N, ...).
        output: `s^ x^`, of the same shape. Where it is the target, nothing moves.
        gate: `s^`; broadcasts to the target's shape.
        factor: `x^`, of the target's shape.

    Returns:
        `s*` and `x*`, single precision at least. Targets whose squares underflow count as zero.
    """
    dtype = solve_dtype(torch.promote_types(target.dtype, factor.dtype))
    shape = gate.shape
    kept = (target != output).double().sum_to_size(shape) == 0
    t, s, x = target.double(), gate.double(), factor.double()
    unit = torch.maximum(_largest(t, shape).sqrt(), _largest(x, shape)).maximum(s.abs())
    unit = torch.where(unit > 0, unit, 1).detach()
    sign = torch.where(s < 0, -1.0, 1.0) * unit  # p is the same for (-s, -s^, -B)
    t, s, x = t / unit / unit, s / sign, x / unit
    square = t.square().sum_to_size(shape)
    product = (t * x).sum_to_size(shape) * sign / unit
    none = square == 0
    closes = none & (s.square() <= x.square().sum_to_size(shape))
    root = _nearest_root(s, torch.where(none, 1, square), product)
    s_new = torch.where(none, torch.where(closes, 0, s), root) * sign / unit
    x_new = torch.where(none, torch.where(closes, x, 0), t / torch.where(none, 1, s_new))
    return (
        torch.where(kept, gate.to(dtype), (s_new * unit).to(dtype)),
        torch.where(kept, factor.to(dtype), (x_new * unit).to(dtype)),
    )


def _largest(values: Tensor, shape: torch.Size) -> Tensor:
    """Return the largest magnitude among the entries that share one of a tensor of this shape."""
    new = values.ndim - len(shape)
    pairs = enumerate(zip(shape, values.shape[new:], strict=True), start=new)
    dims = [*range(new), *(d for d, (size, onto) in pairs if size != onto)]
    largest = values.abs()
    return (largest.amax(dims, keepdim=True) if dims else largest).reshape(shape)


def _nearest_root(s: Tensor, square: Tensor, product: Tensor) -> Tensor:
    """Return the root of p where f is least, for `s >= 0` and `square > 0`.

    For `r > 0`, p is concave on [0, s/2] and convex beyond: from 0 and from a bound on its roots,
    Newton's steps are monotone to the least and to the largest root, where f may have its minima.
    `f(r) <= f(-r)` if `B >= 0`. If `B < 0`, p has one positive root, and one negative:
    `p(-u) = u^4 + s u^3 - B u - T` is increasing and convex. Steps towards a root that is not
    there end anywhere; f, which is the cost of any r, tells.
    """
    size = product.abs()
    side = torch.where(product < 0, -1.0, 1.0)  # of the other candidate
    signed = side * s

    def f(r: Tensor) -> Tensor:
        return (r - s).square() + (square / r - 2 * product) / r

    with torch.no_grad():
        below = (-product).clamp(min=0)
        bound = s + square**0.25 + below ** (1 / 3)
        bound = torch.where(product > 0, bound.minimum(s.maximum(square / size)), bound)
        largest = _newton(bound, s / 2, s, product, square)
        start = (square**0.25).minimum((square / s) ** (1 / 3)).minimum(square / size)
        start, end = (torch.where(product < 0, a, b) for a, b in ((start, 0), (0, s / 2)))
        other = side * _newton(start, end, signed, size, square)
        best = torch.where(f(other) < f(largest), other, largest)
    # One more step, which autograd follows: it has the implicit derivative of the root.
    value, slope = _polynomial(best, s, product, square)
    polish = value / torch.where(slope == 0, 1, slope)
    return best - polish.clamp(-_POLISH * best.abs(), _POLISH * best.abs())


def _polynomial(r: Tensor, s: Tensor, product: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Return `r^4 - s r^3 + product r - square` and its derivative."""
    cubed = (r - s) * r * r
    return (cubed + product) * r - square, 3 * cubed + r * r * r + product


def _newton(r: Tensor, end: Tensor, s: Tensor, product: Tensor, square: Tensor) -> Tensor:
    """Return the root between a start, from which Newton's steps are monotone, and an end."""
    tiny = torch.finfo(r.dtype).tiny
    for _ in range(_STEPS):
        value, slope = _polynomial(r, s, product, square)
        step = r - value / (slope + tiny)
        r = step.maximum(r.minimum(end)).minimum(r.maximum(end))
    return r


def nearest_quotient(
    target: Tensor, output: Tensor, numerator: Tensor, denominator: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the numerator and denominator nearest to the given ones with the target as quotient.

    On `a = t b` the squared distance is quadratic in b, least at
    `b = (b^ + sum t a^) / (1 + sum t^2)`, summed over the entries that share b.

    Args:
        target: `t`, shape (N, ...).
        output: `a^ / b^`, of the same shape. Where it is the target, nothing moves.
        numerator: `a^`, of the same shape.
        denominator: `b^`; broadcasts to that shape.

    Returns:
        `a*` and `b*`, single precision at least; b* is not zero.
    """
    dtype = solve_dtype(torch.promote_types(target.dtype, numerator.dtype))
    shape = denominator.shape
    kept = (target != output).double().sum_to_size(shape) == 0
    t, a, b = target.double(), numerator.double(), denominator.double()
    unit = _largest(t, shape).clamp(min=1)
    scaled = t / unit
    above = b / unit / unit + (scaled * (a / unit)).sum_to_size(shape)
    b_new = above / (1 / unit / unit + scaled.square().sum_to_size(shape))
    # A quotient of zeros would be none.
    b_new = torch.where(b_new == 0, torch.finfo(dtype).eps * b / unit, b_new)
    return (
        torch.where(kept, numerator.to(dtype), (t * b_new).to(dtype)),
        torch.where(kept, denominator.to(dtype), b_new.to(dtype)),
    )
