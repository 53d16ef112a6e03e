"""What is supported: the page says what the registry holds, and rules keep what they say of it."""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18, swin_transformer
from torchvision.ops import StochasticDepth

import frfx
from frfx import ops, registry, vocabulary
from frfx.joint import JointRule
from frfx.rules import Rule
from tests.networks_zoo import snapshot
from tests.oracles import (
    Apply,
    invert,
    minimal_affine_preimage,
    nearest_crossing,
    normal,
    relative,
    window_distance,
)

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
COMMAND = "python -m frfx.support > docs/support.md"


# --- the page ---


def test_page_is_what_the_registry_holds():
    """In a process of its own: other tests register rules."""
    made = subprocess.run(
        [sys.executable, "-m", "frfx.support"], capture_output=True, text=True, check=True
    )
    assert made.stdout == PAGE.read_text(), f"docs/support.md is out of date: {COMMAND}"


def spelled() -> list[tuple[str, str]]:
    """Return every op of the page with every spelling, merged ones written out."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 5 and cells[0].startswith("`"):
            for name in re.findall(r"`([^`]+)`", cells[1]):
                dims = re.search(r"[123]d(?:/[123]d)+", name)
                variants = dims[0].split("/") if dims else [""]
                op = cells[0].strip("`")
                found += [(op, re.sub(r"[123]d(/[123]d)+", v, name)) for v in variants]
    return found


def test_spellings_of_the_page_are_those_that_programs_write():
    """Evaluated as a program would, each gives what the vocabulary knows as that op."""
    found = spelled()
    assert len(found) > 250
    short = {"nn": nn, "F": F}
    for op, text in found:
        if text.startswith('"'):
            spelling = text.strip('"')
            assert hasattr(torch.Tensor, spelling), text
        else:
            home, _, name = text.rpartition(".")
            spelling = getattr(short.get(home) or importlib.import_module(home), name)
        assert registry.resolve(spelling).name == op, text


def test_page_has_every_spelling():
    """No spelling of an op of the page is missing, counting ATen's."""
    counts: dict[str, int] = {}
    for op, _ in spelled():
        counts[op] = counts.get(op, 0) + 1
    for op, aten in re.findall(r"^\| `(\w+)` \| .*?ATen: (\d+)", PAGE.read_text(), re.MULTILINE):
        counts[op] += int(aten)
    expected = {op.name: len(ops.spellings_of(op)) for op, _, _ in registry.default.entries()}
    expected.pop("region")
    assert counts == expected


# --- what rules say of themselves ---


def built_in() -> list[Rule]:
    """Return one rule of every kind that frfx has."""
    made = [make() for _, _, make in registry.default.entries()]
    classes = [v for v in vars(frfx.rules).values() if isinstance(v, type) and issubclass(v, Rule)]
    own = [rule() for rule in classes if rule not in (Rule, frfx.rules.ElementwiseRule)]
    return [*made, *own, JointRule()]


def test_every_rule_says_what_it_answers():
    for rule in built_in():
        assert rule.accuracy.startswith(("exact", "approximate: ")), rule
        assert rule.equation, rule
        assert rule.solvers, rule


def test_a_rule_that_says_nothing_is_not_called_exact():
    class Quiet(Rule):
        def build(self, op):
            raise NotImplementedError

    assert Quiet().accuracy == "not stated"


W = {"w": normal(1, 1, 4, 1, 1).abs() + 0.5}
INDEX = torch.tensor([3, 0, 3])

AFFINE = {
    "linear": (lambda x, w: F.linear(x, w), (2, 5), {"w": normal(2, 3, 5)}),
    "batch_norm": (
        lambda x, m, v, w: F.batch_norm(x, m, v, w),
        (2, 4, 3, 3),
        {"m": normal(3, 4), "v": normal(4, 4).abs() + 0.1, "w": normal(5, 4)},
    ),
    "dropout": (lambda x: F.dropout(x, training=False), (2, 4), {}),
    "stochastic_depth": (StochasticDepth(0.5, "row").eval(), (2, 4), {}),
    "identity": (lambda x: x.contiguous(), (2, 4), {}),
    "avg_pool": (lambda x: F.avg_pool2d(x, 3, 2, 1), (2, 2, 5, 6), {}),
    "adaptive_avg_pool": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), (2, 2, 5, 6), {}),
    "mean": (lambda x: x.mean((2, 3)), (2, 2, 3, 4), {}),
    "interpolate": (
        lambda x: F.interpolate(x, size=(7, 3), mode="bilinear"),
        (2, 2, 4, 5),
        {},
    ),
    "pad": (lambda x: F.pad(x, (1, 2, -1, 1), "reflect"), (2, 2, 4, 5), {}),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (2, 8, 2, 3), {}),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), (2, 2, 4, 6), {}),
    "channel_shuffle": (lambda x: torch.channel_shuffle(x, 2), (2, 6, 2, 2), {}),
    "reshape": (lambda x: x.flatten(1), (2, 3, 4), {}),
    "permute": (lambda x: x.permute(0, 2, 3, 1), (2, 3, 4, 5), {}),
    "transpose": (lambda x: x.transpose(1, 2), (2, 3, 4), {}),
    "movedim": (lambda x: x.movedim(1, -1), (2, 3, 4, 5), {}),
    "roll": (lambda x: x.roll((1, -2), (1, 2)), (2, 3, 4), {}),
    "flip": (lambda x: x.flip(1), (2, 3), {}),
    "rot90": (lambda x: x.rot90(1, (1, 2)), (2, 3, 4), {}),
    "cast": (lambda x: x.double(), (2, 3), {}),
    "cat": (lambda x, w: torch.cat([w.expand(2, -1, -1, -1), x], 1), (2, 3, 1, 1), W),
    "stack": (lambda x, w: torch.stack([x, w], 1), (1, 4, 1, 1), W),
    "chunk": (lambda x: x.chunk(2, 1)[1], (2, 5), {}),
    "split": (lambda x: x.split([1, 3], 1)[1], (2, 4), {}),
    "tensor_split": (lambda x: x.tensor_split(3, 1)[0], (2, 5), {}),
    "unbind": (lambda x: x.unbind(1)[2], (2, 3, 4), {}),
    "getitem": (lambda x: x[:, 1::2, None], (2, 5), {}),
    "select": (lambda x: x.select(1, 2), (2, 3, 4), {}),
    "index_select": (lambda x: x.index_select(1, INDEX), (2, 4), {}),
    "narrow": (lambda x: x.narrow(1, 1, 2), (2, 4), {}),
    "expand": (lambda x: x.expand(-1, 3, 4), (2, 1, 4), {}),
    "repeat": (lambda x: x.repeat(1, 2, 3), (2, 2, 2), {}),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), (2, 4), {}),
    "patch_merging": (
        lambda x: swin_transformer._patch_merging_pad(x),
        (2, 3, 5, 2),
        {},
    ),
    "add": (lambda x, w: x + w, (2, 4, 3, 1), W),
    "sub": (lambda x, w: torch.sub(w, x, alpha=2), (2, 4, 3, 1), W),
    "mul": (lambda x, w: x * w, (2, 1, 3, 1), W),
    "div": (lambda x, w: x / w, (2, 4, 3, 1), W),
    "neg": (lambda x: -x, (2, 3), {}),
}
"""An op as a network: its function, the shape of its input, its parameters."""

ELEMENTWISE = {
    "relu": (F.relu, {}),
    "leaky_relu": (functools.partial(F.leaky_relu, negative_slope=-0.3), {}),
    "prelu": (F.prelu, {"weight": torch.tensor([0.2], dtype=torch.float64)}),
    "hardtanh": (F.hardtanh, {}),
    "clamp": (functools.partial(torch.clamp, min=-0.5, max=2.0), {}),
    "relu6": (F.relu6, {}),
    "hardsigmoid": (F.hardsigmoid, {}),
    "silu": (F.silu, {}),
    "gelu": (F.gelu, {}),
    "mish": (F.mish, {}),
    "hardswish": (F.hardswish, {}),
    "abs": (torch.abs, {}),
    "sin": (torch.sin, {}),
    "sinh": (torch.sinh, {}),
    "asinh": (torch.asinh, {}),
}
"""A function of single entries, and its parameters."""


EXTREME = {
    "max": lambda x: x.max(1)[0],
    "min": lambda x: x.min(1)[0],
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin(1),
}
"""The largest or smallest entry of every row."""


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
def test_exact_affine_ops_are_exact(name):
    """`x* = x^ + J+ (y* - y^)` with NumPy's pseudo-inverse, solved by what the rule says."""
    function, shape, tensors = AFFINE[name]
    x = normal(7, *shape)
    bound = functools.partial(function, **tensors)
    target = bound(x) + normal(8, *bound(x).shape)
    inverse = invert(function, frfx.policy.minimal(branches="rules"), **tensors)
    assert relative(inverse(x, target), minimal_affine_preimage(bound, x, target)) < 1e-10
    steps = {step.op.type.name: step.rule for step in inverse.plan.steps}
    assert name in steps
    for row in inverse.summary():
        assert row.solver in rule_of(row.op).solvers, row


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_exact_elementwise_ops_are_exact(name):
    """No entry of a grid is nearer to the target, or as near to it and nearer to the input."""
    function, tensors = ELEMENTWISE[name]
    grid = np.linspace(-9, 9, 18_001)
    values = function(torch.from_numpy(grid), **tensors).numpy()
    x = torch.linspace(-4, 4, 41, dtype=torch.float64).repeat(33)[None]
    y = torch.linspace(-1.2, 1.2, 33, dtype=torch.float64).repeat_interleave(41)[None]
    found = invert(function, **tensors)(x, y)
    miss = (function(found, **tensors) - y).abs()
    for at, start, target, left in zip(*(v[0].tolist() for v in (found, x, y, miss)), strict=True):
        assert left <= np.abs(values - target).min() + 1e-9
        if left <= 1e-9:
            assert abs(at - start) <= nearest_crossing(grid, values, target, start) + 1e-6


@pytest.mark.parametrize("name", EXTREME)
def test_exact_extremes_are_exact(name):
    """The target is met, at the least distance that trying every entry finds."""
    function, x, target = EXTREME[name], normal(9, 30, 4), normal(10, 30)
    found = invert(function, frfx.policy.minimal(branches="rules"))(x, target)
    torch.testing.assert_close(function(found), target, rtol=0, atol=1e-14)
    sign = 1 if "max" in name else -1
    for row, wanted, at in zip(x.numpy(), target.tolist(), found.numpy(), strict=True):
        assert np.linalg.norm(at - row) <= window_distance(sign * row, sign * wanted) + 1e-12


def rule_of(op: str) -> Rule:
    """Return the rule of an op under `minimal`, by the op's name."""
    kind = next(kind for kind, _, _ in registry.default.entries() if kind.name == op)
    make = registry.default.find(kind, "minimal")
    assert make is not None
    return make()


def test_whatever_is_called_exact_is_tested_here():
    ours = {kind.name for kind in vars(vocabulary).values() if isinstance(kind, ops.OpType)}
    kinds = {kind.name for kind, _, _ in registry.default.entries()} & ours
    exact = {name for name in kinds if rule_of(name).accuracy == "exact"}
    tested = {*AFFINE, *ELEMENTWISE, *EXTREME}
    assert exact <= tested
    assert {
        n for n in (*AFFINE, *ELEMENTWISE) if not rule_of(n).accuracy.startswith("exact")
    } == set()


class One(nn.Module):
    """A network of one module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x):
        if isinstance(self.module, nn.MultiheadAttention):
            return self.module(x, x, x)[0]
        return self.module(x)


MODULES = {
    "unpadded": (nn.Conv2d(2, 3, 3), (2, 40, 40)),
    "1x1": (nn.Conv2d(2, 3, 1), (2, 6, 6)),
    "padded, small": (nn.Conv2d(3, 2, 3, padding=1), (3, 6, 6)),
    "padded": (nn.Conv2d(8, 4, 3, padding=1), (8, 32, 32)),
    "padded, ill-conditioned": (nn.Conv2d(8, 8, 3, padding=1), (8, 32, 32)),
    "transposed": (nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 4, 4)),
    "attention": (nn.MultiheadAttention(8, 2, batch_first=True), (5, 8)),
    "layer norm": (nn.LayerNorm(8), (5, 8)),
    "instance norm": (nn.InstanceNorm2d(4, track_running_stats=True), (4, 3, 3)),
    "max pool": (nn.MaxPool2d(3, 2, 1), (2, 7, 7)),
    "softmax": (nn.Softmax(1), (5,)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning", "ignore::frfx.ConvergenceWarning")
def test_solvers_are_those_that_rules_name(name):
    module, shape = MODULES[name]
    inverse = frfx.invert(One(module).eval(), "x", policy=frfx.policy.minimal(branches="rules"))
    x = normal(0, 2, *shape, dtype=torch.float32)
    inverse(x, inverse.model(x))
    for row in inverse.summary():
        assert row.solver.split(",")[0] in rule_of(row.op).solvers, row


# --- before compiling ---


class Branching(nn.Module):
    """A gate, an attention whose query and key hold, a tuple, and a join; then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x * self.gate(x)
        one, other = x.chunk(2, 1)
        x = torch.cat([other, torch.tanh(one)], 1)
        x = x.flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x).mean(1))


class Unsupported(Branching):
    """With ops that have no rule, one inside of a block."""

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + x.cumsum(1)
        x = torch.erf(self.gate(x)).sort(1)[0]
        return self.head(x.flatten(1).cumprod(1))


X = normal(3, 2, 3, 9, 9, dtype=torch.float32)
POLICIES = {
    "region": frfx.policy.minimal(),
    "rules": frfx.policy.minimal(branches="rules"),
    "joint": frfx.policy.joint(),
    "joint above rules": frfx.policy.joint(start="transpose"),
}


@functools.cache
def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layer", ["relu", "stem", "gate.2", "x"])
def test_layers_down_to_a_layer_are_what_invert_compiles(policy, layer):
    """The rows with a rule are those of the summary, and nothing of the tail is missing."""
    model, chosen = network(Branching), POLICIES[policy]
    before = snapshot(model)
    for example in (None, X):
        found = frfx.layers(model, example, upto_layer=layer, policy=chosen)
        assert found.unsupported == ()
    assert snapshot(model) == before
    everything = [row.name for row in frfx.layers(model)]
    inverse = frfx.invert(model, layer, policy=chosen)
    rows = {row.name: row.inversion for row in found}
    assert next(iter(rows)) == inverse.layer
    assert rows.pop(inverse.layer) == "reconstructed"
    tail = [inverse.traced.paths[node] for node in inverse.plan.tail.nodes]
    assert [name for name in rows if name in everything] == tail
    ruled = {row.node: row.rule for row in inverse.summary()}
    for name, rule in ruled.items():
        assert rows.pop(name).startswith(rule)
    others = {how.partition(" ")[0] for how in rows.values()}
    assert others <= {"in", "a", "held"}  # the region that, part of, held
    for how in rows.values():
        if how.startswith("in the region"):
            assert how.split("'")[1] in ruled


def test_what_a_step_holds_is_told():
    rows = frfx.layers(network(Branching), upto_layer="gate.2", policy=POLICIES["region"])
    how = {row.name: row.inversion for row in rows}
    assert how["mul"] == "ProductRule; holds input"
    rows = frfx.layers(network(Branching), upto_layer="transpose", policy=POLICIES["rules"])
    how = {row.name: row.inversion for row in rows}
    assert how["attention"] == "MultiheadAttentionRule; holds query, key"
    assert how["getitem_2"] == "a part of 'attention'"
    rows = frfx.layers(network(Branching), upto_layer="tanh", policy=POLICIES["region"])
    assert {row.name: row.inversion for row in rows}["cat"] == "CatRule; holds tensors[0]"


@pytest.mark.parametrize("branches", ["region", "rules"])
@pytest.mark.parametrize("layer", ["relu", "add", "gate.0"])
def test_what_is_not_supported_is_listed_as_invert_raises_it(branches, layer):
    model, policy = network(Unsupported), frfx.policy.minimal(branches=branches)
    for example in (None, X):
        found = frfx.layers(model, example, upto_layer=layer, policy=policy)
        with pytest.raises(frfx.UnsupportedOpsError) as caught:
            frfx.invert(model, layer, policy=policy, example_input=example)
        assert found.unsupported == caught.value.ops
        assert str(caught.value) in str(found)
    missing = [row.name for row in found if row.inversion == "not supported"]
    assert missing == [op.path for op in found.unsupported]
    inside = branches == "region" and layer == "relu"
    assert ("cumsum" in missing) is (branches == "rules" and layer == "relu")
    assert {row.name: row.inversion for row in found}.get("cumsum", "").startswith(
        "in the"
    ) is inside


def test_what_only_the_size_tells_needs_an_example():
    """What `invert` refuses at its first call is found with an example, and said without."""

    def function(x):
        return F.interpolate(x, size=(2, 1), mode="bilinear", antialias=True)

    model = Apply(function)
    found = frfx.layers(model, upto_layer="x")
    assert found.unsupported == ()
    assert (
        found.note == "Without example_input, what depends on the size of the image is not checked."
    )
    found = frfx.layers(model, X, upto_layer="x")
    assert ["single column" in op.reason for op in found.unsupported] == [True]
    with pytest.raises(frfx.UnsupportedOpsError) as caught:
        frfx.invert(model, "x")(X, torch.randn(2, 3, 2, 1))
    assert found.unsupported == caught.value.ops


def test_hooks_are_seen_with_an_example():
    model = Branching().eval()
    model.norm.register_forward_hook(lambda module, args, output: 2 * output)
    found = frfx.layers(model, X, upto_layer="transpose", policy=POLICIES["rules"])
    assert [(op.path, "hook" in op.reason) for op in found.unsupported] == [("norm", True)]


def test_without_a_layer_nothing_is_asked_of_rules():
    found = frfx.layers(network(Unsupported))
    assert found.unsupported == ()
    assert {row.inversion for row in found} == {""}
    assert "inverted by" not in str(found)


def test_table():
    text = str(frfx.layers(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), upto_layer="0"))
    assert text.splitlines() == [
        "  l  name    op      parameters  inverted by",
        "     0       linear              reconstructed",
        "  1  1       tanh             8  ElementwiseRule(tanh)",
        "     argmax  argmax              NearestEmbeddingRule",
        "Without example_input, what depends on the size of the image is not checked.",
    ]


@pytest.mark.parametrize(
    ("layer", "policy", "error", "text"),
    [
        ("nowhere", "minimal", frfx.LayerError, "no layer 'nowhere'"),
        ("chunk", "minimal", frfx.LayerError, "is a tuple of tensors"),
        ("relu", "minimum", frfx.PolicyError, "Did you mean 'minimal'"),
        (
            "relu",
            frfx.policy.minimal().override(node="tanh", damping=1.0),
            frfx.PolicyError,
            "lies inside of a region",
        ),
        ("relu", frfx.policy.joint(start="gate.2"), frfx.LayerError, "not on every path"),
    ],
)
def test_mistakes_are_those_of_invert(layer, policy, error, text):
    for call in (frfx.invert, frfx.layers):
        with pytest.raises(error, match=text):
            call(network(Branching), upto_layer=layer, policy=policy)


@pytest.mark.parametrize("layer", ["layer4.0.relu", "layer2", "maxpool"])
def test_a_residual_network(layer):
    model = resnet18().eval()
    found = frfx.layers(model, upto_layer=layer, policy="paper")
    inverse = frfx.invert(model, layer)
    assert found.unsupported == ()
    shown = {row.name for row in found if row.inversion.split("(")[0].endswith("Rule")}
    shown |= {row.name for row in found if row.inversion.startswith(("RegionRule", "SumRule"))}
    assert shown == {row.node for row in inverse.summary()}
