"""Normalisation against the pseudo-inverse of its Jacobian, and against numerical optimisers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import null_space
from scipy.optimize import lsq_linear, minimize
from torch import nn
from torch.nn import functional as F

import frfx
from frfx.rules import NormalizationRule
from tests.oracles import Apply, invert, minimal_affine_preimage, normal, reconstruct, relative

seeds = st.integers(0, 2**31)
aten = torch.ops.aten

LAYERS = {
    "layer": (lambda: nn.LayerNorm(4), (4,)),
    "layer, two dimensions": (lambda: nn.LayerNorm((3, 2), eps=0.2), (4, 3, 2)),
    "layer, no bias": (lambda: nn.LayerNorm(3, bias=False), (2, 3)),
    "layer, plain": (lambda: nn.LayerNorm(5, elementwise_affine=False), (2, 5)),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "group, one": (lambda: nn.GroupNorm(1, 4, eps=0.2), (4, 3)),
    "group, all": (lambda: nn.GroupNorm(4, 4), (4, 3)),
    "group, plain": (lambda: nn.GroupNorm(2, 4, affine=False), (4,)),
    "instance, 1d": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 4)),
    "instance, 2d": (lambda: nn.InstanceNorm2d(2, affine=True, eps=0.2), (2, 2, 3)),
    "instance, 3d": (lambda: nn.InstanceNorm3d(2), (2, 2, 1, 3)),
    "RMS": (lambda: nn.RMSNorm(4), (3, 4)),
    "RMS, plain": (lambda: nn.RMSNorm((3, 2), eps=0.2, elementwise_affine=False), (3, 2)),
}


def layer_of(name, seed=0, dtype=torch.float64):
    """Return a layer with weights that were trained, and the shape that it takes."""
    make, shape = LAYERS[name]
    layer = make().double().eval().requires_grad_(False)
    for i, parameter in enumerate(layer.parameters()):
        parameter.copy_(normal(seed + i, *parameter.shape))
        parameter.add_(0.3 * parameter.sign())
    return layer.to(dtype), shape


def rows_of(layer, x):
    """Return `x` as the rows that are normalised together, and the way back."""
    if isinstance(layer, nn.GroupNorm):
        return x.reshape(len(x), layer.num_groups, -1)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return x.flatten(-len(layer.normalized_shape))
    return x.flatten(2)


def held(layer, x):
    """Return the affine map that the layer is with the mean and variance of x."""
    rows = rows_of(layer, x)
    mean = 0 if isinstance(layer, nn.RMSNorm) else rows.mean(-1, keepdim=True)
    eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
    std = ((rows - mean).square().mean(-1, keepdim=True) + eps).sqrt()
    weight = torch.ones_like(x) if layer.weight is None else layer.weight
    bias = torch.zeros_like(x) if getattr(layer, "bias", None) is None else layer.bias
    if not isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        weight, bias = (
            t if t.ndim == x.ndim else t.reshape(-1, *[1] * (x.ndim - 2)) for t in (weight, bias)
        )

    def function(z):
        return ((rows_of(layer, z) - mean) / std).reshape(x.shape) * weight + bias

    assert relative(function(x), layer(x)) < 1e-12
    return function


@pytest.mark.filterwarnings("error::frfx.ConditionWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_statistics_of_the_forward_pass(name):
    layer, shape = layer_of(name)
    x, target = normal(4, 2, *shape), normal(5, 2, *shape)
    found = reconstruct(layer, x, target)
    for i in range(2):  # sample by sample: none depends on another
        one, wanted = x[i : i + 1], target[i : i + 1]
        expected = minimal_affine_preimage(held(layer, one), one, wanted)
        assert relative(found[i : i + 1], expected) < 1e-11
    assert torch.equal(reconstruct(layer, x, layer(x)), x)


@given(
    name=st.sampled_from(sorted(LAYERS)),
    seed=seeds,
    size=st.sampled_from([1e-6, 1e-3, 1.0, 1e4]),
    damping=st.sampled_from([0.0, 1e-3, 0.5]),
    rcond=st.sampled_from([None, 0.3]),
)
@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
def test_damping_and_cutoff(name, seed, size, damping, rcond):
    """As for the dense Jacobian of one sample, whatever the scale of its input is."""
    layer, shape = layer_of(name, seed)
    x, target = size * normal(seed + 4, 1, *shape), normal(seed + 5, 1, *shape)
    found = reconstruct(layer, x, target, frfx.policy.minimal(damping=damping, rcond=rcond))
    jacobian = torch.autograd.functional.jacobian(held(layer, x), x).reshape(x.numel(), -1).numpy()
    left, singular, right = np.linalg.svd(jacobian)
    cutoff = 1e-12 if rcond is None else rcond
    if (abs(singular / singular[0] / cutoff - 1) < 1e-6).any():
        return  # at the cutoff itself, rounding decides
    kept = singular > cutoff * singular[0]
    weight = np.where(kept, singular / (singular**2 + damping * singular[0] ** 2), 0)
    step = right.T @ (weight * (left.T @ (target - layer(x)).numpy().ravel()))
    assert relative(found, x.numpy() + step.reshape(x.shape)) < 1e-9


@pytest.mark.parametrize("statistics", ["forward", "free"])
@pytest.mark.parametrize("name", ["layer", "group", "instance, 2d", "RMS"])
def test_weights_of_zero(name, statistics):
    layer, shape = layer_of(name)
    layer.weight[1] = 0
    x, target = normal(4, 2, *shape), normal(5, 2, *shape)
    inverse = invert(layer, policy_for(statistics))
    with pytest.warns(frfx.ConditionWarning, match="condition number inf"):
        found = inverse(x, target)
    assert torch.isfinite(found).all()
    hidden = torch.zeros(shape, dtype=torch.bool)
    by_entry = isinstance(layer, (nn.LayerNorm, nn.RMSNorm))
    hidden[(..., 1) if by_entry else 1] = True
    # What the target says where the weight is zero makes no difference.
    other = torch.where(hidden, 99.0, target)
    assert torch.equal(inverse(x, other), found)
    if statistics == "forward":
        assert torch.equal(found[:, hidden], x[:, hidden])
        assert relative(held(layer, x)(found)[:, ~hidden], target[:, ~hidden]) < 1e-12


def policy_for(statistics, **options):
    """Return the minimal policy with a choice of statistics for every normalisation."""
    policy = frfx.policy.minimal(**options)
    for op in (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d, nn.RMSNorm):
        policy = policy.override(op=op, statistics=statistics)
    return policy


def free(function, x, target):
    """Return the reconstruction with free statistics."""
    return reconstruct(function, x, target, policy_for("free"))


def nearest(function, x, start, constraints):
    """Return the nearest input that meets the constraints, by SLSQP."""
    flat = x.numpy().ravel()
    found = minimize(
        lambda z: ((z - flat) ** 2).sum(),
        start.numpy().ravel(),
        jac=lambda z: 2 * (z - flat),
        constraints=constraints,
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-15},
    )
    assert found.success, found.message
    return found.x.reshape(x.shape)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "RMS"])
def test_free_statistics_reach_what_can_be_reached(centred, seed):
    """With eps, the nearest input of those that give the target, by SLSQP."""
    size, eps = 5, 0.3
    norm = F.layer_norm if centred else F.rms_norm

    def function(x):
        return norm(x, (size,), eps=eps)

    x, other = normal(seed, 1, size), normal(seed + 9, 1, size)
    target = function(other)
    basis = null_space(np.ones((1, size))) if centred else np.eye(size)

    def missed(z):
        return basis.T @ (function(torch.from_numpy(z)[None]) - target).numpy()[0]

    def slopes(z):
        point = torch.from_numpy(z)[None]
        return basis.T @ torch.autograd.functional.jacobian(function, point)[0, :, 0].numpy()

    expected = nearest(function, x, other, [{"type": "eq", "fun": missed, "jac": slopes}])
    found = free(function, x, target)
    assert relative(found, expected) < 1e-5
    assert relative(function(found), target) < 1e-12


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "RMS"])
def test_free_statistics_without_eps_are_the_minimal_deviation(centred, seed):
    """Of all inputs that are normalised to the target, the nearest, by SLSQP."""
    size = 5
    norm = F.layer_norm if centred else F.rms_norm

    def function(x):
        return norm(x, (size,), eps=1e-300)

    x = normal(seed, 1, size)
    near = x + 0.3 * normal(seed + 9, 1, size)
    target = function(near)
    fixed = [target.numpy()[0]] + ([np.ones(size)] if centred else [])
    tangent = null_space(np.stack(fixed))  # n(x) can deviate from the target along these

    def value(z):
        return function(torch.from_numpy(z)[None]).numpy()[0]

    expected = nearest(
        function,
        x,
        near,
        [
            {"type": "eq", "fun": lambda z: tangent.T @ value(z)},
            {"type": "ineq", "fun": lambda z: value(z) @ target.numpy()[0]},
        ],
    )
    found = free(function, x, target)
    assert relative(found, expected) < 1e-5
    assert relative(function(found), target) < 1e-12


@given(name=st.sampled_from(sorted(LAYERS)), seed=seeds)
def test_targets_out_of_reach_give_the_nearest_row_of_their_direction(name, seed):
    """`mu 1 + sigma v` with sigma >= 0, row by row, by a bounded least-squares solver."""
    layer, shape = layer_of(name, seed)
    x, target = normal(seed + 4, 1, *shape), 3 * layer(normal(seed + 5, 1, *shape))
    found = free(layer, x, target)
    # What the layer would have to give without weights and bias.
    function = held(layer, x)
    base, unit = function(torch.zeros_like(x)), function(torch.ones_like(x))
    rows = rows_of(layer, x)
    centred = not isinstance(layer, nn.RMSNorm)
    mean = rows.mean(-1, keepdim=True) if centred else torch.zeros_like(rows[..., :1])
    eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
    std = ((rows - mean).square().mean(-1, keepdim=True) + eps).sqrt()
    held_at = ((target - base) / (unit - base)).reshape(x.shape)  # the affine map undone
    wanted = (rows_of(layer, held_at) - mean) / std
    flat = [values.flatten(0, -2) for values in (rows, wanted, rows_of(layer, found))]
    for row, v, out in zip(*flat, strict=True):
        direction = v - v.mean() if centred else v
        if direction.square().mean() < 1:
            continue  # reached: tested below
        columns = [direction, *([torch.ones_like(v)] if centred else [])]
        lower = [0.0, *([-np.inf] if centred else [])]
        matrix = torch.stack(columns, 1).numpy()
        best = lsq_linear(matrix, row.numpy(), (lower, np.inf), tol=1e-14)
        assert np.abs(out.numpy() - matrix @ best.x).max() < 1e-6


@given(name=st.sampled_from(sorted(LAYERS)), seed=seeds)
def test_free_statistics_reach_the_range(name, seed):
    layer, shape = layer_of(name, seed)
    x, other = normal(seed + 4, 2, *shape), normal(seed + 5, 2, *shape)
    target = layer(other)
    found = free(layer, x, target)
    assert relative(layer(found), target) < 1e-6
    assert torch.equal(free(layer, x, layer(x)), x)


@pytest.mark.parametrize("statistics", ["forward", "free"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_degenerate_rows(statistics, dtype, eps):
    def function(x):
        return F.layer_norm(x, (4,), eps=eps)

    x = normal(0, 3, 4, dtype=dtype)
    target = normal(1, 3, 4, dtype=dtype)
    if eps:
        x[0] = 2.5  # constant: it points nowhere
        assert torch.equal(reconstruct(function, x, target, policy_for("free"))[0], x[0])
    target[1] = 7.0  # no direction but that of the mean
    found = reconstruct(function, x, target, policy_for(statistics))
    assert torch.isfinite(found).all()
    if statistics == "free":
        assert torch.equal(found[1], x[1])
        # Only constants are normalised to zero, and only eps lets them be.
        zero = reconstruct(function, x, torch.zeros_like(x), policy_for("free"))
        if eps:
            assert relative(zero, x.mean(1, keepdim=True).expand(3, 4)) < 1e-5
        else:
            assert torch.equal(zero, x)


def test_the_other_side_is_the_end_of_the_ray():
    """A target opposite to the forward row: constant is the nearest that does not oppose it."""
    x = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    found = free(lambda x: F.layer_norm(x, (3,)), x, -2 * F.layer_norm(x, (3,)))
    assert relative(found, torch.full_like(x, 7 / 3)) < 1e-15


def test_a_target_on_the_edge_of_reach_does_not_blow_up():
    """In single, 1 - r of an ordinary target is rounding: the projection's scale is kept."""
    layer = nn.LayerNorm(64, elementwise_affine=False)
    x = 100 * normal(0, 8, 64).float()
    near = x + 10 * normal(1, 8, 64).float()
    found = free(layer, x, layer(near))
    assert (found - x).norm() <= 1.001 * (near - x).norm()
    assert relative(layer(found), layer(near)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("statistics", ["forward", "free"])
@pytest.mark.parametrize("name", ["layer", "group", "instance, 2d", "RMS"])
def test_precisions(name, statistics, dtype):
    layer, shape = layer_of(name, dtype=dtype)
    x, target = normal(4, 3, *shape, dtype=dtype), normal(5, 3, *shape, dtype=dtype)
    model = nn.Sequential(nn.Identity(), layer).eval()
    inverse = frfx.invert(model, "input", policy=policy_for(statistics))
    found = inverse.reconstruct(x, target)["0"].target
    assert found.dtype == torch.float32
    assert inverse(x, target).dtype == dtype
    if statistics == "free":
        return
    double = layer.double()
    double.eps = double.eps or torch.finfo(torch.float32).eps
    expected = np.concatenate(
        [
            minimal_affine_preimage(held(double, x[i : i + 1].double()), x[i : i + 1], t[None])
            for i, t in enumerate(target)
        ]
    )
    assert relative(found, expected) < 8 * torch.finfo(dtype).eps


PARAMETERS = {"w": normal(1, 4) + 2, "b": normal(2, 4)}
SPELLINGS = {
    "F.layer_norm": lambda x, w, b: F.layer_norm(x, (4,), w, b),
    "F.layer_norm, keywords": lambda x, w, b: F.layer_norm(input=x, normalized_shape=[4], bias=b),
    "torch.layer_norm": lambda x, w, b: torch.layer_norm(x, (4,), w, b, 0.1, False),
    "aten.layer_norm": lambda x, w, b: aten.layer_norm.default(x, [4], w, b, 0.1, False),
    "F.group_norm": lambda x, w, b: F.group_norm(x, 2, w, b, eps=0.1),
    "torch.group_norm": lambda x, w, b: torch.group_norm(x, 2, w, b, 0.1, False),
    "aten.group_norm": lambda x, w, b: aten.group_norm.default(x, 2, w, b),
    "F.instance_norm": lambda x, w, b: F.instance_norm(x, weight=w, bias=b, eps=0.1),
    "torch.instance_norm": lambda x, w, b: torch.instance_norm(
        x, w, b, None, None, True, 0.1, 1e-5, False
    ),
    "aten.instance_norm": lambda x, w, b: aten.instance_norm.default(
        x, w, b, None, None, True, 0.1, 0.3, False
    ),
    "F.rms_norm": lambda x, w, b: F.rms_norm(x, (4,), w, 0.1),
    "torch.rms_norm": lambda x, w, b: torch.rms_norm(x, (4,), w),
    "aten.rms_norm": lambda x, w, b: aten.rms_norm.default(x, [4], w),
}


@pytest.mark.parametrize("function", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(function):
    """As the module of the same arguments; that is tested above."""
    x, target = normal(3, 2, 4, 4), normal(4, 2, 4, 4)
    w, b = PARAMETERS["w"], PARAMETERS["b"]
    found = reconstruct(function, x, target, w=w, b=b)
    # A step along the reconstruction, the statistics held by hand: what the scale must have been.
    scale = (target - function(x, w, b)) / (found - x)
    shift = torch.autograd.functional.jacobian(lambda z: function(z, w, b), x).reshape(32, 32)
    # The Jacobian of y = w n(x) is diag(scale) but for what moves mean and variance.
    moved = torch.diag(scale.flatten()) - shift
    for i in range(2):
        block = moved.reshape(2, 16, 2, 16)[i, :, i]
        rows = 4 if "group" not in str(function.__code__.co_names) else 2
        assert np.linalg.matrix_rank(block.numpy(), tol=1e-9) <= 2 * rows
        assert not np.allclose(block, 0)


@pytest.mark.parametrize("spelling", ["module", "function", "aten"])
def test_instance_norm_by_running_statistics(spelling):
    layer = nn.InstanceNorm2d(4, affine=True, track_running_stats=True).double().eval()
    layer.requires_grad_(False)
    layer.running_mean.copy_(normal(0, 4))
    layer.running_var.copy_(normal(1, 4).exp())
    layer.weight.copy_(normal(2, 4))
    tensors = {"m": layer.running_mean, "v": layer.running_var, "w": layer.weight, "b": layer.bias}
    functions = {
        "module": layer,
        "function": lambda x, m, v, w, b: F.instance_norm(x, m, v, w, b, use_input_stats=False),
        "aten": lambda x, m, v, w, b: aten.instance_norm.default(
            x, w, b, m, v, False, 0.1, 1e-5, False
        ),
    }
    x, target = normal(4, 2, 4, 2, 3), normal(5, 2, 4, 2, 3)
    given = {} if spelling == "module" else tensors
    found = reconstruct(functions[spelling], x, target, **given)
    assert relative(found, minimal_affine_preimage(layer, x, target)) < 1e-11


class Sized(nn.Module):
    """Looks at the sizes, as torch.export can follow and symbolic tracing cannot."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) if min(x.shape) > 0 else x


@pytest.mark.parametrize("statistics", ["forward", "free"])
@pytest.mark.parametrize(
    "norm",
    [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm(3), nn.RMSNorm((3, 3))],
    ids=repr,
)
def test_in_networks_by_both_tracers(norm, statistics):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.Tanh(), norm, nn.Flatten(), nn.Linear(36, 3)]
    model = nn.Sequential(*layers).double().eval().requires_grad_(False)
    x, y = normal(0, 4, 1, 5, 5), torch.arange(4) % 3
    policy = policy_for(statistics)
    plain = frfx.invert(model, "1", policy=policy).reconstruct(x, y)
    wanted = plain["2"].target
    if statistics == "forward":
        for i in range(4):
            one = plain["1"].forward[i : i + 1]
            expected = minimal_affine_preimage(held(norm, one), one, wanted[i : i + 1])
            assert relative(plain.feature[i : i + 1], expected) < 1e-10
    exported = frfx.invert(Sized(model).eval(), "model.1", example_input=x, policy=policy)
    assert exported.traced.front_end == "torch.export"
    assert relative(exported(x, y), plain.feature) < 1e-12


@pytest.mark.parametrize("statistics", ["forward", "free"])
def test_compiled(statistics):
    model = nn.Sequential(nn.Identity(), nn.GroupNorm(2, 4), nn.LayerNorm(3)).eval()
    inverse = frfx.invert(model, "0", policy=policy_for(statistics))
    fast = torch.compile(inverse, backend="aot_eager")
    x, target = normal(0, 2, 4, 3).float(), normal(1, 2, 4, 3).float()
    torch.testing.assert_close(fast(x, target), inverse(x, target))


def test_weights_that_change_are_noticed():
    layer, shape = layer_of("group")
    inverse = frfx.invert(Apply(layer), "x")
    x, target = normal(4, 1, *shape), normal(5, 1, *shape)
    inverse(x, target)
    layer.weight.mul_(2)
    assert relative(inverse(x, target), minimal_affine_preimage(held(layer, x), x, target)) < 1e-11


def test_statistics_are_one_of_two():
    with pytest.raises(frfx.PolicyError, match=r"statistics='batch' is none of 'forward', 'free'"):
        NormalizationRule(statistics="batch")
    policy = frfx.policy.minimal().override(op=nn.LayerNorm, statistics="none")
    with pytest.raises(frfx.PolicyError, match="statistics='none' is none of"):
        frfx.invert(nn.Sequential(nn.LayerNorm(3)), "input", policy=policy)
