"""Float targets: exact on affine tails of any rank, met on curved ones, and said where not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import frfx
from frfx.joint.output import OutputConstraint
from frfx.joint.region import Region
from tests.oracles import Apply, minimal_affine_preimage, normal, relative


def affine(seed: int, rows: int, columns: int, rank: int) -> torch.Tensor:
    """Return a matrix of a given rank."""
    rank = min(rank, rows, columns)
    return normal(seed, rows, rank) @ normal(seed + 1, rank, columns)


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 7), st.integers(1, 7))
def test_affine_tails_equal_the_pseudo_inverse(seed, rows, columns, rank):
    weight, bias = affine(seed, rows, columns, rank), normal(seed + 2, rows)

    def function(x, weight, bias):
        return nn.functional.linear(x, weight, bias)

    model = Apply(function, weight=weight, bias=bias).eval()
    x, target = normal(seed + 3, 4, columns), normal(seed + 4, 4, rows)
    policy = frfx.policy.joint(unreached="ignore")
    inverse = frfx.invert(model, "x", policy=policy)
    found = inverse(x, target)
    singular = np.linalg.svd(weight.numpy(), compute_uv=False)
    if singular[singular > 1e-9 * singular[0]].min() < 1e-3 * singular[0]:
        return  # conjugate gradients need more than their share of steps
    for k in range(4):
        expected = minimal_affine_preimage(
            lambda v: function(v, weight, bias), x[k, None], target[k, None], rcond=1e-9
        )
        if np.linalg.norm(expected - x[k, None].numpy()) < 9 * np.linalg.norm(x[k].numpy()):
            assert relative(found[k, None], expected) < 1e-5


def test_one_iteration_of_one_step_is_that_of_steepest_descent():
    weight = affine(0, 5, 4, 4)
    model = Apply(nn.functional.linear, weight=weight).eval()
    x = normal(1, 3, 4)
    target = x @ weight.T + 0.1 * normal(2, 3, 5)
    policy = frfx.policy.joint(steps=1, iterations=1, unreached="ignore")
    gradient = (target - x @ weight.T) @ weight
    length = gradient.square().sum(1) / (gradient @ weight.T).square().sum(1)
    found = frfx.invert(model, "x", policy=policy)(x, target)
    assert relative(found - x, length[:, None] * gradient) < 1e-12


def curved() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 2), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 6)).double().eval()


def test_regression_targets_are_met():
    model, x = curved(), normal(0, 20, 2, 8, 8)
    target = model(x).detach() + 0.01 * normal(1, 20, 6)
    inverse = frfx.invert(model, 0, policy=frfx.policy.joint(steps=20))
    measured = frfx.measure(inverse, x, target)
    assert measured.label_consistency is None
    assert bool(inverse.report["input"].reached.all())
    (residual,) = measured.residuals
    gap = (target - model(x).detach()).norm(dim=1)
    assert bool((residual.residual <= 1.01e-3 * gap).all())
    torch.testing.assert_close(residual.residual, inverse.report["input"].violation)
    # As small as the first linearisation asks for, to second order.
    ratios = []
    jacobian = torch.autograd.functional.jacobian(model, x)
    for k in range(20):
        rows = jacobian[k, :, k].flatten(1)
        least = (torch.linalg.pinv(rows) @ (target[k] - model(x[k, None]).detach()[0])).norm()
        ratios.append(float(inverse.report["input"].deviation[k] / least))
    assert np.median(ratios) < 1.01
    assert max(ratios) < 1.2


def test_the_forward_output_gives_the_forward_feature_back():
    model, x = curved(), normal(0, 5, 2, 8, 8)
    inverse = frfx.invert(model, 0, policy="joint")
    assert torch.equal(inverse(x, model(x).detach()), x)
    assert not inverse.report["input"].steps.any()


def test_softmax_heads():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Softmax(-1)).double()
    x = normal(0, 9, 6)
    labels = torch.arange(9) % 4
    inverse = frfx.invert(model.eval(), 0, policy=frfx.policy.joint(unreached="ignore"))
    assert frfx.measure(inverse, x, labels).label_consistency == 1
    target = torch.softmax(model[:3](x) + 0.1 * normal(1, 9, 4), -1).detach()
    torch.testing.assert_close(model(inverse(x, target)), target, atol=1e-3, rtol=0)


@pytest.mark.parametrize("target", ["labels", "floats"])
@pytest.mark.parametrize("constraint", ["inequality", "equality"])
@pytest.mark.parametrize("weight", ["zero", "saturated", "dead"])
def test_unreachable_targets_are_reported(target, constraint, weight):
    """Constant networks: nothing is NaN, nothing moves out of sight, and all of it is said."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(8, 5)
    with torch.no_grad():
        if weight == "zero":
            model[0].weight.zero_()
        elif weight == "saturated":
            model[0].weight.mul_(1e-12)
            model[0].bias.fill_(9.0)
        else:
            model[0].bias.fill_(-1e3)
        winner = int(model(x)[0].argmax())
    y = torch.full((8,), (winner + 1) % 3) if target == "labels" else model(x).detach() + 1.0
    policy = frfx.policy.joint(constraint=constraint)
    inverse = frfx.invert(model, 0, policy=policy)
    with pytest.warns(frfx.UnreachedWarning, match=r"'3': 8 of 8 samples \(0, 1, 2, 3, 4, ...\)"):
        found = inverse(x, y)
    assert bool(torch.isfinite(found).all())
    report = inverse.report["input"]
    assert not report.reached.any()
    assert bool((report.violation > 0.01).all())
    assert bool((report.deviation <= 15 * x.norm(dim=1)).all())
    with pytest.raises(frfx.UnreachedError, match="have not reached their target in 12 steps"):
        frfx.invert(model, 0, policy=frfx.policy.joint(unreached="raise"))(x, y)


class Skip(nn.Module):
    """A small U-Net: an image in, an image out."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x):
        wide = torch.relu(self.down(x))
        deep = torch.relu(self.deep(nn.functional.max_pool2d(wide, 2)))
        return self.out(torch.cat([wide, torch.relu(self.up(deep))], 1))


def trained() -> tuple[nn.Module, torch.Tensor]:
    """Return one that has learned a little, as networks that are inverted have, and images."""
    torch.manual_seed(0)
    model, x = Skip(), torch.rand(8, 1, 8, 8)
    target = torch.rand(8, 1, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    return model.double().eval(), x[:4].double()


@pytest.mark.parametrize(("moved", "left"), [(0.1, 0.1), (0.5, 0.2)])
def test_images_are_targets_too(moved, left):
    """Linearisations of so many numbers are not worth whole steps, nor exact solutions."""
    model, x = trained()
    target = model(x + moved * normal(1, *x.shape)).detach()
    inverse = frfx.invert(model, "x", policy=frfx.policy.joint(unreached="ignore"))
    found = inverse(x, target)
    with torch.no_grad():
        gap = (target - model(x)).flatten(1).norm(dim=1)
        missing = (target - model(found)).flatten(1).norm(dim=1)
    report = inverse.report["x"]
    torch.testing.assert_close(missing, report.violation)
    assert float((missing / gap).mean()) <= left
    assert float((missing / gap).max()) <= 3 * left
    assert float(report.deviation.max()) <= 2 * moved * 8


def test_many_numbers_of_an_affine_tail_are_solved_for_exactly():
    """The first step leaves a share, and finds that nothing was off."""
    weight = torch.linalg.qr(normal(0, 70, 70))[0] * torch.linspace(1, 3, 70)
    model = Apply(nn.functional.linear, weight=weight).eval()
    x, target = normal(1, 3, 70), normal(2, 3, 70)
    inverse = frfx.invert(model, "x", policy="joint")
    found = inverse(x, target)
    assert relative(found, torch.linalg.solve(weight, target.T).T) < 1e-6
    assert inverse.report["x"].steps.tolist() == [2, 2, 2]
    inverse = frfx.invert(model, "x", policy=frfx.policy.joint(steps=1))  # there is no second
    assert relative(inverse(x, target), torch.linalg.solve(weight, target.T).T) < 1e-3
    assert bool(inverse.report["x"].reached.all())


def test_few_steps_are_more_exact():
    """Towards a target that is near a tail that is nearly affine."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 100)).double().eval()
    x = normal(0, 8, 100)
    target = model(x + 0.02 * normal(1, 8, 100)).detach()
    for steps in (3, 12):
        policy = frfx.policy.joint(steps=steps, iterations=200, unreached="ignore")
        inverse = frfx.invert(model, 0, policy=policy)
        inverse(x, target)
        assert bool(inverse.report["input"].reached.all())


@pytest.mark.parametrize("size", [1e20, 1e38])
def test_targets_whose_norm_overflows_are_not_reached(size):
    model, x = nn.Linear(6, 6).eval(), torch.randn(2, 6)
    inverse = frfx.invert(nn.Sequential(model), 0, policy=frfx.policy.joint(unreached="ignore"))
    found = inverse(x, torch.full((2, 6), size))
    assert bool(found.isfinite().all())
    assert not inverse.report["input"].reached.any()


class Scalar(nn.Module):
    def forward(self, x):
        return torch.atan(x)


def test_a_step_is_shortened_until_less_is_missing():
    constraint = OutputConstraint(
        Region(Scalar(), (), None), torch.zeros(5, 1), torch.atan(torch.full((5, 1), 3.0)), 100
    )
    point = constraint.linearise(torch.full((5, 1), 3.0), torch.arange(5))
    step = torch.tensor([[-12.5], [-12.5], [1.0], [-0.5], [-300.0]])
    most = torch.tensor([1.0, 1.0, 1.0, 0.5, 1.0])
    allowed = torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0])
    share = point.share(step, most, allowed)
    assert share[[1, 2, 3]].tolist() == [1.0, 0.0, 0.5]  # allowed to; there is none; fits
    after = torch.atan(3 + share[:, None] * step).abs()[:, 0]
    assert 0.05 <= float(share[0]) < 1
    assert float(after[0]) < float(torch.atan(torch.tensor(3.0)))
    assert 0 < float(share[4]) < 0.1
    assert float(after[4]) < float(after[3])
