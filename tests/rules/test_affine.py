"""Batch norm and scalar arithmetic against the pseudo-inverse of their Jacobians."""

from __future__ import annotations

import operator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import frfx
from tests.oracles import damped_least_squares, invert, minimal_affine_preimage, normal, relative
from tests.oracles import reconstruct as rebuild

seeds = st.integers(0, 2**31)

BATCH_NORM = {
    nn.BatchNorm1d: [(4,), (4, 3)],
    nn.BatchNorm2d: [(4, 2, 3)],
    nn.BatchNorm3d: [(4, 2, 1, 2)],
}
CASES = [(kind, shape) for kind, shapes in BATCH_NORM.items() for shape in shapes]


def batch_norm(kind, seed, affine=True, eps=1e-5):
    """Return a batch norm over four channels, with statistics and weights that were trained."""
    layer = kind(4, affine=affine, eps=eps).double().eval().requires_grad_(False)
    layer.running_mean.copy_(normal(seed, 4))
    layer.running_var.copy_(normal(seed + 1, 4).exp())
    if affine:
        layer.weight.copy_(normal(seed + 2, 4) + 0.1)
        layer.bias.copy_(normal(seed + 3, 4))
    return layer


@pytest.mark.filterwarnings("error::frfx.ConditionWarning")
@pytest.mark.parametrize(("kind", "shape"), CASES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_batch_norm(kind, shape, affine, eps):
    layer = batch_norm(kind, 0, affine, eps)
    x, target = normal(4, 2, *shape), normal(5, 2, *shape)
    found = rebuild(layer, x, target)
    assert relative(found, minimal_affine_preimage(layer, x, target)) < 1e-11
    assert relative(layer(found), target) < 1e-11
    assert torch.equal(rebuild(layer, x, layer(x)), x)


@given(seed=seeds)
def test_batch_norm_of_any_values(seed):
    layer = batch_norm(nn.BatchNorm2d, seed)
    x, target = normal(seed + 4, 2, 4, 2, 2), normal(seed + 5, 2, 4, 2, 2)
    found = rebuild(layer, x, target)
    assert relative(found, minimal_affine_preimage(layer, x, target, rcond=1e-14)) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_channel_of_scale_zero_keeps_its_values(dtype):
    layer = batch_norm(nn.BatchNorm2d, 0)
    layer.weight[2] = 0
    layer = layer.to(dtype)
    x, target = normal(4, 2, 4, 2, 3, dtype=dtype), normal(5, 2, 4, 2, 3, dtype=dtype)
    with pytest.warns(frfx.ConditionWarning, match="condition number inf"):
        found = rebuild(layer, x, target)
    expected = minimal_affine_preimage(layer.double(), x, target, rcond=1e-12)
    assert torch.equal(found[:, 2], x[:, 2])
    assert relative(found, expected) < 100 * torch.finfo(dtype).eps


def test_damped_batch_norm():
    layer = batch_norm(nn.BatchNorm2d, 0)
    x, target = normal(4, 1, 4, 2, 3), normal(5, 1, 4, 2, 3)
    found = rebuild(layer, x, target, frfx.policy.minimal(damping=0.3))
    scale = (layer.weight / (layer.running_var + layer.eps).sqrt()).repeat_interleave(6)
    residual = (target - layer(x)).ravel().numpy()
    step = damped_least_squares(np.diag(scale.numpy()), residual, 0.3)
    assert relative(found, x.numpy() + step.reshape(x.shape)) < 1e-12


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b),
        lambda x, m, v, w, b: F.batch_norm(x, m, v, weight=w, bias=b, training=False, eps=1e-5),
    ],
)
def test_functional_batch_norm(spelling):
    layer = batch_norm(nn.BatchNorm2d, 0)
    x, target = normal(4, 2, 4, 2, 3), normal(5, 2, 4, 2, 3)
    tensors = {"m": layer.running_mean, "v": layer.running_var, "w": layer.weight, "b": layer.bias}
    found = rebuild(spelling, x, target, **tensors)
    assert relative(found, minimal_affine_preimage(layer, x, target)) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_of_a_half_network(dtype):
    layer = batch_norm(nn.BatchNorm2d, 0).to(dtype)
    x, target = normal(4, 2, 4, 2, 3).to(dtype), normal(5, 2, 4, 2, 3).to(dtype)
    found = rebuild(layer, x, target)
    assert found.dtype == dtype
    expected = minimal_affine_preimage(layer.double(), x, target)
    assert relative(found.double(), expected) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["batch norm", "division"])
def test_scales_of_a_half_network_are_not_rounded(kind, dtype):
    layer = batch_norm(nn.BatchNorm2d, 0)
    if kind == "division":
        layer = Divided(layer.running_var[:, None, None])
    layer = layer.to(dtype)
    x, target = normal(4, 2, 4, 2, 3).to(dtype), (1e3 * normal(5, 2, 4, 2, 3)).to(dtype)
    # In front of another node the preimage is still in single.
    inverse = frfx.invert(nn.Sequential(nn.Identity(), layer).eval(), "input")
    found = inverse.reconstruct(x, target)["0"].target
    expected = minimal_affine_preimage(layer.double(), x, target)
    assert relative(found.double(), expected) < 0.02 * torch.finfo(dtype).eps


class Divided(nn.Module):
    def __init__(self, divisor):
        super().__init__()
        self.register_buffer("divisor", divisor)

    def forward(self, x):
        return x / self.divisor


ARITHMETIC = {
    "x + 3": lambda x: x + 3,
    "3 + x": lambda x: 3 + x,
    "torch.add(x, 3, alpha=2)": lambda x: torch.add(x, 3, alpha=2),
    "x.add(3)": lambda x: x.add(3),
    "aten.add": lambda x: torch.ops.aten.add.Scalar(x, 3),
    "x - 3": lambda x: x - 3,
    "3 - x": lambda x: 3 - x,
    "torch.sub(x, 3, alpha=2)": lambda x: torch.sub(x, 3, alpha=2),
    "torch.subtract": lambda x: torch.subtract(x, 3),
    "x.sub(3)": lambda x: x.sub(3),
    "torch.rsub(x, 3)": lambda x: torch.rsub(x, 3),
    "torch.rsub(x, 3, alpha=2)": lambda x: torch.rsub(x, 3, alpha=2),
    "aten.rsub": lambda x: torch.ops.aten.rsub.Scalar(x, 3),
    "x * -2.5": lambda x: x * -2.5,
    "-2.5 * x": lambda x: -2.5 * x,
    "torch.mul": lambda x: torch.mul(x, 4),
    "torch.multiply": lambda x: torch.multiply(x, 4),
    "x.mul(4)": lambda x: x.mul(4),
    "x / 7": lambda x: x / 7,
    "torch.div": lambda x: torch.div(x, -0.2),
    "torch.divide": lambda x: torch.divide(x, 7),
    "torch.true_divide": lambda x: torch.true_divide(x, 7),
    "x.div(7)": lambda x: x.div(7),
    "-x": lambda x: -x,
    "operator.neg": operator.neg,
    "torch.neg": torch.neg,
    "x.neg()": lambda x: x.neg(),
    "x *= 2": lambda x: operator.imul(x * 1, 2),
    "x.mul_(2)": lambda x: (x + 0).mul_(2),
}


@pytest.mark.filterwarnings("error::frfx.ConditionWarning")
@pytest.mark.parametrize("function", ARITHMETIC.values(), ids=ARITHMETIC)
def test_arithmetic_with_a_number(function):
    x, target = normal(0, 2, 3, 2), normal(1, 2, 3, 2)
    found = rebuild(function, x, target)
    assert relative(found, minimal_affine_preimage(function, x, target)) < 1e-13


TENSOR_ARITHMETIC = {
    "x + w": lambda x, w: x + w,
    "w + x": lambda x, w: w + x,
    "torch.add(w, x, alpha=3)": lambda x, w: torch.add(w, x, alpha=3),
    "torch.add(x, w, alpha=3)": lambda x, w: torch.add(x, w, alpha=3),
    "x - w": lambda x, w: x - w,
    "w - x": lambda x, w: w - x,
    "torch.sub(w, x, alpha=3)": lambda x, w: torch.sub(w, x, alpha=3),
    "torch.rsub(x, w)": lambda x, w: torch.rsub(x, w),
    "torch.rsub(w, x)": lambda x, w: torch.rsub(w, x),
    "x * w": lambda x, w: x * w,
    "w * x": lambda x, w: w * x,
    "x / w": lambda x, w: x / w,
    "aten.mul": lambda x, w: torch.ops.aten.mul.Tensor(x, w),
}


@pytest.mark.filterwarnings("error::frfx.ConditionWarning")
@pytest.mark.parametrize("shape", [(), (3, 1), (1, 1, 2), (3, 2)], ids=str)
@pytest.mark.parametrize("function", TENSOR_ARITHMETIC.values(), ids=TENSOR_ARITHMETIC)
def test_arithmetic_with_a_tensor(function, shape):
    w = normal(7, *shape)
    x, target = normal(0, 2, 3, 2), normal(1, 2, 3, 2)
    found = rebuild(function, x, target, w=w)
    expected = minimal_affine_preimage(lambda x: function(x, w), x, target)
    assert relative(found, expected) < 1e-13


@given(values=st.lists(st.sampled_from([0.0, -1.0, 0.5, 3.0]), min_size=3, max_size=3), seed=seeds)
def test_factors_with_zeros_keep_what_they_hide(values, seed):
    w = torch.tensor(values, dtype=torch.float64)
    x, target = normal(seed, 2, 3), normal(seed + 1, 2, 3)
    inverse = invert(lambda x, w: x * w, w=w)
    if 0 in values:
        with pytest.warns(frfx.ConditionWarning):
            found = inverse(x, target)
    else:
        found = inverse(x, target)
    expected = minimal_affine_preimage(lambda x: x * w, x, target, rcond=1e-12)
    assert relative(found, expected) < 1e-13


@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
def test_a_factor_of_zero_leaves_the_input():
    x = normal(0, 2, 3)
    assert torch.equal(rebuild(lambda x: x * 0, x, normal(1, 2, 3)), x)


def test_damped_arithmetic():
    w = torch.tensor([2.0, 0.5, -1.0], dtype=torch.float64)
    x, target = normal(0, 1, 3), normal(1, 1, 3)
    found = rebuild(lambda x, w: x * w, x, target, frfx.policy.minimal(damping=0.3), w=w)
    step = damped_least_squares(np.diag(w.numpy()), (target - x * w).numpy()[0], 0.3)
    assert relative(found, x.numpy() + step) < 1e-13


@pytest.mark.parametrize("function", [lambda x, w: x * w, lambda x, w: x / w], ids=["*", "/"])
def test_whole_numbers_as_factors(function):
    w = torch.tensor([3, 7])
    x, target = normal(0, 4, 2), normal(1, 4, 2)
    found = rebuild(function, x, target, w=w)
    assert relative(found, minimal_affine_preimage(lambda x: function(x, w), x, target)) < 1e-14


@pytest.mark.parametrize("function", [lambda x: 2 * x + 1, lambda x: 1 - x / 3])
def test_numbers_do_not_widen_the_walk(function):
    x, target = normal(0, 2, 3).float(), normal(1, 2, 3).float()
    nodes = invert(function).reconstruct(x, target)
    assert {node.target.dtype for node in nodes.values()} == {torch.float32}


def cut_and_damped(matrix, residual, rcond, damping):
    """Return the damped solutions without the singular values that are cut off."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    weights = values / (values**2 + damping * values[0] ** 2) * (values > rcond * values[0])
    return residual @ left @ np.diag(weights) @ right


class Scaled(nn.Module):
    """Multiplies by a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(normal(4, 6, 6))

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize("damping", [1e-3, 0.05, 0.3])
@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (nn.Linear(6, 5), {}),
        (nn.Linear(6, 9), {}),
        (nn.Conv2d(2, 3, 2), {"solver": "dense"}),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), {"solver": "spectral"}),
        (nn.Conv2d(2, 3, 1), {}),
        (nn.ConvTranspose2d(2, 2, 2), {"solver": "dense"}),
        (nn.AvgPool2d(3, 1), {}),
        (nn.BatchNorm2d(2, affine=False), {}),
        (Scaled(), {}),
    ],
    ids=str,
)
def test_a_cutoff_that_is_asked_for_stays_beside_damping(layer, options, damping):
    """However large: what is cut off is not moved."""
    layer = nn.Sequential(layer).double().eval().requires_grad_(False)
    if isinstance(layer[0], nn.BatchNorm2d):
        layer[0].running_var.copy_(torch.tensor([1.0, 40.0]))
    x = normal(1, 3, 2, 6, 6)
    y = layer(x)
    target = y + normal(2, *y.shape)
    policy = frfx.policy.minimal(rcond=0.3, damping=damping)
    if options:
        policy = policy.override(op=type(layer[0]), **options)
    found = frfx.invert(layer, 0, policy=policy)(x, target)
    basis = torch.eye(72, dtype=torch.float64).view(72, 2, 6, 6)
    matrix = (layer(basis) - layer(0 * basis)).flatten(1).T.numpy()
    deviation = cut_and_damped(matrix, (target - y).flatten(1).numpy(), 0.3, damping)
    assert relative((found - x).flatten(1), deviation) < 1e-9


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3, padding=1), nn.ConvTranspose2d(2, 3, 3, 2),
        nn.Conv2d(2, 2, 3, groups=2), nn.Linear(6, 4), nn.SiLU(), nn.Tanh(), nn.MaxPool2d(2),
        nn.AvgPool2d(3, 1), nn.GroupNorm(1, 2), nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Softmax(1), nn.ReflectionPad2d(1), nn.ChannelShuffle(2), Scaled(),
    ],
    ids=str,
)  # fmt: skip
def test_no_default_device_is_read(layer):
    """It may be another than the model's."""
    layer = nn.Sequential(layer).double()
    x = normal(1, 3, 2, 6, 6)
    target = layer(x + 0.1).detach()
    expected = frfx.invert(layer, 0, policy="minimal")(x, target)
    with torch.device("meta"):
        found = frfx.invert(layer, 0, policy="minimal")(x, target)
    torch.testing.assert_close(found, expected)
