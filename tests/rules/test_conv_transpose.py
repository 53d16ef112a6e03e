"""The transposed convolution rule, compiled by `frfx.invert`, against the Jacobian's inverse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import frfx
from tests.oracles import (
    damped_least_squares,
    invert,
    jacobian,
    minimal_affine_preimage,
    normal,
    reconstruct,
    relative,
)

CONV = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
seeds = st.integers(0, 2**31)


def transposed(seed, n_in, n_out, window, dtype=torch.float64, dominant=3.0, **geometry):
    """Return a random transposed convolution; a dominant tap keeps it well conditioned."""
    layer = CONV[len(window)](n_in, n_out, window, dtype=dtype, **geometry)
    kernel = 0.3 * normal(seed, *layer.weight.shape)
    for row in range(len(kernel)):
        kernel[(row, row % kernel.shape[1], *(k // 2 for k in window))] += dominant
    with torch.no_grad():
        layer.weight.copy_(kernel)
        layer.bias.copy_(normal(seed + 1, n_out))
    return layer.requires_grad_(False)


@st.composite
def problems(draw):
    """Draw a layer, its input and a target."""
    dims = draw(st.sampled_from([1, 1, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2]))
    axes = []
    for _ in range(dims):
        stride, dilation = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 1, 2]))
        extra = draw(st.integers(0, max(stride, dilation) - 1))
        axes.append((draw(st.integers(1, 3)), stride, dilation, draw(st.integers(0, 1)), extra))
    window, stride, dilation, padding, extra = (tuple(axis) for axis in zip(*axes, strict=True))
    size = [draw(st.integers(2, {1: 6, 2: 4, 3: 2}[dims])) for _ in range(dims)]
    seed = draw(seeds)
    out = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1 + e
        for n, (k, s, d, p, e) in zip(size, axes, strict=True)
    ]
    assume(min(out) > 0 and math.prod(out) < 200)
    layer = transposed(
        seed,
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        window,
        stride=stride,
        dilation=dilation,
        padding=padding,
        output_padding=extra,
        groups=groups,
    )
    x = normal(seed + 2, 2, layer.in_channels, *size)
    return layer, x, layer(x) + normal(seed + 3, *layer(x).shape)


def condition(layer, x):
    """Return the ratio of the singular values that are not zero."""
    singular = np.linalg.svd(jacobian(layer, torch.zeros_like(x[:1])), compute_uv=False)
    kept = singular[singular > 1e-10 * singular.max()]
    return kept[0] / kept[-1] if len(kept) else 1.0  # nothing arrives


@given(problem=problems())
@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
def test_equals_the_jacobians_pseudo_inverse(problem):
    layer, x, target = problem
    assume(condition(layer, x) < 30)
    expected = minimal_affine_preimage(layer, x, target, rcond=1e-8)
    found = reconstruct(layer, x, target, frfx.policy.minimal(damping=0.0))
    assert found.shape == x.shape
    assert relative(found, expected) < 1e-8


@given(problem=problems())
@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
def test_fixed_point(problem):
    layer, x, _ = problem
    assert torch.equal(reconstruct(layer, x, layer(x)), x)


@given(problem=problems(), damping=st.floats(1e-3, 1))
@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
def test_damping(problem, damping):
    layer, x, target = problem
    found = reconstruct(layer, x, target, frfx.policy.minimal(damping=damping))
    matrix = jacobian(layer, torch.zeros_like(x[:1]))
    columns = (target - layer(x)).flatten(1).numpy().T
    step = damped_least_squares(matrix, columns, damping).T
    assert relative(found, x.numpy() + step.reshape(x.shape)) < 1e-9


@pytest.mark.parametrize("solver", ["dense", "iterative"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_solvers_agree(solver, stride):
    layer = transposed(0, 3, 2, (3, 3), stride=stride, padding=1, output_padding=stride - 1)
    x = normal(2, 2, 3, 5, 6)
    target = layer(x) + normal(3, *layer(x).shape)
    policy = frfx.policy.minimal().override(
        op=nn.ConvTranspose2d, solver=solver, tolerance=1e-9, max_steps=200
    )
    expected = minimal_affine_preimage(layer, x, target)
    assert relative(reconstruct(layer, x, target, policy), expected) < 1e-7


@pytest.mark.parametrize("output_size", [(9, 11), (10, 12)])
def test_an_output_size_that_the_call_gives(output_size):
    layer = transposed(0, 2, 3, (3, 3), stride=2, padding=1)
    x = normal(2, 2, 2, 5, 6)
    target = normal(3, 2, 3, *output_size)
    weights = {"w": layer.weight, "b": layer.bias}
    extra = tuple(n - m for n, m in zip(output_size, (9, 11), strict=True))
    found = reconstruct(
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, extra), x, target, **weights
    )
    expected = minimal_affine_preimage(lambda x: layer(x, output_size=output_size), x, target)
    assert relative(found, expected) < 1e-9


class Sized(nn.Module):
    """Gives its transposed convolution the size that it should return."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, output_size=(10, 12))


def test_an_output_size_by_the_module():
    layer = transposed(0, 2, 3, (3, 3), stride=2, padding=1)
    x, target = normal(2, 2, 2, 5, 6), normal(3, 2, 3, 10, 12)
    model = Sized(layer).eval()
    found = frfx.invert(model, "x", policy="minimal")(x, target)
    assert relative(found, minimal_affine_preimage(model, x, target)) < 1e-9


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1, output_padding=1),
        lambda x, w, b: torch.conv_transpose2d(x, w, b, (2, 2), (1, 1), (1, 1)),
        lambda x, w, b: torch.ops.aten.conv_transpose2d.input(x, w, b, [2, 2], [1, 1], [1, 1]),
        lambda x, w, b: F.conv_transpose2d(x, w, b, (2,), (1,), (1,), 1, (1,)),
    ],
    ids=["F", "torch", "aten", "one number"],
)
def test_spellings(spelling):
    layer = transposed(0, 3, 2, (3, 3), stride=2, padding=1, output_padding=1)
    x = normal(2, 2, 3, 4, 5)
    target = layer(x) + normal(3, *layer(x).shape)
    found = reconstruct(spelling, x, target, w=layer.weight, b=layer.bias)
    assert relative(found, minimal_affine_preimage(layer, x, target)) < 1e-9


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_after_torch_export(dims):
    torch._dynamo.reset()  # older versions bound how often a process may trace the same code
    layer = transposed(0, 2, 2, (3,) * dims, stride=2, padding=1)
    model = nn.Sequential(layer, nn.Tanh())
    x = 0.1 * normal(2, 2, 2, *[3] * dims)
    exported = torch.export.export(model.eval(), (x,)).module()
    target = 0.9 * torch.tanh(layer(x))
    expected = frfx.invert(model, 0, policy="minimal")(x, target)
    found = frfx.invert(exported, 0, policy="minimal")(x, target)
    assert relative(found, expected) < 1e-12
    assert relative(found, minimal_affine_preimage(layer, x, torch.atanh(target))) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precisions(dtype):
    layer = transposed(0, 2, 2, (3, 3), dtype, stride=2, padding=1)
    x = normal(2, 2, 2, 4, 5).to(dtype)
    target = normal(3, *layer(x).shape).to(dtype)
    found = reconstruct(layer, x, target)
    assert found.dtype == dtype
    residual = (target.double() - layer(x).double()).numpy().ravel()
    step = np.linalg.pinv(jacobian(layer.double(), x)) @ residual
    expected = x.double().numpy() + step.reshape(x.shape)
    assert relative(found.double(), expected) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("weights_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("solver", ["auto", "spectral", "iterative", "dense"])
def test_memory_formats(solver, weights_format):
    layer = transposed(0, 4, 4, (3, 3), stride=2, padding=1, groups=2)
    x = normal(2, 2, 4, 4, 5)
    target = layer(x) + normal(3, *layer(x).shape)
    policy = frfx.policy.minimal().override(op=nn.ConvTranspose2d, solver=solver)
    expected = reconstruct(layer, x, target, policy)
    moved = layer.to(memory_format=weights_format)
    found = reconstruct(
        moved,
        x.to(memory_format=torch.channels_last),
        target.to(memory_format=torch.channels_last),
        policy,
    )
    assert relative(found, expected) < 1e-10


def test_every_size_of_input_and_output_has_its_own_factor():
    layer = transposed(0, 3, 2, (3,), stride=2, padding=1)
    inverse = invert(layer)
    for size in (4, 6, 4):
        x = normal(2, 2, 3, size)
        target = normal(3, *layer(x).shape)
        assert relative(inverse(x, target), minimal_affine_preimage(layer, x, target)) < 1e-9


def test_without_a_batch():
    layer = transposed(0, 3, 2, (3, 3))
    with pytest.raises(frfx.UnsupportedOpsError, match="no batch dimension"):
        invert(layer)(normal(0, 3, 4, 4), normal(1, 2, 6, 6))
