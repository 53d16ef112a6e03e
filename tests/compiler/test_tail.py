"""What lies behind a layer: dominators, branches, and the paper's numbers."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import frfx
from frfx import networks
from frfx.compiler.tail import Network, Tail
from frfx.compiler.trace import trace
from frfx.view import evaluation_view
from tests.oracles import invert, normal


def network_of(model: nn.Module) -> Network:
    return Network(trace(evaluation_view(model)))


def tail_of(model: nn.Module, layer: str) -> tuple[Network, Tail]:
    network = network_of(model)
    return network, network.tail(network.find(layer))


def names(network: Network, nodes) -> list[str]:
    return [network.traced.paths[node] for node in nodes]


class Branching(nn.Module):
    """A front, a residual block, a bypass over it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("front", "left", "right", "mid", "end", "side"):
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x):
        x = self.front(x)
        a = torch.tanh(x)
        block = self.left(a) * 2 + self.right(a)
        m = self.mid(block)
        self.side(m)
        m = m + x  # over the whole block
        return F.softmax(self.end(F.relu(m)), dim=-1)


def test_chain_is_what_every_path_leads_through():
    network, tail = tail_of(Branching(), "front")
    assert names(network, tail.chain) == ["front", "add_1", "relu", "end", "softmax"]
    network, tail = tail_of(Branching(), "tanh")
    chain = ["tanh", "add", "mid", "add_1", "relu", "end", "softmax"]
    assert names(network, tail.chain) == chain
    network, tail = tail_of(Branching(), "left")
    assert names(network, tail.chain) == ["left", "mul", *chain[1:]]


def every_path(network: Network, start, end) -> list[list]:
    """Return all paths by plain recursion."""
    if start is end:
        return [[end]]
    onward = [
        path for user in network.flow.successors(start) for path in every_path(network, user, end)
    ]
    return [[start, *path] for path in onward]


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (Branching(), ["x", "front", "tanh", "left", "right", "mid", "end"]),
        (
            torchvision.models.resnet18(),
            ["layer3.1.relu", "layer4.0.conv1", "layer4.0.downsample.0"],
        ),
        (torchvision.models.squeezenet1_0(), ["features.10.squeeze", "features.12.expand1x1"]),
    ],
    ids=["branching", "resnet", "squeezenet"],
)
def test_chain_and_nodes_against_enumerated_paths(model, layers):
    for layer in layers:
        network, tail = tail_of(model.eval(), layer)
        paths = every_path(network, tail.cut, network.output)
        common = set.intersection(*map(set, paths))
        reached = set().union(*paths) - {tail.cut}
        order = list(network.traced.graph.nodes)
        assert list(tail.chain) == sorted(common, key=order.index)
        assert list(tail.nodes) == sorted(reached, key=order.index)


def test_what_the_output_does_not_need_is_not_in_the_tail():
    """`side` reads `mid`, too, but leads nowhere."""
    network, tail = tail_of(Branching(), "mid")
    assert names(network, tail.nodes) == ["add_1", "relu", "end", "softmax"]
    assert "side" not in [row.name for row in frfx.layers(Branching())]


def test_heads_are_behind_the_logits():
    network = network_of(Branching())
    assert network.traced.paths[network.logits()] == "end"
    assert names(network, network.heads) == ["softmax"]

    class Label(Branching):
        def forward(self, x):
            return super().forward(x).log().argmax(-1)

    # a logarithm of the softmax is none of the heads, and the logits are what it reads from on
    network = network_of(Label())
    assert network.traced.paths[network.logits()] == "log"


def test_several_heads():
    class Label(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return torch.argmax(F.softmax(self.fc(x), 1), dim=1)

    network = network_of(Label())
    assert network.traced.paths[network.logits()] == "fc"
    assert sorted(names(network, network.heads)) == ["argmax", "softmax"]


# --- the paper's numbers ---

# What the next convolution or linear op reads: a layer of the paper is one such op with its
# activation and its pooling. The counts of parameters are those of Tables 1 to 4.
NUMBERED = {
    "mnist": ["input", "pool1", "flatten", "fc1"],
    "cifar10": ["input", "pool1", "pool2", "flatten", "tanh4", "fc2"],
    "cifar100": ["input", "pool1", "pool2", "flatten", "tanh4", "fc2"],
    "tiny-imagenet": ["input", "pool1", "pool2", "pool3", "flatten", "tanh5", "fc2"],
    "imagenette": ["input", "pool1", "pool2", "pool3", "pool4", "flatten", "tanh6", "fc2"],
    "imagewoof": ["input", "pool1", "pool2", "pool3", "pool4", "flatten", "tanh6", "fc2"],
}
PARAMETERS = {
    "mnist": [0, 52, 204, 2570],
    "cifar10": [0, 380, 460, 1365, 30848, 1290],
    "cifar100": [0, 760, 1365, 2720, 82176, 25700],
    "tiny-imagenet": [0, 760, 2275, 7910, 14220, 369152, 102600],
}


@pytest.mark.parametrize("name", NUMBERED)
def test_layers_of_the_papers_networks(name):
    model = networks.build(name)
    rows = [row for row in frfx.layers(model) if row.index is not None]
    assert [row.name for row in rows] == NUMBERED[name]
    assert [row.index for row in rows] == list(range(len(rows)))
    if name in PARAMETERS:
        assert [row.parameters for row in rows] == PARAMETERS[name]
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    for row in rows:
        inverse = frfx.invert(model, row.index)
        assert inverse.layer == row.name == frfx.invert(model, row.name).layer


def test_layers_of_alexnet():
    rows = frfx.layers(torchvision.models.alexnet())
    assert [(row.index, row.name) for row in rows if row.index is not None] == [
        (0, "x"),
        (1, "features.2"),
        (2, "features.5"),
        (3, "features.7"),
        (4, "features.9"),
        (5, "classifier.0"),
        (6, "classifier.3"),
        (7, "classifier.5"),
        (8, "classifier.6"),
    ]
    assert rows.note == ""
    assert sum(row.parameters for row in rows) == 61100840


def test_layers_of_a_resnet_have_no_numbers():
    model = torchvision.models.resnet18()
    rows = frfx.layers(model)
    assert all(row.index is None and row.parameters == 0 for row in rows)
    assert rows.note == "The network branches between its layers: use names."
    assert str(rows).splitlines()[-1] == rows.note
    assert len(rows) == 70


def test_normalisation_and_activation_belong_to_their_layer():
    model = nn.Sequential(
        nn.BatchNorm2d(1),
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.PReLU(),
        nn.Flatten(),
        nn.Linear(32, 3, bias=False),
        nn.Softmax(-1),
    )
    rows = {row.index: row for row in frfx.layers(model) if row.index is not None}
    assert {index: row.name for index, row in rows.items()} == {0: "input", 1: "4", 2: "5"}
    assert [rows[i].parameters for i in range(3)] == [0, 2 + 18 + 2 + 4 + 1, 96]


def test_parameters_of_functions_are_counted():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 6))
            self.v = nn.Parameter(torch.randn(4, 5))

        def forward(self, x):
            return F.linear(torch.tanh(F.linear(x, self.w)), self.v)

    rows = [row for row in frfx.layers(Functional()) if row.index is not None]
    assert [(row.name, row.parameters) for row in rows] == [
        ("x", 0),
        ("tanh", 30),
        ("linear_1", 20),
    ]


class Computed(nn.Module):
    """Weights that the graph computes: of a factor, of two factors added, and standardised."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(5, 6))
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 5))
        self.second = nn.Linear(5, 4)
        self.third = weight_norm(nn.Linear(4, 3, bias=False))

    def forward(self, x):
        x = F.linear(x, self.first - self.first.mean(1, keepdim=True)).tanh()
        x = F.linear(x, self.second.weight + self.a @ self.b, self.second.bias).tanh()
        return self.third(x)


def test_parameters_that_weights_are_computed_of_are_counted():
    rows = [row for row in frfx.layers(Computed()) if row.index is not None]
    assert [row.parameters for row in rows] == [0, 30, 20 + 4 + 8 + 10, 3 + 12]


def test_layer_0_is_the_input():
    """Whatever is done to it before the first layer, and where layers have no other numbers."""
    for model in (
        nn.Sequential(nn.Tanh(), nn.Linear(4, 4)),
        nn.Conv1d(1, 2, 3, padding=1, padding_mode="reflect"),
        nn.Sequential(nn.AvgPool1d(2)),
        Branching(),
    ):
        network = network_of(model)
        assert network.find(0) is network.traced.input


def test_network_without_layers():
    """No convolution, no linear op: names only."""
    rows = frfx.layers(nn.Sequential(nn.Flatten(), nn.Tanh()))
    assert all(row.index is None for row in rows)
    assert "has no convolution and no linear layer: use names" in rows.note
    with pytest.raises(frfx.LayerError, match=r"no number but 0, the input\. Use a name: '0', '1'"):
        frfx.invert(nn.Sequential(nn.Flatten(), nn.Tanh()), 1)
    inverse = frfx.invert(nn.Sequential(nn.Flatten(), nn.Tanh()), "0")
    assert inverse(torch.randn(3, 2, 2), torch.arange(3)).shape == (3, 4)


def test_layers_is_a_sequence():
    rows = frfx.layers(networks.build("mnist"))
    assert len(rows) == len(list(rows)) == 8
    assert rows[0].op == "placeholder"
    assert rows[-1].name == "fc1"
    assert [row.name for row in rows[1:3]] == ["conv1", "tanh1"]
    assert repr(rows) == str(rows)
    width = {len(line) for line in str(rows).splitlines()}
    assert len(width) == 1


@pytest.mark.parametrize(
    "fresh",
    [
        lambda x: x.new_zeros(x.shape),
        lambda x: x.new_full(x.shape, 2.0),
        lambda x: torch.zeros_like(x),
        lambda x: torch.ones_like(x) * 3,
        lambda x: torch.ops.aten.full_like.default(x, 2.0),
        lambda x: torch.ops.aten.new_ones.default(x, [3, 5]),
    ],
)
@pytest.mark.parametrize("branches", ["region", "rules"])
def test_a_tensor_made_of_sizes_is_no_branch(fresh, branches):
    """What is added to the feature does not depend on its values: the sum is a shift of it."""
    x, target = normal(1, 3, 5), normal(2, 3, 5)
    inverse = invert(lambda x: x + fresh(x), frfx.policy.minimal(branches=branches))
    assert [row.op for row in inverse.summary()] == ["argmax", "add"]
    shift = fresh(x)
    torch.testing.assert_close(inverse(x, target), target - shift, rtol=1e-12, atol=1e-12)
