"""Branching networks at work: layouts, sizes, types, changing weights, copies, compilation."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import frfx
from frfx import vocabulary
from tests.branch_walks import A, B, Blocks, by_sample, exact, near, residual_block
from tests.networks_zoo import snapshot
from tests.oracles import Apply, invert, jacobian, normal, relative

BRANCHES = ["region", "rules"]


@pytest.mark.parametrize("layer", ["stem", "tanh", "add_1", "mid"])
@pytest.mark.parametrize("branches", BRANCHES)
def test_the_model_is_untouched(branches, layer):
    model, x = Blocks(), normal(0, 4, 6)
    before = snapshot(model)
    inverse = frfx.invert(model, layer, policy=exact(branches))
    inverse(x, torch.arange(4))
    frfx.measure(inverse, x, near(model, x))
    assert snapshot(model) == before
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


# --- where the batch is not the first dimension ---


class SequenceFirst(nn.Module):
    """A transformer layer on (L, N, C), as torch's own are by default, and a classifier."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, norm_first=norm_first)
        self.fc = nn.Linear(30, 4)
        self.double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x.transpose(0, 1))
        return self.fc(x.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_region_whose_batch_is_the_second_dimension(norm_first, count):
    """As many samples as tokens among them, so that no size tells which is which."""
    model, x = SequenceFirst(norm_first).eval(), normal(0, count, 5, 6)
    inverse = frfx.invert(model, "transpose", policy=exact())
    nodes = inverse.reconstruct(x, near(model, x))
    feature = x.transpose(0, 1)
    assert torch.equal(nodes["transpose"].forward, feature)
    regions = [step for step in inverse.plan.steps if step.op.type is vocabulary.region]
    assert len(regions) == 2
    step = regions[-1]
    assert step.op.module is not None
    found = nodes.feature - feature
    asked = nodes[step.op.path].target - nodes[step.op.path].forward
    for k in range(count):
        matrix = jacobian(step.op.module, feature[:, k : k + 1])
        expected = np.linalg.pinv(matrix, rcond=1e-10) @ asked[:, k].numpy().ravel()
        assert relative(found[:, k].reshape(-1), expected) < 1e-6


def test_frames_that_are_folded_into_the_batch():
    """Two frames a clip see each other, half a batch apart from none."""

    def function(x: Tensor, a: Tensor) -> Tensor:
        frames = x.reshape(-1, 6)
        pairs = frames.reshape(-1, 2, 6).flip(1).reshape(-1, 6)
        return (frames + F.linear(pairs, a)).reshape(-1, 2, 6)

    x, wanted = normal(0, 4, 2, 6), normal(1, 4, 2, 6)
    inverse = invert(function, exact(), a=A)
    found = inverse(x, function(wanted, A))
    assert relative(found, by_sample(lambda v: function(v, A), x, function(wanted, A))) < 1e-8
    weight = torch.zeros(6, 6, dtype=torch.float64)
    model = Apply(function, a=weight).eval()  # as of layers that begin as the identity
    inverse = frfx.invert(model, "x", policy=exact())
    assert relative(inverse(x, wanted), wanted) < 1e-12
    with torch.no_grad():
        model.a.copy_(A)
    assert relative(inverse(x, function(wanted, A)), found) < 1e-8


# --- sizes, types, modes ---


class Convolutions(nn.Module):
    """A residual block of images of any size, a gate over channels, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 3, padding=1)
        self.gate, self.fc = nn.Linear(3, 3), nn.Linear(3, 4)
        self.double()

    def block(self, x: Tensor) -> Tensor:
        """The residual block."""
        return x + torch.tanh(self.conv(x))

    def gated(self, x: Tensor) -> Tensor:
        """The gate."""
        return x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        x = self.gated(torch.tanh(self.block(self.stem(x))))
        return self.fc(x.mean((2, 3)))


def check_convolutions(model: Convolutions, inverse: frfx.Inverse, x: Tensor) -> None:
    """Assert that both regions are solved exactly, at the weights as they are."""
    nodes = inverse.reconstruct(x, near(model, x).detach())
    for start, end, function in [("tanh_1", "mul", model.gated), ("stem", "add", model.block)]:
        expected = by_sample(function, nodes[start].forward, nodes[end].target)
        assert relative(nodes[start].target, expected) < 1e-6


def test_images_that_change_their_size_and_weights_that_change():
    model = Convolutions().eval()
    inverse = frfx.invert(model, "stem", policy=exact())
    for count, height, width in [(2, 4, 4), (1, 3, 5), (3, 4, 4), (2, 4, 4)]:
        check_convolutions(model, inverse, normal(count, count, 1, height, width))
    with torch.no_grad():
        model.conv.weight.mul_(-1.5)
        model.gate.bias.add_(1)
    check_convolutions(model, inverse, normal(0, 2, 1, 4, 4))
    model.conv.weight = nn.Parameter(normal(5, 3, 3, 3, 3) / 3)
    check_convolutions(model, inverse, normal(0, 2, 1, 4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(normal(0, 2, 1, 4, 4)).square().sum().backward()
    optimizer.step()
    check_convolutions(model, inverse, normal(0, 2, 1, 4, 4))


@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision(branches, dtype):
    """The steps are solved in single precision, from the rounded weights and forward values."""
    model, x = Blocks(), normal(0, 4, 6)
    low = copy.deepcopy(model).to(dtype)
    policy = frfx.policy.minimal(branches=branches).override(
        op=vocabulary.region, damping=1e-2, tolerance=1e-5
    )
    expected = frfx.invert(model, "stem", policy=policy)(x, near(model, x))
    found = frfx.invert(low, "stem", policy=policy)(x.to(dtype), near(model, x).to(dtype))
    assert found.dtype == dtype
    step, exact_step = found.double() - low.stem(x.to(dtype)).double(), expected - model.stem(x)
    assert relative(step, exact_step) < (1e-3 if dtype == torch.float32 else 0.3)


@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda m: m.__name__
)
def test_modes_of_autograd(branches, mode):
    model, x = Blocks(), normal(0, 4, 6)
    target = near(model, x)
    inverse = frfx.invert(model, "stem", policy=exact(branches))
    expected = inverse(x, target)
    fresh = frfx.invert(model, "stem", policy=exact(branches))
    with mode():
        found = fresh(x.clone(), target.clone())
    assert relative(found.clone(), expected) < 1e-14
    assert relative(fresh(x, target), expected) < 1e-14  # nothing of the mode is left in it


def test_autocast_is_left_out():
    model, x = Blocks().float(), normal(0, 4, 6).float()
    policy = frfx.policy.minimal().override(op=vocabulary.region, tolerance=1e-5)
    inverse = frfx.invert(model, "stem", policy=policy)
    expected = inverse(x, torch.arange(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = inverse.get_submodule("inverse.add_1")(*(normal(i, 4, 6).float() for i in range(3)))
    again = inverse.get_submodule("inverse.add_1")(*(normal(i, 4, 6).float() for i in range(3)))
    assert torch.equal(step, again)
    assert torch.equal(inverse(x, torch.arange(4)), expected)


# --- nothing stays behind ---


def test_a_region_keeps_nothing_between_calls():
    model = Convolutions().eval()
    inverse = frfx.invert(model, "stem", policy=exact())
    region = inverse.get_submodule("inverse.add")
    feature, output = normal(0, 2, 3, 4, 4), normal(1, 2, 3, 4, 4)
    kept = [weakref.ref(feature), weakref.ref(output)]
    result = region(normal(2, 2, 3, 4, 4), output, feature)
    kept.append(weakref.ref(result))
    del feature, output, result
    gc.collect()
    assert [reference() for reference in kept] == [None] * 3
    held = sum(
        isinstance(found, Tensor) and found.shape == (2, 3, 4, 4) for found in gc.get_objects()
    )
    assert held == 0


def test_no_gradients_are_left_in_the_model():
    model = Convolutions().eval()
    x = normal(0, 2, 1, 4, 4).requires_grad_()
    found = frfx.invert(model, "stem", policy=exact())(x, torch.arange(2))
    assert found.shape == (2, 3, 4, 4)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert x.grad is None


# --- copies, compilation, post-training, the three numbers ---


@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize(
    "copied", [lambda i: pickle.loads(pickle.dumps(i)), copy.deepcopy, copy.copy], ids=range(3)
)
def test_copies_of_an_inverse(branches, copied):
    model, x, labels = Blocks(), normal(0, 4, 6), torch.arange(4)
    policy = exact(branches, trust_region=0.5).override(node="add_1", branches="region")
    inverse = frfx.invert(model, "stem", policy=policy)
    expected = inverse(x, labels)
    twin = copied(inverse)
    assert twin.code == inverse.code
    assert torch.equal(twin(x, labels), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_inverse():
    """Regions break the graph; what they have to say of convergence is said all the same."""
    model, x, labels = Blocks(), normal(0, 4, 6), torch.arange(4)
    inverse = frfx.invert(model, "stem", policy=exact())
    expected = inverse(x, labels)
    compiled = torch.compile(inverse, backend="eager")
    assert relative(compiled(x, labels), expected) < 1e-12
    policy = exact().override(
        op=vocabulary.region, tolerance=1e-12, max_steps=1, unconverged="raise"
    )
    torch.compiler.reset()
    compiled = torch.compile(frfx.invert(model, "stem", policy=policy), backend="eager")
    with pytest.raises(frfx.ConvergenceError, match="after 1 steps"):
        compiled(x, labels)


@pytest.mark.parametrize("branches", BRANCHES)
def test_post_training_a_network_that_branches(branches):
    model = Convolutions().float()
    x, labels = normal(0, 12, 1, 4, 4).float(), torch.arange(12) % 4
    loader = [(x[i : i + 4], labels[i : i + 4]) for i in range(0, 12, 4)]
    frozen = {name: p.clone() for name, p in model.named_parameters() if "stem" in name}
    before = model.conv.weight.clone()
    policy = frfx.policy.minimal(branches=branches, trust_region=0.5)
    history = frfx.post_train(
        model,
        loader,
        freeze_upto="stem",
        upto_layer="add",
        alpha=0.5,
        epochs=2,
        policy=policy,
    )
    assert np.isfinite([epoch.loss for epoch in history]).all()
    assert not torch.equal(model.conv.weight, before)
    for name, parameter in model.named_parameters():
        assert bool(parameter.isfinite().all())
        assert name not in frozen or torch.equal(parameter, frozen[name])


@pytest.mark.parametrize("branches", BRANCHES)
def test_residuals_by_node(branches):
    """`||f(x*) - y*||`, at the inputs that the walk has found, parts of a tuple among them."""

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        left, right = residual_block(x, a).chunk(2, 1)
        return torch.cat([F.linear(left, b), torch.tanh(right)], 1)

    x, b = normal(0, 4, 6), B[:2, :3]
    target = near(function, x, a=A, b=b).clamp(-0.9, 0.9)
    inverse = invert(function, exact(branches), a=A, b=b)
    nodes = inverse.reconstruct(x, target)
    measured = {row.node: row for row in frfx.measure(inverse, x, target).residuals}
    assert [*measured] == [n for n in nodes if n in measured]
    known = {"linear": lambda h: F.linear(h, A), "linear_1": lambda h: F.linear(h, b)}
    known |= {"tanh": torch.tanh, "tanh_1": torch.tanh}
    reads = {"linear": "x", "tanh": "linear", "linear_1": "getitem", "tanh_1": "getitem_1"}
    if branches == "region":
        assert [*measured] == ["cat", "add"]
        missing = residual_block(nodes["x"].target, A) - nodes["add"].target
        torch.testing.assert_close(measured["add"].residual, missing.norm(dim=1))
        return
    assert {"cat", "linear_1", "tanh_1", "add"} <= measured.keys()
    for name in measured.keys() & known.keys():
        missing = known[name](nodes[reads[name]].target) - nodes[name].target
        torch.testing.assert_close(measured[name].residual, missing.norm(dim=1))
    assert float(measured["linear_1"].residual.max()) < 1e-12
    assert float(measured["tanh_1"].residual.max()) < 1e-12


def test_deep_networks_stay_finite():
    """Errors that grow from block to block are bounded by damping and the trust region."""
    torch.manual_seed(0)

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(60))
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + torch.tanh(3 * block(x))
            return self.fc(x)

    model, x, labels = Deep().eval(), normal(0, 4, 6).float(), torch.arange(4)
    policy = frfx.policy.minimal(trust_region=0.1)
    policy = policy.override(op=vocabulary.region, unconverged="ignore")
    measured = frfx.measure(frfx.invert(model, "x", policy=policy), x, labels)
    assert len(measured.residuals) == 61
    assert all(bool(row.residual.isfinite().all()) for row in measured.residuals)
    assert float(measured.deviation.max()) <= 0.1 * (1 + 1e-5)


def chain(activation: type[nn.Module]) -> nn.Sequential:
    """Return 120 linear layers that each forget some of their input, and a head."""
    torch.manual_seed(0)
    layers = [module for _ in range(120) for module in (nn.Linear(16, 16), activation())]
    return nn.Sequential(*layers, nn.Linear(16, 4)).eval()


@pytest.mark.parametrize("policy", [frfx.policy.paper, frfx.policy.minimal])
def test_errors_of_a_hundred_layers_are_visible_and_bounded(policy):
    """Their growth shows node by node; damping slows it down, and a trust region ends it."""
    x, labels = normal(0, 4, 16).float(), torch.arange(4)
    model, worst = chain(nn.Tanh), {}
    for damping in (0.0, 1e-2):
        measured = frfx.measure(frfx.invert(model, "0", policy=policy(damping=damping)), x, labels)
        assert len(measured.residuals) == 240
        assert all(bool(row.residual.isfinite().all()) for row in measured.residuals)
        worst[damping] = max(row.relative for row in measured.residuals)
    assert worst[0.0] > 1e3
    assert worst[1e-2] < 0.1 * worst[0.0]
    model = chain(nn.ReLU)
    with pytest.raises(frfx.NonFiniteError, match=r"the inverse of '\d+' gives .* trust_region="):
        frfx.invert(model, "0", policy=policy())(x, labels)
    inverse = frfx.invert(model, "0", policy=policy(trust_region=0.3))
    measured = frfx.measure(inverse, x, labels)
    assert all(bool(row.residual.isfinite().all()) for row in measured.residuals)
    for node in inverse.reconstruct(x, labels).values():
        if node.op != "argmax" and node.name != "240":  # what the labels ask for
            moved = (node.target - node.forward).norm(dim=1)
            assert bool((moved <= 0.3 * (1 + 1e-5) * node.forward.norm(dim=1)).all())


class Spectrum(nn.Module):
    """Features from the absolute values of a Fourier transform."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.fft.rfft(self.first(x)).abs())


def test_complex_values_are_solved_through_or_refused():
    model, x, y = Spectrum().eval(), torch.randn(4, 6), torch.arange(4) % 3
    rule = frfx.rules.RegionRule()
    alone = frfx.policy.minimal().override(node="fft_rfft", rule=rule)
    for policy, layer in ((alone, "first"), ("joint", "fft_rfft"), ("minimal", "fft_rfft")):
        with pytest.raises(frfx.UnsupportedOpsError, match="values are complex numbers"):
            frfx.invert(model, layer, policy=policy)(x, y)
    assert frfx.invert(model, "first", policy="joint")(x, y).shape == (4, 8)
