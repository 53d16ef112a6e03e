"""The convolution rule, compiled by `frfx.invert`, against the paper's Eq. 19 and 20."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import frfx
from tests.geometries import convolutions
from tests.oracles import (
    circulant,
    damped_least_squares,
    invert,
    jacobian,
    minimal_affine_preimage,
    normal,
    pad_left,
    paper_convolution,
    reconstruct,
    relative,
)

pytestmark = pytest.mark.filterwarnings("error::frfx.ConditionWarning")

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
seeds = st.integers(0, 2**31)

# Channels in and out, window, size: case (a) of the paper is C_in >= C_out, case (b) the other.
GEOMETRIES = {
    "1d-a": (4, 2, (3,), (9,)),
    "1d-square": (3, 3, (4,), (8,)),
    "1d-b": (2, 5, (2,), (7,)),
    "2d-a": (3, 2, (3, 3), (6, 7)),
    "2d-square": (2, 2, (2, 3), (5, 6)),
    "2d-b": (2, 4, (3, 2), (7, 5)),
    "2d-one-by-one": (4, 3, (1, 1), (3, 2)),
    "2d-whole-image": (3, 2, (4, 5), (4, 5)),
    "3d-a": (3, 2, (2, 1, 2), (3, 2, 4)),
    "3d-b": (1, 3, (2, 2, 2), (3, 3, 3)),
}


def conv(seed, n_in, n_out, window, dtype=torch.float64, dominant=3.0, bias=True):
    """Return a random convolution; a dominant entry keeps its spectrum away from zero."""
    layer = CONV[len(window)](n_in, n_out, window, bias=bias, dtype=dtype)
    kernel = 0.3 * normal(seed, n_out, n_in, *window)
    kernel[(slice(None), slice(None), *(0 for _ in window))] += dominant * torch.eye(n_out, n_in)
    with torch.no_grad():
        layer.weight.copy_(kernel)
        if bias:
            layer.bias.copy_(normal(seed + 1, n_out))
    return layer.requires_grad_(False)


def by_the_paper(layer, x, target):
    """Return Eq. 19 or 20, built literally, in complex128."""
    bias = layer.bias if layer.bias is not None else torch.zeros(len(layer.weight))
    values = (layer.weight, bias, x, target)
    return paper_convolution(*(v.double().numpy() for v in values))


def valid(size, window):
    """Return the spatial shape of the output."""
    return [n - k + 1 for n, k in zip(size, window, strict=True)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("policy", ["paper", "minimal"])
def test_equals_the_papers_equations(policy, geometry, dtype, tolerance):
    n_in, n_out, window, size = geometry
    layer = conv(0, n_in, n_out, window, dtype)
    x, target = normal(2, 3, n_in, *size), 3 * normal(3, 3, n_out, *valid(size, window))
    found = reconstruct(layer, x.to(dtype), target.to(dtype), policy)
    assert found.dtype == dtype
    assert relative(found, by_the_paper(layer, x.to(dtype), target.to(dtype))) < tolerance


@st.composite
def geometries(draw):
    """Draw channels in and out, window and size of a small convolution in 1 to 3 dimensions."""
    dims = draw(st.integers(1, 3))
    most = {1: 9, 2: 6, 3: 3}[dims]
    window = tuple(draw(st.integers(1, min(3, most))) for _ in range(dims))
    size = tuple(draw(st.integers(k, most)) for k in window)
    return draw(st.integers(1, 4)), draw(st.integers(1, 4)), window, size


@given(seed=seeds, geometry=geometries(), bias=st.booleans())
def test_equals_the_papers_equations_for_any_geometry(seed, geometry, bias):
    n_in, n_out, window, size = geometry
    layer = conv(seed, n_in, n_out, window, bias=bias)
    x, target = normal(seed + 2, 2, n_in, *size), normal(seed + 3, 2, n_out, *valid(size, window))
    assert relative(reconstruct(layer, x, target), by_the_paper(layer, x, target)) < 1e-10


@pytest.mark.parametrize(("n_in", "n_out"), [(4, 2), (2, 4), (3, 5)])
@given(seed=seeds)
def test_kernels_as_training_leaves_them(n_in, n_out, seed):
    layer = conv(seed, n_in, n_out, (3, 3), dominant=0.0)
    x, target = normal(seed + 2, 1, n_in, 6, 7), normal(seed + 3, 1, n_out, 4, 5)
    assert relative(reconstruct(layer, x, target), by_the_paper(layer, x, target)) < 1e-10


@pytest.mark.parametrize("size", [(5, 5), (50,)], ids=["only the middle", "two in three"])
def test_windows_of_atrous_pyramids(size):
    """Dilated by 36, as DeepLab's widest: most of the kernel reads the padding."""
    torch.manual_seed(0)
    layer = CONV[len(size)](2, 3, 3, padding=36, dilation=36).double().requires_grad_(False)
    x, target = normal(1, 2, 2, *size), normal(2, 2, 3, *size)
    expected = minimal_affine_preimage(layer, x, target)
    dense = frfx.policy.minimal().override(op=CONV[len(size)], solver="dense")
    assert relative(reconstruct(layer, x, target, dense), expected) < 1e-9


@given(seed=seeds, geometry=geometries())
def test_case_a_gives_the_target_exactly(seed, geometry):
    n_in, n_out, window, size = geometry
    n_in, n_out = max(n_in, n_out), min(n_in, n_out)
    layer = conv(seed, n_in, n_out, window)
    x, target = normal(seed + 2, 2, n_in, *size), normal(seed + 3, 2, n_out, *valid(size, window))
    found = reconstruct(layer, x, target)
    assert (layer(found) - target).abs().max() < 1e-9


@given(seed=seeds, geometry=geometries())
def test_fixed_point(seed, geometry):
    n_in, n_out, window, size = geometry
    layer, x = conv(seed, n_in, n_out, window), normal(seed + 2, 2, n_in, *size)
    assert torch.equal(reconstruct(layer, x, layer(x)), x)


@given(seed=seeds, geometry=geometries(), damping=st.floats(1e-4, 1))
def test_damping(seed, geometry, damping):
    n_in, n_out, window, size = geometry
    layer = conv(seed, n_in, n_out, window)
    x, target = normal(seed + 2, 2, n_in, *size), normal(seed + 3, 2, n_out, *valid(size, window))
    found = reconstruct(layer, x, target, frfx.policy.minimal(damping=damping))
    residual = pad_left((target - layer(x)).numpy(), size).reshape(2, -1)
    step = damped_least_squares(circulant(layer.weight.numpy(), size), residual.T, damping).T
    assert relative(found, x.numpy() + step.reshape(x.shape)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("geometry", [GEOMETRIES["2d-a"], GEOMETRIES["2d-b"]], ids=["a", "b"])
def test_zero_kernels_leave_the_input(geometry, dtype):
    n_in, n_out, window, size = geometry
    layer = conv(0, n_in, n_out, window, dtype)
    layer.weight.zero_()
    x = normal(2, 2, n_in, *size, dtype=dtype)
    target = normal(3, 2, n_out, *valid(size, window), dtype=dtype)
    with pytest.warns(frfx.ConditionWarning, match="condition number inf"):
        assert torch.equal(reconstruct(layer, x, target), x)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("geometry", [GEOMETRIES["2d-a"], GEOMETRIES["2d-b"]], ids=["a", "b"])
def test_scaled_kernels(geometry, dtype, tolerance, scale):
    n_in, n_out, window, size = geometry
    layer = conv(0, n_in, n_out, window, dtype, bias=False)
    layer.weight.mul_(scale)
    x = normal(2, 2, n_in, *size, dtype=dtype)
    target = layer(x) + scale * normal(3, 2, n_out, *valid(size, window), dtype=dtype)
    # Unscaled, for the system of Eq. 19 mixes the scale with ones.
    plain = conv(0, n_in, n_out, window, dtype, bias=False)
    expected = by_the_paper(plain, x, plain(x) + (target - layer(x)) / scale)
    assert relative(reconstruct(layer, x, target), expected) < tolerance


def test_dead_output_channel():
    layer = conv(0, 3, 3, (3, 3))
    layer.weight[1] = 0
    x, target = normal(2, 2, 3, 6, 5), normal(3, 2, 3, 4, 3)
    with pytest.warns(frfx.ConditionWarning):
        found = reconstruct(layer, x, target)
    residual = pad_left((target - layer(x)).numpy(), (6, 5)).reshape(2, -1)
    step = residual @ np.linalg.pinv(circulant(layer.weight.numpy(), (6, 5)), rcond=1e-12).T
    assert relative(found, x.numpy() + step.reshape(x.shape)) < 1e-12


def test_every_image_size_has_its_own_factor():
    layer = conv(0, 3, 2, (3, 2))
    inverse = invert(layer)
    for size in [(5, 6), (8, 4), (5, 6)]:
        x, target = normal(2, 2, 3, *size), normal(3, 2, 2, *valid(size, (3, 2)))
        assert relative(inverse(x, target), by_the_paper(layer, x, target)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_networks_are_solved_in_single(dtype):
    n_in, n_out, window, size = GEOMETRIES["2d-a"]
    layer = conv(0, n_in, n_out, window, dtype)
    x, target = normal(2, 2, n_in, *size), normal(3, 2, n_out, *valid(size, window))
    found = reconstruct(layer, x.to(dtype), target.to(dtype))
    assert found.dtype == dtype
    # The rounding of the forward output and of the result to the half type is seen, no more.
    expected = by_the_paper(layer, x.to(dtype), target.to(dtype))
    assert relative(found.double(), expected) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x, w, b: F.conv2d(x, w, b),
        lambda x, w, b: F.conv2d(x, w, b, stride=(1, 1), padding="valid", dilation=1),
        lambda x, w, b: torch.conv2d(x, w, b),
        lambda x, w, b: torch.ops.aten.conv2d.default(x, w, b, [1, 1], [0, 0]),
        lambda x, w, b: torch.ops.aten.conv2d.padding(x, w, b, [1, 1], "valid"),
    ],
    ids=["F.conv2d", "keywords", "torch.conv2d", "aten", "aten padding"],
)
def test_spellings(spelling):
    layer = conv(0, 3, 2, (3, 2))
    x, target = normal(2, 2, 3, 5, 6), normal(3, 2, 2, 3, 5)
    found = reconstruct(spelling, x, target, w=layer.weight, b=layer.bias)
    assert relative(found, by_the_paper(layer, x, target)) < 1e-10


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 2, 1, padding="same"),
        nn.Conv2d(3, 2, 3, padding="valid"),
        nn.Conv2d(3, 2, 3, padding_mode="reflect"),  # pads by nothing
    ],
    ids=["same, one by one", "valid", "padding mode"],
)
def test_paddings_that_pad_nothing(layer):
    layer = layer.double().requires_grad_(False)
    x = normal(2, 2, 3, 5, 6)
    target = layer(x) + normal(3, 2, 2, *layer(x).shape[2:])
    assert relative(reconstruct(layer, x, target), by_the_paper(layer, x, target)) < 1e-10


# Any geometry: the Jacobian's pseudo-inverse, where the solver is not the paper's.


def module_of(operator, bias=True):
    """Return torch's module for a drawn convolution of symmetric padding."""
    layer = CONV[len(operator.size)](
        operator.in_channels,
        operator.out_channels,
        operator.kernel.shape[2:],
        stride=operator.stride,
        padding=tuple(before for before, _ in operator.padding),
        dilation=operator.dilation,
        groups=operator.groups,
        padding_mode=operator.padding_mode,
        bias=bias,
        dtype=operator.kernel.dtype,
    ).requires_grad_(False)
    layer.weight.copy_(operator.kernel)
    if bias:
        layer.bias.copy_(normal(1, operator.out_channels))
    return layer


def with_target(layer, operator, seed):
    x = normal(seed, 2, *operator.in_shape)
    return x, layer(x) + normal(seed + 1, 2, *operator.out_shape)


def quietly(function, *args):
    """Call a function that may tell of a rank: windows may lie in the padding alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", frfx.ConditionWarning)
        return function(*args)


def conditioned(layer, x, most=30):
    """Return whether the singular values that are not zero lie this near together."""
    singular = np.linalg.svd(jacobian(layer, torch.zeros_like(x[:1])), compute_uv=False)
    kept = singular[singular > 1e-10 * singular.max()]
    return len(kept) == 0 or kept[0] < most * kept[-1]


@pytest.mark.parametrize("solver", ["auto", "dense"])
@given(operator=convolutions(padded=True, symmetric=True, dominant=3.0), seed=seeds)
def test_padded_convolutions_equal_the_jacobians_pseudo_inverse(solver, operator, seed):
    layer = module_of(operator)
    x, target = with_target(layer, operator, seed)
    assume(conditioned(layer, x))
    policy = frfx.policy.minimal(damping=0.0).override(op=nn.Conv2d, solver=solver)
    inverse = invert(layer, policy)
    found = quietly(inverse, x, target)
    row = next(row for row in inverse.summary() if row.op == "conv")
    assume(row.solver == "dense")  # circular padding is spectral, and exact where it is wide
    expected = minimal_affine_preimage(layer, x, target, rcond=1e-8)
    assert relative(found, expected) < 1e-8


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("window", [(3, 3), (2, 3)])
@pytest.mark.parametrize("solver", ["iterative", "dense"])
def test_padding_that_keeps_the_size(solver, window, mode):
    layer = nn.Conv2d(3, 3, window, padding="same", dilation=(1, 2), padding_mode=mode)
    layer = layer.double().requires_grad_(False)
    layer.weight.mul_(0.3)
    layer.weight[..., (window[0] - 1) // 2, 1] += 3 * torch.eye(3)
    x = normal(2, 2, 3, 6, 7)
    target = layer(x) + normal(3, 2, 3, 6, 7)
    policy = frfx.policy.minimal().override(
        op=nn.Conv2d, solver=solver, tolerance=1e-10, max_steps=300
    )
    expected = minimal_affine_preimage(layer, x, target)
    assert relative(reconstruct(layer, x, target, policy), expected) < 1e-8


@given(operator=convolutions(symmetric=True), seed=seeds)
def test_fixed_point_of_any_geometry(operator, seed):
    layer = module_of(operator)
    x, _ = with_target(layer, operator, seed)
    assert torch.equal(quietly(reconstruct, layer, x, layer(x)), x)


@given(operator=convolutions(padded=False, dominant=3.0), seed=seeds)
def test_wide_strided_grouped_and_dilated_ones_give_the_target_exactly(operator, seed):
    taps = zip(operator.kernel.shape[2:], operator.dilation, operator.stride, strict=True)
    read = [len({d * j % stride for j in range(k)}) for k, d, stride in taps]  # of a block
    columns = operator.kernel.shape[1] * math.prod(read)
    assume(operator.out_channels // operator.groups <= columns)
    layer = module_of(operator)
    x, target = with_target(layer, operator, seed)
    inverse = invert(layer)
    found = quietly(inverse, x, target)
    row = next(row for row in inverse.summary() if row.op == "conv")
    assume(row.condition < 1e5)
    assert relative(layer(found), target) < 1e-8


class Deep(nn.Module):
    """What real networks are made of: a strided stem, depthwise and grouped blocks, patches."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.pointwise = nn.Conv2d(8, 16, 1, stride=2)
        self.patches = nn.Conv2d(16, 12, 2, stride=2)
        self.head = nn.Linear(12, 5)
        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                middle = tuple(k // 2 for k in layer.kernel_size)
                for row in range(len(layer.weight)):
                    layer.weight.data[(row, row % layer.weight.shape[1], *middle)] += 1

    def forward(self, x):
        for layer in (self.stem, self.depthwise, self.grouped, self.pointwise, self.patches):
            x = torch.tanh(layer(x))
        return self.head(x.flatten(1))


def test_inside_a_network_every_op_is_inverted_as_its_own_jacobian_says():
    model = Deep().double().eval().requires_grad_(False)
    x = normal(0, 2, 3, 8, 8)
    inverse = frfx.invert(model, "x", policy="minimal")
    values = inverse.reconstruct(x, torch.tensor([1, 4]))
    rows = {row.node: row for row in inverse.summary()}
    names = [name for name in values if values[name].op == "conv"]
    assert len(names) == 5
    order = list(values)
    for name in names:
        after = values[order[order.index(name) + 1]]
        layer = getattr(model, name)
        moved = after.target - after.forward
        wanted = values[name].target - values[name].forward
        matrix = jacobian(layer, torch.zeros_like(after.forward[:1]))
        assert rows[name].solver == "dense"
        damping = 1e-2 if "damped" in rows[name].reason else 0.0
        step = damped_least_squares(matrix, wanted.flatten(1).numpy().T, damping)
        assert relative(moved.flatten(1), step.T) < 1e-7


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x, w, b: F.conv2d(x, w, b, 2, 1),
        lambda x, w, b: F.conv2d(x, w, b, stride=(2,), padding=(1,), dilation=(1,)),
        lambda x, w, b: torch.conv2d(x, w, b, (2, 2), (1, 1)),
        lambda x, w, b: torch.ops.aten.conv2d.default(x, w, b, [2, 2], [1, 1], [1, 1], 1),
    ],
    ids=["numbers", "one-element tuples", "torch.conv2d", "aten"],
)
def test_spellings_of_strides_and_paddings(spelling):
    layer = conv(0, 3, 2, (3, 3))
    x = normal(2, 2, 3, 6, 7)
    output = F.conv2d(x, layer.weight, layer.bias, 2, 1)
    target = output + normal(3, *output.shape)
    expected = minimal_affine_preimage(
        lambda x: F.conv2d(x, layer.weight, layer.bias, 2, 1), x, target
    )
    found = reconstruct(spelling, x, target, w=layer.weight, b=layer.bias)
    assert relative(found, expected) < 1e-9


@pytest.mark.parametrize("padding", ["same", 1, "valid"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_after_torch_export(dims, padding):
    torch._dynamo.reset()  # older versions bound how often a process may trace the same code
    layer = CONV[dims](2, 2, 3, padding=padding, dtype=torch.float64).requires_grad_(False)
    layer.weight[(..., *(1,) * dims)] += 2 * torch.eye(2)
    model = nn.Sequential(layer, nn.Tanh()).eval()
    x = 0.1 * normal(2, 2, 2, *[4] * dims)
    exported = torch.export.export(model, (x,)).module()
    target = 0.9 * torch.tanh(layer(x))
    found = frfx.invert(exported, 0, policy="minimal")(x, target)
    assert relative(found, frfx.invert(model, 0, policy="minimal")(x, target)) < 1e-12
    assert relative(layer(found), torch.atanh(target)) < 1e-8


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("solver", ["auto", "spectral", "iterative", "dense"])
@pytest.mark.filterwarnings("ignore::frfx.ConvergenceWarning")
def test_memory_formats(solver, padding):
    torch.manual_seed(2)  # conditioned so well that two ways to round stay close for ten steps
    layer = nn.Conv2d(4, 4, 3, padding=padding, groups=2, stride=(1, 2)).double()
    layer.requires_grad_(False).weight[..., 1, 1] += 2
    x = normal(2, 2, 4, 6, 7)
    target = layer(x) + normal(3, *layer(x).shape)
    policy = frfx.policy.minimal().override(op=nn.Conv2d, solver=solver)
    expected = reconstruct(layer, x, target, policy)
    found = reconstruct(
        layer.to(memory_format=torch.channels_last),
        x.to(memory_format=torch.channels_last),
        target.to(memory_format=torch.channels_last),
        policy,
    )
    assert relative(found, expected) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("solver", ["auto", "iterative"])
def test_padded_networks_of_every_precision(solver, dtype):
    layer = nn.Conv2d(3, 3, 3, padding=1, dtype=dtype).requires_grad_(False)
    layer.weight[..., 1, 1] += 2 * torch.eye(3).to(dtype)
    x = normal(2, 2, 3, 6, 7).to(dtype)
    target = layer(x) + normal(3, 2, 3, 6, 7).to(dtype)
    policy = frfx.policy.minimal().override(op=nn.Conv2d, solver=solver, tolerance=1e-5)
    found = reconstruct(layer, x, target, policy)
    assert found.dtype == dtype
    residual = (target.double() - layer(x).double()).numpy().ravel()
    matrix = jacobian(layer.double(), x)
    expected = x.double().numpy() + (np.linalg.pinv(matrix) @ residual).reshape(x.shape)
    assert relative(found.double(), expected) < max(2 * torch.finfo(dtype).eps, 5e-5)


# What has not converged.


def unconverged(**options):
    """Return the inverse of a padded convolution with one step to solve it, and a call for it."""
    layer = nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64).requires_grad_(False)
    layer.weight.copy_(normal(0, 3, 3, 3, 3))
    options = {"solver": "iterative", "max_steps": 1, "tolerance": 1e-9, **options}
    policy = frfx.policy.minimal().override(op=nn.Conv2d, **options)
    model = nn.Sequential(nn.Identity(), layer, nn.Tanh())
    x = normal(1, 4, 3, 6, 6)
    return frfx.invert(model, 0, policy=policy), x, torch.tanh(layer(x) + 0.1)


MESSAGE = (
    r"1 \(.*\): the iterative solver has left 4 of 4 samples above its tolerance, the worst at a "
    r"relative residual of .* after 1 steps.*override\(node='1', damping=.*unconverged=\"ignore\""
)


@pytest.mark.parametrize("call", ["call", "reconstruct"])
def test_unconverged_warns(call):
    inverse, x, target = unconverged()
    with pytest.warns(frfx.ConvergenceWarning, match=MESSAGE):
        inverse(x, target) if call == "call" else inverse.reconstruct(x, target)


def test_unconverged_warns_when_compiled():
    inverse, x, target = unconverged()
    compiled = torch.compile(inverse, backend="eager")
    for _ in range(2):  # when it is traced, and afterwards
        with pytest.warns(frfx.ConvergenceWarning, match=MESSAGE):
            compiled(x, target)


def test_convergence_is_no_part_of_the_gradient():
    inverse, x, target = unconverged()
    with pytest.warns() as caught:
        inverse(x.requires_grad_(), target).sum().backward()
    assert [warning.category for warning in caught] == [frfx.ConvergenceWarning]
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("call", ["call", "reconstruct"])
def test_unconverged_raises(call):
    inverse, x, target = unconverged(unconverged="raise")
    with pytest.raises(frfx.ConvergenceError, match=MESSAGE):
        inverse(x, target) if call == "call" else inverse.reconstruct(x, target)


@pytest.mark.filterwarnings("error")
def test_unconverged_is_silent_if_asked():
    inverse, x, target = unconverged(unconverged="ignore")
    assert torch.isfinite(inverse(x, target)).all()
    inverse.reconstruct(x, target)


@pytest.mark.filterwarnings("error")
def test_converged_says_nothing():
    inverse, x, _ = unconverged()
    layer = inverse.model.get_submodule("1")
    inverse(x, torch.tanh(layer(x)))  # no deviation, nothing to solve


@pytest.mark.filterwarnings("error")
def test_a_call_is_not_blamed_for_the_one_before():
    """The first size has not converged and raises; what is told of the second is its own."""
    inverse, x, target = unconverged(unconverged="raise")
    with pytest.raises(frfx.ConvergenceError):
        inverse(x, target)
    layer, other = inverse.model.get_submodule("1"), normal(2, 2, 3, 5, 5)
    inverse(other, torch.tanh(layer(other)))
    with pytest.raises(frfx.ConvergenceError):
        inverse(x, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "fastest"}, "solver='fastest' is none of 'auto', 'dense'"),
        ({"unconverged": "hide"}, "unconverged='hide' is none of 'warn', 'raise', 'ignore'"),
        ({"tolerance": 0.0}, "tolerance=0.0 does not lie between 0 and 1"),
        ({"max_steps": 0}, "max_steps=0 is less than one step"),
        ({"solver": "iterative", "rcond": 0.1}, "cannot cut singular values off, as rcond=0.1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(frfx.PolicyError, match=message):
        invert(conv(0, 2, 2, (3, 3)), frfx.policy.minimal().override(op=nn.Conv2d, **options))


# The summary.


@pytest.mark.parametrize(
    ("layer", "solver", "why"),
    [
        (nn.Conv2d(3, 2, 1), "dense", "share no entry"),
        (nn.Conv2d(3, 2, 2, stride=2), "dense", "share no entry"),
        (nn.Conv2d(3, 2, 3), "spectral", "exact: no padding"),
        (nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), "spectral", "circular padding"),
        (nn.Conv2d(3, 2, 3, padding=1), "dense", "written out"),
        (nn.ConvTranspose2d(3, 2, 2, stride=2), "dense", "share no entry"),
    ],
)
def test_the_summary_tells_the_solver_and_why(layer, solver, why):
    inverse = invert(layer)
    before = next(row for row in inverse.summary() if row.node == "function")
    assert (before.solver, before.reason, before.condition) == ("auto", "", None)
    x = normal(0, 2, 3, 6, 6, dtype=torch.float32)
    inverse(x, layer(x).detach())
    row = next(row for row in inverse.summary() if row.node == "function")
    assert row.solver == solver
    assert why in row.reason
    assert row.condition >= 1
    shown = str(inverse.summary())
    assert "solver" in shown
    assert row.reason in shown


def test_a_solver_by_name_for_one_node():
    model = nn.Sequential(conv(0, 3, 3, (3, 3)), nn.Tanh(), conv(1, 3, 3, (3, 3)))
    policy = frfx.policy.minimal().override(node="2", solver="iterative", max_steps=200)
    inverse = frfx.invert(model, 0, policy=policy)
    x = normal(0, 2, 3, 8, 8)
    inverse(x, model(x))
    rows = {row.node: row for row in inverse.summary()}
    assert rows["2"].solver == "iterative"
    assert rows["2"].reason == "as asked"
    assert rows["0"].solver == "spectral"
    assert "max_steps=200" in rows["2"].rule
