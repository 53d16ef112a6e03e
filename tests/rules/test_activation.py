"""Every activation of the table: consistent, a fixed point, and nearest by a brute-force grid."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special
from torch import nn
from torch.nn import functional as F

import frfx
from frfx.rules import dip as dips
from tests.oracles import invert, nearest_crossing, normal, reconstruct

INF = math.inf
aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """What a test knows of an activation, beside the function itself.

    Attributes:
        module: The activation as a module.
        limits: What targets are limited to: the range, and where it is open, a margin inside of it.
        spellings: Other ways to write the same.
        exact: The function in float64 for a grid, where torch's own loses its left tail.
        domain: How far x^ and the grid reach.
        open: Whether the function does not reach the finite ends of its range.
        jump: Where the function jumps.
        dip: The value of a minimum, close to which preimages are ill-conditioned.
    """

    module: nn.Module
    limits: tuple[float, float] = (-INF, INF)
    spellings: Mapping[str, Callable] = field(default_factory=dict)
    exact: Callable | None = None
    domain: float = 30.0
    open: bool = False
    jump: float | None = None
    dip: float | None = None

    def end_at(self, y):
        """Return 0 for a target inside the limits, -1 or 1 for one that an open end limits."""
        low, high = self.limits
        sign = -1 if abs(y - low) < 1e-6 else int(abs(y - high) < 1e-6)
        return sign if self.open else 0

    def on(self, grid):
        """Return the function's values on a grid, in float64."""
        if self.exact is not None:
            return self.exact(grid)
        with torch.no_grad():
            return self.module(torch.from_numpy(grid)[:, None])[:, 0].numpy()


def of(name, *holders, method=None):
    """Return spellings of one argument by name: functions of torch and F, the method, ATen."""
    found = {f"{holder.__name__}.{name}": getattr(holder, name) for holder in holders}
    if method:
        found[f"x.{method}"] = lambda x: getattr(x, method)()
    return found


def mish(x):
    """Mish in float64."""
    return x * np.tanh(np.logaddexp(0, x))


def gelu_tanh(x):
    """The approximate form of GELU in float64: `(1 + tanh u) / 2` is the logistic of 2 u."""
    return x * special.expit(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


SELU_LOW = -1.0507009873554805 * 1.6732632423543772
ACTIVATIONS = {
    "sinh": Activation(
        type("Sinh", (nn.Module,), {"forward": lambda self, x: torch.sinh(x)})(),
        spellings=of("sinh", torch, method="sinh") | {"aten": aten.sinh.default},
        domain=12.0,
    ),
    "asinh": Activation(
        type("Asinh", (nn.Module,), {"forward": lambda self, x: torch.asinh(x)})(),
        spellings=of("asinh", torch, method="asinh")
        | of("arcsinh", torch, method="arcsinh")
        | {"aten": aten.asinh.default},
    ),
    "tanh": Activation(
        nn.Tanh(),
        (-0.999, 0.999),
        of("tanh", torch, F, method="tanh") | {"aten": aten.tanh.default},
        open=True,
    ),
    "sigmoid": Activation(
        nn.Sigmoid(),
        (0.0005, 0.9995),
        of("sigmoid", torch, F, method="sigmoid")
        | {"torch.special.expit": torch.special.expit, "aten": aten.sigmoid.default},
        open=True,
    ),
    "atan": Activation(
        type("Atan", (nn.Module,), {"forward": lambda self, x: torch.atan(x)})(),
        (-0.999 * math.pi / 2, 0.999 * math.pi / 2),
        of("atan", torch, method="atan")
        | of("arctan", torch, method="arctan")
        | {"aten": aten.atan.default},
        domain=700.0,
        open=True,
    ),
    "softsign": Activation(
        nn.Softsign(), (-0.999, 0.999), of("softsign", F), domain=1100.0, open=True
    ),
    "logsigmoid": Activation(
        nn.LogSigmoid(),
        (-INF, -1e-3),
        of("logsigmoid", F) | {"aten": aten.log_sigmoid.default},
        open=True,
    ),
    "softplus": Activation(
        nn.Softplus(), (1e-3, INF), of("softplus", F) | {"aten": aten.softplus.default}, open=True
    ),
    "softplus, beta 3": Activation(
        nn.Softplus(3.0),
        (1e-3, INF),
        {
            "F.softplus": lambda x: F.softplus(x, 3.0),
            "aten": lambda x: aten.softplus.default(x, 3.0),
        },
        open=True,
    ),
    "softplus, threshold 1": Activation(
        nn.Softplus(2, 1),
        (1e-3, INF),
        {"F.softplus": lambda x: F.softplus(x, beta=2, threshold=1)},
        jump=0.5,
        open=True,
    ),
    "elu": Activation(
        nn.ELU(), (-0.999, INF), of("elu", F) | {"aten": aten.elu.default}, open=True
    ),
    "elu, alpha 2": Activation(
        nn.ELU(2.0),
        (-1.998, INF),
        {"F.elu": lambda x: F.elu(x, alpha=2.0), "F.elu in place": lambda x: F.elu(x, 2.0, True)},
        open=True,
    ),
    "elu, alpha 0.3": Activation(nn.ELU(0.3), (-0.2997, INF), open=True),
    "selu": Activation(
        nn.SELU(),
        (0.999 * SELU_LOW, INF),
        of("selu", torch, F) | {"aten": aten.selu.default},
        open=True,
    ),
    "celu": Activation(
        nn.CELU(), (-0.999, INF), of("celu", torch, F) | {"aten": aten.celu.default}, open=True
    ),
    "celu, alpha 0.5": Activation(
        nn.CELU(0.5), (-0.4995, INF), {"F.celu": lambda x: F.celu(x, 0.5)}, open=True
    ),
    "relu": Activation(
        nn.ReLU(),
        (0, INF),
        of("relu", torch, F, method="relu")
        | {
            "in place": nn.ReLU(inplace=True),
            "F.relu in place": lambda x: F.relu(x, inplace=True),
            "aten": aten.relu.default,
        },
    ),
    "relu6": Activation(nn.ReLU6(), (0, 6), of("relu6", F) | {"aten": aten.relu6.default}),
    "hardtanh": Activation(
        nn.Hardtanh(), (-1, 1), of("hardtanh", F) | {"aten": aten.hardtanh.default}
    ),
    "hardtanh, -0.5 to 2": Activation(
        nn.Hardtanh(-0.5, 2.0),
        (-0.5, 2),
        {
            "F.hardtanh": lambda x: F.hardtanh(x, -0.5, 2.0),
            "keywords": lambda x: F.hardtanh(x, min_val=-0.5, max_val=2.0),
            "aten": lambda x: aten.hardtanh.default(x, -0.5, 2.0),
        },
    ),
    "clamp": Activation(
        nn.Hardtanh(-0.5, 2.0),
        (-0.5, 2),
        {
            "torch.clamp": lambda x: torch.clamp(x, -0.5, 2.0),
            "torch.clip": lambda x: torch.clip(x, max=2.0, min=-0.5),
            "x.clamp": lambda x: x.clamp(-0.5, 2.0),
            "x.clip": lambda x: x.clip(-0.5, 2.0),
            "aten": lambda x: aten.clamp.default(x, -0.5, 2.0),
        },
    ),
    "clamp, one end": Activation(
        nn.Hardtanh(-0.5, math.inf),
        (-0.5, math.inf),
        {
            "torch.clamp": lambda x: torch.clamp(x, -0.5),
            "torch.clip": lambda x: torch.clip(x, min=-0.5),
            "x.clamp": lambda x: x.clamp(min=-0.5),
            "x.clip": lambda x: x.clip(-0.5, None),
            "aten": lambda x: aten.clamp.default(x, -0.5),
        },
    ),
    "hardsigmoid": Activation(
        nn.Hardsigmoid(), (0, 1), of("hardsigmoid", F) | {"aten": aten.hardsigmoid.default}
    ),
    "leaky_relu": Activation(
        nn.LeakyReLU(), spellings=of("leaky_relu", F) | {"aten": aten.leaky_relu.default}
    ),
    "leaky_relu, slope 2": Activation(
        nn.LeakyReLU(2.0),
        spellings={
            "F.leaky_relu": lambda x: F.leaky_relu(x, 2.0),
            "keywords": lambda x: F.leaky_relu(x, negative_slope=2.0, inplace=True),
        },
    ),
    "leaky_relu, slope 0": Activation(nn.LeakyReLU(0.0), (0, INF)),
    "leaky_relu, slope -0.5": Activation(nn.LeakyReLU(-0.5), (0, INF)),
    "prelu": Activation(
        nn.PReLU(init=0.3),
        spellings={
            "F.prelu": lambda x: F.prelu(x, torch.tensor([0.3]).double()),
            "torch.prelu": lambda x: torch.prelu(x, torch.tensor([0.3]).double()),
            "x.prelu": lambda x: x.prelu(torch.tensor([0.3]).double()),
        },
    ),
    "prelu, slope 0": Activation(nn.PReLU(init=0.0), (0, INF)),
    "prelu, slope -0.3": Activation(nn.PReLU(init=-0.3), (0, INF)),
    "sin": Activation(
        type("Sin", (nn.Module,), {"forward": lambda self, x: torch.sin(x)})(),
        (-1, 1),
        of("sin", torch, method="sin") | {"aten": aten.sin.default},
        dip=-1.0,
    ),
    "abs": Activation(
        type("Abs", (nn.Module,), {"forward": lambda self, x: torch.abs(x)})(),
        (0, INF),
        of("abs", torch, method="abs")
        | of("absolute", torch, method="absolute")
        | {"operator": operator.abs, "aten": aten.abs.default},
        dip=0.0,
    ),
    "silu": Activation(
        nn.SiLU(),
        (-0.2784645427610738, INF),
        of("silu", F) | {"aten": aten.silu.default},
        exact=lambda x: x * special.expit(x),
        dip=-0.2784645427610738,
    ),
    "gelu": Activation(
        nn.GELU(),
        (-0.16997120747990369, INF),
        of("gelu", F) | {"aten": aten.gelu.default},
        exact=lambda x: x * special.ndtr(x),
        dip=-0.16997120747990369,
    ),
    "gelu, tanh": Activation(
        nn.GELU("tanh"),
        (-0.17004075057125413, INF),
        {
            "F.gelu": lambda x: F.gelu(x, approximate="tanh"),
            "aten": lambda x: aten.gelu.default(x, approximate="tanh"),
        },
        exact=gelu_tanh,
        dip=-0.17004075057125413,
    ),
    "mish": Activation(
        nn.Mish(),
        (-0.30884341301725043, INF),
        of("mish", F) | {"aten": aten.mish.default},
        exact=mish,
        dip=-0.30884341301725043,
    ),
    "hardswish": Activation(
        nn.Hardswish(),
        (-0.375, INF),
        of("hardswish", F) | {"aten": aten.hardswish.default},
        dip=-0.375,
    ),
}
for _activation in ACTIVATIONS.values():
    _activation.module.double().requires_grad_(False)

DTYPES = [torch.float64, torch.float32]
each_activation = pytest.mark.parametrize("name", ACTIVATIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["double", "single"])


@functools.cache
def inverse_of(name, dtype):
    """Return the compiled inverse of an activation."""
    return invert(module_of(name, dtype))


@functools.cache
def module_of(name, dtype):
    """Return an activation as a module of a type."""
    return copy.deepcopy(ACTIVATIONS[name].module).to(dtype)


def pairs(name, inside=False):
    """Draw a few pairs of a forward input and a target; `inside` the limits if asked for."""
    case = ACTIVATIONS[name]
    inputs = st.floats(-case.domain, case.domain) | st.floats(-4, 4)
    inputs |= st.sampled_from([0.0, -1.0, 1.0, -3.0, 3.0])
    targets = (st.floats(-4, 4) | inputs).map(lambda v: case.on(np.array([v])).item())
    if inside:
        targets = targets.filter(lambda y: not case.end_at(y) and _is_inside(y, case.limits))
    else:
        ends = [end for end in case.limits if math.isfinite(end)]
        values = [0.0, 0.5, -0.5, *ends]
        values += [end + s for end in ends for s in (-1e-4, 1e-4, -3.0, 3.0)]
        targets |= st.sampled_from(values) | st.floats(-case.domain, case.domain)
        # Closer to an open end, whether the target is limited is up to the rounding.
        targets = targets.filter(lambda y: y in ends or not case.end_at(y))
    if case.dip is not None:
        # A vanishing target, or one at the minimum, has preimages that no precision resolves.
        targets = targets.filter(
            lambda y: y in (0, case.dip) or min(abs(y), abs(abs(y) - abs(case.dip))) > 1e-3
        )
    return st.lists(st.tuples(inputs, targets), min_size=1, max_size=12)


def _is_inside(y, limits):
    return limits[0] <= y <= limits[1]


def columns(drawn, dtype):
    """Return pairs as two columns of a type: a batch of single entries."""
    return (torch.tensor(values, dtype=dtype)[:, None] for values in zip(*drawn, strict=True))


@functools.cache
def grid_of(name):
    """Return a fine grid over the domain, and the function on it."""
    case = ACTIVATIONS[name]
    # Half of the points are dense about zero: no range of interest is stepped over.
    wide = np.linspace(-case.domain, case.domain, 8001)
    points = np.union1d(wide, np.linspace(-5, 5, 8001))
    return points, case.on(points)


@each_dtype
@each_activation
@given(data=st.data())
def test_consistent_inside_the_limits(name, dtype, data):
    x, target = columns(data.draw(pairs(name, inside=True)), dtype)
    found = inverse_of(name, dtype)(x, target)
    reached = ACTIVATIONS[name].on(found.double().numpy().ravel())
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    np.testing.assert_allclose(reached, target.ravel(), rtol=tolerance, atol=tolerance)


@each_dtype
@each_activation
@given(data=st.data())
def test_nearest_of_all_on_a_grid(name, dtype, data):
    x, target = columns(data.draw(pairs(name)), dtype)
    case, (grid, values) = ACTIVATIONS[name], grid_of(name)
    found = inverse_of(name, dtype)(x, target).double().numpy().ravel()
    before, after = case.on(x.double().numpy().ravel()), case.on(found)
    tolerance, slack = (1e-9, 1e-7) if dtype == torch.float64 else (2e-5, 2e-3)
    for i, (start, y) in enumerate(zip(x.ravel().tolist(), target.ravel().tolist(), strict=True)):
        wanted = min(max(y, case.limits[0]), case.limits[1])
        end = case.end_at(wanted)
        if end and end * (before[i] - wanted) > -1e-6:
            # It is as near to the end as targets may be, or nearer, and stays.
            assert found[i] == start or abs(before[i] - wanted) < 2e-6
            continue
        best = min(np.abs(values - wanted).min(), abs(before[i] - wanted))
        assert abs(after[i] - wanted) <= best + tolerance * max(1, abs(wanted))
        bound = nearest_crossing(grid, values, wanted, start, case.jump)
        assert abs(found[i] - start) <= bound + slack * max(1, abs(found[i]))


@each_dtype
@each_activation
@given(data=st.data())
def test_fixed_point(name, dtype, data):
    domain = ACTIVATIONS[name].domain
    reach = 12.0 if name == "sinh" else 1e4
    inputs = st.floats(-domain, domain) | st.floats(-reach, reach)
    inputs |= st.sampled_from([-reach, reach, -0.0, 0.0, 6.0, -3.0, 3.0])
    if name != "sinh":
        inputs |= st.sampled_from([20.0, -20.0, 50.0, -50.0, 90.0, -104.0, -760.0])
    x = torch.tensor(data.draw(st.lists(inputs, min_size=1, max_size=12)), dtype=dtype)[:, None]
    output = module_of(name, dtype)(x)
    assert torch.equal(inverse_of(name, dtype)(x, output), x)


@each_dtype
@each_activation
def test_targets_out_of_range_reach_the_limit(name, dtype):
    case = ACTIVATIONS[name]
    x = torch.linspace(-1, 1, 11, dtype=dtype)[:, None]
    for limit, beyond in zip(case.limits, ((-1e-6, -3.0, -1e30), (1e-6, 3.0, 1e30)), strict=True):
        for distance in beyond if math.isfinite(limit) else ():
            target = torch.full_like(x, limit + distance)
            found = inverse_of(name, dtype)(x, target).double().numpy().ravel()
            tolerance = 1e-9 if dtype == torch.float64 else 1e-5
            np.testing.assert_allclose(case.on(found), limit, rtol=0, atol=tolerance)


@each_dtype
@each_activation
def test_large_magnitudes_never_give_nan(name, dtype):
    magnitudes = [1.0, 1e4, 1e10, 1e30, 1.9e38, torch.finfo(dtype).max]
    values = torch.tensor([s * m for m in magnitudes for s in (1, -1)], dtype=dtype)
    x, target = (v.reshape(-1, 1) for v in torch.meshgrid(values, values, indexing="ij"))
    output = module_of(name, dtype)(x)
    inverse = inverse_of(name, dtype)
    inverse(torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype))  # reads its weights
    inversion = list(inverse.inverse.children())[-1]
    found = inversion(target, output, x)
    assert not found.isnan().any()
    if name not in ("asinh", "leaky_relu", "prelu"):  # there the preimage exceeds the type itself
        assert found.isfinite().all()


def uniform(seed, count):
    """Return numbers between 0 and 1."""
    return torch.from_numpy(np.random.default_rng(seed).random(count))


DIPS = {"silu": dips.SILU, "mish": dips.MISH, "gelu": dips.GELU, "gelu, tanh": dips.GELU_TANH}


@each_dtype
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", DIPS)
def test_a_dips_roots_are_exact_to_rounding(name, left, dtype):
    dip, resolution = DIPS[name], torch.finfo(dtype).eps
    share = uniform(0, 4000)
    depth = 80 if dtype == torch.float32 else 690
    near_zero = dip.minimum * (-depth * share).exp()
    near_minimum = dip.minimum * (1 - (-depth * share).exp())
    parts = [near_zero, near_minimum] if left else [near_minimum, 10 * share, (80 * share).exp()]
    y = torch.cat(parts).to(dtype).clamp(min=dip.minimum)
    found = dip.nearest(y, torch.full_like(y, -1e4 if left else 1e4))
    assert ((found <= dip.argmin) if left else (found >= dip.argmin)).all()
    reached = torch.from_numpy(ACTIVATIONS[name].on(found.double().numpy()))
    _, slope = dip.at(found.double())
    rounding = resolution * ((slope * found).abs() + y.abs())
    assert ((reached - y).abs() <= 4 * rounding).all()
    assert torch.equal(torch.func.vmap(dip.nearest)(y, found), dip.nearest(y, found))


@pytest.mark.parametrize("name", DIPS)
def test_a_dip_takes_the_nearer_root(name):
    dip = DIPS[name]
    y, x = dip.minimum * uniform(0, 500), 8 * uniform(1, 500) - 6
    far = torch.full_like(y, 1e4)
    left, right = dip.nearest(y, -far), dip.nearest(y, far)
    expected = torch.where((left - x).abs() < (right - x).abs(), left, right)
    assert torch.equal(dip.nearest(y, x), expected)
    assert dip.nearest(y[:0], x[:0]).shape == (0,)


@pytest.mark.parametrize("name", DIPS)
def test_a_dips_derivative_is_that_of_its_inverse(name):
    dip = DIPS[name]
    x, y = 2 * normal(0, 200), 2 * normal(1, 200)
    y.clamp_(min=dip.minimum)
    y[(y - dip.minimum < 1e-2) | (y.abs() < 1e-2)] = 1.0  # where differences say little
    y[0], y[1] = dip.minimum, -1e-320  # flat, and as good as flat
    target = y.clone().requires_grad_()
    found = dip.nearest(target, x)
    assert torch.equal(found.detach(), dip.nearest(y, x))
    (gradient,) = torch.autograd.grad(found.sum(), target)
    _, along = torch.func.jvp(lambda y: dip.nearest(y, x), (y,), (torch.ones_like(y),))
    step = 1e-6
    slope = (dip.nearest(y + step, x) - dip.nearest(y - step, x)) / (2 * step)
    torch.testing.assert_close(gradient[2:], slope[2:], rtol=1e-4, atol=1e-6)
    assert gradient.isfinite().all()
    torch.testing.assert_close(along[2:], gradient[2:])


@pytest.mark.parametrize("name", DIPS)
def test_a_dips_derivatives_have_derivatives(name):
    x, y = 2 * normal(0, 30), DIPS[name].minimum + 0.1 + normal(1, 30).abs()
    y.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda y: DIPS[name].nearest(y, x), y)
    torch.func.vmap(torch.func.hessian(DIPS[name].nearest))(y, x)


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_an_elu_that_does_not_increase_is_refused(alpha):
    with pytest.raises(frfx.UnsupportedOpsError, match="no range is known"):
        frfx.invert(nn.Sequential(nn.ELU(alpha)), 0)


SPELLINGS = [
    pytest.param(name, spelling, id=f"{name}: {label}")
    for name, case in ACTIVATIONS.items()
    for label, spelling in case.spellings.items()
]


@pytest.mark.parametrize(("name", "spelling"), SPELLINGS)
def test_spellings(name, spelling):
    x, target = 2 * normal(0, 7, 5), 2 * normal(1, 7, 5)
    expected = inverse_of(name, torch.float64)(x, target)
    assert torch.equal(reconstruct(spelling, x, target), expected)


@pytest.mark.parametrize(
    ("x", "expected"),
    [(0.4, 0.420808791), (0.3, 0.420808791), (0.55, 0.6), (5.0, 0.6)],
)
def test_softplus_below_the_end_of_its_curve(x, expected):
    # log(1 + e^(2 v)) / 2 = 0.6 at v = 0.420808791, and beyond v = 0.5 torch goes on as v itself.
    softplus = nn.Softplus(beta=2, threshold=1)
    x, target = torch.tensor([[[x]], [[0.6]]], dtype=torch.float64)
    found = reconstruct(softplus, x, target)
    assert found.item() == pytest.approx(expected, rel=1e-8)
    assert softplus(found).item() == pytest.approx(0.6, rel=1e-12)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 2, 3)], ids=str)
def test_prelu_by_channel(shape):
    slopes = torch.tensor([0.5, 0.0, -0.4, 3.0], dtype=torch.float64)
    prelu = nn.PReLU(4).double().requires_grad_(False)
    prelu.weight.copy_(slopes)
    x, target = normal(0, 5, *shape), normal(1, 5, *shape)
    found = reconstruct(prelu, x, target)
    for channel, slope in enumerate(slopes.tolist()):
        alone = reconstruct(
            nn.LeakyReLU(slope), x[:, channel].reshape(5, -1), target[:, channel].reshape(5, -1)
        )
        assert torch.equal(found[:, channel].reshape(5, -1), alone)
    again = reconstruct(lambda x, w: F.prelu(x, w), x, target, w=slopes)
    assert torch.equal(again, found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_activation
def test_half_networks_are_inverted_in_single(name, dtype):
    module = module_of(name, dtype)
    x = torch.linspace(-2, 2, 9).to(dtype)[:, None]
    low, high = ACTIVATIONS[name].limits
    middle = torch.full_like(x, (max(low, -2) + min(high, 2)) / 2)
    found = reconstruct(module, x, middle)
    assert found.dtype == dtype
    reached = ACTIVATIONS[name].on(found.double().numpy().ravel())
    np.testing.assert_allclose(
        reached, middle.double().numpy().ravel(), atol=8 * torch.finfo(dtype).eps
    )
    assert torch.equal(reconstruct(module, x, module(x)), x)


@pytest.mark.parametrize("clamp_margin", [1e-6, 1e-2, 0.3])
@pytest.mark.parametrize("policy", [frfx.policy.paper, frfx.policy.minimal])
@pytest.mark.parametrize(
    ("module", "end", "unit"),
    [
        (nn.Tanh(), 1.0, 1.0),
        (nn.Sigmoid(), 0.0, 0.5),
        (nn.Softplus(), 0.0, 1.0),
        (nn.ELU(2.0), -2.0, 2.0),
        (nn.LogSigmoid(), 0.0, 1.0),
        (nn.SELU(), SELU_LOW, -SELU_LOW),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_the_clamp_margin(module, end, unit, policy, clamp_margin):
    x, target = torch.full((1, 1), 0.1).double(), torch.full((1, 1), end).double()
    found = reconstruct(module, x, target, policy(clamp_margin=clamp_margin))
    assert abs(module(found).item() - end) == pytest.approx(clamp_margin * unit, rel=1e-6)


@given(values=st.lists(st.floats(-50, 50), min_size=2, max_size=8))
def test_the_papers_relu_is_the_identity(values):
    target = torch.tensor([values], dtype=torch.float64)
    assert torch.equal(reconstruct(nn.ReLU(), normal(0, *target.shape), target, "paper"), target)


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 0.9, 3.0, 1e5]))
def test_the_papers_sine_is_normalised_by_sample(seed, scale):
    x, target = normal(seed, 4, 3, 2), scale * normal(seed + 1, 4, 3, 2)
    found = reconstruct(torch.sin, x, target, "paper")
    for sample, wanted in zip(found.numpy(), target.numpy(), strict=True):
        expected = np.arcsin(wanted / max(1.0, np.abs(wanted).max()))
        np.testing.assert_allclose(sample, expected, rtol=1e-12)


@pytest.fixture
def registry(monkeypatch):
    """Let a test register rules that are forgotten after it."""
    monkeypatch.setattr(frfx.registry, "default", frfx.registry.default.copy())


@pytest.mark.usefixtures("registry")
def test_registered_bijection():
    frfx.register_elementwise((torch.exp2, "exp2"), inverse=torch.log2, range=(0, INF))
    x, target = torch.zeros(1, 3).double(), torch.tensor([[-4.0, 2.0, 5.0]]).double()
    for spelling in (torch.exp2, lambda x: x.exp2()):
        found = reconstruct(spelling, x, target, frfx.policy.paper(clamp_margin=0.01))
        np.testing.assert_allclose(found.exp2().numpy(), [[0.01, 2, 5]], rtol=1e-12)


@pytest.mark.usefixtures("registry")
def test_registered_nearest():
    frfx.register_elementwise(
        torch.square, nearest=lambda y, x: y.sqrt().copysign(x), range=(0, INF), attained=True
    )
    x, target = torch.tensor([[-2.0, 2, 3]]).double(), torch.tensor([[9.0, 4, -1]]).double()
    assert reconstruct(torch.square, x, target).tolist() == [[-3, 2, 0]]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either `inverse`"),
        ({"inverse": torch.log2, "nearest": lambda y, x: y}, "either `inverse`"),
        ({"inverse": torch.log2, "range": (1, 1)}, r"range \(1, 1\) is empty"),
    ],
)
def test_registrations_that_make_no_sense(arguments, message):
    with pytest.raises(frfx.RegistryError, match=message):
        frfx.register_elementwise(torch.exp2, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [torch.relu, F.relu6, F.hardtanh, F.hardsigmoid, F.hardswish])
def test_rounding_of_the_target_moves_no_entry_far(function, dtype):
    """Where the function is flat, too: a target is computed in more ways than one."""
    x = 8 * normal(0, 4, 50).to(dtype)
    output = function(x)
    target = output + normal(1, 4, 50).to(dtype) * 4 * torch.finfo(dtype).eps
    policy = "minimal" if function is torch.relu else "paper"
    found = reconstruct(function, x, target, policy)
    assert float((found - x).abs().max()) <= (1e-3 if dtype == torch.float32 else 1e-9)
