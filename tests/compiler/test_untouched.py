"""The user's model is never touched: not by success, not by failure, not by use of the inverse."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import frfx
from frfx.rules import Inversion, Rule
from tests.networks_zoo import SUBJECTS, Cnn, batch, snapshot, subject

pytestmark = [
    pytest.mark.filterwarnings("ignore::frfx.ModeWarning"),
    pytest.mark.filterwarnings("ignore::frfx.ConditionWarning"),
]

subjects = pytest.mark.parametrize("name", SUBJECTS)


class Broken(Inversion):
    """Raises in the middle of a reconstruction."""

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        raise ZeroDivisionError("in the middle")


@dataclass(frozen=True)
class BrokenRule(Rule):
    """Fails when it is used."""

    def build(self, op) -> Inversion:
        return Broken()


def broken_policy() -> frfx.policy.Policy:
    """Return a policy whose walk fails at the convolution."""
    return frfx.policy.paper().override(op=nn.Conv2d, rule=BrokenRule())


def fails(error: type[Exception], **arguments) -> Callable[[Cnn], None]:
    """Return what inverts a model in a way that does not work."""

    def run(model: Cnn) -> None:
        with pytest.raises(error):
            frfx.invert(model, **{"upto_layer": "stem", **arguments})

    return run


def fails_to_trace(model: Cnn) -> None:
    """Invert a model that neither front end can follow; restore the switch that makes it so."""
    model.untraceable = True
    try:
        for example in (None, batch()[0]):
            with pytest.raises(frfx.TraceError):
                frfx.invert(model, "stem", example_input=example)
    finally:
        model.untraceable = False


def call(model: Cnn) -> None:
    """Use the inverse in every way."""
    inverse = frfx.invert(model, "stem", policy="minimal")
    for count in (5, 2):
        inverse(*batch(count))
    x, _ = batch()
    inverse(x, model.fc(torch.zeros(5, 64)).detach())
    inverse.reconstruct(*batch())
    inverse.refresh()
    str(inverse.summary())
    inverse(*batch())


def call_wrongly(model: Cnn) -> None:
    """Give the inverse what it cannot take."""
    inverse = frfx.invert(model, "stem")
    x, y = batch()
    for arguments in ((x[:, :2], y), (x * torch.nan, y), (x, y + 100), (x, y[:2])):
        with pytest.raises(frfx.FrfxError):
            inverse(*arguments)


def break_in_the_middle(model: Cnn) -> None:
    """Let a rule raise while the inverse runs."""
    inverse = frfx.invert(model, "stem", policy=broken_policy())
    for run in (inverse, inverse.reconstruct):
        with pytest.raises(ZeroDivisionError, match="in the middle"):
            run(*batch())


def example(model: Cnn) -> None:
    """Make everything ready at once."""
    frfx.invert(model, "stem", example_input=batch()[0])


REFUSED = frfx.policy.paper().override(op=torch.nn.Linear, solver="spectral")
"""No linear layer can be inverted by it."""

ACTIONS: dict[str, Callable[[Cnn], None]] = {
    "layers": lambda model: frfx.layers(model),
    "invert": lambda model: frfx.invert(model, "stem"),
    "invert with an example": example,
    "call": call,
    "call wrongly": call_wrongly,
    "unsupported ops": fails(frfx.UnsupportedOpsError, upto_layer="x", policy=REFUSED),
    "unsupported ops, example": fails(
        frfx.UnsupportedOpsError, upto_layer="x", policy=REFUSED, example_input=batch()[0]
    ),
    "unknown layer": fails(frfx.LayerError, upto_layer="steem"),
    "no such number": fails(frfx.LayerError, upto_layer=9),
    "unknown backend": fails(frfx.BackendError, backend="jax"),
    "unknown policy": fails(frfx.PolicyError, policy="papre"),
    "bad example": fails(frfx.InputError, example_input=torch.zeros(2, 1, 6, 6)),
    "trace failure": fails_to_trace,
    "exception in the middle": break_in_the_middle,
}


@subjects
@pytest.mark.parametrize("action", ACTIONS)
def test_model_is_untouched(name, action):
    model = subject(name)
    before = snapshot(model)
    ACTIONS[action](model)
    assert snapshot(model) == before


def copied(inverse: frfx.Inverse) -> None:
    """Copy the inverse in every way and use the copies."""
    for twin in (copy.copy(inverse), copy.deepcopy(inverse), pickle.loads(pickle.dumps(inverse))):
        twin(*batch())
        twin.double()
        twin(*batch(dtype=torch.float64))


MOVES: dict[str, Callable[[frfx.Inverse], object]] = {
    "to(float64)": lambda inverse: inverse.to(torch.float64)(*batch(dtype=torch.float64)),
    "to(cpu)": lambda inverse: inverse.to("cpu")(*batch()),
    "to(meta)": lambda inverse: inverse.to("meta"),
    "double": lambda inverse: inverse.double()(*batch(dtype=torch.float64)),
    "half": lambda inverse: inverse.half(),
    "bfloat16": lambda inverse: inverse.bfloat16(),
    "train": lambda inverse: inverse.train()(*batch()),
    "eval": lambda inverse: inverse.eval()(*batch()),
    "copies": copied,
    "state dict": lambda inverse: inverse.state_dict(),
}


@subjects
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
@pytest.mark.parametrize("move", MOVES)
def test_model_is_untouched_when_its_inverse_is_moved(name, called, move):
    model = subject(name)
    before = snapshot(model)
    inverse = frfx.invert(model, "stem")
    if called:
        inverse(*batch())
    MOVES[move](inverse)
    assert snapshot(model) == before


@subjects
def test_inverse_writes_nothing_of_its_own_to_disk(name):
    """The state dict holds the model's tensors and nothing that frfx made."""
    model = subject(name)
    inverse = frfx.invert(model, "stem")
    inverse(*batch())
    assert {key.removeprefix("model.") for key in inverse.state_dict()} == set(model.state_dict())


@subjects
def test_inverse_is_that_of_the_model_in_evaluation_mode(name):
    """Whatever the mode: the same as of a copy that has been switched to evaluation."""
    model, switched = subject(name), subject(name)
    for module in switched.modules():
        module.training = False
    with warnings.catch_warnings():
        warnings.simplefilter("error", frfx.ModeWarning)
        expected = frfx.invert(switched, "stem")(*batch())
    torch.testing.assert_close(frfx.invert(model, "stem")(*batch()), expected, rtol=0, atol=0)


def test_forward_of_the_model_still_works_after_a_failure():
    """Hooks still fire on the model itself, and its own attributes are written to again."""
    model = subject("HookedCnn")
    x, _ = batch()
    expected = model(x)
    model.activations.clear()
    with pytest.raises(frfx.UnsupportedOpsError):
        frfx.invert(model, "x", policy=REFUSED)
    assert model.activations == {}
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert list(model.activations) == ["stem", "conv"]


def test_repeated_calls_do_not_fill_the_views_containers():
    """A forward that collects its activations does not collect those of the inverse's calls."""
    model = subject("WritingCnn")
    inverse = frfx.invert(model, "stem")
    inverse(*batch())
    held = len(pickle.dumps(inverse))
    for _ in range(3):
        inverse(*batch())
    assert len(pickle.dumps(inverse)) == held


def test_snapshot_notices_what_it_is_for():
    """The oracle itself: each of these changes is seen."""

    def changes(change: Callable[[Cnn], object]) -> bool:
        model = subject("WritingCnn")
        before = snapshot(model)
        change(model)
        return snapshot(model) != before

    assert not changes(lambda m: None)
    assert not changes(lambda m: (m.fc.weight + 1, m.state_dict(), str(m)))
    assert changes(lambda m: m.eval())
    assert changes(lambda m: m.calls.add_(1))
    assert changes(lambda m: m.fc.weight.data.mul_(1.5))
    assert changes(lambda m: m.fc.weight.requires_grad_(False))
    assert changes(lambda m: m.fc.register_parameter("weight", nn.Parameter(m.fc.weight.detach())))
    assert changes(lambda m: m.register_buffer("late", torch.zeros(1)))
    assert changes(lambda m: m.cache.append(1))
    assert changes(lambda m: m.seen["deep"][0].append(1))
    assert changes(lambda m: setattr(m, "last", 1))
    assert changes(lambda m: m.fc.register_forward_hook(lambda *_: None))
    assert changes(lambda m: m.add_module("act", nn.Tanh()))


class Adapting(nn.Module):
    """Keeps statistics in evaluation mode, too; or renormalises an embedding that it reads."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.last = kind, nn.Linear(6, 8), nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(8)
        self.embedding = nn.Embedding(5, 8, max_norm=0.1)
        self.register_buffer("tokens", torch.arange(5))

    def forward(self, x):
        x = self.first(x)
        if self.kind == "norm":
            norm = self.norm
            x = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, training=True)
        else:
            x = x + self.embedding(self.tokens).sum(0)
        return self.last(torch.relu(x))


@pytest.mark.parametrize(
    ("kind", "written"),
    [("norm", "norm.running_mean, norm.running_var"), ("embedding", "embedding.weight")],
)
def test_a_model_that_would_write_to_itself_is_refused(kind, written):
    model = Adapting(kind).eval()
    x, y = torch.rand(5, 6), torch.arange(5) % 4
    before = snapshot(model)
    for act in (
        lambda: frfx.invert(model, "first", policy="joint")(x, y),
        lambda: frfx.invert(model, "first", policy="joint", example_input=x)(x, y),
        lambda: frfx.post_train(model, [(x, y)], upto_layer=1, alpha=0, epochs=1),
    ):
        with pytest.raises(frfx.ModelError, match=f"the model writes to {written}: it would not"):
            act()
        assert snapshot(model) == before
    frfx.layers(model, x)
    assert snapshot(model) == before
