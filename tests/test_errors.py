"""Bad input: every message names the node, the shapes or the samples, and the way out."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import frfx
from frfx import errors
from tests.oracles import relative


def network() -> nn.Sequential:
    """Return a small network of 1x10x10 images and four classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.LeakyReLU(0.3),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 2),
        nn.LeakyReLU(0.3),
        nn.Flatten(),
        nn.Linear(18, 4),
    ).requires_grad_(False)


def batch(count: int = 5):
    """Return images and labels."""
    torch.manual_seed(count)
    return torch.randn(count, 1, 10, 10), torch.arange(count) % 4


def message(error: type[Exception], call, *args) -> str:
    """Return what a failing call says."""
    with pytest.raises(error) as caught:
        call(*args)
    return str(caught.value)


# --- targets ---

BAD_TARGETS = {
    "too large": (
        torch.tensor([0, 1, 7, 3, 0]),
        r"label 7 at position \[2\] is out of range: the network has 4 classes, 0 to 3",
    ),
    "negative": (
        torch.tensor([0, 1, 2, 3, -1]),
        r"label -1 at position \[4\] is out of range: the network has 4 classes, 0 to 3",
    ),
    "float labels": (
        torch.zeros(5),
        r"a float target has the shape of the output, \(5, 4\), not \(5,\); labels have an integer",
    ),
    "bool": (torch.zeros(5, dtype=torch.bool), "labels have an integer dtype, not torch.bool"),
    "complex": (torch.zeros(5, dtype=torch.complex64), "integer dtype, not torch.complex64"),
    "too few": (
        torch.zeros(3, dtype=torch.long),
        r"labels of shape \(3,\) do not fit logits of shape \(5, 4\): expected \(5,\)",
    ),
    "column": (torch.zeros(5, 1, dtype=torch.long), r"shape \(5, 1\) .* expected \(5,\)"),
    "scalar": (torch.tensor(1), r"shape \(\) .* expected \(5,\)"),
    "scores of too few classes": (torch.zeros(5, 3), r"\(5, 4\), not \(5, 3\)"),
    "scores of too few samples": (torch.zeros(4, 4), r"\(5, 4\), not \(4, 4\)"),
    "NaN": (torch.full((5, 4), math.nan), "the target holds NaN or infinity, in the samples 0, 1"),
    "a list": ([0, 1, 2, 3, 0], "expected a tensor as the target, got list"),
    "another device": (
        torch.zeros(5, dtype=torch.long, device="meta"),
        "the target is on meta, the input on cpu",
    ),
}


@pytest.mark.parametrize("ready", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("case", BAD_TARGETS)
def test_bad_target(case, ready):
    target, text = BAD_TARGETS[case]
    inverse = frfx.invert(network(), 0)
    x, y = batch()
    if ready:
        inverse(x, y)
    error = errors.NonFiniteError if case == "NaN" else errors.TargetError
    for call in (inverse, inverse.reconstruct):
        assert re.search(text, message(error, call, x, target))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype(dtype):
    inverse = frfx.invert(network(), 1)
    x, y = batch()
    torch.testing.assert_close(inverse(x, y.to(dtype)), inverse(x, y), rtol=0, atol=0)


class Argmax(nn.Module):
    """A network that returns labels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x):
        return self.body(x).softmax(-1).argmax(dim=-1)


def test_scores_for_a_network_of_labels():
    x, y = batch()
    inverse = frfx.invert(Argmax(), "body.0")
    torch.testing.assert_close(inverse(x, y), frfx.invert(network(), "0")(x, y))
    text = message(errors.TargetError, inverse, x, torch.zeros(5, 4))
    assert text == "the network ends in argmax: give integer labels"


def test_labels_for_an_image_of_scores():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 3, 1))
    inverse = frfx.invert(model, 1)
    x, y = batch()
    text = message(errors.TargetError, inverse, x, y % 3)
    assert text == (
        "labels of shape (5,) do not fit logits of shape (5, 3, 8, 8): expected (5, 8, 8)"
    )
    wrong = torch.zeros(5, 8, 8, dtype=torch.long)
    wrong[4, 7, 1] = 3
    text = message(errors.TargetError, inverse, x, wrong)
    assert text.startswith("label 3 at position [4, 7, 1] is out of range: the network has 3 class")
    assert inverse(x, torch.zeros(5, 3, 8, 8)).shape == (5, 2, 8, 8)


def test_labels_for_a_network_without_classes():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(0))
    text = message(errors.TargetError, frfx.invert(model, "0"), batch()[0], batch()[1])
    assert text.startswith("labels need an output of shape (N, K, ...), but this network's is (5,)")


def test_inequalities_of_dense_labels():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 3, 1))
    inverse = frfx.invert(model, 1, policy="joint")
    labels = torch.zeros(5, 8, 8, dtype=torch.long)
    text = message(errors.TargetError, inverse, batch()[0], labels)
    assert text.startswith("'2': labels of shape (5, 8, 8), but that one label of a sample wins")
    assert text.endswith('give frfx.policy.joint(constraint="equality")')


# --- input batches ---

X = batch()[0]
BAD_INPUTS = {
    "a list": ([[1.0]], "expected a tensor as the input batch, got list"),
    "integers": (X.long(), "the input batch has dtype torch.int64; give a floating-point tensor"),
    "bool": (X > 0, "the input batch has dtype torch.bool"),
    "empty": (X[:0], r"the input batch of shape \(0, 1, 10, 10\) is empty"),
    "of no entries": (X[..., :0], r"the input batch of shape \(5, 1, 10, 0\) is empty"),
    "scalar": (torch.tensor(1.0), r"the input batch of shape \(\) is empty"),
    "meta": (X.to("meta"), "the input batch is on the meta device and holds no values"),
    "too many channels": (
        torch.randn(5, 2, 10, 10),
        r"fails at '0' \(input shapes \[\(5, 2, 10, 10\)\]\).*channels",
    ),
    "too large": (
        torch.randn(5, 1, 12, 12),
        r"fails at '6' \(input shapes \[\(5, 32\)\]\).*18x4",
    ),
    "too small": (torch.randn(5, 1, 2, 2), r"fails at '0' \(input shapes \[\(5, 1, 2, 2\)\]\)"),
    "one image": (X[0], r"fails at '6' \(input shapes"),
    "a matrix": (torch.randn(5, 10), r"fails at '0' \(input shapes \[\(5, 10\)\]\)"),
    "another dtype": (X.double(), "fails at '0' .*(?:[dD]ouble|type)"),
}


@pytest.mark.parametrize("ready", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input(case, ready):
    x, text = BAD_INPUTS[case]
    inverse = frfx.invert(network(), 1)
    y = batch()[1]
    if ready:
        inverse(*batch())
    for call in (inverse, inverse.reconstruct):
        said = message(errors.InputError, call, x, y)
        assert re.search(text, said)
        assert "While executing" not in said
    torch.testing.assert_close(inverse(*batch()), frfx.invert(network(), 1)(*batch()))


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_example_input(case):
    x, text = BAD_INPUTS[case]
    call = lambda: frfx.invert(network(), 1, example_input=x)  # noqa: E731
    assert re.search(text, message(errors.InputError, call))


@pytest.mark.parametrize("ready", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_input_that_is_not_finite(value, ready):
    inverse = frfx.invert(network(), 1)
    x, y = batch(9)
    if ready:
        inverse(x, y)
    x[1, 0, 3, 4] = x[4] = value
    text = message(errors.NonFiniteError, inverse, x, y)
    assert text == "the input batch holds NaN or infinity, in the samples 1, 4"
    x[:] = value
    text = message(errors.NonFiniteError, inverse, x, y)
    assert text.endswith("in the samples 0, 1, 2, 3, 4, ... (9 in all)")


# --- weights that are not finite ---


@pytest.mark.parametrize("ready", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("node", "name"), [(0, "weight"), (0, "bias"), (3, "weight"), (6, "bias")])
def test_weight_that_is_not_finite(node, name, value, ready):
    """Before the layer (3 lies behind it) and behind it, before and after the first call."""
    model = network()
    inverse = frfx.invert(model, 1)
    if ready:
        inverse(*batch())
    with torch.no_grad():
        getattr(model[node], name).view(-1)[0] = value
    for call in (inverse, inverse.reconstruct):
        text = message(errors.NonFiniteError, call, *batch())
        assert text == f"'{node}': its {name} holds NaN or infinity"


def test_first_of_several_nodes_is_named():
    model = network()
    with torch.no_grad():
        model[6].weight.fill_(math.nan)
        model[3].weight.fill_(math.nan)
        model[3].bias.fill_(math.inf)
    text = message(errors.NonFiniteError, frfx.invert(model, 0), *batch())
    assert text == "'3': its weight and bias holds NaN or infinity"


class Functional(nn.Module):
    """Reads its weights in functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 100))
        self.norm = nn.BatchNorm1d(100)

    def forward(self, x):
        return F.linear(self.norm(x.flatten(1)), self.weight)


def test_weight_of_a_function_that_is_not_finite():
    model = Functional().eval()
    inverse = frfx.invert(model, "flatten")
    with torch.no_grad():
        model.weight[2, 3] = math.nan
    assert message(errors.NonFiniteError, inverse, *batch()) == (
        "'linear': its weight holds NaN or infinity"
    )


def test_buffer_that_is_not_finite():
    model = Functional().eval()
    inverse = frfx.invert(model, "flatten")
    model.norm.running_mean[7] = math.nan
    assert message(errors.NonFiniteError, inverse, *batch()) == (
        "'norm': its running_mean holds NaN or infinity"
    )


class Overflowing(nn.Module):
    """Multiplies by more and more."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(100, 4)

    def forward(self, x):
        return self.fc(x.flatten(1)) * 1e30 * 1e30


def test_overflow_on_the_way_forward():
    text = message(errors.NonFiniteError, frfx.invert(Overflowing(), "flatten"), *batch())
    assert (
        text == "'mul_1': its output holds NaN or infinity, though its input and weights are finite"
    )


class Asinh(nn.Module):
    """Its inverse grows exponentially."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(100, 4)

    def forward(self, x):
        return torch.asinh(self.fc(x.flatten(1)))


def test_overflow_on_the_way_back():
    inverse = frfx.invert(Asinh(), "flatten")
    x, _ = batch()
    for call in (inverse, inverse.reconstruct):
        text = message(errors.NonFiniteError, call, x, torch.full((5, 4), 1000.0))
        assert "the inverse of 'asinh' gives NaN or infinity" in text
        assert "damping=" in text
        assert "trust_region=" in text


def test_result_beyond_the_range_of_the_models_dtype():
    """Solved in single precision, where 1e6 is a number; in half precision it is not."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 4)).half()
    inverse = frfx.invert(model, "0")
    x, _ = batch()
    text = message(errors.NonFiniteError, inverse, x.half(), torch.full((5, 4), 1e6))
    assert "the inverse of '0' gives NaN or infinity" in text
    assert "dtype" in text


# --- weights of low rank ---


def deficient(kind: str) -> nn.Module:
    """Return a network with one op of low rank, called `op`."""
    torch.manual_seed(1)
    parts = {"conv": nn.Conv2d(1, 3, 3), "flat": nn.Flatten(), "op": nn.Linear(192, 4)}
    if kind.endswith("conv"):
        parts = {"op": nn.Conv2d(1, 3, 3), "flat": nn.Flatten(), "fc": nn.Linear(192, 4)}
        if kind == "deficient conv":
            parts = {"conv": nn.Conv2d(1, 3, 3), "op": nn.Conv2d(3, 3, 1), **parts}
            parts = {"conv": parts["conv"], "op": nn.Conv2d(3, 3, 1), "flat": nn.Flatten()}
            parts["fc"] = nn.Linear(192, 4)
    elif kind.endswith("norm"):
        parts = {"op": nn.BatchNorm2d(1), "flat": nn.Flatten(), "fc": nn.Linear(100, 4)}
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    with torch.no_grad():
        if kind.startswith("zero"):
            model.op.weight.zero_()
        else:
            model.op.weight[1] = model.op.weight[0]
    return model.eval()


BEFORE = {"deficient conv": "conv", "deficient linear": "flat", "zero linear": "flat"}
LOW_RANK = ["zero conv", "deficient conv", "zero linear", "deficient linear", "zero norm"]


@pytest.mark.parametrize("kind", LOW_RANK)
def test_low_rank_gives_a_finite_answer_and_a_warning(kind):
    model = deficient(kind)
    inverse = frfx.invert(model, BEFORE.get(kind, "input"))
    with pytest.warns(frfx.ConditionWarning) as caught:
        result = inverse(*batch())
    assert result.isfinite().all()
    (warning,) = caught
    text = str(warning.message)
    row = next(row for row in inverse.summary() if row.node == "op")
    assert text.startswith("op (")
    assert "is rank-deficient to working precision" in text
    assert f"condition number {row.condition:.3g}." in text
    assert "policy.override(node='op', damping=...)" in text
    assert row.condition > 1e6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inverse(*batch())  # once a factorisation, not once a call


@pytest.mark.parametrize("kind", [kind for kind in LOW_RANK if kind.startswith("zero")])
@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
def test_weights_of_zero_leave_the_feature_where_it_is(kind):
    """Nothing can be changed through them, so the smallest deviation is none."""
    inverse = frfx.invert(deficient(kind), BEFORE.get(kind, "input"))
    found = inverse.reconstruct(*batch())
    torch.testing.assert_close(found.feature, found[inverse.layer].forward, rtol=0, atol=0)
    assert next(row for row in inverse.summary() if row.node == "op").condition == math.inf


@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
def test_low_rank_is_the_truncated_pseudo_inverse():
    model = deficient("deficient linear")
    inverse = frfx.invert(model, "flat")
    found = inverse.reconstruct(*batch())
    weight = model.op.weight.detach().double().numpy()
    had, wanted = (v.double().numpy() for v in (found["op"].forward, found["op"].target))
    before = found["flat"].forward.double().numpy()
    expected = before + (wanted - had) @ np.linalg.pinv(weight, rcond=1e-6).T
    assert relative(found.feature, expected) < 1e-5


def test_sound_weights_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frfx.invert(network(), 0)(*batch())


def test_damping_in_the_way_out_of_the_warning():
    """What the warning advises bounds the deviation."""
    model = deficient("deficient linear")
    with torch.no_grad():
        model.op.weight[1] += 1e-4 * torch.randn(192)
    policy = frfx.policy.paper()
    plain = frfx.invert(model, "flat", policy=policy)
    damped = frfx.invert(model, "flat", policy=policy.override(node="op", damping=1e-3))
    x, y = batch()
    feature = x.new_tensor(plain.reconstruct(x, y)["flat"].forward.tolist())
    assert (damped(x, y) - feature).norm() < 0.2 * (plain(x, y) - feature).norm()


# --- half precision ---


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)],
    ids=["half", "bfloat16"],
)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_half_precision(layer, dtype, tolerance, policy):
    """In the model's dtype, and close to what the same rounded weights give in double."""
    model = network().to(dtype)
    wide = copy.deepcopy(model).double()
    x, y = batch()
    x = x.to(dtype)
    result = frfx.invert(model, layer, policy=policy)(x, y)
    assert result.dtype == dtype
    assert (
        relative(result.double(), frfx.invert(wide, layer, policy=policy)(x.double(), y))
        < tolerance
    )


def test_half_precision_is_solved_in_single():
    """A residual below half precision's resolution still moves the feature the right way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 4)).half()
    x = batch()[0].half()
    inverse = frfx.invert(model, 0)
    found = inverse.reconstruct(x, model(x).float() + 1e-5)
    target = found["1"].target
    assert target.dtype == torch.float32
    deviation = found["1"].target - found["1"].forward
    torch.testing.assert_close(deviation, torch.full((5, 4), 1e-5), rtol=0.1, atol=0)


# --- the mode of the model ---


class Modes(nn.Module):
    """Depends on its mode in four places."""

    def __init__(self, p: float = 0.5, norms: int = 1) -> None:
        super().__init__()
        self.norms = nn.Sequential(*(nn.BatchNorm2d(1) for _ in range(norms)))
        self.drop = nn.Dropout(p)
        self.fc = nn.Linear(100, 4)

    def forward(self, x):
        return self.fc(self.drop(self.norms(x)).flatten(1))


def test_mode_warning_names_what_depends_on_it():
    with pytest.warns(frfx.ModeWarning) as caught:
        frfx.invert(Modes(), "norms.0")
    (warning,) = caught
    text = str(warning.message)
    assert "in training mode, where 'norms.0', 'drop' compute something else" in text
    assert "inverted as in evaluation mode" in text
    assert warning.filename == __file__
    with pytest.warns(frfx.ModeWarning, match=r"'norms.0', 'norms.1', 'norms.2', \.\.\. compute"):
        frfx.invert(Modes(norms=5), "norms.0")


@pytest.mark.parametrize(
    "model",
    [Modes().eval(), Modes(p=0.0, norms=0), network().train()],
    ids=["evaluation", "dropout of nothing", "no such op"],
)
def test_no_mode_warning_without_a_reason(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frfx.invert(model, "x" if isinstance(model, Modes) else "0")


@pytest.mark.filterwarnings("ignore::frfx.ModeWarning")
def test_training_mode_gives_what_evaluation_gives():
    model = Modes()
    with torch.no_grad():
        model.norms[0].running_mean.fill_(0.7)
        model.norms[0].running_var.fill_(3)
    x, y = batch()
    in_training = frfx.invert(model.train(), "x")(x, y)
    torch.testing.assert_close(in_training, frfx.invert(model.eval(), "x")(x, y), rtol=0, atol=0)


# --- models ---


def test_model_on_meta():
    with torch.device("meta"):
        model = network()
    for call in (frfx.invert, lambda model, _: frfx.layers(model)):
        text = message(errors.ModelError, call, model, 1)
        assert "'0.weight', '0.bias', '3.weight' and 3 more are on the meta device" in text
        assert "to_empty(device=...)" in text


def test_lazy_model():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    text = message(errors.ModelError, frfx.invert, model, 0)
    assert text == "'1.weight', '1.bias' are not initialised yet; run the model on a batch first"
    x, y = batch()
    model(x)
    assert frfx.invert(model, 0)(x, y).shape == x.shape


def test_models_without_python():
    x, _ = batch()
    for model in (torch.jit.script(network()), torch.jit.trace(network(), x)):
        text = message(errors.ModelError, frfx.invert, model, 0)
        assert "scripted model" in text
        assert "give the module it came from" in text
    text = message(errors.ModelError, frfx.invert, torch.compile(network()), 0)
    assert text == "a compiled model cannot be traced; give the module it came from"
    text = message(errors.ModelError, frfx.invert, lambda x: x, 0)
    assert text == "expected a torch.nn.Module, got function"


def test_backend():
    text = message(errors.BackendError, lambda: frfx.invert(network(), 0, backend="jax"))
    assert text == "there is no backend 'jax'; there are 'auto', 'torch', 'cupy'"
    x, y = batch()
    expected = frfx.invert(network(), 0)(x, y)
    torch.testing.assert_close(frfx.invert(network(), 0, backend="torch")(x, y), expected)


# --- layers ---


def test_unknown_name_gets_the_nearest():
    text = message(errors.LayerError, frfx.invert, Modes().eval(), "norm.0")
    assert text.startswith("no layer 'norm.0' on the way to the output. Did you mean 'norms.0'")
    assert "frfx.layers(model) lists them all" in text
    text = message(errors.LayerError, frfx.invert, Modes().eval(), "########")
    assert "Did you mean" not in text


@pytest.mark.parametrize("layer", [-1, 4, 100])
def test_number_out_of_range(layer):
    text = message(errors.LayerError, frfx.invert, network(), layer)
    assert text.startswith(
        f"layer {layer}: this network has the layers 0 (its input) to 3 (its logits)"
    )


@pytest.mark.parametrize("layer", [True, 1.0, None, b"0"])
def test_layer_that_is_neither_number_nor_name(layer):
    text = message(errors.LayerError, frfx.invert, network(), layer)
    assert text == f"a layer is an int or a name, not {layer!r}"


class Residual(nn.Module):
    """Branches between its layers, with an unused side branch and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(100, 100)
        self.second = nn.Linear(100, 100)
        self.side = nn.Linear(100, 2)
        self.fc = nn.Linear(100, 4)

    def forward(self, x):
        x = x.flatten(1)
        self.side(x)
        x = x + self.second(torch.tanh(self.first(x)))
        return F.softmax(self.fc(x), dim=1)


def test_number_on_a_branched_graph_lists_the_names():
    text = message(errors.LayerError, frfx.invert, Residual(), 1)
    assert "branches between its layers, so there is no number but 0, the input" in text
    names = re.findall("'([^']*)'", text.partition("Use a name: ")[2])
    assert names == ["flatten", "first", "tanh", "second", "add", "fc", "softmax"]
    assert frfx.invert(Residual(), "add")(*batch()).shape == (5, 100)


def test_layer_behind_the_logits():
    text = message(errors.LayerError, frfx.invert, Residual(), "softmax")
    assert text == "layer 'softmax' lies behind the logits 'fc': there is nothing to invert"


def test_layer_off_the_path():
    text = message(errors.LayerError, frfx.invert, Residual(), "side")
    assert text.startswith("no layer 'side' on the way to the output.")


class Pair(nn.Module):
    """Returns two tensors."""

    def forward(self, x):
        return x * 2, x + 1


class Constant(nn.Module):
    """Does not look at its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.weight * 2


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (
            Pair(),
            "the model returns several tensors (0, 1): name the one to start from, as in output=0",
        ),
        (Constant(), "the model's output does not depend on its input"),
    ],
)
@pytest.mark.parametrize("call", [frfx.layers, lambda model: frfx.invert(model, 0)])
def test_models_that_are_no_chain(model, text, call):
    assert message(errors.LayerError, call, model).startswith(text)


# --- the tree of errors ---


def test_every_error_is_an_frfx_error_and_exported():
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, Exception):
            assert name in frfx.__all__ or name.endswith("Op"), name
            assert issubclass(kind, (frfx.FrfxError, Warning))


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        ("InputError", ValueError),
        ("TargetError", ValueError),
        ("LayerError", ValueError),
        ("ModelError", ValueError),
        ("NonFiniteError", ArithmeticError),
        ("UnsupportedOpsError", NotImplementedError),
        ("TraceMismatchError", frfx.TraceError),
    ],
)
def test_errors_can_be_caught_as_pythons_own(kind, builtin):
    assert issubclass(getattr(frfx, kind), builtin)


def test_errors_survive_pickling():
    """A data loader's or a test runner's processes send them so."""
    for kind in (frfx.InputError, frfx.TraceMismatchError):
        twin = pickle.loads(pickle.dumps(kind("some text")))
        assert (type(twin), str(twin)) == (kind, "some text")


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("conv", ["conv1", "fc"], " Did you mean 'conv1'?"),
        ("a", ["zzz"], ""),
        ("a", [], ""),
        ("ab", ["ab", "abc"], " Did you mean 'ab', 'abc'?"),
    ],
)
def test_nearest(name, known, expected):
    assert errors.nearest(name, known) == expected
