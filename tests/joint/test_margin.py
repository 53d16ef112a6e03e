"""Labels: exact on linear tails, first-order optimal on curved ones, safeguarded on kinked ones."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import quadprog
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

import frfx
from frfx.joint import margin
from frfx.joint.sqp import Subproblem
from tests.oracles import integers, normal


def linear_tail(
    seed: int, size: int, classes: int, draw: Callable[..., torch.Tensor] = normal
) -> nn.Module:
    tail = nn.Linear(size, classes).double()
    with torch.no_grad():
        tail.weight.copy_(draw(seed, classes, size))
        tail.bias.copy_(draw(seed + 1, classes))
    return nn.Sequential(OrderedDict(fc=tail)).eval()


@given(
    st.integers(0, 10**6), st.integers(1, 9), st.integers(2, 7), st.sampled_from([1e-3, 0.5, 10.0])
)
def test_linear_tails_equal_a_qp_solver(seed, size, classes, gap):
    model, x = linear_tail(seed, size, classes), normal(seed + 2, 5, size)
    y = torch.arange(5) % classes
    policy = frfx.policy.joint(
        margin=gap, classes=classes, steps=60, tolerance=1e-9, unreached="ignore"
    )
    inverse = frfx.invert(model, 0, policy=policy)
    found = inverse(x, y)
    report = inverse.report["input"]
    weight, bias = model.fc.weight.detach().numpy(), model.fc.bias.detach().numpy()
    for k in range(5):
        others = [i for i in range(classes) if i != y[k]]
        rows = weight[y[k]] - weight[others]
        right = gap - (bias[y[k]] - bias[others]) - rows @ x[k].numpy()
        try:
            step = quadprog.solve_qp(np.eye(size), np.zeros(size), rows.T.copy(), right)[0]
        except ValueError:  # the label cannot win
            assert not report.reached[k]
            continue
        if np.linalg.norm(step) > 10 * np.linalg.norm(x[k].numpy()):
            continue  # further than the linearisation is trusted at once
        assert report.reached[k]
        if report.violation[k] > 1e-9:  # by a class that was not in the way, within the slack
            assert report.violation[k] <= 0.01 * gap
            assert report.deviation[k] <= np.linalg.norm(step)
            continue
        error = np.linalg.norm((found[k] - x[k]).numpy() - step)
        assert error <= 1e-6 * max(np.linalg.norm(step), 1e-3)


def test_whole_numbers_and_ties():
    model, x = linear_tail(3, 5, 4, integers), integers(9, 40, 5)
    y = torch.arange(40) % 4
    measured = frfx.measure(frfx.invert(model, 0, policy="joint"), x, y)
    assert measured.label_consistency == 1


def test_rows_whose_squares_underflow():
    model, x = linear_tail(5, 6, 3), normal(7, 30, 6)
    y = torch.arange(30) % 3
    small = copy.deepcopy(model).float()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1e-20)
    found = frfx.invert(small, 0, policy=frfx.policy.joint(margin=1e-22))(x.float(), y)
    expected = frfx.invert(model, 0, policy=frfx.policy.joint(margin=1e-2))(x, y)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def tanh_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 5)]
    return nn.Sequential(*layers).double().eval()


def polished(model: nn.Module, x: torch.Tensor, label: int, start: torch.Tensor, margin: float):
    """Return the deviation that SLSQP, SciPy's own, comes to from a feature that wins."""

    def surplus(a):
        with torch.no_grad():
            logits = model(torch.from_numpy(a))
        return np.delete((logits[label] - logits - margin).numpy(), label)

    def slope(a):
        rows = torch.autograd.functional.jacobian(model, torch.from_numpy(a)).numpy()
        return np.delete(rows[label] - rows, label, axis=0)

    found = minimize(
        lambda a: 0.5 * np.square(a - x.numpy()).sum(),
        start.numpy(),
        jac=lambda a: a - x.numpy(),
        constraints={"type": "ineq", "fun": surplus, "jac": slope},
        method="SLSQP",
        options={"maxiter": 200, "ftol": 1e-12},
    )
    return np.linalg.norm(found.x - x.numpy()) if surplus(found.x).min() > -1e-6 else np.inf


@pytest.mark.parametrize("seed", range(6))
def test_tanh_networks_against_slsqp(seed):
    """Nothing nearer is to be found around the result, nor by starting where it started."""
    model, x = tanh_network(seed), normal(seed, 24, 12)
    y = torch.arange(24) % 5
    policy = frfx.policy.joint(margin=0.05, steps=60, tolerance=1e-4, unreached="ignore")
    inverse = frfx.invert(model, 0, policy=policy)
    found = inverse(x, y)
    report = inverse.report["input"]
    assert report.reached.double().mean() > 0.75  # some classes of these networks never win
    ratios = []
    for k in report.reached.nonzero()[:, 0].tolist():
        logits = model(found[k]).detach()
        assert float((logits[y[k]] - logits)[torch.arange(5) != y[k]].min()) >= 0.05 * 0.98999
        around = polished(model, x[k], int(y[k]), found[k], 0.05)
        assert float(report.deviation[k]) <= max(1.005 * around, 1e-12)
        anew = polished(model, x[k], int(y[k]), x[k], 0.05)
        ratios.append(float(report.deviation[k]) / max(anew, 1e-12))
    ratios = [ratio for ratio in ratios if 0 < ratio < np.inf]
    assert np.median(ratios) <= 1.001
    assert np.mean(ratios) <= 1.01


class Pooled(nn.Module):
    """Max pooling in the tail: its winners change under a step."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3)
        self.second = nn.Conv2d(6, 6, 3)
        self.fc = nn.Linear(6 * 4, 6)

    def forward(self, x):
        x = torch.tanh(self.first(x) * 2)
        x = nn.functional.max_pool2d(x, 2)
        x = nn.functional.max_pool2d(torch.tanh(self.second(x) * 2), 2)
        return self.fc(x.flatten(1))


def test_the_safeguard_reaches_what_plain_steps_do_not(monkeypatch):
    torch.manual_seed(0)
    model, x, y = Pooled().eval(), torch.randn(100, 2, 14, 14), torch.arange(100) % 6
    policy = frfx.policy.joint(unreached="ignore", steps=30)
    safe = frfx.invert(model, 0, policy=policy)
    measured = frfx.measure(safe, x, y)
    assert measured.label_consistency == 1
    assert bool(safe.report["x"].reached.all())
    # Without cuts and restoration every step starts from a^ anew, and some winners swap for ever.
    monkeypatch.setattr("frfx.joint.sqp._PATIENCE", 10**6)
    solve = margin.MarginPoint.correct
    monkeypatch.setattr(
        margin.MarginPoint,
        "correct",
        lambda self, asked: solve(self, replace(asked, use_cut=torch.zeros_like(asked.use_cut))),
    )
    plain = frfx.invert(model, 0, policy=policy)
    plain(x, y)
    assert float(plain.report["x"].reached.double().mean()) < 0.9


def test_more_steps_come_nearer_and_never_go_back():
    torch.manual_seed(1)
    model, x, y = Pooled().eval(), torch.randn(60, 2, 14, 14), torch.arange(60) % 6
    reports = []
    for steps in (1, 2, 4, 8, 16, 32):
        inverse = frfx.invert(model, 0, policy=frfx.policy.joint(steps=steps, unreached="ignore"))
        inverse(x, y)
        reports.append(inverse.report["x"])
        assert int(reports[-1].steps.max()) <= steps
    for before, after in itertools.pairwise(reports):
        assert bool((after.reached | ~before.reached).all())
        nearer = (after.deviation <= before.deviation * 1.0001)[before.reached]
        assert bool(nearer.all())
        assert bool((after.violation <= before.violation)[~after.reached].all())
    both = reports[2].reached & (reports[2].steps > 2)
    assert float(reports[-1].deviation[both].mean()) < float(reports[2].deviation[both].mean())


def test_what_is_right_already_stays():
    model, x = tanh_network(0), normal(4, 50, 12)
    y = model(x).argmax(1)
    inverse = frfx.invert(model, 0, policy=frfx.policy.joint(margin=1e-9))
    assert torch.equal(inverse(x, y), x)
    report = inverse.report["input"]
    assert not report.steps.any()
    assert not report.deviation.any()
    assert "50 of 50 reached" in str(report)


def test_samples_do_not_touch_each_other():
    torch.manual_seed(0)
    model, x = Pooled().double().eval(), torch.randn(30, 2, 14, 14).double()
    y = torch.arange(30) % 6
    inverse = frfx.invert(model, 0, policy=frfx.policy.joint(unreached="ignore"))
    alone = torch.cat([inverse(x[k, None], y[k, None]) for k in range(30)])
    torch.testing.assert_close(inverse(x, y), alone)


def test_few_rows_for_many_classes(monkeypatch):
    """The rows of the Jacobian are those of the classes in the way, whatever the count of all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 1000)).eval()
    x = torch.randn(16, 40)
    y = model(x).topk(3).indices[:, 2]
    widths = []
    solve = margin.nearest_point_multipliers

    def watch(gram, bound, active):
        widths.append(gram.shape[-1])
        return solve(gram, bound, active)

    monkeypatch.setattr("frfx.joint.margin.nearest_point_multipliers", watch)
    inverse = frfx.invert(model, 0, policy=frfx.policy.joint(classes=5, steps=40))
    assert frfx.measure(inverse, x, y).label_consistency == 1
    assert max(widths) <= 6  # five classes and the cut
    assert bool(inverse.report["input"].reached.all())


def test_two_classes_and_one():
    for classes in (1, 2):
        model, x = linear_tail(0, 4, classes), normal(1, 6, 4)
        y = torch.arange(6) % classes
        assert frfx.measure(frfx.invert(model, 0, policy="joint"), x, y).label_consistency == 1


def test_who_is_not_asked_gets_no_correction():
    """Not even where the gradient is infinite."""
    constraint = margin.MarginConstraint(
        lambda a, rows: torch.stack([a.sqrt().sum(1), a.sum(1)], 1),
        torch.tensor([0, 0]), margin=0.1, slack=1e-3, classes=1,
    )  # fmt: skip
    point = constraint.linearise(
        torch.tensor([[0.0, 0], [4, 9]], dtype=torch.float64), torch.arange(2)
    )
    nothing, no = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.bool)
    zeros, asked = nothing[0], torch.tensor([False, True])
    found = point.correct(Subproblem(nothing, zeros + 1, nothing, zeros, no, asked, left=1))
    assert found[0].tolist() == [0, 0]
    row = torch.tensor([1 / 4 - 1, 1 / 6 - 1], dtype=torch.float64)
    expected = row * (13 - 5 + 0.1) / row.square().sum()
    torch.testing.assert_close(found[1], expected)
