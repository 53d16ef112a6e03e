"""The linear rule, compiled by `frfx.invert`, against a dense oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import frfx
from tests.oracles import damped_least_squares, invert, jacobian, normal, reconstruct, relative

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 7)


def linear(weight, bias=True):
    """Return a linear layer of this weight, with a bias that should not matter."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias:
            layer.bias.copy_(torch.linspace(-2, 2, len(weight)))
    return layer.requires_grad_(False)


def by_lstsq(layer, x, target, rcond=None):
    """Return `x + lstsq(W, z* - z)`, with W as the Jacobian of the layer on one sample."""
    layer = linear(layer.weight.double(), layer.bias is not None)
    matrix = jacobian(layer, torch.zeros(x.shape[-1]))
    residual = (target.double() - layer(x.double())).reshape(-1, len(matrix)).numpy()
    step = np.linalg.lstsq(matrix, residual.T, rcond=rcond)[0].T
    return x.double().numpy() + step.reshape(x.shape)


@pytest.mark.filterwarnings("error::frfx.ConditionWarning")
@given(
    seed=seeds, m=sizes, n=sizes, leading=st.sampled_from([(1,), (4,), (2, 3)]), bias=st.booleans()
)
def test_equals_lstsq(seed, m, n, leading, bias):
    layer = linear(normal(seed, m, n), bias)
    x, target = normal(seed + 1, *leading, n), normal(seed + 2, *leading, m)
    found = reconstruct(layer, x, target)
    condition = np.linalg.cond(layer.weight.numpy())
    assert relative(found, by_lstsq(layer, x, target)) < 1e-13 * condition + 1e-12


@pytest.mark.parametrize("shape", [(3, 6), (6, 3), (5, 5)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("policy", ["paper", "minimal"])
def test_single_precision(shape, policy):
    layer = linear((normal(0, *shape) / 4 + torch.eye(*shape)).float())
    x, target = normal(1, 4, shape[1]).float(), normal(2, 4, shape[0]).float()
    found = reconstruct(layer, x, target, policy)
    assert found.dtype == torch.float32
    assert relative(found, by_lstsq(layer, x, target)) < 2e-6


@given(seed=seeds, n=st.integers(2, 7), extra=st.integers(0, 4))
def test_a_wide_layer_gives_the_target_exactly_and_the_shortest_way(seed, n, extra):
    layer = linear(normal(seed, n, n + extra))
    x, target = normal(seed + 1, 3, n + extra), normal(seed + 2, 3, n)
    found = reconstruct(layer, x, target)
    condition = np.linalg.cond(layer.weight.numpy())
    assert relative(layer(found), target) < 1e-13 * condition + 1e-12
    # The deviation is orthogonal to every direction that the layer does not see.
    blind = np.linalg.svd(layer.weight.numpy())[2][n:]
    assert np.abs((found - x).numpy() @ blind.T).max(initial=0) < 1e-12 * condition


@given(seed=seeds, n=sizes, extra=st.integers(0, 4))
def test_a_tall_layer_leaves_no_residual_that_it_could_reduce(seed, n, extra):
    layer = linear(normal(seed, n + extra, n))
    x, target = normal(seed + 1, 3, n), normal(seed + 2, 3, n + extra)
    residual = target - layer(reconstruct(layer, x, target))
    condition = np.linalg.cond(layer.weight.numpy())
    assert relative(residual @ layer.weight, np.zeros((3, n))) < 1e-12 * condition


@given(seed=seeds, m=sizes, n=sizes)
def test_fixed_point(seed, m, n):
    layer, x = linear(normal(seed, m, n)), normal(seed + 1, 3, n)
    assert torch.equal(reconstruct(layer, x, layer(x)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("rank", [1, 3])
def test_rank_deficient(dtype, shape, rank):
    weight = (normal(0, shape[0], rank) @ normal(1, rank, shape[1])).to(dtype)
    layer = linear(weight)
    x, target = normal(2, 4, shape[1], dtype=dtype), normal(3, 4, shape[0], dtype=dtype)
    with pytest.warns(frfx.ConditionWarning, match="function .*rank-deficient.*condition number"):
        found = reconstruct(layer, x, target)
    cutoff = 1e-6 if dtype == torch.float32 else 1e-12
    expected = by_lstsq(layer, x, target, rcond=cutoff)
    assert relative(found, expected) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_zero_weights_leave_the_input(dtype, shape):
    layer = linear(torch.zeros(shape, dtype=dtype))
    x, target = normal(0, 4, shape[1], dtype=dtype), normal(1, 4, shape[0], dtype=dtype)
    with pytest.warns(frfx.ConditionWarning, match="condition number inf"):
        assert torch.equal(reconstruct(layer, x, target), x)


@pytest.mark.filterwarnings("error::frfx.ConditionWarning")
@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_scaled_weights(scale, dtype, shape):
    layer = linear(((normal(0, *shape) / 4 + torch.eye(*shape)) * scale).to(dtype), bias=False)
    x = normal(1, 4, shape[1]).to(dtype)
    target = layer(x) + scale * normal(2, 4, shape[0]).to(dtype)
    expected = by_lstsq(layer, x, target)
    assert relative(reconstruct(layer, x, target), expected) < 10 * np.finfo(str(dtype)[6:]).eps * 4


@pytest.mark.filterwarnings("error::frfx.ConditionWarning")
@given(seed=seeds, exponents=st.lists(st.integers(-4, 4), min_size=4, max_size=4))
def test_badly_scaled_rows(seed, exponents):
    rows = 10.0 ** torch.tensor(exponents, dtype=torch.float64)
    layer = linear(rows[:, None] * (normal(seed, 4, 6) + 3 * torch.eye(4, 6)), bias=False)
    x = normal(seed + 1, 2, 6)
    target = layer(x) + rows * normal(seed + 2, 2, 4)
    assert relative(reconstruct(layer, x, target), by_lstsq(layer, x, target)) < 1e-7


@given(seed=seeds, m=sizes, n=sizes, damping=st.floats(1e-4, 10))
def test_damping(seed, m, n, damping):
    layer = linear(normal(seed, m, n))
    x, target = normal(seed + 1, 3, n), normal(seed + 2, 3, m)
    found = reconstruct(layer, x, target, frfx.policy.minimal(damping=damping))
    residual = (target - layer(x)).numpy()
    step = damped_least_squares(layer.weight.numpy(), residual.T, damping).T
    assert relative(found, x.numpy() + step) < 1e-10


@given(seed=seeds, rcond=st.sampled_from([0.05, 0.2, 0.5]))
def test_rcond(seed, rcond):
    layer = linear(normal(seed, 5, 6))
    singular = np.linalg.svd(layer.weight.numpy(), compute_uv=False)
    x, target = normal(seed + 1, 3, 6), normal(seed + 2, 3, 5)
    inverse = invert(layer, frfx.policy.minimal(rcond=rcond))
    if singular.min() <= rcond * singular.max():
        with pytest.warns(frfx.ConditionWarning):
            found = inverse(x, target)
    else:
        found = inverse(x, target)
    assert relative(found, by_lstsq(layer, x, target, rcond)) < 1e-11


def test_the_summary_tells_the_condition_number():
    layer = linear(normal(0, 4, 6))
    inverse = invert(layer)
    inverse(normal(1, 2, 6), normal(2, 2, 4))
    row = next(row for row in inverse.summary() if row.op == "linear")
    assert row.condition == pytest.approx(np.linalg.cond(layer.weight.numpy()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_networks_are_solved_in_single(dtype):
    layer = linear((normal(0, 3, 5) / 4 + torch.eye(3, 5)).to(dtype))
    x, target = normal(1, 4, 5).to(dtype), normal(2, 4, 3).to(dtype)
    found = reconstruct(layer, x, target)
    assert found.dtype == dtype
    # Only the rounding of the forward output and of the result to the half type is seen.
    assert relative(found.double(), by_lstsq(layer, x, target)) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x, w, b: F.linear(x, w, b),
        lambda x, w, b: F.linear(input=x, weight=w) + b,
        lambda x, w, b: torch.ops.aten.linear.default(x, w, b),
    ],
    ids=["F.linear", "keywords", "aten"],
)
def test_spellings(spelling):
    weight, bias = normal(0, 3, 5), normal(1, 3)
    x, target = normal(2, 4, 5), normal(3, 4, 3)
    found = reconstruct(spelling, x, target, w=weight, b=bias)
    residual = target.numpy() - (x.numpy() @ weight.numpy().T + bias.numpy())
    assert relative(found, x.numpy() + residual @ np.linalg.pinv(weight.numpy()).T) < 1e-13


def test_solvers_by_name():
    layer = linear(normal(0, 4, 6) / 4 + torch.eye(4, 6))
    x, target = normal(1, 3, 6), normal(2, 3, 4)
    for solver, why in {"auto": "a matrix", "dense": "as asked", "iterative": "as asked"}.items():
        policy = frfx.policy.minimal().override(
            op=nn.Linear, solver=solver, tolerance=1e-10, max_steps=100
        )
        inverse = invert(layer, policy)
        assert relative(inverse(x, target), by_lstsq(layer, x, target)) < 1e-8
        row = next(row for row in inverse.summary() if row.op == "linear")
        assert row.solver == ("dense" if solver == "auto" else solver)
        assert row.reason == why


@pytest.mark.parametrize("leading", [(4,), (2, 3), (2, 1, 3)])
def test_the_iterative_solver_takes_any_leading_dimensions(leading):
    layer = linear(normal(0, 4, 6) / 4 + torch.eye(4, 6))
    x, target = normal(1, *leading, 6), normal(2, *leading, 4)
    policy = frfx.policy.minimal().override(
        op=nn.Linear, solver="iterative", tolerance=1e-10, max_steps=100
    )
    assert relative(reconstruct(layer, x, target, policy), by_lstsq(layer, x, target)) < 1e-8


def test_a_linear_layer_has_no_spectrum_over_frequencies():
    policy = frfx.policy.minimal().override(op=nn.Linear, solver="spectral")
    with pytest.raises(frfx.UnsupportedOpsError, match="no spectrum over frequencies"):
        invert(linear(normal(0, 4, 6)), policy)


@pytest.mark.parametrize("shape", [(256, 600), (600, 256)], ids=["wide", "tall"])
@pytest.mark.parametrize("spread", [0.5, 2.5], ids=["well", "ill"])
def test_long_layers_in_single_precision(shape, spread):
    left, _, right = torch.linalg.svd(normal(0, *shape), full_matrices=False)
    singular = 10 ** torch.linspace(0, -spread, 256, dtype=torch.float64)
    layer = linear(((left * singular) @ right).float())
    x, target = normal(1, 3, shape[1]).float(), normal(2, 3, shape[0]).float()
    found = reconstruct(layer, x, target)
    assert relative(found, by_lstsq(layer, x, target)) < 2e-6 * 10**spread


def test_an_iteration_that_has_not_converged_is_told():
    layer = linear(normal(0, 40, 40))
    policy = frfx.policy.minimal().override(
        op=nn.Linear, solver="iterative", max_steps=2, unconverged="raise"
    )
    with pytest.raises(frfx.ConvergenceError, match="left 3 of 3 samples above its tolerance"):
        reconstruct(layer, normal(1, 3, 40), normal(2, 3, 40), policy)


def test_a_rule_shows_the_options_that_are_not_the_default():
    rules = frfx.rules
    assert str(rules.LinearRule()) == "LinearRule"
    assert str(rules.LinearRule(rcond=1e-3, damping=0.1)) == "LinearRule(rcond=0.001, damping=0.1)"
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    policy = frfx.policy.minimal(clamp_margin=0.01, damping=0.5)
    assert [row.rule for row in frfx.invert(model, "1", policy=policy).summary()] == [
        "NearestEmbeddingRule(label_margin=0.5)",
        "LinearRule(damping=0.5)",
        "ElementwiseRule(tanh, clamp_margin=0.01)",
    ]
