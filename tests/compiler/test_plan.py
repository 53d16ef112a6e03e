"""Every op that cannot be inverted is named at once, with the line that would help."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import frfx


def problems(model: nn.Module, layer: str, **arguments) -> dict[str, frfx.errors.UnsupportedOp]:
    """Return what cannot be inverted, by path, in the order of the error."""
    with pytest.raises(frfx.UnsupportedOpsError) as caught:
        frfx.invert(model, layer, **arguments)
    paths = [op.path for op in caught.value.ops]
    assert len(set(paths)) == len(paths)
    return {op.path: op for op in caught.value.ops}


RULES = frfx.policy.paper(branches="rules")


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return torchvision.models.resnet18().eval()


@pytest.fixture(scope="module")
def shrunk() -> nn.Module:
    """A ResNet with activations for which there is no rule."""
    model = torchvision.models.resnet18()
    for module in model.modules():
        if hasattr(module, "relu"):
            module.relu = nn.Hardshrink()
    return model.eval()


def test_all_problems_of_a_resnet_at_once(shrunk):
    found = problems(shrunk, "layer3.1.conv1")
    ends = ["layer3.1.relu_1", "layer4.0.relu_1", "layer4.1.relu_1"]
    assert list(found) == ["layer3.1.relu", *ends]  # in front of the first sum, there is one path
    found = problems(shrunk, "layer3.1.conv1", policy=RULES)
    inside = ["layer3.1.relu", "layer4.0.relu", "layer4.1.relu"]
    assert list(found) == [name for pair in zip(inside, ends, strict=True) for name in pair]
    assert {op.op for op in found.values()} == {"torch.nn.Hardshrink"}
    assert {op.reason for op in found.values()} == {"no rule is registered for it"}


def test_nothing_inside_of_a_region_needs_a_rule(shrunk):
    inverse = frfx.invert(shrunk, "layer4.0.relu_1", policy=shrinking())
    rows = [(row.node, row.op) for row in inverse.summary()]
    assert rows[-2:] == [("layer4.1.relu_1", "region"), ("layer4.1.add", "region")]


def shrinking() -> frfx.policy.Policy:
    """Return a policy that inverts the last activation of a ResNet as a region of one op."""
    return frfx.policy.paper().override(node="layer4.1.relu_1", rule=frfx.rules.RegionRule())


def test_a_region_as_the_rule_of_a_single_op_is_a_way_round(shrunk):
    """So is the line that every message advises."""
    assert "layer4.1.relu_1" in problems(shrunk, "layer4.1.add")
    torch.manual_seed(0)
    inverse = frfx.invert(shrunk, "layer4.1.add", policy=shrinking())
    x, y = torch.randn(2, 3, 32, 32), torch.arange(2)
    assert inverse(x, y).shape == (2, 512, 1, 1)


def test_a_rule_that_refuses_names_the_weights_and_the_way_out(resnet):
    by_spectrum = frfx.policy.paper().override(op=nn.Linear, solver="spectral")
    refused = problems(resnet, "avgpool", policy=by_spectrum)["fc"]
    assert refused.reason.startswith("a linear layer has no spectrum over frequencies")
    assert refused.shapes == "known once there is an input; weight 1000x512; bias 1000"
    assert refused.remedy == (
        "policy.override(node='fc', rule=MyRule()), or "
        "@frfx.register_rule(torch.nn.Linear, overwrite=True) on a subclass of frfx.rules.Rule; "
        "or policy.override(node='fc', rule=frfx.rules.RegionRule()), if it has a derivative"
    )


def test_shapes_are_given_when_there_is_an_input(shrunk):
    example = torch.randn(1, 3, 64, 64)
    found = problems(shrunk, "layer4.0.relu_1", policy=RULES, example_input=example)
    assert found["layer4.1.relu"].shapes == "512x2x2 -> 512x2x2"


def test_message_has_every_part_of_every_op(shrunk):
    with pytest.raises(frfx.UnsupportedOpsError) as caught:
        frfx.invert(shrunk, "layer2.0", policy=RULES)
    text = str(caught.value)
    assert text.startswith(f"{len(caught.value.ops)} ops between the layer and the output cannot")
    for op in caught.value.ops:
        part = f"{op.path}: {op.op}\n    shapes: {op.shapes}\n    reason: {op.reason}\n"
        assert f"  {part}    way out: {op.remedy}" in text
        assert all((op.path, op.op, op.shapes, op.reason, op.remedy))


def test_error_survives_pickling_and_copying(shrunk):
    with pytest.raises(frfx.UnsupportedOpsError) as caught:
        frfx.invert(shrunk, "layer4.0")
    for twin in (pickle.loads(pickle.dumps(caught.value)), copy.deepcopy(caught.value)):
        assert type(twin) is frfx.UnsupportedOpsError
        assert twin.ops == caught.value.ops
        assert str(twin) == str(caught.value)


class Zoo(nn.Module):
    """One op of every kind that has no rule, and some that have one for other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(1, 4, 1)
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.mirror = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.overlap = nn.MaxPool2d(3, stride=2)
        self.norm = nn.LocalResponseNorm(2)
        self.transposed = nn.ConvTranspose2d(4, 4, 2)
        self.embed = nn.Hardshrink()

    def forward(self, x):
        x = self.mirror(self.grouped(self.dilated(self.start(x))))
        x = self.norm(self.overlap(x))
        x = torch.erf(self.embed(self.transposed(x)))
        x = x.cumsum(1) * x
        return F.normalize(x.flatten(1), dim=1)


CHAIN = ["norm", "embed", "erf", "normalize"]
"""What has no rule; `cumsum` lies inside of a region, where none is needed."""

SPELLINGS = {
    "norm": "torch.nn.LocalResponseNorm",
    "erf": "torch.erf",
    "cumsum": '"cumsum"',
    "normalize": "torch.nn.functional.normalize",
}


def test_a_zoo_of_problems():
    assert list(problems(Zoo().eval(), "start")) == CHAIN
    found = problems(Zoo().eval(), "start", policy=RULES)
    assert list(found) == [*CHAIN[:3], "cumsum", CHAIN[3]]
    assert {op.reason for op in found.values()} == {"no rule is registered for it"}
    assert {path: found[path].op for path in SPELLINGS} == SPELLINGS
    assert found["cumsum"].remedy == (
        '@frfx.register_rule("cumsum") on a subclass of frfx.rules.Rule; '
        "or policy.override(node='cumsum', rule=frfx.rules.RegionRule()), if it has a derivative"
    )
    assert found["norm"].remedy == (
        "@frfx.register_rule(torch.nn.LocalResponseNorm) on a subclass of frfx.rules.Rule; "
        "or policy.override(node='norm', rule=frfx.rules.RegionRule()), if it has a derivative"
    )


def test_the_lines_of_remedies_are_python():
    """What a message tells the user to write can be written."""
    for path, op in problems(Zoo().eval(), "start", policy=RULES).items():
        for line in re.findall(
            r"(?:@frfx\.register_rule|policy\.override|frfx\.invert)\(.*?\)", op.remedy
        ):
            opened = line.count("(") - line.count(")")
            compile(line.removeprefix("@") + ")" * opened, path, "eval")


def test_batch_statistics_are_a_reason():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)).eval()
    found = problems(model, "0")
    assert found["1"].reason.startswith("it normalises with the statistics of the batch")


class Shrunk(nn.Module):
    """Filters the columns of images, which torch does not do right if only one is left."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(1, 2, 1)
        self.fc = nn.Linear(2, 4)

    def forward(self, x):
        x = F.interpolate(self.start(x), scale_factor=(1, 0.25), mode="bilinear", antialias=True)
        return self.fc(x.mean((2, 3)))


def test_shapes_can_be_the_reason_at_the_first_call():
    model = Shrunk()
    inverse = frfx.invert(model, "start")
    y = torch.arange(2)
    assert inverse(torch.randn(2, 1, 3, 8), y).shape == (2, 2, 3, 8)
    with pytest.raises(frfx.UnsupportedOpsError) as caught:
        inverse(torch.randn(2, 1, 3, 4), y)
    (op,) = caught.value.ops
    assert (op.path, op.shapes) == ("interpolate", "2x3x4 -> 2x3x1")
    assert op.reason == "antialias onto a single column, where torch does not filter the rows right"
    assert inverse(torch.randn(2, 1, 3, 8), y).shape == (2, 2, 3, 8)
    found = problems(model, "start", example_input=torch.randn(2, 1, 3, 4))
    assert found["interpolate"].shapes == op.shapes


def hooked(**hooks) -> nn.Sequential:
    """Return a network whose activation `1` carries hooks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    for kind, hook in hooks.items():
        getattr(model[1], kind)(hook)
    return model


@pytest.mark.parametrize(
    "hooks",
    [
        {"register_forward_hook": lambda module, args, output: output * 2},
        {"register_forward_pre_hook": lambda module, args: (args[0] + 1,)},
    ],
)
def test_a_hook_that_changes_a_value_is_a_reason(hooks):
    """A rule knows the module, and not what its hooks make of it."""
    x, y = torch.randn(5, 4), torch.arange(5) % 3
    inverse = frfx.invert(hooked(**hooks), "0")
    for _ in range(2):
        with pytest.raises(frfx.UnsupportedOpsError) as caught:
            inverse(x, y)
        (op,) = caught.value.ops
        assert op.path == "1"
        assert op.reason == "a hook of the module changes its value, which no rule can see"
        assert op.remedy == "remove the hook, or write what it does in the forward of the model"
    problems(hooked(**hooks), "0", example_input=x)
    behind = frfx.invert(hooked(**hooks), "1")
    torch.testing.assert_close(behind.reconstruct(x, y)["1"].forward, hooked(**hooks)[:2](x))


def test_a_hook_that_changes_a_part_of_a_tuple_is_a_reason():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model, x = Attention().eval(), torch.randn(2, 3, 4)
    inverse = frfx.invert(model, "x", policy=RULES)
    assert inverse(x, model(x).detach()).shape == x.shape
    model.attention.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    with pytest.raises(frfx.UnsupportedOpsError, match="a hook of the module changes its value"):
        frfx.invert(model, "x", policy=RULES)(x, model(x).detach())
    whole = frfx.invert(model, "x")  # a region runs its hooks
    torch.testing.assert_close(whole(x, model(x).detach()), x)


def test_a_hook_that_looks_on_is_none():
    seen = []
    model = hooked(
        register_forward_hook=lambda module, args, output: seen.append(output.shape),
        register_forward_pre_hook=lambda module, args: None,
    )
    x, y = torch.randn(5, 4), torch.arange(5) % 3
    expected = frfx.invert(hooked(), "0")(x, y)
    torch.testing.assert_close(frfx.invert(model, "0")(x, y), expected)
    assert set(seen) == {(5, 4)}


def test_a_hook_of_a_container_is_traced():
    """It becomes an op like any other."""

    class Plain(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body, self.last = body, nn.Linear(4, 3)

        def forward(self, x):
            return self.last(self.body(x))

    class Written(Plain):
        def forward(self, x):
            return self.last(self.body(x) * 2)

    torch.manual_seed(0)
    written = Written(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    plain = Plain(copy.deepcopy(written.body))
    plain.last = written.last
    plain.body.register_forward_hook(lambda module, args, output: output * 2)
    x, y = torch.randn(5, 4), torch.arange(5) % 3
    expected = frfx.invert(written, "body.0")(x, y)
    torch.testing.assert_close(frfx.invert(plain, "body.0")(x, y), expected)


def test_scripted_and_unregistered_parts():
    """Outside of the walk they run as they are; within it they are named."""
    x, y = torch.randn(5, 4), torch.arange(5) % 3
    front = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3))
    assert frfx.invert(front, "1")(x, y).shape == (5, 4)
    within = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Tanh()), nn.Linear(4, 3))
    with pytest.raises(frfx.UnsupportedOpsError, match="no rule is registered"):
        frfx.invert(within, "0")


def test_what_lies_before_the_layer_is_no_problem():
    class Front(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            x = torch.erf(x).cumsum(1) + torch.roll(x, 1, 0)
            return self.fc(x)

    x, y = torch.randn(5, 8), torch.arange(5) % 4
    assert frfx.invert(Front(), "add")(x, y).shape == (5, 8)


def test_what_leads_to_no_output_is_no_problem():
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.side = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            x = torch.tanh(x)
            torch.erf(self.side(x)).sum()
            return self.fc(x)

    assert frfx.invert(Side(), "x")(torch.randn(5, 8), torch.arange(5) % 4).shape == (5, 8)


def test_softmax_in_front_of_argmax_is_asked_too():
    class OverTheBatch(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return torch.softmax(self.fc(x), 0).argmax(1)

    with pytest.raises(frfx.UnsupportedOpsError, match="softmax"):
        frfx.invert(OverTheBatch(), "fc")


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_labels_pass_through_softmax_in_front_of_argmax(dtype):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 4)

        def forward(self, x):
            return torch.softmax(self.fc(x), 1, dtype).argmax(1)

    torch.manual_seed(0)
    model, x, y = Classifier(), torch.randn(20, 5), torch.randint(4, (20,))
    a_star = frfx.invert(model, "fc", policy="minimal")(x, y)
    assert torch.equal(a_star.argmax(1), y)
    expected = frfx.nearest_embedding(model.fc(x), y, 0.5)
    torch.testing.assert_close(a_star, expected)
