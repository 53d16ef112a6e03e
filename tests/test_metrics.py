"""The three numbers against their definitions."""

import linecache

import pytest
import torch

import frfx
from frfx import networks


@pytest.fixture
def model():
    torch.manual_seed(0)
    return networks.build("digits").double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(10, (30,), generator=generator)


@pytest.mark.parametrize("policy", ["paper", "minimal"])
def test_numbers_are_what_they_are_defined_as(model, batch, policy):
    x, y = batch
    inverse = frfx.invert(model, 1, policy=policy)
    found = frfx.measure(inverse, x, y)
    with torch.no_grad():
        a_hat, a_star = model[:3](x), inverse(x, y)
        kept = model[3:](a_star).argmax(1) == y
        deviation = (a_star - a_hat).flatten(1).norm(dim=1) / a_hat.flatten(1).norm(dim=1)
    assert torch.equal(found.consistent, kept)
    assert found.label_consistency == pytest.approx(kept.double().mean().item())
    torch.testing.assert_close(found.deviation, deviation)
    assert found.relative_deviation == pytest.approx(deviation.mean().item())
    assert found.deviation_quantiles([0.0, 0.5, 1.0]) == pytest.approx(
        [deviation.min().item(), deviation.quantile(0.5).item(), deviation.max().item()]
    )


def test_residuals_by_node(model, batch):
    x, y = batch
    inverse = frfx.invert(model, 1)
    nodes = inverse.reconstruct(x, y)
    by_node = {r.node: r for r in frfx.measure(inverse, x, y).residuals}
    assert list(by_node) == ["fc1", "flatten", "tanh2", "conv2"]
    reached = {
        "fc1": model.fc1(nodes["flatten"].target),
        "flatten": nodes["tanh2"].target.flatten(1),
        "tanh2": torch.tanh(nodes["conv2"].target),
        "conv2": model.conv2(nodes["pool1"].target),
    }
    for node, value in reached.items():
        residual = (value - nodes[node].target).flatten(1).norm(dim=1).detach()
        torch.testing.assert_close(by_node[node].residual, residual)
        scale = nodes[node].forward.flatten(1).norm(dim=1)
        assert by_node[node].relative == pytest.approx((residual / scale).mean().item())


def test_float_targets_have_no_label(model, batch):
    x, _ = batch
    found = frfx.measure(frfx.invert(model, 2), x, model(x).detach())
    assert found.label_consistency is None
    assert found.relative_deviation == pytest.approx(0, abs=1e-12)
    assert "label consistency   -" in str(found)


def test_batches_together_are_the_whole(model, batch):
    x, y = batch
    inverse = frfx.invert(model, 1)
    whole = frfx.measure(inverse, x, y)
    parts = frfx.Measurement.cat(
        [frfx.measure(inverse, x[:7], y[:7]), frfx.measure(inverse, x[7:], y[7:])]
    )
    torch.testing.assert_close(parts.deviation, whole.deviation)
    assert torch.equal(parts.consistent, whole.consistent)
    for a, b in zip(parts.residuals, whole.residuals, strict=True):
        torch.testing.assert_close(a.residual, b.residual)
    assert parts.relative_deviation == pytest.approx(whole.relative_deviation)
    assert _words(parts) == _words(whole)


def _words(measurement):
    """Return what is shown, without numbers: residuals that are rounding differ."""
    return [word for word in str(measurement).split() if not any(map(str.isdigit, word))]


def test_outputs_of_one_number_a_sample():
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    model.append(torch.nn.Flatten(0)).double()
    x, target = torch.randn(30, 5).double(), torch.randn(30).double()
    found = frfx.measure(frfx.invert(model, 1), x, target)
    assert [r.node for r in found.residuals] == ["3", "2"]
    assert found.residuals[-1].relative < 1e-12
    assert found.deviation.shape == (30,)


def test_nothing_of_nothing_is_no_deviation():
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    torch.nn.init.constant_(model[0].bias, -100)
    x = torch.randn(6, 5)
    deviation = frfx.measure(frfx.invert(model, 1, policy="minimal"), x, model(x)).deviation
    assert torch.equal(deviation, torch.zeros(6).double())
    target = model(x).detach() + 1
    deviation = frfx.measure(frfx.invert(model, 1, policy="minimal"), x, target).deviation
    assert deviation.isinf().all()


def test_measuring_compiles_no_code(model, batch):
    inverse = frfx.invert(model, 0)
    frfx.measure(inverse, *batch)
    before = len(linecache.cache)
    frfx.measure(inverse, *batch)
    assert len(linecache.cache) == before


def test_the_input_as_layer(model, batch):
    x, y = batch
    found = frfx.measure(frfx.invert(model, 0), x, y)
    assert found.layer == "input"
    assert [r.node for r in found.residuals][-1] == "conv1"


def test_measurements_of_no_layer_or_of_several():
    with pytest.raises(frfx.InputError, match="measurements of 0 layers"):
        frfx.Measurement.cat([])
