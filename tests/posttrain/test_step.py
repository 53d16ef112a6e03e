"""One step of post-training against Eq. 1-3 written out."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import frfx
from frfx import networks


@pytest.fixture
def model():
    torch.manual_seed(0)
    return networks.build("digits").double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(10, (12,), generator=generator)


def feature(model, x, layer):
    """The forward feature a_l, by the modules of the digits network themselves."""
    names = {0: 0, 1: 3, 2: 6, 3: 7}
    return model[: names[layer]](x)


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_loss_is_eq_1_to_3(model, batch, layer, policy):
    x, y = batch
    a_star = frfx.invert(copy.deepcopy(model), layer, policy=policy)(x, y).detach()
    rec = (feature(model, x, layer) - a_star).square().mean()
    cls = -F.log_softmax(model(x), 1)[torch.arange(len(y)), y].mean()
    with frfx.PostTraining(model, upto_layer=layer, alpha=0.3, policy=policy) as step:
        losses = step(x, y)
    torch.testing.assert_close(losses.reconstruction, rec)
    torch.testing.assert_close(losses.classification, cls)
    torch.testing.assert_close(losses.total, 0.7 * cls + 0.3 * rec)
    torch.testing.assert_close(losses.output, model(x))


def test_gradient_reaches_the_trained_layers_alone(model, batch):
    trained = [*model.conv2.parameters()]
    with frfx.PostTraining(model, freeze_upto=1, upto_layer=2, alpha=0.5) as step:
        assert [id(p) for p in step.trained_parameters()] == [id(p) for p in trained]
        step(*batch).total.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("conv2"), name


def test_alpha_0_is_backpropagation(model, batch):
    x, y = batch
    with frfx.PostTraining(model, upto_layer=2, alpha=0) as step:
        losses = step(x, y)
        gradients = torch.autograd.grad(losses.total, step.trained_parameters())
    assert losses.reconstruction is None
    expected = torch.autograd.grad(
        F.cross_entropy(model(x), y), [*model.conv1.parameters(), *model.conv2.parameters()]
    )
    torch.testing.assert_close(gradients, expected)


def test_alpha_1_does_not_run_the_tail(model, batch):
    x, y = batch
    a_star = frfx.invert(copy.deepcopy(model), 2)(x, y).detach()
    with frfx.PostTraining(model, upto_layer=2, alpha=1) as step:
        losses = step(x, y)
        gradients = torch.autograd.grad(losses.total, step.trained_parameters())
    assert losses.classification is None
    assert losses.output is None
    rec = F.mse_loss(feature(model, x, 2), a_star)
    expected = torch.autograd.grad(rec, [*model.conv1.parameters(), *model.conv2.parameters()])
    torch.testing.assert_close(gradients, expected)


def test_targets_are_those_of_the_network_before_training(model, batch):
    x, y = batch
    before = frfx.invert(copy.deepcopy(model), 2)(x, y)
    with frfx.PostTraining(model, upto_layer=2, alpha=0.5) as step:
        optimizer = torch.optim.SGD(step.trained_parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            step(x, y).total.backward()
            optimizer.step()
        torch.testing.assert_close(step.targets(x, y), before)
    assert not torch.allclose(frfx.invert(model, 2)(x, y), before)


def test_a_changed_tail_is_noticed(model, batch):
    x, y = batch
    reference = copy.deepcopy(model)
    with frfx.PostTraining(model, upto_layer=2, alpha=0.5) as step:
        step(x, y)
        with torch.no_grad():
            model.fc1.weight.mul_(1.5)
            reference.fc1.weight.mul_(1.5)
        torch.testing.assert_close(step.targets(x, y), frfx.invert(reference, 2)(x, y))


@pytest.mark.parametrize("fails", [False, True])
def test_flags_and_modes_come_back(model, batch, fails):
    model.train()
    model.conv1.bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    try:
        with frfx.PostTraining(model, freeze_upto=1, upto_layer=2) as step:
            assert not model.fc1.weight.requires_grad
            step(*batch)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert {name: m.training for name, m in model.named_modules()} == modes


def test_a_block_that_is_entered_again_freezes_again(model, batch):
    before = copy.deepcopy(model)
    step = frfx.PostTraining(model, upto_layer=1)
    assert not model[6].weight.requires_grad
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    for _ in range(2):
        with step:
            assert not model[6].weight.requires_grad
            step(*batch).total.backward()
            optimizer.step()
        assert model[6].weight.requires_grad
        assert torch.equal(model[6].weight, before[6].weight)
        assert not torch.equal(model[0].weight, before[0].weight)


def test_modes_that_a_graph_does_not_follow_are_told():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x):
            if x.shape[1] != 8:  # what symbolic tracing cannot follow
                raise ValueError
            return self.b(F.dropout(torch.tanh(self.norm(self.a(x))), 0.1, self.training))

    text = r"torch\.export has traced '.*norm.*' of the trained layers as functions"
    with pytest.warns(frfx.ModeWarning, match=text):
        frfx.PostTraining(Net().eval(), upto_layer="tanh", example_input=torch.randn(4, 8))


def test_a_failing_start_freezes_nothing(model):
    model.fc1 = nn.Sequential(nn.Linear(64, 10), nn.GLU())  # GLU has no rule
    with pytest.raises(frfx.UnsupportedOpsError):
        frfx.PostTraining(model, upto_layer=1)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("start", "end", "text"),
    [
        (2, 1, "must lie before"),
        (1, 1, "must lie before"),
        ("conv2", "tanh2", "no parameter to train"),
        (0, 9, "has the layers 0"),
    ],
)
def test_layers_that_cannot_be_trained(model, start, end, text):
    with pytest.raises(frfx.LayerError, match=text):
        frfx.PostTraining(model, freeze_upto=start, upto_layer=end)
    assert all(p.requires_grad for p in model.parameters())


def test_tied_weights_cannot_be_trained_and_frozen():
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    tied = nn.Sequential(first, nn.Tanh(), second)
    with pytest.raises(frfx.LayerError, match=r"0\.weight.*trained and by the frozen"):
        frfx.PostTraining(tied, upto_layer=1)


def test_what_a_weight_is_computed_of_is_trained():
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.Tanh(), weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)
    model = nn.Sequential(*layers)
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    with frfx.PostTraining(model, freeze_upto=1, upto_layer=2, alpha=1, policy="joint") as step:
        trained = step.trained_parameters()
        assert {id(p) for p in trained} == set(map(id, layers[2].parameters()))
        assert len(trained) == 3
        step(x, y).total.backward()
        assert all(p.grad is not None and p.grad.any() for p in trained)


def test_alpha_out_of_range(model):
    with pytest.raises(frfx.FrfxError, match=r"\[0, 1\]"):
        frfx.PostTraining(model, upto_layer=1, alpha=1.5)


def test_batch_norm_learns_its_statistics_where_it_is_trained():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(),
        nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5),
    ).eval()  # fmt: skip
    x, y = 2 + torch.randn(16, 1, 8, 8), torch.randint(5, (16,))
    statistics = model[1].running_mean.clone(), model[4].running_mean.clone()
    expected = copy.deepcopy(model)
    expected[1].train()
    with frfx.PostTraining(model, upto_layer=1, alpha=0.5) as step:
        losses = step(x, y)
        torch.testing.assert_close(losses.output, expected(x))
        torch.testing.assert_close(model[1].running_mean, expected[1].running_mean)
        assert not torch.equal(model[1].running_mean, statistics[0])
        assert torch.equal(model[4].running_mean, statistics[1])
        step.eval()
        again = step(x, y).output
    torch.testing.assert_close(again, model(x))
    assert not model[1].training


class SharedDropout(nn.Module):
    """Calls one dropout in two layers."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(6, 40), nn.Linear(40, 40), nn.Dropout(0.5)
        self.head = nn.Linear(40, 3)

    def forward(self, x):
        x = self.drop(torch.tanh(self.fc1(x)))
        return self.head(self.drop(torch.tanh(self.fc2(x))))


def test_a_module_that_frozen_layers_call_too_is_in_evaluation_mode_there():
    torch.manual_seed(0)
    model = SharedDropout().eval()
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    with frfx.PostTraining(model, upto_layer=1, alpha=0) as step:
        torch.manual_seed(1)
        output = step(x, y).output
        torch.manual_seed(1)
        first = F.dropout(torch.tanh(model.fc1(x)), 0.5)
        torch.testing.assert_close(output, model.head(torch.tanh(model.fc2(first))))
        step.eval()
        torch.testing.assert_close(step(x, y).output, model(x))


@pytest.mark.parametrize("affine", [True, False])
def test_statistics_that_frozen_layers_use_too_are_refused(affine):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = (nn.Linear(4, 4) for _ in range(3))
            self.norm = nn.BatchNorm1d(4, affine=affine)
            self.norm.requires_grad_(False)

        def forward(self, x):
            return self.last(self.norm(self.second(self.norm(self.first(x)))))

    model = Shared()
    with pytest.raises(frfx.LayerError, match=r"norm.* used by the trained and by the frozen"):
        frfx.PostTraining(model, freeze_upto=1, upto_layer=2)
    assert model.first.weight.requires_grad


def test_the_train_of_the_model_is_not_called(model, batch):
    class Merging(nn.Linear):
        def train(self, mode=True):
            with torch.no_grad():
                self.weight.zero_()
            return super().train(mode)

    model.fc1 = Merging(64, 10).double()
    before = copy.deepcopy(model.fc1.weight)
    with frfx.PostTraining(model, upto_layer=2, alpha=0) as step:
        step.eval()
        step(*batch)
    assert torch.equal(model.fc1.weight, before)


def test_the_front_is_the_input_where_layers_have_no_numbers():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(x + torch.tanh(self.a(x)))

    model = Residual()
    with frfx.PostTraining(model, upto_layer="tanh", alpha=0) as step:
        assert [id(p) for p in step.trained_parameters()] == [*map(id, model.a.parameters())]


@pytest.mark.parametrize("alpha", [0, 0.5])
def test_a_graph_that_is_not_the_model_is_refused(alpha):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x):
            h = self.a(x)
            return self.b(torch.tanh(h) if type(x) is torch.Tensor else h)

    model = Branching()
    with frfx.PostTraining(model, upto_layer="a", alpha=alpha) as step:
        with pytest.raises(frfx.TraceMismatchError, match="does not compute what the model"):
            step(torch.randn(8, 6), torch.randint(3, (8,)))
        assert torch.equal(model.a.running_mean, torch.zeros(6))


def test_targets_that_do_not_fit_the_feature(model, batch):
    x, y = batch
    with frfx.PostTraining(model, upto_layer=1, alpha=0.5) as step:
        with pytest.raises(frfx.TargetError, match=r"\(12, 1\).*\(12, 8, 3, 3\)"):
            step(x, y, x.new_zeros(12, 1))
        with pytest.raises(frfx.TargetError, match="is out of range"):
            step(x, y + 5)


def test_float_labels_mean_one_thing(model, batch):
    """Probabilities to one loss, logits to the other: unless a softmax stands behind these."""
    x, y = batch
    soft = F.one_hot(y, 10).to(x.dtype)
    options = {"upto_layer": 1, "alpha": 0.5}
    with frfx.PostTraining(model, **options) as step:
        with pytest.raises(frfx.TargetError, match="reads float labels as probabilities"):
            step(x, soft)
        step(x, soft, target=step(x, y).output.new_zeros(()).expand(feature(model, x, 1).shape))
    with frfx.PostTraining(model, classification_loss=F.mse_loss, **options) as step:
        step(x, soft)
    behind = nn.Sequential(*model, nn.Softmax(1))
    with frfx.PostTraining(behind, **options) as step:
        step(x, 0.9 * soft + 0.01)
    logarithms = nn.Sequential(*model, nn.LogSoftmax(1))
    refused = pytest.raises(frfx.TargetError, match="which does not end in softmax")
    with frfx.PostTraining(logarithms, **options) as step, refused:
        step(x, soft)
    for targets in ("cache", "recompute"):
        with pytest.raises(frfx.TargetError, match="reads float labels as probabilities"):
            frfx.post_train(model, [(x, soft)], epochs=1, targets=targets, **options)


def test_targets_by_themselves(model, batch):
    with frfx.PostTraining(model, upto_layer=2, alpha=0.5) as step:
        expected = frfx.invert(copy.deepcopy(model), 2)(*batch)
        torch.testing.assert_close(step.reconstruct(*batch), expected)
    refused = pytest.raises(frfx.TargetError, match="nothing is reconstructed")
    with frfx.PostTraining(model, upto_layer=2, alpha=0) as step, refused:
        step.reconstruct(*batch)


def test_a_network_of_two_types_keeps_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(1))
    model.append(nn.Linear(144, 5)).to(torch.bfloat16).eval()
    model[1].float()
    x, y = torch.randn(8, 1, 8, 8, dtype=torch.bfloat16), torch.randint(5, (8,))
    with frfx.PostTraining(model, freeze_upto="0", upto_layer=1, alpha=0.5) as step:
        expected = frfx.invert(copy.deepcopy(model), 1)(x, y)
        assert torch.equal(step.targets(x, y), expected)
        assert step.targets.inverse.model.get_buffer("1.running_var").dtype == torch.float32
        step.double()
        assert step.targets(x.double(), y).dtype == torch.float64


def test_constants_of_the_forward_move_with_the_step():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)) * torch.tensor([1.0, 2, 3, 4, 5, 6]))

    with frfx.PostTraining(Scaled(), upto_layer="a", alpha=0.5) as step:
        step.double()
        step(torch.randn(4, 6).double(), torch.arange(4) % 3)
        assert {b.dtype for b in step.targets.inverse.model.buffers()} == {torch.float64}


def test_moving_the_step_moves_model_and_targets_together(model, batch):
    x, y = batch
    with frfx.PostTraining(model, upto_layer=2, alpha=0.5) as step:
        expected = step(x, y).total
        step.float()
        assert model.conv1.weight.dtype == torch.float32
        got = step(x.float(), y).total
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)
