"""Nodes are named as torchvision's feature extraction names them, by either front end."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import frfx
from frfx.compiler.trace import trace
from frfx.view import evaluation_view


def names_of(model: nn.Module, example_input=None) -> list[str]:
    """Return the names of all nodes but the output's."""
    traced = trace(evaluation_view(model), example_input)
    return [traced.paths[node] for node in traced.graph.nodes if node.op != "output"]


def torchvisions(model: nn.Module) -> list[str]:
    """Return torchvision's names."""
    names = get_graph_node_names(model, suppress_diff_warning=True)[1]
    return [name for name in names if name != "output"]


PLAIN = [
    "alexnet",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "vgg11_bn",
]


@pytest.mark.parametrize("name", PLAIN)
def test_names_of_torchvision_models(name):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(name, **options).eval()
    assert names_of(model) == torchvisions(model)


class Reused(nn.Module):
    """Calls modules, containers and functions repeatedly."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.act = nn.Tanh()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x):
        x = self.act(self.fc(self.fc(x)))
        x = self.block(self.act(self.block(x)))
        x = torch.tanh(torch.tanh(x) * 2 * 3 + 1)
        return self.block[0](x)


class Numbered(nn.Module):
    """Has modules whose own names end in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1 = nn.Linear(4, 4)
        self.conv_2 = nn.Linear(4, 4)
        self.conv = nn.Linear(4, 4)
        self.fc10 = nn.Linear(4, 4)
        self.act_01 = nn.Tanh()

    def forward(self, x):
        x = self.act_01(self.conv_2(self.conv_1(x)))
        return self.act_01(self.fc10(self.conv(self.conv_2(x))))


class Inner(nn.Module):
    """Calls functions and methods."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.below = Inner(depth - 1) if depth else nn.Identity()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        x = F.linear(self.below(x).relu(), self.weight)
        return torch.relu(x) + x.size(0) * 0


class Nested(nn.Module):
    """Functions at several depths of modules, and in lists and dicts of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ModuleList([Inner(0), Inner(2)])
        self.dict = nn.ModuleDict({"a": Inner(1), "linear": nn.Linear(4, 4)})

    def forward(self, x):
        for inner in self.list:
            x = inner(x)
        x = self.dict["linear"](self.dict["a"](x))
        return F.softmax(x.view(x.shape[0], -1), dim=1)


class Inputs(nn.Module):
    """Names its argument otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Linear(4, 4)
        self.target = nn.Linear(4, 4)
        self.prepare = nn.Linear(4, 4)
        self.finish = nn.Linear(4, 4)
        self.model = nn.Linear(4, 4)
        self.inverse = nn.Linear(4, 4)

    def forward(self, image):
        x = self.target(self.x(image))
        return self.inverse(self.model(self.finish(self.prepare(x))))


ODD = [Reused, Numbered, Nested, Inputs]


@pytest.mark.parametrize("kind", ODD)
def test_names_of_odd_models(kind):
    model = kind().eval()
    assert names_of(model) == torchvisions(model)


@pytest.mark.parametrize("kind", [Reused, Numbered, Inputs])
def test_exported_graphs_carry_the_same_names(kind):
    model = kind().eval()

    class Untraceable(kind):
        def forward(self, image):
            if image.shape[-1] != 4:
                raise ValueError("no")
            return super().forward(image)

    twin = Untraceable().eval()
    weights = {name.replace(".", "_") for name in model.state_dict()}
    exported = names_of(twin, torch.randn(3, 4))
    activations = [name for name in exported if name not in weights]
    assert activations == ["image", *torchvisions(model)[1:]]


@pytest.mark.parametrize("kind", ODD)
def test_names_lead_to_the_same_values_as_torchvisions(kind):
    """What `reconstruct` calls the forward value at a name is torchvision's value there."""
    model = kind().eval()
    x, y = torch.randn(5, 4), torch.arange(5) % 4
    for row in frfx.layers(model)[1:]:
        if row.op == "softmax":
            continue
        try:
            inverse = frfx.invert(model, row.name)
        except frfx.UnsupportedOpsError:
            continue
        extractor = create_feature_extractor(model, [row.name], suppress_diff_warning=True)
        found = inverse.reconstruct(x, y)
        assert inverse.layer == row.name
        torch.testing.assert_close(found[row.name].forward, extractor(x)[row.name])


@pytest.mark.parametrize("kind", ODD)
def test_every_layer_can_be_named(kind):
    """Each row of `layers` is accepted, or refused for what lies behind it, never as unknown."""
    model = kind().eval()
    said = []
    rows = frfx.layers(model)
    for row in rows:
        try:
            assert frfx.invert(model, row.name).layer == row.name
        except (frfx.UnsupportedOpsError, frfx.LayerError) as error:
            said.append(str(error))
    assert len(said) <= len(rows) - 2
    assert not any("no layer" in text for text in said)


def test_container_stands_for_its_last_node():
    model = Reused().eval()
    assert frfx.invert(model, "block").layer == "block.0_2"
    model = torchvision.models.alexnet().eval()
    assert frfx.invert(model, "classifier").layer == "classifier.6"
    assert frfx.invert(model, "features.0").layer == "features.0"
    with pytest.raises(frfx.LayerError, match="Did you mean"):
        frfx.invert(model, "classifie")


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0", "regnet_y_400mf"])
def test_what_torchvision_takes_for_a_leaf_is_resolved(name):
    """torchvision keeps some blocks of `torchvision.ops` whole; their names are containers here."""
    model = torchvision.models.get_model(name).eval()
    traced = trace(evaluation_view(model))
    network = frfx.compiler.tail.Network(traced)
    known = set(traced.paths.values())
    whole = [n for n in torchvisions(model) if n not in known and "stochastic_depth" not in n]
    assert len(whole) > 10
    x = torch.randn(1, 3, 32, 32)
    extractor = create_feature_extractor(model, whole, suppress_diff_warning=True)
    expected = extractor(x)
    values: dict[str, torch.Tensor] = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n):
            values[traced.paths[n]] = super().run_node(n)
            return values[traced.paths[n]]

    Keep(traced.root, graph=traced.graph).run(x)
    for leaf in whole:
        node = network.find(leaf)
        assert traced.paths[node].startswith(f"{leaf}.")
        torch.testing.assert_close(values[traced.paths[node]], expected[leaf])


def test_layers_prints_the_names():
    rows = frfx.layers(Numbered())
    text = str(rows)
    assert text.splitlines()[0].split() == ["l", "name", "op", "parameters"]
    assert [line.split()[1] for line in text.splitlines()[1:] if line.split()[0].isdigit()] == [
        row.name for row in rows if row.index is not None
    ]
