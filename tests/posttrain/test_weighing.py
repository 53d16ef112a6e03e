"""How alpha weighs the reconstruction loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import frfx
from frfx import networks


def setup():
    torch.manual_seed(0)
    model = networks.build("digits").double()
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(n, 1, 8, 8, generator=generator).double(), torch.arange(n) % 10)
        for n in (12, 20, 8)
    ]
    return model, batches


@pytest.mark.parametrize("policy", ["paper", "minimal", "joint"])
def test_relative_divides_by_the_loss_before_training(policy):
    model, batches = setup()
    before = copy.deepcopy(model)
    reference = frfx.invert(before, 1, policy=policy)
    sums = count = 0
    options = {"upto_layer": 1, "alpha": 0.4, "policy": policy, "weighing": "relative"}
    with frfx.PostTraining(model, **options) as step:
        optimizer = torch.optim.SGD(step.trained_parameters(), lr=0.5)
        for i, (x, y) in enumerate(batches):
            target = reference(x, y)
            sums += float(F.mse_loss(before[:3](x), target).detach()) * len(x)
            count += len(x)
            losses = step(x, y)
            expected = F.mse_loss(model[:3](x), target)
            torch.testing.assert_close(losses.reconstruction, expected)
            relative = expected * count / sums
            if i == 0:
                torch.testing.assert_close(relative, torch.ones_like(relative))
            torch.testing.assert_close(losses.total, 0.6 * losses.classification + 0.4 * relative)
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(8), nn.Dropout(0.3)], ids=["norm", "dropout"])
@pytest.mark.parametrize("policy", ["paper", "joint"])
def test_relative_is_1_where_training_begins_in_its_mode(policy, layer):
    """What training mode alone adds to the loss is no less before training."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), copy.deepcopy(layer), nn.Tanh(), nn.Flatten(), nn.Linear(288, 10)
    )
    x, y = torch.randn(500, 1, 8, 8), torch.arange(500) % 10
    options = {"upto_layer": 1, "alpha": 0.5, "policy": policy, "weighing": "relative"}
    with frfx.PostTraining(model.eval(), **options) as step:
        buffers = [buffer.clone() for buffer in step.targets.inverse.model.buffers()]
        losses = step(x, y)
        relative = 2 * losses.total - losses.classification
        assert abs(float(relative.detach()) - 1) < 0.02  # two masks are not the same
        for before, now in zip(buffers, step.targets.inverse.model.buffers(), strict=True):
            assert torch.equal(before, now)


class Aliased(nn.Module):
    """Layers by two names, as where a model lists its own layers once more."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 5), norm, nn.Linear(5, 4)
        self.body = nn.Sequential(self.first, self.norm, nn.Tanh(), self.last)

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm1d(5)], ids=["none", "norm"])
def test_modules_by_two_names_are_trained(norm):
    model, x, y = Aliased(norm), torch.randn(16, 6), torch.arange(16) % 4
    parameters = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with frfx.PostTraining(model, upto_layer=1, alpha=0.5, weighing="relative") as step:
        optimizer = torch.optim.SGD(step.trained_parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            step(x, y).total.backward()
            optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    changed = [n for n, p in parameters.items() if not torch.equal(p, before[n])]
    assert "first.weight" in changed
    assert not any(name.startswith("last") for name in changed)


@pytest.mark.parametrize("move", ["not at all", "step", "model"])
def test_what_was_before_training_leaves_no_trace_in_the_statistics(move):
    found = []
    for weighing in ("paper", "relative"):
        model = Aliased(nn.BatchNorm1d(5))
        x, y = torch.randn(16, 6, generator=torch.Generator().manual_seed(3)), torch.arange(16) % 4
        with frfx.PostTraining(model, upto_layer=1, alpha=0.5, weighing=weighing) as step:
            if move != "not at all":
                (step if move == "step" else model).double()
                x = x.double()
            for _ in range(2):
                step(x, y)
        assert int(model.norm.num_batches_tracked) == 2
        found.append(model.norm.running_mean)
    torch.testing.assert_close(*found)


def test_relative_does_not_depend_on_the_unit_of_the_loss():
    model, ((x, y), *_) = setup()
    totals = []
    for unit in (1.0, 1e6):
        with frfx.PostTraining(
            copy.deepcopy(model),
            upto_layer=1,
            alpha=0.4,
            weighing="relative",
            reconstruction_loss=lambda a, t, unit=unit: unit * F.mse_loss(a, t),
        ) as step:
            totals.append(step(x, y).total)
    torch.testing.assert_close(totals[0], totals[1])


def test_targets_that_are_the_features_have_no_scale():
    model, ((x, y), *_) = setup()
    with frfx.PostTraining(model, upto_layer=1, alpha=0.4, weighing="relative") as step:
        losses = step(x, y, model[:3](x).detach())
    assert float(losses.reconstruction.detach()) == 0
    torch.testing.assert_close(losses.total, 0.6 * losses.classification)


def test_evaluation_leaves_the_scale():
    model, ((x, y), (other, labels), _) = setup()
    with frfx.PostTraining(model, upto_layer=1, alpha=0.4, weighing="relative") as step:
        first = step(x, y).total
        step.eval()
        step(other, labels)
        torch.testing.assert_close(step(x, y).total, first)


def test_unknown_weighing():
    model, batches = setup()
    with pytest.raises(frfx.TargetError, match=r'weighing is "paper" or "relative", not \'both\''):
        frfx.post_train(model, batches, upto_layer=1, weighing="both")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_post_train_passes_it_on():
    model, batches = setup()
    found = []
    for weighing in ("paper", "relative"):
        twin = copy.deepcopy(model)
        (record,) = frfx.post_train(
            twin, batches, upto_layer=1, alpha=0.4, epochs=1, policy="joint", weighing=weighing
        )
        found.append(record.loss)
    assert found[1] > found[0]  # joint targets lie close: as it is, the term would hardly count
