"""Softmax and log-softmax: labels pass, distributions are met by the nearest logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quadprog import solve_qp
from scipy.optimize import minimize_scalar
from torch import nn
from torch.nn import functional as F

import frfx
from frfx import vocabulary
from frfx.rules import SoftmaxRule
from tests.bound_ops import bound, solve
from tests.oracles import normal, reconstruct

SOFTMAX = {
    "nn.Softmax": nn.Softmax(1),
    "F.softmax": lambda x: F.softmax(x, dim=1),
    "torch.softmax": lambda x: torch.softmax(x, -1),
    "x.softmax": lambda x: x.softmax(dim=1),
    "aten.softmax": lambda x: torch.ops.aten.softmax.int(x, 1),
}
LOG_SOFTMAX = {
    "nn.LogSoftmax": nn.LogSoftmax(1),
    "F.log_softmax": lambda x: F.log_softmax(x, dim=1),
    "torch.log_softmax": lambda x: torch.log_softmax(x, -1),
    "x.log_softmax": lambda x: x.log_softmax(dim=1),
    "aten.log_softmax": lambda x: torch.ops.aten.log_softmax.int(x, 1),
}
logit = st.floats(-6, 6)
saturated = st.sampled_from([-60.0, -20.0, 0.0, 15.0, 40.0])


@st.composite
def distributions(draw, entries=logit):
    """Draw logits and, as the softmax of others, a target with no small probability."""
    classes = draw(st.integers(2, 6))
    rows = st.lists(entries, min_size=classes, max_size=classes)
    others = st.lists(st.floats(-2, 2), min_size=classes, max_size=classes)
    x = torch.tensor([draw(rows)], dtype=torch.float64)
    return x, torch.tensor([draw(others)], dtype=torch.float64).softmax(1)


def nearest_distance(x, target):
    """Return the distance of x from the line `log p* + c`, by a scalar search for c."""
    line = np.log(target)
    guess = float((x - line).mean())
    found = minimize_scalar(
        lambda c: np.sum((line + c - x) ** 2), bracket=(guess - 3, guess + 2), tol=1e-12
    )
    return float(np.sqrt(found.fun))


@pytest.mark.parametrize("entries", [logit, saturated], ids=["moderate", "saturated"])
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@given(data=st.data())
def test_distributions_are_met_by_the_nearest_logits(log, entries, data):
    x, target = data.draw(distributions(entries))
    found = reconstruct(
        nn.LogSoftmax(1) if log else nn.Softmax(1), x, target.log() if log else target
    )
    np.testing.assert_allclose(found.softmax(1).numpy(), target.numpy(), rtol=1e-12)
    distance = np.linalg.norm((found - x).numpy())
    assert distance <= nearest_distance(x[0].numpy(), target[0].numpy()) + 1e-6


@pytest.mark.parametrize(
    "softmax", [*SOFTMAX.values(), *LOG_SOFTMAX.values()], ids=[*SOFTMAX, *LOG_SOFTMAX]
)
@given(row=st.lists(logit | saturated, min_size=4, max_size=4))
def test_fixed_point(softmax, row):
    x = torch.tensor([row], dtype=torch.float64)
    assert torch.equal(reconstruct(softmax, x, softmax(x)), x)


@pytest.mark.parametrize("softmax", SOFTMAX.values(), ids=SOFTMAX)
def test_softmax_spellings(softmax):
    x, target = normal(0, 3, 4), normal(1, 3, 4).softmax(1)
    torch.testing.assert_close(reconstruct(softmax, x, target).softmax(1), target)


@pytest.mark.parametrize("softmax", LOG_SOFTMAX.values(), ids=LOG_SOFTMAX)
def test_log_softmax_spellings(softmax):
    x, target = normal(0, 3, 4), normal(1, 3, 4).log_softmax(1)
    torch.testing.assert_close(reconstruct(softmax, x, target).log_softmax(1), target)


@pytest.mark.parametrize(
    ("softmax", "dim"),
    [(nn.Softmax2d(), 1), (nn.Softmax(2), 2), (nn.Softmax(-1), 3), (nn.LogSoftmax(-2), 2)],
    ids=str,
)
def test_images(softmax, dim):
    x, logits = normal(0, 2, 3, 2, 4), normal(1, 2, 3, 2, 4)
    found = reconstruct(softmax, x, softmax(logits))
    torch.testing.assert_close(softmax(found), softmax(logits))
    # The nearest of the preimages, which differ by constants along the classes.
    assert (found - x).mean(dim).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clamp_margin", [1e-3, 0.1])
def test_no_probability_is_lowered_below_the_margin(dtype, clamp_margin):
    x = torch.tensor([[1.0, 0, 0, 0.5], [0, 30, 0, -30]], dtype=dtype)
    target = torch.tensor([[0.0, 0.0, 0.25, 0.75], [0.4, 1e-12, 0.6, 0.0]], dtype=dtype)
    policy = frfx.policy.minimal(clamp_margin=clamp_margin)
    found = reconstruct(nn.Softmax(1), x, target, policy).softmax(1).double()
    floor = clamp_margin / 4
    raised = torch.tensor([[floor, floor, 0.25, 0.75], [0.4, floor, 0.6, 0.0]]).double()
    assert found[1, 3] < 1e-20  # it was as small before, and is wanted to be: it stays
    found[1, 3] = 0
    torch.testing.assert_close(found, raised / raised.sum(1, keepdim=True), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precisions(dtype):
    x, target = (4 * normal(0, 3, 5)).to(dtype), normal(1, 3, 5).softmax(1)
    found = reconstruct(nn.Softmax(1), x, target.to(dtype))
    assert found.dtype == dtype
    difference = found.double().softmax(1) - target.to(dtype).double()
    assert difference.abs().max() < 10 * torch.finfo(dtype).eps


@given(row=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6))
def test_a_target_that_is_no_distribution_is_met_as_nearly_as_can_be(row):
    target = torch.tensor([row], dtype=torch.float64)
    x = normal(0, 1, len(row))
    found = reconstruct(nn.Softmax(1), x, target, frfx.policy.minimal(clamp_margin=1e-9))
    count = len(row)
    nearest = solve_qp(  # the projection on the simplex
        np.eye(count),
        target[0].numpy(),
        np.vstack([np.ones(count), np.eye(count)]).T,
        np.array([1.0] + [0.0] * count),
        meq=1,
    )[0]
    np.testing.assert_allclose(found.softmax(1)[0].numpy(), nearest, atol=1e-8)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("size", [1e30, -1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_however_far_the_target(dtype, size, log):
    x, target = normal(0, 4, 5).to(dtype), normal(1, 4, 5).to(dtype) * size
    softmax = nn.LogSoftmax(1) if log else nn.Softmax(1)
    assert reconstruct(softmax, x, target).isfinite().all()


def test_masked_logits_stay_and_the_others_are_as_if_alone():
    x, target = normal(0, 2, 5), torch.zeros(2, 5, dtype=torch.float64)
    target[:, [0, 2, 4]] = normal(1, 2, 3).softmax(1)
    masked = x.clone()
    masked[:, [1, 3]] = -torch.inf
    op = bound(lambda x: F.softmax(x, 1), vocabulary.softmax, 1)
    found = solve(SoftmaxRule(), op, target, masked.softmax(1), masked)
    alone = [t[:, [0, 2, 4]] for t in (target, masked.softmax(1), masked)]
    assert (found[:, [1, 3]] == -torch.inf).all()
    # The least probability that is kept is a share of 1 / K.
    rule = SoftmaxRule(clamp_margin=1e-3 * 3 / 5)
    torch.testing.assert_close(found[:, [0, 2, 4]], solve(rule, op, *alone))
