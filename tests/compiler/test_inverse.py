"""The emitted module: its values against dense code, its text, its copies, its compilation."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import frfx
from frfx import networks
from tests.oracles import circulant, embedding_by_quadprog, paper_convolution, relative


def small(seed: int = 0) -> nn.Sequential:
    """Return a network that takes images of any size from 6x6 on."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.Tanh(),
        nn.Conv2d(2, 3, 3),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 4),
    ).requires_grad_(False)


def batch(count: int = 5, size: int | tuple[int, int] = 9, dtype: torch.dtype = torch.float32):
    """Return images and labels."""
    generator = torch.Generator().manual_seed(count)
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(count, 1, height, width, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.arange(count) % 4


# --- against dense code ---


def mnist():
    """Return the paper's MNIST network in float64, images, and labels that it does not predict."""
    torch.manual_seed(0)
    model = networks.build("mnist").double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(1.7)
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    return model, x, (model(x).argmax(1) + torch.tensor([1, 4])) % 10


def by_hand(model: nn.Sequential, x, labels, clamp_margin: float) -> dict[str, tuple]:
    """Walk back through the paper's MNIST network: NumPy, dense matrices, and the printed formulas.

    Returns target and forward value of every node, from the logits to the input.
    """
    forward = {"input": x}
    for name, module in model.named_children():
        forward[name] = module(list(forward.values())[-1])
    had = {name: value.numpy() for name, value in forward.items()}
    weight = {name: value.numpy() for name, value in model.state_dict().items()}

    def untanh(target, name, before):
        end = 1 - clamp_margin
        wanted, reached = np.clip(target, -end, end), np.clip(had[name], -end, end)
        return np.where(wanted == reached, had[before], np.arctanh(wanted))

    star = {}
    star["fc1"] = np.stack(
        [embedding_by_quadprog(z, y, 0.0) for z, y in zip(had["fc1"], labels.tolist(), strict=True)]
    )
    residual = (star["fc1"] - had["fc1"]).T
    star["flatten"] = had["flatten"] + np.linalg.lstsq(weight["fc1.weight"], residual)[0].T
    star["tanh2"] = star["flatten"].reshape(had["tanh2"].shape)
    star["conv2"] = untanh(star["tanh2"], "tanh2", "conv2")
    star["pool1"] = paper_convolution(
        weight["conv2.weight"], weight["conv2.bias"], had["pool1"], star["conv2"]
    )
    star["tanh1"] = np.kron(star["pool1"], np.ones((2, 2)))
    star["conv1"] = untanh(star["tanh1"], "tanh1", "conv1")
    star["input"] = paper_convolution(
        weight["conv1.weight"], weight["conv1.bias"], had["input"], star["conv1"]
    )
    return {name: (value, had[name]) for name, value in star.items()}


def test_papers_mnist_network_against_dense_code():
    """Every node of the whole walk, from the labels to the input."""
    model, x, labels = mnist()
    expected = by_hand(model, x, labels, clamp_margin=1e-3)
    inverse = frfx.invert(model, 0)
    found = inverse.reconstruct(x, labels)
    assert list(found) == ["argmax", *expected]
    for name, (target, forward) in expected.items():
        assert relative(found[name].target, target) < 1e-9, name
        assert relative(found[name].forward, forward) < 1e-12, name
    torch.testing.assert_close(inverse(x, labels), found.feature, rtol=0, atol=0)
    for layer, name in enumerate(["input", "pool1", "tanh2", "fc1"]):
        result = frfx.invert(model, layer)(x, labels)
        assert relative(result, expected[name if layer != 2 else "flatten"][0]) < 1e-9


# --- reconstruct ---


def test_reconstruct_walks_from_the_output_to_the_layer():
    model = small()
    inverse = frfx.invert(model, 1)
    x, y = batch()
    found = inverse.reconstruct(x, y)
    assert list(found) == ["argmax", "6", "5", "4", "3", "2", "1"]
    assert len(found) == 7
    assert [node.op for node in found.values()] == [
        "argmax",
        "linear",
        "reshape",
        "adaptive_avg_pool",
        "tanh",
        "conv",
        "feature",
    ]
    torch.testing.assert_close(found["argmax"].target, y)
    torch.testing.assert_close(found["argmax"].forward, model(x).argmax(1))
    value = x
    for name, module in model.named_children():
        value = module(value)
        if name in found:
            torch.testing.assert_close(found[name].forward, value)
            assert found[name].target.shape == value.shape
            assert found[name].name == name
    torch.testing.assert_close(found.feature, inverse(x, y), rtol=0, atol=0)
    assert found.feature is found["1"].target
    assert "1: feature (5, 2, 7, 7)" in repr(found)
    with pytest.raises(KeyError):
        found["0"]


def test_reconstruct_each_target_follows_from_the_one_before():
    """The walk is a chain: cutting it at any node gives the same values behind the cut."""
    x, y = batch()
    whole = frfx.invert(small(), "input").reconstruct(x, y)
    for name in list(whole)[1:]:
        part = frfx.invert(small(), name)(x, y)
        torch.testing.assert_close(part, whole[name].target.to(part.dtype))


def test_reconstruct_from_scores():
    model = small()
    x, _ = batch()
    target = torch.randn(5, 4)
    found = frfx.invert(model, 1).reconstruct(x, target)
    assert list(found) == ["6", "5", "4", "3", "2", "1"]
    torch.testing.assert_close(found["6"].target, target)


class Headed(nn.Module):
    """Returns log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    def forward(self, x):
        return F.log_softmax(self.body(x), dim=-1)


def test_labels_pass_through_a_head():
    x, y = batch()
    expected = frfx.invert(small(), 1)(x, y)
    inverse = frfx.invert(Headed(), "body.1")
    torch.testing.assert_close(inverse(x, y), expected)
    assert "log_softmax" not in inverse.reconstruct(x, y)
    found = inverse.reconstruct(x, torch.log_softmax(torch.randn(5, 4), -1))
    assert next(iter(found)) == "log_softmax"


# --- text ---


def test_code_is_readable():
    inverse = frfx.invert(small(), 1)
    lines = [line.strip() for line in inverse.code.replace('"', "'").strip().splitlines()]
    assert lines[0] == "def forward(self, x, target):"
    calls = [line.partition(";")[0] for line in lines[1:]]
    assert calls == [
        "prepare = self.prepare(x, target)",
        "_0 = self.replaced._0(x)",
        "_1 = getattr(self.model, '1')(_0)",
        "_2 = self.replaced._2(_1)",
        "_3 = getattr(self.model, '3')(_2)",
        "_4 = getattr(self.model, '4')(_3)",
        "_5 = getattr(self.model, '5')(_4)",
        "_6 = getattr(self.model, '6')(_5)",
        "predicted_labels = frfx_rules_label_predicted_labels(_6, 1)",
        "argmax_inverse = self.inverse.argmax(prepare, predicted_labels, _6)",
        "_6_inverse = self.inverse._6(argmax_inverse, _6, _5)",
        "_5_inverse = self.inverse._5(_6_inverse, _5, _4)",
        "_4_inverse = self.inverse._4(_5_inverse, _4, _3)",
        "_3_inverse = self.inverse._3(_4_inverse, _3, _2)",
        "_2_inverse = self.inverse._2(_3_inverse, _2, _1)",
        "finish = self.finish(_2_inverse, _1)",
        "return finish",
    ]
    compile(inverse.code, "code", "exec")


def test_code_names_nodes_after_the_forward_ones():
    inverse = frfx.invert(networks.build("mnist"), "pool1")
    for name in ("fc1", "flatten", "tanh2", "conv2"):
        assert f"{name}_inverse = self.inverse.{name}(" in inverse.code
    assert "pool1_inverse" not in inverse.code
    assert isinstance(inverse, torch.fx.GraphModule)
    inverse.graph.lint()


def test_summary_before_and_after_the_first_call():
    inverse = frfx.invert(small(), 1)
    before = inverse.summary()
    assert [row.node for row in before] == ["argmax", "6", "5", "4", "3", "2"]
    assert [row.shapes for row in before] == [""] * 6
    assert [row.condition for row in before] == [None] * 6
    assert str(before).count("at the first call") == 6
    inverse(*batch())
    after = inverse.summary()
    assert [row.op for row in after][:2] == ["argmax", "linear"]
    assert [row.rule for row in after] == [
        "NearestEmbeddingRule",
        "LinearRule",
        "ReshapeRule",
        "AdaptiveAvgPoolRule",
        "ElementwiseRule(tanh)",
        "ConvolutionRule",
    ]
    solvers = [row.solver for row in after if row.condition is not None]
    assert solvers == ["dense", "separable", "spectral"]
    assert [row.shapes for row in after] == [
        "4 -> label",
        "3 -> 4",
        "3x1x1 -> 3",
        "3x5x5 -> 3x1x1",
        "3x5x5 -> 3x5x5",
        "2x7x7 -> 3x5x5",
    ]
    text = str(after)
    assert text.splitlines()[0] == "Inverse up to '1', traced by torch.fx"
    columns = ["node", "op", "rule", "solver", "shapes", "condition", "why"]
    assert text.splitlines()[1].split() == columns
    assert len(text.splitlines()) == 2 + len(after)
    inverse(*batch(2, (8, 12)))
    assert inverse.summary()[-1].shapes == "2x6x10 -> 3x4x8"


def test_condition_numbers_are_those_of_the_dense_operators():
    model = small().double()
    inverse = frfx.invert(model, 1)
    inverse(*batch(dtype=torch.float64))
    condition = {row.node: row.condition for row in inverse.summary()}
    assert condition["6"] == pytest.approx(np.linalg.cond(model[6].weight.numpy()))
    dense = circulant(model[2].weight.numpy(), (7, 7))
    assert condition["2"] == pytest.approx(np.linalg.cond(dense))


def test_example_input_makes_everything_ready(monkeypatch):
    inverse = frfx.invert(small(), 1, example_input=batch()[0])
    assert inverse.summary()[-1].condition > 1

    def forbidden(*_):
        raise AssertionError("factored again")

    monkeypatch.setattr(frfx.linalg.Spectral, "prepare", forbidden)
    monkeypatch.setattr(frfx.linalg.Dense, "prepare", forbidden)
    expected = frfx.invert(small(), 1)
    result = inverse(*batch())
    with pytest.raises(AssertionError, match="factored again"):
        inverse(*batch(5, 10))
    monkeypatch.undo()
    torch.testing.assert_close(result, expected(*batch()))


# --- copies and moves ---

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda inverse: pickle.loads(pickle.dumps(inverse)),
    "torch.save": lambda inverse: _saved_and_loaded(inverse),
    "twice": lambda inverse: copy.deepcopy(pickle.loads(pickle.dumps(inverse))),
}


def _saved_and_loaded(inverse):
    file = io.BytesIO()
    torch.save(inverse, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
@pytest.mark.parametrize("make", COPIES)
def test_copies_compute_the_same(make, called):
    policy = frfx.policy.minimal(damping=1e-3).override(node="6", rcond=1e-2)
    inverse = frfx.invert(small(), 1, policy=policy)
    inverse.factor_memory = 12345
    expected = frfx.invert(small(), 1, policy=policy)(*batch())
    if called:
        inverse(*batch())
    twin = COPIES[make](inverse)
    assert isinstance(twin, frfx.Inverse)
    assert twin.factor_memory == 12345
    assert twin.layer == inverse.layer
    torch.testing.assert_close(twin(*batch()), expected, rtol=0, atol=0)
    torch.testing.assert_close(inverse(*batch()), expected, rtol=0, atol=0)


def test_a_copy_shares_parameters_and_a_deep_copy_does_not():
    model = small()
    inverse = frfx.invert(model, 1)
    shallow, deep = copy.copy(inverse), copy.deepcopy(inverse)
    before = deep(*batch())
    torch.testing.assert_close(inverse(*batch()), before)
    model[6].weight.mul_(-2)
    expected = frfx.invert(model, 1)(*batch())
    torch.testing.assert_close(shallow(*batch()), expected)
    torch.testing.assert_close(inverse(*batch()), expected)
    torch.testing.assert_close(deep(*batch()), before)
    assert not torch.allclose(expected, before)


def test_deep_copy_together_with_its_model_stays_linked():
    """As when a trainer that holds both is copied."""
    pair = {"model": small()}
    pair["inverse"] = frfx.invert(pair["model"], 1)
    twin = copy.deepcopy(pair)
    twin["model"][6].weight.mul_(-2)
    expected = frfx.invert(twin["model"], 1)(*batch())
    torch.testing.assert_close(twin["inverse"](*batch()), expected)
    torch.testing.assert_close(pair["inverse"](*batch()), frfx.invert(small(), 1)(*batch()))


def test_moving_unlinks_from_the_model():
    model = small()
    inverse = frfx.invert(model, 1)
    moved = inverse.double()
    assert moved is inverse
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    x, y = batch(dtype=torch.float64)
    expected = frfx.invert(small().double(), 1)(x, y)
    torch.testing.assert_close(inverse(x, y), expected)
    model[6].weight.mul_(-2)
    torch.testing.assert_close(inverse(x, y), expected)
    assert inverse(x, y).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
def test_moving_to_another_dtype_is_inverting_the_moved_model(dtype, called):
    inverse = frfx.invert(small(), 1, policy="minimal")
    if called:
        inverse(*batch())
    x, y = batch(dtype=dtype)
    result = inverse.to(dtype)(x, y)
    assert result.dtype == dtype
    expected = frfx.invert(small().to(dtype), 1, policy="minimal")(x, y)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_moving_nowhere_keeps_the_link():
    model = small()
    inverse = frfx.invert(model, 1).to("cpu").float().to(torch.float32)
    model[6].weight.mul_(-2)
    torch.testing.assert_close(inverse(*batch()), frfx.invert(model, 1)(*batch()))


def test_moving_the_model_is_followed():
    """The inverse works on the model's own parameters, whatever becomes of them."""
    model = small()
    inverse = frfx.invert(model, 1)
    inverse(*batch())
    model.double()
    x, y = batch(dtype=torch.float64)
    torch.testing.assert_close(inverse(x, y), frfx.invert(model, 1)(x, y))
    model.float()
    torch.testing.assert_close(inverse(*batch()), frfx.invert(small(), 1)(*batch()))


def test_inverse_is_always_in_evaluation_mode():
    model = small().train()
    inverse = frfx.invert(model, 1)
    assert inverse.train() is inverse
    assert not any(module.training for module in inverse.modules())
    assert all(module.training for module in model.modules())


def test_inverse_as_a_submodule():
    """It takes part in its parent's moves and mode, and the model in none of them."""

    class Parent(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inverse = frfx.invert(model, 1)
            self.own = nn.Linear(1, 1)

    model = small()
    parent = Parent(model).train().double()
    assert model[0].weight.dtype == torch.float32
    assert parent.training
    assert not parent.inverse.training
    x, y = batch(dtype=torch.float64)
    torch.testing.assert_close(parent.inverse(x, y), frfx.invert(small().double(), 1)(x, y))


# --- calls ---


def test_results_do_not_depend_on_the_other_samples():
    inverse = frfx.invert(small().double(), 0)
    x, y = batch(6, dtype=torch.float64)
    whole = inverse(x, y)
    for i in range(6):
        torch.testing.assert_close(inverse(x[i : i + 1], y[i : i + 1]), whole[i : i + 1])


def test_right_labels_change_nothing():
    """The fixed point: a label that wins already is reached by no deviation."""
    model = small()
    x, _ = batch()
    predicted = model(x).argmax(1)
    for policy in ("paper", frfx.policy.minimal(margin=0.0)):
        found = frfx.invert(model, "0", policy=policy).reconstruct(x, predicted)
        torch.testing.assert_close(found.feature, found["0"].forward, rtol=0, atol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes(context):
    expected = frfx.invert(small(), 1)(*batch())
    model = small().requires_grad_(True)
    inverse = frfx.invert(model, 1)
    with context():
        result = inverse(*batch())
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(inverse(*batch()), expected)
    if context is not torch.enable_grad:
        assert not result.requires_grad
    assert not inverse.reconstruct(*batch()).feature.requires_grad


def test_inverse_made_in_inference_mode():
    with torch.inference_mode():
        model = small()
        inverse = frfx.invert(model, 1)
        before = inverse(*batch())
        model[6].weight.mul_(-2)  # such weights do not count their changes
        expected = frfx.invert(model, 1)(*batch())
        torch.testing.assert_close(inverse(*batch()), expected)
    assert not torch.allclose(before, expected)


def test_autocast_changes_the_forward_pass_only():
    x, y = batch()
    inverse = frfx.invert(small(), 1)
    expected = inverse(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = inverse(x, y)
    assert relative(result.float(), expected) < 0.05


def test_warm_calls_do_not_warn():
    inverse = frfx.invert(small(), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            inverse(*batch())


def test_many_calls_hold_no_more_memory_than_one():
    """Neither activations nor factors pile up."""
    inverse = frfx.invert(small(), 1)
    inverse(*batch())
    held = inverse.prepare.nbytes
    sizes = len(inverse.prepare.shapes)
    for count in (1, 2, 3, 4):
        inverse(*batch(count))
    assert inverse.prepare.nbytes == held
    assert len(inverse.prepare.shapes) == sizes


# --- torch.compile ---


@pytest.fixture(scope="module")
def compiled():
    """Return a model, its inverse, and the inverse compiled."""
    torch._dynamo.reset()
    model = small()
    inverse = frfx.invert(model, 1)
    return model, inverse, torch.compile(inverse, backend="aot_eager")


def test_compiled_equals_eager(compiled):
    _, inverse, fast = compiled
    torch.testing.assert_close(fast(*batch()), inverse(*batch()))
    scores = torch.randn(5, 4)
    torch.testing.assert_close(fast(batch()[0], scores), inverse(batch()[0], scores))


def test_compiled_follows_weights_and_sizes(compiled):
    model, _, fast = compiled
    for size in (9, (10, 11), 9):
        model[2].weight.mul_(1.3)
        model[6].weight = nn.Parameter(-model[6].weight.detach(), requires_grad=False)
        torch.testing.assert_close(fast(*batch(3, size)), frfx.invert(model, 1)(*batch(3, size)))


def test_compiled_when_factors_come_and_go(compiled):
    model, inverse, fast = compiled
    inverse.factor_memory = 0
    for size in (9, 12, 9, 12):
        torch.testing.assert_close(fast(*batch(3, size)), frfx.invert(model, 1)(*batch(3, size)))


def test_compiled_checks_its_arguments(compiled):
    _, _, fast = compiled
    x, y = batch()
    with pytest.raises(frfx.TargetError, match="out of range"):
        fast(x, y + 4)
    with pytest.raises(frfx.NonFiniteError, match="in the samples 0, 1"):
        fast(x * torch.nan, y)
    with pytest.raises(frfx.InputError, match="fails at '0'"):
        fast(x[:, :, :2], y)


# --- repetitions ---


class Again(nn.Module):
    """Uses one linear layer and one activation twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 6)
        self.act = nn.Tanh()
        self.out = nn.Linear(6, 4)
        self.requires_grad_(False)

    def forward(self, x):
        return self.out(self.act(self.fc(self.act(self.fc(x)))))


def test_reused_modules():
    """The same as two layers that happen to have equal weights."""
    model = Again()
    twice = nn.Sequential(
        copy.deepcopy(model.fc), nn.Tanh(), copy.deepcopy(model.fc), nn.Tanh(), model.out
    )
    x, y = 0.5 * torch.randn(5, 6), torch.arange(5) % 4
    inverse = frfx.invert(model, "x")
    torch.testing.assert_close(inverse(x, y), frfx.invert(twice, "input")(x, y))
    assert [row.node for row in inverse.summary()] == [
        "argmax",
        "out",
        "act_1",
        "fc_1",
        "act",
        "fc",
    ]
    model.fc.weight.mul_(1.5)
    twice[0].weight.mul_(1.5)
    twice[2].weight.mul_(1.5)
    torch.testing.assert_close(inverse(x, y), frfx.invert(twice, "input")(x, y))


class Awkward(nn.Module):
    """Its modules are called like parts of the inverse, or like attributes of modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        names = ["x", "target", "prepare", "finish", "model", "inverse", "argmax", "fc_inverse"]
        self.names = [*names, "training_", "forward_", "relu", "fc"]
        for name in self.names:
            self.add_module(name, nn.Linear(4, 4))
            nn.init.orthogonal_(getattr(self, name).weight)
        self.requires_grad_(False)

    def forward(self, x):
        for name in self.names:
            x = getattr(self, name)(x)
        return x


def test_names_do_not_collide():
    model = Awkward().double()
    twin = nn.Sequential(*(getattr(model, name) for name in model.names))
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 4
    inverse = frfx.invert(model, "x")
    torch.testing.assert_close(inverse(x, y), frfx.invert(twin, "input")(x, y))
    names = [re.sub(r"_1$", "", row.node) for row in inverse.summary()]
    assert names[1:] == [re.sub(r"_1$", "", name) for name in reversed(model.names)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layer", ["0", "2"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_feature_is_no_tensor_of_the_caller(layer, context, compiled):
    """Not where the walk back only reshapes the target, or there is none."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten())
    x, target = torch.randn(2, 1, 3, 3), torch.rand(2, 18)
    before = target.clone()
    inverse = frfx.invert(model, layer)
    with context():
        (torch.compile(inverse, backend="eager") if compiled else inverse)(x, target).zero_()
    assert torch.equal(target, before)


def test_a_target_of_another_type_has_its_gradient():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    x, gradients = torch.randn(2, 3), []
    for dtype in (torch.float32, torch.float64):
        target = model(x).detach().to(dtype).requires_grad_()
        frfx.invert(model, "1")(x, target + 0.1).square().sum().backward()
        gradients.append(target.grad.float())
    torch.testing.assert_close(*gradients)
