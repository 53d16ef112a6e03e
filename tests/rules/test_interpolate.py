"""Interpolation against the pseudo-inverse of its Jacobian."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import frfx
from tests.oracles import Apply, damped_least_squares, normal, reconstruct, relative

seeds = st.integers(0, 2**31)
aten = torch.ops.aten

pytestmark = [
    pytest.mark.filterwarnings("ignore::frfx.ConditionWarning"),
    pytest.mark.filterwarnings("ignore:.*nn.functional.upsample.* is deprecated:UserWarning"),
]

MODES = {
    1: ["nearest", "nearest-exact", "linear", "area"],
    2: ["nearest", "nearest-exact", "bilinear", "bicubic", "area"],
    3: ["nearest", "nearest-exact", "trilinear", "area"],
}


def matrix_of(function, x):
    """Return a linear function of one image as a dense matrix, from its values.

    Not by autograd: torch differentiates some interpolations by a scale factor wrongly.
    """
    count = x[0].numel()
    images = torch.eye(count, dtype=torch.float64).reshape(count, *x.shape[1:])
    return function(images).flatten(1).T.numpy()


def expected_for(function, x, target, rcond=1e-9):
    """Return `x + A+ (y* - A x)`, image by image, by NumPy's pseudo-inverse."""
    x, target = x.double(), target.double()
    inverse = np.linalg.pinv(matrix_of(function, x), rcond=rcond)
    step = (target - function(x)).flatten(1).numpy() @ inverse.T
    return x.numpy() + step.reshape(x.shape)


@st.composite
def interpolations(draw):
    """Draw arguments of `F.interpolate`, and the size of an image that they fit."""
    dims = draw(st.integers(1, 3))
    mode = draw(st.sampled_from(MODES[dims]))
    size = [draw(st.integers(1, 7 if dims < 3 else 4)) for _ in range(dims)]
    options = {"mode": mode}
    if mode.endswith(("linear", "cubic")):
        options["align_corners"] = draw(st.sampled_from([None, False, True]))
    if mode.startswith("bi"):
        options["antialias"] = draw(st.booleans())
    if draw(st.booleans()):
        onto = tuple(draw(st.integers(1, 9 if dims < 3 else 4)) for _ in size)
        options["size"] = onto if draw(st.booleans()) else onto[0]
    else:
        by = tuple(max(draw(st.floats(0.3, 2.5)), 1.001 / n) for n in size)
        options["scale_factor"] = by if draw(st.booleans()) else max(by)
        options["recompute_scale_factor"] = draw(st.sampled_from([None, False, True]))
    if options.get("antialias"):
        rows, columns = F.interpolate(torch.ones(1, 1, *size), **options).shape[2:]
        assume(columns > 1 or rows == 1)  # else torch filters the rows wrongly, and it is refused
    return options, size


@given(drawn=interpolations(), seed=seeds)
def test_interpolate(drawn, seed):
    options, size = drawn

    def function(x):
        return F.interpolate(x, **options)

    x = normal(seed, 1, 2, *size)
    target = normal(seed + 1, *function(x).shape)
    found = reconstruct(function, x, target)
    assert relative(found, expected_for(function, x, target)) < 1e-8
    assert torch.equal(reconstruct(function, x, function(x)), x)


@given(drawn=interpolations(), seed=seeds, damping=st.floats(1e-3, 1))
def test_damped(drawn, seed, damping):
    options, size = drawn

    def function(x):
        return F.interpolate(x, **options)

    x = normal(seed, 1, 1, *size)
    target = normal(seed + 1, *function(x).shape)
    residual = (target - function(x)).numpy().ravel()
    step = damped_least_squares(matrix_of(function, x), residual, damping)
    found = reconstruct(function, x, target, frfx.policy.minimal(damping=damping))
    assert relative(found, x.numpy() + step.reshape(x.shape)) < 1e-8


@pytest.mark.parametrize("rcond", [0.1, 0.6])
def test_cutoff(rcond):
    def function(x):
        return F.interpolate(x, (3, 8), mode="bicubic")

    x, target = normal(0, 1, 2, 5, 4), normal(1, 1, 2, 3, 8)
    found = reconstruct(function, x, target, frfx.policy.minimal(rcond=rcond))
    assert relative(found, expected_for(function, x, target, rcond=rcond)) < 1e-10


SPELLINGS = {
    "nn.Upsample": nn.Upsample(scale_factor=2),
    "nn.Upsample, size": nn.Upsample((5, 3), mode="bilinear"),
    "nn.Upsample, corners": nn.Upsample(
        scale_factor=(1.7, 2.3), mode="bicubic", align_corners=True
    ),
    "nn.Upsample, recomputed": nn.Upsample(
        scale_factor=1.7, mode="bilinear", recompute_scale_factor=True
    ),
    "nn.UpsamplingNearest2d": nn.UpsamplingNearest2d(scale_factor=3),
    "nn.UpsamplingBilinear2d": nn.UpsamplingBilinear2d((7, 6)),
    "F.upsample": lambda x: F.upsample(x, scale_factor=2, mode="bilinear"),
    "F.upsample_nearest": lambda x: F.upsample_nearest(x, (5, 5)),
    "F.upsample_bilinear": lambda x: F.upsample_bilinear(x, scale_factor=2),
    "of another's size": lambda x: F.interpolate(x[:, :, ::2], size=x.shape[-2:]),
    "in a keyword": lambda x: F.interpolate(input=x, size=3, mode="area"),
    "aten.upsample_nearest2d": lambda x: aten.upsample_nearest2d.vec(x, None, [1.5, 2.0]),
    "aten._upsample_nearest_exact2d": lambda x: aten._upsample_nearest_exact2d.vec(x, [5, 7], None),
    "aten.upsample_bilinear2d": lambda x: aten.upsample_bilinear2d.vec(x, [5, 7], True, None),
    "aten.upsample_bicubic2d": lambda x: aten.upsample_bicubic2d.vec(x, None, False, [0.5, 1.7]),
    "aten._upsample_bilinear2d_aa": lambda x: aten._upsample_bilinear2d_aa.vec(
        x, [2, 3], False, None
    ),
    "aten._upsample_bicubic2d_aa": lambda x: aten._upsample_bicubic2d_aa.vec(
        x, None, False, [0.5, 0.6]
    ),
}


class Sliced(nn.Module):
    """Interpolates back to the size of its input; what is sliced is no part of the tail."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, stride=2).double().requires_grad_(False)

    def forward(self, x):
        return F.interpolate(self.conv(x), size=x.shape[-2:], mode="bilinear")


@pytest.mark.parametrize("name", [name for name in SPELLINGS if "another" not in name])
def test_spellings(name):
    function = SPELLINGS[name]
    x = normal(0, 2, 3, 4, 5)
    target = normal(1, *function(x).shape)
    found = reconstruct(function, x, target)
    assert relative(found, expected_for(function, x, target)) < 1e-10


@pytest.mark.parametrize("dims", [1, 3])
def test_exported_spellings_of_other_dimensions(dims):
    x = normal(0, 2, 3, *[3, 4, 2][:dims])
    linear = aten.upsample_linear1d if dims == 1 else aten.upsample_trilinear3d
    for function in (
        lambda x: linear.vec(x, None, False, [1.5] * dims),
        lambda x: getattr(aten, f"upsample_nearest{dims}d").vec(x, [5] * dims, None),
        lambda x: getattr(aten, f"_upsample_nearest_exact{dims}d").vec(x, None, [1.7] * dims),
    ):
        target = normal(1, *function(x).shape)
        found = reconstruct(function, x, target)
        assert relative(found, expected_for(function, x, target)) < 1e-10


@pytest.mark.parametrize("example", [False, True])
def test_a_size_that_is_computed_is_read_off_the_output(example):
    """The same feature size, interpolated onto two: a factor fits one of them only."""
    model = Sliced().eval()
    inverse = frfx.invert(model, "conv", example_input=normal(0, 2, 1, 9, 9) if example else None)
    for size in (9, 10, 9):
        x, target = normal(0, 2, 1, size, size), normal(1, 2, 2, size, size)
        feature = model.conv(x)
        assert feature.shape[-1] == 4
        expected = expected_for(
            lambda z, n=size: F.interpolate(z, size=n, mode="bilinear"), feature, target
        )
        assert relative(inverse(x, target), expected) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "area"])
def test_precisions(mode, dtype):
    def function(x):
        return F.interpolate(x, (9, 5), mode=mode)

    x, target = normal(0, 2, 3, 5, 9, dtype=dtype), normal(1, 2, 3, 9, 5, dtype=dtype)
    inverse = frfx.invert(nn.Sequential(nn.Identity(), Apply(function)).eval(), "input")
    found = inverse.reconstruct(x, target)["0"].target
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert inverse(x, target).dtype == dtype
    expected = expected_for(function, x, target)
    assert relative(found, expected) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [1, 2])
def test_the_nearest_neighbour_is_torchs_own(dims, dtype):
    """At these sizes it is another one in another precision, or in another dimension."""
    for size, onto, mode in ((65, 55, "nearest"), (4, 94, "nearest-exact")):

        def function(x, onto=onto, mode=mode):
            return F.interpolate(x, onto if dims == 1 else (onto, 1), mode=mode)

        x = normal(0, 1, 1, size, *[1] * (dims - 1), dtype=dtype)
        target = normal(1, *function(x).shape, dtype=dtype)
        # Nearest interpolation onto more pixels reaches the means of the copies.
        chosen = function(torch.arange(size).reshape(x.shape).to(dtype)).long().flatten()
        step = torch.zeros(size, dtype=dtype).index_add(0, chosen, (target - function(x)).flatten())
        step /= torch.bincount(chosen, minlength=size).clamp(min=1)
        found = reconstruct(function, x, target)
        assert relative(found, x + step.reshape(x.shape)) < 50 * torch.finfo(dtype).eps


def test_compiled():
    model = nn.Sequential(nn.Identity(), nn.Upsample(scale_factor=1.5, mode="bilinear")).eval()
    inverse = frfx.invert(model, "0")
    fast = torch.compile(inverse, backend="aot_eager")
    for size in (4, 6, 4):
        x, target = normal(0, 2, 3, size, size), normal(1, 2, 3, size * 3 // 2, size * 3 // 2)
        torch.testing.assert_close(fast(x, target), inverse(x, target))
