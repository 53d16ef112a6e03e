"""Models that return several tensors: which one is inverted, and that the rest is left out."""

from __future__ import annotations

import collections
import copy
import dataclasses
import pickle

import pytest
import torch
from torch import Tensor, nn

import frfx
from tests.oracles import normal

Named = collections.namedtuple("Named", ["main", "aux"])


@dataclasses.dataclass
class Record:
    """What a forward may return."""

    main: Tensor
    aux: Tensor | None = None


class Heads(nn.Module):
    """A stem and two heads, whose outputs a function puts together."""

    def __init__(self, pack) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pack = pack
        self.stem = nn.Linear(6, 5)
        self.main = nn.Linear(5, 4)
        self.aux = nn.Sequential(nn.ReLU(inplace=True), nn.Hardshrink(), nn.Linear(5, 3))
        self.double().eval()

    def forward(self, x):
        """Return what the function makes of the two outputs."""
        x = torch.tanh(self.stem(x))
        return self.pack(self.main(x), self.aux(x * 2))


class Checked(Heads):
    """The same, but no symbolic tracing follows."""

    def forward(self, x):
        """Return what the function makes of the two outputs."""
        if x.ndim != 2:
            raise ValueError("rank")
        return super().forward(x)


torch.export.register_dataclass(Record)

FIRST = {
    "one tensor": (lambda main, aux: main, None),
    "dict": (lambda main, aux: {"a": main, "b": aux}, "a"),
    "out": (lambda main, aux: {"aux": aux, "out": main}, None),
    "dict of one": (lambda main, aux: {"logits": main}, None),
    "dict beside None": (lambda main, aux: {"logits": main, "loss": None}, None),
    "tuple": (lambda main, aux: (main, aux), 0),
    "tuple, from the end": (lambda main, aux: (main, aux), -2),
    "tuple of one": (lambda main, aux: (main,), None),
    "list": (lambda main, aux: [aux, main], 1),
    "named tuple": (Named, "main"),
    "index of a named tuple": (Named, 0),
    "named tuple beside None": (lambda main, aux: Named(main, None), None),
    "dataclass": (Record, "main"),
    "index of a dataclass": (Record, 0),
    "dataclass beside None": (lambda main, aux: Record(main), None),
    "nested": (lambda main, aux: (aux, {"out": main, "aux": aux}), 1),
}


@pytest.mark.parametrize("kind", [Heads, Checked])
@pytest.mark.parametrize("case", FIRST)
def test_chosen_output_is_that_of_the_model_that_returns_it(case, kind):
    pack, output = FIRST[case]
    x, y = normal(0, 7, 6), torch.arange(7) % 4
    example = x if kind is Checked else None
    inverse = frfx.invert(kind(pack), "stem", example_input=example, output=output)
    alone = frfx.invert(Heads(FIRST["one tensor"][0]), "stem")
    torch.testing.assert_close(inverse(x, y), alone(x, y), rtol=1e-12, atol=0)
    target = normal(1, 7, 4)
    torch.testing.assert_close(inverse(x, target), alone(x, target), rtol=1e-12, atol=0)
    assert inverse.traced.front_end == ("torch.fx" if kind is Heads else "torch.export")


@pytest.mark.parametrize("case", FIRST)
def test_what_other_outputs_need_is_dropped(case):
    pack, output = FIRST[case]
    inverse = frfx.invert(Heads(pack), "stem", output=output)
    names = set(inverse.traced.paths.values())
    assert {"stem", "main"} <= names
    # ... but what the forward has computed for nobody stays, as it does in the model
    assert any(name.startswith("aux") for name in names) == ("one" in case or "None" in case)
    assert not any("aux" in row.name for row in frfx.layers(Heads(pack), output=output))


def test_names_do_not_depend_on_the_choice():
    model = Heads(lambda main, aux: (torch.tanh(aux), torch.tanh(main)))
    names = [row.name for row in frfx.layers(model, output=1)]
    assert names[-1] == "tanh_2"
    assert frfx.invert(model, "tanh", output=1).layer == "tanh"


@pytest.mark.parametrize(
    ("pack", "output", "text"),
    [
        (
            lambda main, aux: {"a": main, "b": aux},
            None,
            "the model returns several tensors ('a', 'b'): name the one to start from, as in "
            "output='a'",
        ),
        (
            lambda main, aux: (main, aux),
            None,
            "the model returns several tensors (0, 1): name the one to start from, as in output=0",
        ),
        (
            Record,
            None,
            "the model returns several tensors ('main', 'aux'): name the one to start from, as in "
            "output='main'",
        ),
        (
            lambda main, aux: {"logits": main, "aux": aux},
            "logit",
            "output='logit': the model returns 'logits', 'aux'. Did you mean 'logits'?",
        ),
        (lambda main, aux: (main, aux), 2, "output=2: the model returns 0, 1."),
        (lambda main, aux: (main, aux), -3, "output=-3: the model returns 0, 1."),
        (lambda main, aux: {"a": main, "b": aux}, 0, "output=0: the model returns 'a', 'b'."),
        (lambda main, aux: Named(main, None), 1, "output=1: the model returns 'main'."),
        (
            lambda main, aux: main,
            "out",
            "output='out': the model returns one tensor, so leave this out",
        ),
        (
            lambda main, aux: (main, {"a": main, "b": aux}),
            1,
            "the model's output 1 holds several tensors ('a', 'b'): wrap the model in a module "
            "that returns the one to start from",
        ),
        (lambda main, aux: {"n": 3}, None, "the model's output does not depend on its input"),
    ],
)
def test_no_such_output(pack, output, text):
    for call in (frfx.layers, lambda model, output: frfx.invert(model, "stem", output=output)):
        with pytest.raises(frfx.LayerError) as caught:
            call(Heads(pack), output=output)
        assert str(caught.value) == text


def test_copies_keep_the_output():
    x, target = normal(0, 7, 6), normal(1, 7, 3)
    model = Heads(Named)
    model.aux[1] = nn.Tanh()
    inverse = frfx.invert(model, "stem", output="aux")
    for twin in (copy.deepcopy(inverse), copy.copy(inverse), pickle.loads(pickle.dumps(inverse))):
        assert torch.equal(twin(x, target), inverse(x, target))


class Wrong(Heads):
    """Whose second output depends on the training mode of torch's own graph."""

    def forward(self, x):
        """Return two outputs, of which tracing sees another one."""
        main, aux = super().forward(x)
        return {"out": main + float(type(x) is Tensor), "aux": aux}


def test_graph_is_compared_with_the_model_by_the_chosen_output():
    inverse = frfx.invert(Wrong(lambda *pair: pair), "stem", output="out")
    with pytest.raises(frfx.TraceMismatchError):
        inverse(normal(0, 7, 6), torch.arange(7) % 4)
    model = Wrong(lambda *pair: pair)
    model.aux[1] = nn.Tanh()
    inverse = frfx.invert(model, "stem", output="aux")
    assert inverse(normal(0, 7, 6), torch.arange(7) % 3).shape == (7, 5)


def test_measure_and_post_training_of_one_output():
    x, y = normal(0, 9, 6), torch.arange(9) % 4
    model, alone = Heads(Named), Heads(FIRST["one tensor"][0])
    policy = frfx.policy.joint(margin=0.1)
    inverse = frfx.invert(model, "tanh", policy=policy, output="main")
    assert frfx.measure(inverse, x, y).label_consistency == 1
    loader = [(x, y)]
    assert frfx.accuracy(model, loader, "main") == frfx.accuracy(alone, loader)
    records = [
        frfx.post_train(net, loader, upto_layer="stem", epochs=2, val_loader=loader, output=output)
        for net, output in ((model, "main"), (alone, None))
    ]
    for one, other in zip(*records, strict=True):
        assert (one.loss, one.val_accuracy) == (other.loss, other.val_accuracy)
    assert torch.equal(model.stem.weight, alone.stem.weight)
    with pytest.raises(frfx.LayerError, match="name the one to start from"):
        frfx.post_train(model, loader, upto_layer="stem", epochs=1)


def test_segmentation_models_of_torchvision():
    models = pytest.importorskip("torchvision.models.segmentation")
    model = models.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    rows = frfx.layers(model)
    assert rows[-1].op == "interpolate"
    model = models.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True).eval()
    names = [row.name for row in frfx.layers(model)]
    assert "classifier.4" in names
    assert not any(name.startswith("aux") for name in names)
    assert any(row.name == "aux_classifier.4" for row in frfx.layers(model, output="aux"))
