"""Products and quotients of two activations: nearest points by brute force, dense algebra else."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import frfx
from frfx import vocabulary
from frfx.rules import ProductRule, QuotientRule
from frfx.rules.nearest_product import nearest_product, nearest_quotient
from tests.branches import answer, least_deviations, op_of
from tests.oracles import invert, minimal_affine_preimage, normal, reconstruct, relative

NAMES = ("input", "other")
MUL = op_of(vocabulary.mul, *NAMES)
DIV = op_of(vocabulary.div, *NAMES)

GRID = np.concatenate([np.logspace(-12, 4, 6001) * sign for sign in (1, -1)])


def least_product_distance(s, x, t):
    """Return a bound on the least squared distance from (s, x) to `{s x = t}`: a grid of s."""
    options = [x @ x] if not t.any() else []  # x = 0
    options += [s * s] if not t.any() else []  # s = 0
    near = s + np.array([0.0, 1e-9, -1e-9]) * max(abs(s), 1e-12)
    tries = np.concatenate([GRID * max(abs(s), np.abs(x).max(), 1e-12), near])
    tries = tries[tries != 0]
    away = (t[:, None] / tries - x[:, None]) ** 2
    return min([*options, ((tries - s) ** 2 + away.sum(0)).min()])


numbers = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 2.0]),
    st.builds(
        lambda v, sign, e: sign * v * 10.0**e,
        st.floats(0.1, 3),
        st.sampled_from([1, -1]),
        st.integers(-6, 3),
    ),
)
copies = st.integers(1, 3).flatmap(
    lambda m: st.tuples(*[st.lists(numbers, min_size=m, max_size=m) for _ in range(2)])
)


@given(s=numbers, pair=copies)
@example(s=2.0, pair=([2.0], [1.0]))  # three roots in one
@example(s=0.0, pair=([0.0], [1.0]))
@example(s=0.0, pair=([0.0, 0.0], [0.0, 0.0]))
@example(s=1.0, pair=([0.0], [-1.0]))
@example(s=1.0, pair=([-1.0], [1.0]))
@example(s=1e-30, pair=([1.0], [1.0]))
def test_nearest_product(s, pair):
    x, t = (np.array(values) for values in pair)
    gate, factor = (torch.tensor(v)[None] for v in ([s], x))
    target = torch.tensor(t)[None]
    s_new, x_new = nearest_product(target, target + 1, gate, factor)
    s_new, x_new = s_new.numpy()[0, 0], x_new.numpy()[0]
    size = s * s + x @ x + np.abs(t).max()
    assert np.abs(s_new * x_new - t).max() <= 1e-14 * np.abs(t).max()
    found = (s_new - s) ** 2 + ((x_new - x) ** 2).sum()
    assert found <= least_product_distance(s, x, t) * (1 + 1e-12) + 1e-14 * size


@given(seed=st.integers(0, 2**31))
def test_the_derivative_of_the_distance_vanishes(seed):
    """Every answer is a stationary point of f, whose formula is finite differences here."""
    s, x, t = normal(seed, 4, 1), normal(seed + 1, 4, 3), normal(seed + 2, 4, 3)
    s_new, _ = nearest_product(t, t + 1, s, x)

    def f(r):
        return (r - s).square().squeeze(1) + (t / r - x).square().sum(1)

    h = 1e-6 * s_new
    slope = (f(s_new + h) - f(s_new - h)) / (2 * h.squeeze(1))
    curvature = (f(s_new + h) - 2 * f(s_new) + f(s_new - h)) / h.squeeze(1) ** 2
    assert bool((slope.abs() <= 1e-4 * (1 + curvature.abs())).all())


DEGENERATE = {
    "nothing to gain": ([[2.0]], [[3.0]], [[6.0]], [[2.0]], [[3.0]]),
    "t = 0, small gate": ([[0.1]], [[3.0]], [[0.0]], [[0.0]], [[3.0]]),
    "t = 0, small factors": ([[2.0]], [[0.3, -0.4]], [[0.0, 0.0]], [[2.0]], [[0.0, 0.0]]),
    "both zero": ([[0.0]], [[0.0]], [[4.0]], [[2.0]], [[2.0]]),
    "both zero, negative": ([[0.0]], [[0.0]], [[-4.0]], [[2.0]], [[-2.0]]),
    "several entries": (
        [[0.0]],
        [[0.0, 0.0]],
        [[3.0, 4.0]],
        [[5**0.5]],
        [[3 / 5**0.5, 4 / 5**0.5]],
    ),
    "nothing at all": ([[0.0]], [[0.0]], [[0.0]], [[0.0]], [[0.0]]),
}


@pytest.mark.parametrize("case", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_products(case):
    s, x, t, s_wanted, x_wanted = (torch.tensor(v, dtype=torch.float64) for v in case)
    s_new, x_new = nearest_product(t, torch.full_like(t, 9.0), s, x)
    assert relative(s_new, s_wanted) < 1e-12
    assert relative(x_new, x_wanted) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_products_of_extreme_numbers_are_finite(dtype):
    ends = torch.finfo(dtype)
    large = ends.max / 4  # a distance may be twice the length of its sides
    values = torch.tensor([0.0, ends.tiny, 1.0, -1.0, large, -large], dtype=dtype)
    s, x, t = (v.reshape(-1, 1) for v in torch.cartesian_prod(values, values, values).T)
    for result in (*nearest_product(t, s * 0, s, x), *nearest_quotient(t, s * 0, s, x)):
        assert bool(result.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 3, 4, 5)], ids=["gate", "full"])
def test_forward_products_give_the_factors(dtype, shape):
    s, x = normal(0, *shape).to(dtype), normal(1, 2, 3, 4, 5).to(dtype)
    y = s * x
    found = answer(ProductRule(), MUL, y, y, s, x)
    assert torch.equal(found[0], s)
    assert torch.equal(found[1], x)
    target = y.clone()
    target[0, 1] += 1
    found = answer(ProductRule(), MUL, target, y, s, x)
    moved = [(new != old).reshape(2, 3, -1).any(2) for new, old in zip(found, (s, x), strict=True)]
    for where in moved:
        assert where.nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 1, 1), (2, 1, 4, 5), (2, 3, 4, 5), (5,)])
def test_products_of_two_factors(shape):
    s, x = normal(0, *shape), normal(1, 2, 3, 4, 5)
    target = normal(2, 2, 3, 4, 5)
    s_new, x_new = nearest_product(target, s * x, s, x)
    assert s_new.shape == s.shape
    assert relative(s_new * x_new, target) < 1e-13
    groups = torch.arange(s.numel()).reshape(shape).expand_as(x)
    for i, (old, new) in enumerate(zip(s.flatten(), s_new.flatten(), strict=True)):
        chosen = groups == i
        away = float((new - old) ** 2 + (x_new - x)[chosen].square().sum())
        least = least_product_distance(float(old), x[chosen].numpy(), target[chosen].numpy())
        assert away <= least * (1 + 1e-12)


def test_the_order_of_the_factors_does_not_matter():
    s, x, target = normal(0, 2, 3, 1), normal(1, 2, 3, 4), normal(2, 2, 3, 4)
    one = answer(ProductRule(), MUL, target, s * x, s, x)
    other = answer(ProductRule(), MUL, target, s * x, x, s)
    assert torch.equal(one[0], other[1])
    assert torch.equal(one[1], other[0])
    assert one[0].shape == s.shape


def test_free_gates_cost_no_more_than_held_ones():
    s, x = torch.sigmoid(normal(0, 4, 3, 1) - 4), normal(1, 4, 3, 6)
    target = s * x + 0.1 * normal(2, 4, 3, 6)
    away = {}
    for gate in ("free", "held"):
        s_new, x_new = answer(ProductRule(gate=gate), MUL, target, s * x, s, x)
        assert relative(s_new * x_new, target) < 1e-12
        away[gate] = float((s_new - s).square().sum() + (x_new - x).square().sum())
    assert away["free"] < 0.5 * away["held"]


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_held_gate_stays(damping):
    s, x, target = normal(0, 1, 3, 1), normal(1, 1, 3, 4), normal(2, 1, 3, 4)
    s[0, 1] = 0
    rule = ProductRule(gate="held", damping=damping)
    s_new, x_new = answer(rule, MUL, target, s * x, s, x)
    assert torch.equal(s_new, s)
    (expected,) = least_deviations(lambda x: s * x, [x], target, damping)
    assert relative(x_new, expected) < 1e-12
    full = s.expand(1, 3, 4).contiguous()  # no gate: both are free
    assert not torch.equal(answer(rule, MUL, target, s * x, full, x)[0], full)


HELD = {
    "s * x": (vocabulary.mul, "input", lambda s, x: s * x),
    "x * s": (vocabulary.mul, "other", lambda s, x: x * s),
    "x / s": (vocabulary.div, "other", lambda s, x: x / s),
}
HELD_SHAPES = [
    ((1, 3, 1), (1, 3, 4)),
    ((1, 3, 4), (1, 3, 4)),
    ((1, 3, 4), (1, 3, 1)),
    ((4,), (1, 3, 1)),
]


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("shapes", HELD_SHAPES, ids=str)
@pytest.mark.parametrize("case", HELD.values(), ids=HELD)
def test_an_operand_that_is_held(case, shapes, damping):
    kind, held, function = case
    s, x = normal(0, *shapes[0]), normal(1, *shapes[1])
    output = function(s, x)
    target = normal(2, *output.shape)
    rule = (ProductRule if kind is vocabulary.mul else QuotientRule)(damping=damping)
    op = op_of(kind, *NAMES, held=(held,))
    inputs = (s, x) if held == "input" else (x, s)
    found = rule.build(op)(target, output, *inputs)
    (expected,) = least_deviations(lambda x: function(s, x), [x], target, damping)
    assert found.shape == x.shape
    assert relative(found, expected) < 1e-12
    assert torch.equal(rule.build(op)(output, output, *inputs), x)


def test_held_scales_are_cut_off_by_sample():
    s = torch.tensor([[1.0, 1e-9, 0.0], [1e-9, 1e-10, 0.0]]).double()
    x, target = normal(0, 2, 3), normal(1, 2, 3)
    op = op_of(vocabulary.mul, *NAMES, held=("other",))
    found = ProductRule(rcond=1e-4).build(op)(target, x * s, x, s)
    moved = (found != x).tolist()
    assert moved == [[True, False, False], [True, True, False]]


@given(seed=st.integers(0, 2**31))
def test_nearest_quotient(seed):
    a, b, t = normal(seed, 3, 4), normal(seed + 1, 3, 1), normal(seed + 2, 3, 4)
    a_new, b_new = answer(QuotientRule(), DIV, t, a / b, a, b)
    assert relative(a_new / b_new, t) < 1e-13
    for i in range(3):  # the plane a = t b, by least squares
        plane = np.append(t[i].numpy(), 1.0)[:, None]
        point = np.append(a[i].numpy(), b[i, 0].numpy())
        nearest = plane[:, 0] * np.linalg.lstsq(plane, point, rcond=None)[0]
        assert relative(np.append(a_new[i], b_new[i]), nearest) < 1e-12


def test_forward_quotients_give_the_operands():
    a, b = normal(0, 2, 3).float(), normal(1, 2, 1).float()
    found = answer(QuotientRule(), DIV, a / b, a / b, a, b)
    assert torch.equal(found[0], a)
    assert torch.equal(found[1], b)


def test_no_quotient_of_zeros():
    a, b, t = (torch.tensor([[v]]).double() for v in (1.0, 1.0, -1.0))
    a_new, b_new = nearest_quotient(t, a / b, a, b)
    assert float(a_new / b_new) == -1


def test_gradients_flow_through_the_nearest_point():
    s, x, t = normal(0, 3, 1), normal(1, 3, 2), normal(2, 3, 2)
    leaves = [v.requires_grad_() for v in (t, s, x)]
    assert torch.autograd.gradcheck(lambda t, s, x: nearest_product(t, t + 1, s, x), leaves)
    assert torch.autograd.gradcheck(lambda t, a, b: nearest_quotient(t, t + 1, a, b), [t, x, s])


SCALES = {
    "x * w": lambda x, w: x * w,
    "w * x": lambda x, w: w * x,
    "x / w": lambda x, w: x / w,
}


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (4,), (1, 3, 4)], ids=str)
@pytest.mark.parametrize("function", SCALES.values(), ids=SCALES)
def test_an_activation_that_parameters_broadcast(function, shape):
    w, x, target = normal(0, *shape), normal(1, 2, 3, 1), normal(2, 2, 3, 4)
    expected = minimal_affine_preimage(lambda x: function(x, w), x, target)
    found = reconstruct(function, x, target, w=w)
    assert relative(found, expected) < 1e-13
    policy = frfx.policy.minimal(damping=0.3)
    (expected,) = least_deviations(lambda x: function(x[None], w)[0], [x[0]], target[0], 0.3)
    assert relative(reconstruct(function, x, target, policy, w=w)[0], expected) < 1e-13


SIZES = {
    "x * x.size(1) ** -0.5": lambda x: x * x.size(1) ** -0.5,
    "x / x.shape[-1]": lambda x: x / x.shape[-1],
    "x.size(2) // 2 * x": lambda x: x.size(2) // 2 * x,
}


@pytest.mark.parametrize("function", SIZES.values(), ids=SIZES)
def test_factors_computed_from_sizes(function):
    inverse = invert(function)
    for shape in ((2, 3, 4), (2, 5, 6), (1, 3, 4)):
        x, target = normal(0, *shape), normal(1, *shape)
        expected = minimal_affine_preimage(function, x, target)
        assert relative(inverse(x, target), expected) < 1e-13


def test_a_row_of_zeros_keeps_what_it_broadcasts():
    w, x, target = normal(0, 3, 4), normal(1, 2, 3, 1), normal(2, 2, 3, 4)
    w[1] = 0
    with pytest.warns(frfx.ConditionWarning, match="condition number inf"):
        found = reconstruct(lambda x, w: x * w, x, target, w=w)
    assert torch.equal(found[:, 1], x[:, 1])
    expected = minimal_affine_preimage(lambda x: x * w, x, target, rcond=1e-12)
    assert relative(found, expected) < 1e-13


REFUSED = {
    "both broadcast": (
        (ProductRule(), MUL, ((3, 1), (1, 4)), (3, 4)),
        "both of its operands are broadcast over the other",
    ),
    "another rank": (
        (ProductRule(), MUL, ((3,), (3, 4)), (3, 4)),
        "it broadcasts an activation to more dimensions, so its samples are not the result's",
    ),
    "broadcast numerator": (
        (QuotientRule(), DIV, ((3, 1), (3, 4)), (3, 4)),
        "its numerator is broadcast, so one numerator would have to give several quotients",
    ),
    "free denominator": (
        (QuotientRule(), op_of(vocabulary.div, *NAMES, held=("input",)), ((3,), (3,)), (3,)),
        "it divides by the activation, which is not affine",
    ),
    "rounding mode": (
        (QuotientRule(), op_of(vocabulary.div, *NAMES, rounding_mode="floor"), ((3,), (3,)), (3,)),
        "it rounds, so nothing can be told from its result",
    ),
    "other operands": (
        (ProductRule(), op_of(vocabulary.mul, "input", "out"), ((3,), (3,)), (3,)),
        "it is applied to node_input and node_out, not to two operands",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(case):
    (rule, op, inputs, output), reason = case
    assert rule.supports(op.with_shapes(inputs, output)) == reason


def test_batches_that_broadcast_are_found_when_it_runs():
    with pytest.raises(frfx.InputError, match=re.escape("(2, 1) and (1, 3), which are both")):
        ProductRule().build(MUL)(
            torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 1), torch.ones(1, 3)
        )


def test_an_unknown_gate():
    with pytest.raises(frfx.PolicyError, match="gate='shut' is none of 'free', 'held'"):
        ProductRule(gate="shut")
    held = frfx.policy.minimal().override(op=torch.mul, gate="held")
    assert str(held.rule_for(MUL)) == "ProductRule(gate=held)"
