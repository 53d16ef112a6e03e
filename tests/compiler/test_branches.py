"""The walk back over any graph: fan-out, what is held, parts of tuples, regions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import frfx
from frfx import rules
from tests.branch_walks import A, B, Blocks, C, by_sample, exact, near, steps
from tests.oracles import (
    Apply,
    embedding_by_quadprog,
    invert,
    jacobian,
    normal,
    reconstruct,
    relative,
)

# --- what is one step ---


BLOCKS = [("mul", "region"), ("tanh_2", "tanh"), ("mid", "linear"), ("add_1", "region")]


def test_lines_by_rules_and_blocks_as_regions():
    model, x = Blocks(), normal(0, 4, 6)
    target = near(model, x)
    inverse = frfx.invert(model, "stem", policy=exact())
    assert steps(inverse) == [("argmax", "argmax"), ("fc", "linear"), *BLOCKS]
    nodes = inverse.reconstruct(x, target)
    pairs = {"mul": ("tanh_2", model.gated), "add_1": ("stem", model.block)}
    for end, (start, function) in pairs.items():
        expected = by_sample(function, nodes[start].forward, nodes[end].target)
        assert relative(nodes[start].target, expected) < 1e-8
    assert relative(inverse(x, target), nodes.feature) == 0


def test_a_cut_inside_of_a_block():
    """Of the region that is left, what the layer does not reach is held."""
    model, x = Blocks(), normal(0, 4, 6)
    labels = torch.arange(4)
    inverse = frfx.invert(model, "tanh", policy=exact())
    assert steps(inverse)[2:] == [*BLOCKS[:3], ("add_1", "add"), ("c", "linear"), ("add", "region")]
    nodes = inverse.reconstruct(x, labels)
    held = model.stem(x)
    torch.testing.assert_close(held + nodes["c"].target, nodes["add_1"].target)
    expected = by_sample(
        lambda h: h + model.b(torch.tanh(h)), nodes["tanh"].forward, nodes["add"].target
    )
    assert relative(nodes.feature, expected) < 1e-8


def test_a_region_that_begins_at_the_input_and_ends_in_the_logits():
    def function(x, a):
        return x + torch.tanh(F.linear(x, a))

    x, labels = normal(0, 4, 6), torch.arange(4)
    inverse = invert(function, exact(), a=A)
    assert steps(inverse) == [("argmax", "argmax"), ("add", "region")]
    nodes, logits = inverse.reconstruct(x, labels), function(x, A)
    wanted = [embedding_by_quadprog(row.numpy(), int(y), 0.5) for row, y in zip(logits, labels)]  # noqa: B905
    assert relative(nodes["add"].target, np.stack(wanted)) < 1e-9
    assert (
        relative(nodes.feature, by_sample(lambda v: function(v, A), x, nodes["add"].target)) < 1e-9
    )


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: torch.softmax(z, 1),
    "log_softmax": lambda z: F.log_softmax(z, -1),
    "argmax": lambda z: z.argmax(1),
    "both": lambda z: torch.softmax(z, 1).argmax(1),
}


@pytest.mark.parametrize("head", HEADS)
def test_labels_pass_the_heads_behind_a_region(head):
    def function(x, a):
        return x + torch.tanh(F.linear(x, a))

    def headed(x, a):
        return HEADS[head](function(x, a))

    x, labels = normal(0, 4, 6), torch.arange(4)
    expected = reconstruct(function, x, labels, exact(), a=A)
    assert relative(reconstruct(headed, x, labels, exact(), a=A), expected) < 1e-12


def test_a_float_target_behind_softmax_and_a_region():
    def function(x, a):
        return x + torch.tanh(F.linear(x, a))

    x, target = normal(0, 4, 6), torch.softmax(normal(1, 4, 6), 1)
    inverse = invert(lambda x, a: torch.softmax(function(x, a), 1), exact(), a=A)
    nodes = inverse.reconstruct(x, target)
    logits = function(x, A)
    error = target.log() - torch.softmax(logits, 1).log()
    torch.testing.assert_close(nodes["add"].target, logits + error - error.mean(1, keepdim=True))
    expected = by_sample(lambda v: function(v, A), x, nodes["add"].target)
    assert relative(nodes.feature, expected) < 1e-9


def test_a_head_that_leads_nowhere_tells_nothing_of_the_classes():
    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x):
            x = self.fc(x)
            self.seen = torch.softmax(x, 0)
            return x

    x, labels = normal(0, 5, 6).float(), torch.arange(5) % 4
    model = Side().eval()
    found = frfx.invert(model, "x", policy="minimal")(x, labels)
    assert bool((model.fc(found).argmax(1) == labels).all())


# --- fan-out, one value under two names, one module twice ---


def test_answers_of_nested_fan_outs_are_averaged_by_their_readers():
    def function(x, a, b, c):
        return torch.cat([F.linear(x, a), F.linear(x, b), F.linear(x, c)], 1)

    x = normal(0, 4, 6)
    target = near(function, x, a=A, b=B, c=C)
    asked = (target - function(x, A, B, C)).numpy().reshape(4, 3, 6)
    answers = [asked[:, i] @ np.linalg.pinv(m.numpy()).T for i, m in enumerate((A, B, C))]
    found = reconstruct(function, x, target, exact("rules"), a=A, b=B, c=C)
    assert relative(found - x, np.mean(answers, 0)) < 1e-9


TWICE: dict[str, Callable[[Tensor], Tensor]] = {
    "x + x": lambda x: x + x,
    "x * x": lambda x: x * x,
    "cat of one": lambda x: torch.cat([x, x], 1),
    "stack of one": lambda x: torch.stack([x, x, x], 1),
    "x - x / 3": lambda x: x - x / 3,
    "matmul": lambda x: x[:, None] @ x[:, :, None],
}


@pytest.mark.parametrize("name", TWICE)
def test_one_value_under_two_names(name):
    function, x = TWICE[name], normal(0, 4, 6)
    target = near(function, x)
    inverse = invert(function, exact())
    assert steps(inverse)[1][1] == "region"
    assert relative(inverse(x, target), by_sample(function, x, target)) < 1e-9


@pytest.mark.parametrize("name", ["x + x", "cat of one", "stack of one"])
def test_readers_that_agree_are_met_by_rules_too(name):
    function, x, wanted = TWICE[name], normal(0, 4, 6), normal(1, 4, 6)
    assert relative(reconstruct(function, x, function(wanted), exact("rules")), wanted) < 1e-9


class Reused(nn.Module):
    """Calls one module twice in a row, and once more beside."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(6, 6).double().requires_grad_(False), nn.Tanh()
        self.fc.weight.data = A / 3

    def forward(self, x):
        x = self.act(self.fc(x))
        x = self.act(self.fc(x))
        return x + self.fc(x)


def test_a_module_that_is_called_several_times():
    model, x, wanted = Reused().eval(), 0.3 * normal(0, 4, 6), 0.3 * normal(1, 4, 6)
    inverse = frfx.invert(model, "x", policy=exact(clamp_margin=1e-9))
    assert [name for name, _ in steps(inverse)[1:]] == ["add", "act_1", "fc_1", "act", "fc"]
    nodes = inverse.reconstruct(x, model(wanted))
    assert relative(nodes.feature, wanted) < 1e-6  # the region is linear, and every op can be met
    by_rules = frfx.invert(model, "x", policy=exact("rules"))
    assert len(by_rules.plan.steps) == 7
    assert relative(by_rules(x, model(x)), x) < 1e-9


# --- parts of a tuple ---


def test_parts_take_different_ways():
    def function(x, a, b):
        left, right = x.chunk(2, 1)
        return torch.cat([F.linear(right, a), torch.tanh(F.linear(left, b))], 1)

    a, b = A[:3, :3], B[:3, :3] / 4
    x, wanted = 0.3 * normal(0, 4, 6), 0.3 * normal(1, 4, 6)
    for branches in ("rules", "region"):
        inverse = invert(function, exact(branches, clamp_margin=1e-9), a=a, b=b)
        assert relative(inverse(x, function(x, a, b)), x) < 1e-12
        if branches == "rules":
            assert relative(inverse(x, function(wanted, a, b)), wanted) < 1e-9
            assert steps(inverse)[-1] == ("chunk", "chunk")


def test_a_part_that_nobody_reads_stays():
    def function(x, a):
        first, _, last = x.split([1, 2, 3], 1)
        return torch.cat([F.linear(last, a), first], 1)

    x = normal(0, 4, 6)
    target = near(function, x, a=A[:3, :3])
    for branches in ("rules", "region"):
        found = reconstruct(function, x, target, exact(branches), a=A[:3, :3])
        assert torch.equal(found[:, 1:3], x[:, 1:3])
        assert relative(function(found, A[:3, :3]), target) < 1e-9


@pytest.mark.parametrize("second", [0, -2])
def test_a_part_that_is_taken_twice_has_the_mean_of_both_answers(second):
    def function(x, a, b):
        parts = x.chunk(2, 1)
        return torch.cat([F.linear(parts[0], a), F.linear(parts[second], b), parts[1]], 1)

    a, b, x = A[:3, :3], B[:3, :3], normal(0, 4, 6)
    target = near(function, x, a=a, b=b)
    asked = (target - function(x, a, b)).numpy().reshape(4, 3, 3)
    answers = [asked[:, i] @ np.linalg.pinv(m.numpy()).T for i, m in enumerate((a, b))]
    expected = np.concatenate([np.mean(answers, 0), asked[:, 2]], 1)
    assert relative(reconstruct(function, x, target, exact("rules"), a=a, b=b) - x, expected) < 1e-9


def test_several_parts_at_once():
    """As a region, whatever is done with a tuple; by rules, its parts are taken one by one."""

    def function(x, a):
        parts = x.chunk(3, 1)
        return torch.cat([F.linear(parts[0], a), torch.cat(parts[1:], 1)], 1)

    a, x = A[:2, :2], normal(0, 4, 6)
    target = near(function, x, a=a)
    found = reconstruct(function, x, target, exact(), a=a)
    assert relative(found, by_sample(lambda v: function(v, a), x, target)) < 1e-9
    with pytest.raises(
        frfx.UnsupportedOpsError, match="several parts of a tuple at once"
    ) as caught:
        invert(function, exact("rules"), a=a)
    assert 'branches="region"' in caught.value.ops[0].remedy


def test_a_line_through_a_part_is_no_branch():
    def function(x, a):
        return F.linear(x.chunk(2, 1)[1], a)

    x, a = normal(0, 4, 6), A[:3, :3]
    inverse = invert(function, frfx.policy.minimal(), a=a)
    assert steps(inverse) == [("argmax", "argmax"), ("linear", "linear"), ("chunk", "chunk")]
    target = near(function, x, a=a)
    found = inverse(x, target)
    assert relative(found, by_sample(lambda v: function(v, a), x, target)) < 1e-9
    assert "6 -> tuple" in str(inverse.summary())


def test_a_region_whose_paths_all_lead_through_a_tuple():
    """Nothing begins or ends in a tuple: the region goes on to the next tensor."""

    def function(x, a):
        left, right = torch.tanh(F.linear(x, a)).chunk(2, 1)
        return left * torch.sigmoid(right)

    x = normal(0, 4, 6)
    inverse = invert(function, exact(), a=A)
    assert steps(inverse)[1:] == [("mul", "region"), ("tanh", "tanh"), ("linear", "linear")]
    nodes = inverse.reconstruct(x, near(function, x, a=A))

    def gate(h: Tensor) -> Tensor:
        return h[:, :3] * torch.sigmoid(h[:, 3:])

    expected = by_sample(gate, nodes["tanh"].forward, nodes["mul"].target)
    assert relative(nodes["tanh"].target, expected) < 1e-9


def test_what_cannot_be_reconstructed():
    def halves(x):
        return x.chunk(2, 1)[0] + 1

    with pytest.raises(
        frfx.LayerError, match="'chunk' is a tuple of tensors: name what it is made"
    ):
        frfx.invert(Apply(halves).eval(), "chunk")

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(self.lstm(x)[0][:, -1])

    with pytest.raises(frfx.LayerError, match="'lstm' is a tuple of tensors: name what it is"):
        frfx.invert(Recurrent().eval(), "lstm")


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_region_that_ends_in_a_part_of_what_an_op_returns(kind):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.rnn = nn.Linear(3, 6), kind(6, 5, batch_first=True)
            self.last = nn.Linear(5, 3)

        def forward(self, x):
            sequence, _ = self.rnn(self.first(x))
            return self.last(sequence[:, -1])

    model, x = Recurrent().double().eval(), normal(0, 2, 4, 3)
    with pytest.raises(frfx.UnsupportedOpsError) as caught:
        frfx.invert(model, "first")
    (problem,) = caught.value.ops
    assert "policy.override(node='getitem', rule=frfx.rules.RegionRule())" in problem.remedy
    rule = rules.RegionRule(damping=0.0, tolerance=1e-12, max_steps=200)
    inverse = frfx.invert(model, "first", policy=exact().override(node="getitem", rule=rule))
    nodes = inverse.reconstruct(x, model(normal(1, 2, 4, 3)).detach())
    feature, part = nodes["first"], nodes["getitem"]
    for k in range(2):
        matrix = jacobian(lambda v: model.rnn(v)[0], feature.forward[k : k + 1])
        asked = (part.target - part.forward)[k].numpy().ravel()
        moved = (feature.target - feature.forward)[k].reshape(-1)
        assert relative(moved, np.linalg.pinv(matrix, rcond=1e-10) @ asked) < 1e-6
    with pytest.raises(frfx.UnsupportedOpsError, match="name what takes a part") as caught:
        frfx.invert(model, "first", policy=exact().override(node="rnn", rule=rule))
    assert "RegionRule" not in caught.value.ops[0].remedy


class HoldAll(rules.ProductRule):
    """Answers for none of its inputs."""

    def reconstructs(self, op):
        return ()


def test_a_cut_that_no_rule_answers_for():
    def function(x, a):
        return F.linear(x, a) * torch.tanh(x)

    policy = exact("rules").override(node="mul", rule=HoldAll())
    with pytest.raises(frfx.LayerError, match="no rule answers for 'x'") as caught:
        invert(function, policy, a=A)
    assert 'branches="region"' in str(caught.value)
    assert steps(invert(function, exact(), a=A))[-1] == ("mul", "region")
