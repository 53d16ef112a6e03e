"""Sums of two activations against the pseudo-inverse of their joint Jacobian."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frfx import vocabulary
from frfx.rules import SumRule
from tests.branches import answer, least_deviations, op_of
from tests.oracles import minimal_affine_preimage, normal, reconstruct, relative

SUMS = {
    "a + b": (vocabulary.add, 1, lambda a, b: a + b),
    "a + 3 b": (vocabulary.add, 3, lambda a, b: a + 3 * b),
    "a - b": (vocabulary.sub, 1, lambda a, b: a - b),
    "a - b/2": (vocabulary.sub, 0.5, lambda a, b: a - b / 2),
    "a": (vocabulary.add, 0, lambda a, b: a + 0 * b),
}
SHAPES = {
    "same": ((2, 3, 4), (2, 3, 4)),
    "b over the image": ((2, 3, 4), (2, 3, 1)),
    "a over the channels": ((2, 1, 4), (2, 3, 4)),
    "both": ((2, 1, 4), (2, 3, 1)),
    "b over the batch": ((2, 3, 4), (1, 3, 4)),
    "b without a batch": ((2, 3, 4), (4,)),
}


def check(sum_, shapes, seed, damping=0.0, held=()):
    """Compare one sum with dense linear algebra."""
    kind, alpha, function = sum_
    values = {name: normal(seed + i, *shapes[i]) for i, name in enumerate(NAMES)}
    output = function(*values.values())
    target = normal(seed + 2, *output.shape)
    op = op_of(kind, *NAMES, held=held, alpha=alpha)
    rule = SumRule(damping=damping or None)
    found = answer(rule, op, target, output, *values.values())
    free = [name for name in NAMES if name not in held]
    expected = least_deviations(
        lambda *parts: function(*(values | dict(zip(free, parts, strict=True))).values()),
        [values[name] for name in free],
        target,
        damping,
    )
    assert len(found) == len(free)
    for result, wanted, name in zip(found, expected, free, strict=True):
        assert result.shape == values[name].shape
        assert relative(result, wanted) < 1e-12


NAMES = ("input", "other")


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("sum_", SUMS.values(), ids=SUMS)
def test_sum_of_two(sum_, shapes):
    check(sum_, shapes, 0)
    check(sum_, shapes, 3, damping=0.3)
    check(sum_, shapes[::-1], 6)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("held", NAMES)
@pytest.mark.parametrize("sum_", list(SUMS.values())[:4], ids=list(SUMS)[:4])
def test_sum_with_one_held(sum_, held, shapes):
    check(sum_, shapes, 0, held=(held,))
    check(sum_, shapes, 3, damping=0.3, held=(held,))


@given(data=st.data(), shape=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_any_broadcasting(data, shape):
    def operand():
        kept = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
        fewer = data.draw(st.integers(0, len(shape)))
        return tuple(n if keep else 1 for n, keep in zip(shape, kept, strict=True))[fewer:]

    check(SUMS["a - b/2"], (operand(), operand()), data.draw(st.integers(0, 100)))


def test_small_copies_are_cut_off():
    a, b = normal(0, 2, 3, 4), normal(1, 2, 3, 1)
    target = normal(2, 2, 3, 4)
    # The squares of the singular values are 5 where the copies agree, and 1 elsewhere.
    found = answer(SumRule(rcond=0.5), op_of(vocabulary.add, *NAMES), target, a + b, a, b)
    mean = (target - a - b).mean(2, keepdim=True)
    assert relative(found[0], a + mean / 5) < 1e-14
    assert relative(found[1], b + 4 * mean / 5) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_forward_output_gives_the_inputs(dtype):
    a, b = normal(0, 2, 3, 4).to(dtype), normal(1, 2, 3, 1).to(dtype)
    found = answer(SumRule(), op_of(vocabulary.add, *NAMES), a + b, a + b, a, b)
    assert torch.equal(found[0], a)
    assert torch.equal(found[1], b)


def test_half_types_are_solved_in_single():
    a, b = normal(0, 2, 3).half(), normal(1, 2, 3).half()
    target = normal(2, 2, 3).float()
    for result in answer(SumRule(), op_of(vocabulary.add, *NAMES), target, a + b, a, b):
        assert result.dtype == torch.float32
    assert relative(result, b.double() + (target - (a + b)).double() / 2) < 1e-6


@pytest.mark.parametrize("alpha", [1, 2])
def test_operands_of_one_feature_share_what_they_give_it(alpha):
    """The mean of both answers is the solution for x + x; for x + alpha x it is none."""
    x, target = normal(0, 2, 3), normal(1, 2, 3)
    op = op_of(vocabulary.add, *NAMES, alpha=alpha)
    both = answer(SumRule(), op, target, x + alpha * x, x, x)
    expected = minimal_affine_preimage(lambda x: x + alpha * x, x, target)
    assert (relative(sum(both) / 2, expected) < 1e-14) == (alpha == 1)


COMPUTED = {
    "x + exp(w)": lambda x, w: x + w.exp(),
    "w.view - x": lambda x, w: w.view(3, 1) - x,
    "x - arange": lambda x, w: x - torch.arange(x.size(1), dtype=x.dtype)[:, None],
    "alpha": lambda x, w: torch.sub(w * w, x, alpha=2),
    "alpha of a size": lambda x, w: torch.sub(w, x, alpha=x.size(1)),
    "broadcast": lambda x, w: x + w.exp().expand(3, 4),
}


@pytest.mark.parametrize("function", COMPUTED.values(), ids=COMPUTED)
def test_what_the_graph_computes_is_a_shift(function):
    w = normal(2, 3, 1)
    x = normal(0, 2, 3, 1)
    target = normal(1, *function(x, w).shape)
    found = reconstruct(function, x, target, w=w)
    assert relative(found, minimal_affine_preimage(lambda x: function(x, w), x, target)) < 1e-13


@pytest.mark.parametrize("shape", [(3, 4), (1, 4)])
def test_a_broadcast_activation_takes_the_mean(shape):
    w, x, target = normal(0, *shape), normal(1, 2, 3, 1), normal(2, 2, 3, 4)
    expected = minimal_affine_preimage(lambda x: x + w, x, target)
    assert relative(reconstruct(lambda x, w: x + w, x, target, w=w), expected) < 1e-13


def test_an_op_of_other_operands_is_none():
    reason = SumRule().supports(op_of(vocabulary.add, "input", "alpha"))
    assert reason == "it is applied to node_input and node_alpha, not to two operands"
