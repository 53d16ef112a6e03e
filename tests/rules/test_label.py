"""From labels to logits: against a QP solver in L2 and an LP solver in L1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import frfx
from frfx import rules
from tests.oracles import embedding_by_quadprog, normal, smallest_l1_distance

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
INTEGERS += [torch.uint16, torch.uint32, torch.uint64]
MARGINS = st.sampled_from([0.0, 0.5, 3.0]) | st.floats(0, 10)


@st.composite
def labelled(draw, max_batch=4):
    """Draw logits (N, K), K from 1 to 12, with and without ties, and labels."""
    batch, classes = draw(st.integers(1, max_batch)), draw(st.integers(1, 12))
    entries = draw(st.sampled_from([st.integers(-2, 2).map(float), st.floats(-10, 10)]))
    row = st.lists(entries, min_size=classes, max_size=classes)
    logits = draw(st.lists(row, min_size=batch, max_size=batch))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=batch, max_size=batch))
    return torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)


def wins(embedded, labels, margin):
    """Return by how much less than the margin every label wins, 0 if by the margin or more."""
    own = embedded.gather(-1, labels[..., None])
    others = (embedded + margin).scatter(-1, labels[..., None], -torch.inf).amax(-1, keepdim=True)
    return (others - own).clamp(min=0).max().item()


@given(drawn=labelled(), margin=MARGINS)
def test_nearest_embedding_is_the_projection(drawn, margin):
    logits, labels = drawn
    found = frfx.nearest_embedding(logits, labels, margin)
    for row, y, embedded in zip(logits.numpy(), labels.tolist(), found.numpy(), strict=True):
        expected = embedding_by_quadprog(row, y, margin)
        np.testing.assert_allclose(embedded, expected, rtol=0, atol=1e-9)
    assert wins(found, labels, margin) < 1e-12


@given(drawn=labelled(), margin=MARGINS)
def test_maximum_assignment_is_nearest_in_l1(drawn, margin):
    logits, labels = drawn
    found = frfx.maximum_assignment(logits, labels, margin)
    assert wins(found, labels, margin) < 1e-12
    for row, y, embedded in zip(logits.numpy(), labels.tolist(), found.numpy(), strict=True):
        distance = np.abs(embedded - row).sum()
        assert distance <= smallest_l1_distance(row, y, margin) + 1e-9
        assert np.array_equal(np.delete(embedded, y), np.delete(row, y))


@pytest.mark.parametrize("embed", [frfx.nearest_embedding, frfx.maximum_assignment])
@given(drawn=labelled(), margin=MARGINS)
def test_labels_that_win_already_change_nothing(embed, drawn, margin):
    logits, labels = drawn
    own = logits.scatter(-1, labels[:, None], 40.0)
    assert torch.equal(embed(own, labels, margin), own)
    tied = logits.scatter(-1, labels[:, None], logits.amax(-1, keepdim=True))
    assert torch.equal(embed(tied, labels), tied)


@given(drawn=labelled(), margin=MARGINS)
def test_embeddings_are_projections(drawn, margin):
    logits, labels = drawn
    once = frfx.nearest_embedding(logits, labels, margin)
    twice = frfx.nearest_embedding(once, labels, margin)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-12)


@given(drawn=labelled())
def test_one_hot(drawn):
    logits, labels = drawn
    found = frfx.one_hot(logits, labels)
    assert found.dtype == logits.dtype
    assert np.array_equal(found.numpy(), np.eye(logits.shape[-1])[labels.numpy()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_many_classes(dtype, margin):
    logits, labels = normal(0, 2, 200, dtype=dtype), torch.tensor([0, 137])
    found = frfx.nearest_embedding(logits, labels, margin)
    assert found.dtype == dtype
    for row, y, embedded in zip(logits.double().numpy(), labels, found, strict=True):
        expected = embedding_by_quadprog(row, int(y), margin)
        np.testing.assert_allclose(embedded, expected, rtol=0, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_solved_in_single(dtype):
    # All competitors are active: the sums and counts run beyond what the half types can tell.
    logits = torch.cat([torch.zeros(1), torch.full((400,), 1.0)])[None].to(dtype)
    found = frfx.nearest_embedding(logits, torch.tensor([0]))
    expected = embedding_by_quadprog(logits[0].double().numpy(), 0, 0.0)
    assert found.dtype == dtype
    np.testing.assert_allclose(found[0].double(), expected, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_batch_dimensions(shape, margin):
    logits = normal(0, *shape, 6)
    labels = torch.arange(np.prod(shape, dtype=int)).reshape(shape) % 6
    found = frfx.nearest_embedding(logits, labels, margin)
    assigned = frfx.maximum_assignment(logits, labels, margin)
    hot = frfx.one_hot(logits, labels)
    for at in np.ndindex(*shape):
        row, y = logits[at].numpy(), int(labels[at])
        expected = embedding_by_quadprog(row, y, margin)
        np.testing.assert_allclose(found[at].numpy(), expected, rtol=0, atol=1e-12)
        distance = np.abs(assigned[at].numpy() - row).sum()
        assert distance == pytest.approx(smallest_l1_distance(row, y, margin), abs=1e-9)
        assert hot[at].tolist() == [float(i == y) for i in range(6)]


@pytest.mark.parametrize(
    "embed",
    [frfx.nearest_embedding, frfx.maximum_assignment, frfx.one_hot],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_every_integer_dtype(dtype, embed):
    logits, labels = normal(0, 4, 6), torch.tensor([5, 0, 3, 3])
    assert torch.equal(embed(logits, labels.to(dtype)), embed(logits, labels))
    with pytest.raises(frfx.TargetError, match=r"label 6 at position \[2\] is out of range"):
        embed(logits, torch.tensor([5, 0, 6, 3]).to(dtype))


@pytest.mark.parametrize(
    "embed",
    [frfx.nearest_embedding, frfx.maximum_assignment, frfx.one_hot],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, -1]), r"label -1 at position \[1\] .* has 3 classes, 0 to 2"),
        (torch.tensor([3, 0]), r"label 3 at position \[0\] .* has 3 classes, 0 to 2"),
        (torch.tensor([0.0, 1.0]), "integer dtype, not torch.float32"),
        (torch.tensor([True, False]), "integer dtype, not torch.bool"),
        (torch.tensor([0j, 1]), "integer dtype, not torch.complex64"),
        (torch.tensor([0]), r"shape \(1,\) do not fit logits of shape \(2, 3\): expected \(2,\)"),
        (torch.tensor([[0], [1]]), r"shape \(2, 1\) do not fit"),
        ([0, 1], "expected a tensor of labels, got list"),
    ],
)
def test_labels_that_do_not_fit(embed, labels, message):
    with pytest.raises(frfx.TargetError, match=message):
        embed(torch.zeros(2, 3), labels)


@pytest.mark.parametrize("embed", [frfx.nearest_embedding, frfx.maximum_assignment])
@pytest.mark.parametrize("margin", [-0.1, -1e-9, float("nan")])
def test_negative_margins(embed, margin):
    with pytest.raises(frfx.TargetError, match=f"must not be negative, got {margin}"):
        embed(torch.zeros(2, 3), torch.tensor([0, 1]), margin)


def test_no_samples():
    logits, labels = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    for embed in (frfx.nearest_embedding, frfx.maximum_assignment, frfx.one_hot):
        assert embed(logits, labels).shape == (0, 3)


# In the graph: the embedding stands at the network's end, said (argmax) or unsaid.


class Classifier(nn.Module):
    """A linear layer and one more step."""

    def __init__(self, head=None):
        super().__init__()
        self.fc = nn.Linear(4, 6).double().requires_grad_(False)
        self.fc.weight.copy_(normal(0, 6, 4))
        self.head = head

    def forward(self, x):
        logits = self.fc(x)
        return logits if self.head is None else self.head(logits)


HEADS = {
    "none": None,
    "torch.argmax": lambda z: torch.argmax(z, 1),
    "x.argmax": lambda z: z.argmax(dim=-1),
    "axis": lambda z: torch.argmax(z, axis=1),
    "keepdim": lambda z: z.argmax(-1, keepdim=True),
    "softmax": nn.Softmax(1),
    "softmax and argmax": lambda z: torch.softmax(z, 1).argmax(1),
    "log_softmax": lambda z: z.log_softmax(-1),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("policy", "margin"), [("paper", 0.0), ("minimal", 0.5)])
def test_labels_reach_the_logits(head, policy, margin):
    model, x, labels = Classifier(head).eval(), normal(1, 5, 4), torch.tensor([0, 1, 2, 3, 4])
    found = frfx.invert(model, "fc", policy=policy)(x, labels)
    for row, y, embedded in zip(model.fc(x).numpy(), labels.tolist(), found.numpy(), strict=True):
        np.testing.assert_allclose(embedded, embedding_by_quadprog(row, y, margin), atol=1e-12)


@pytest.mark.parametrize(
    ("rule", "embed"),
    [
        (
            rules.MaximumAssignmentRule(label_margin=0.3),
            lambda z, y: frfx.maximum_assignment(z, y, 0.3),
        ),
        (rules.OneHotRule(), frfx.one_hot),
        (
            rules.NearestEmbeddingRule(label_margin=2.0),
            lambda z, y: frfx.nearest_embedding(z, y, 2.0),
        ),
    ],
    ids=["maximum assignment", "one hot", "nearest embedding"],
)
def test_other_embeddings_by_policy(rule, embed):
    model, x, labels = Classifier(), normal(1, 3, 4), torch.tensor([0, 5, 2])
    policy = frfx.policy.minimal().override(op=torch.argmax, rule=rule)
    found = frfx.invert(model, "fc", policy=policy)(x, labels)
    assert torch.equal(found, embed(model.fc(x), labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_networks_keep_the_label(dtype):
    model = Classifier().to(dtype)
    x, labels = normal(1, 5, 4).to(dtype), torch.tensor([0, 1, 2, 3, 4])
    found = frfx.invert(model, "fc", policy="minimal")(x, labels)
    assert found.dtype == dtype
    assert torch.equal(found.argmax(1), labels)


# Dense labels: every place of an image has its own.


@pytest.mark.parametrize("dim", [1, -2, 0, -1])
@given(drawn=labelled(), margin=MARGINS)
def test_classes_in_any_dimension(dim, drawn, margin):
    logits, labels = drawn
    rows = torch.stack([logits, 2 - logits])  # (2, N, K)
    many = torch.stack([labels, labels.flip(0)])
    moved = rows.movedim(-1, dim).contiguous()
    for embed in (frfx.nearest_embedding, frfx.maximum_assignment):
        found = embed(moved, many, margin, dim)
        assert torch.equal(found.movedim(dim, -1), embed(rows, many, margin))
    assert torch.equal(frfx.one_hot(moved, many, dim).movedim(dim, -1), frfx.one_hot(rows, many))


def test_labels_that_do_not_fit_another_dimension():
    logits = torch.zeros(2, 3, 4, 5)
    text = r"shape \(2, 3, 4\) do not fit logits of shape \(2, 3, 4, 5\): expected \(2, 4, 5\)"
    with pytest.raises(frfx.TargetError, match=text):
        frfx.nearest_embedding(logits, torch.zeros(2, 3, 4, dtype=torch.int64), dim=1)
    with pytest.raises(frfx.TargetError, match="has 3 classes, 0 to 2"):
        frfx.nearest_embedding(logits, torch.full((2, 4, 5), 3), dim=1)


class Dense(nn.Module):
    """A convolution, whose output is classes for every place, and one more step."""

    def __init__(self, head=None, classes=6):
        super().__init__()
        self.conv = nn.Conv2d(2, classes, 1).double().requires_grad_(False)
        self.conv.weight.copy_(normal(0, classes, 2, 1, 1))
        self.head = head

    def forward(self, x):
        logits = self.conv(x)
        return logits if self.head is None else self.head(logits)


DENSE = {
    "none": None,
    "argmax": lambda z: z.argmax(1),
    "argmax from the end": lambda z: torch.argmax(z, dim=-3),
    "softmax": nn.Softmax(1),
    "Softmax2d": nn.Softmax2d(),
    "classes last": lambda z: F.log_softmax(z.permute(0, 2, 3, 1), -1),
    "classes last, then labels": lambda z: z.permute(0, 2, 3, 1).argmax(-1),
    "a sequence": lambda z: z.flatten(2).transpose(1, 2).softmax(2),
}


@pytest.mark.parametrize("case", DENSE)
@pytest.mark.parametrize(("policy", "margin"), [("paper", 0.0), ("minimal", 0.5)])
def test_dense_labels_reach_the_logits(case, policy, margin):
    head = DENSE[case]
    model, x = Dense(head).eval(), normal(1, 2, 2, 3, 4)
    shape = (2, 12) if case == "a sequence" else (2, 3, 4)
    labels = torch.arange(24).reshape(shape) % 6
    inverse = frfx.invert(model, "conv", policy=policy)
    found = inverse(x, labels).movedim(1, -1).reshape(24, 6)
    rows = model.conv(x).movedim(1, -1).reshape(24, 6)
    for row, y, embedded in zip(rows.numpy(), labels.flatten().tolist(), found, strict=True):
        np.testing.assert_allclose(embedded, embedding_by_quadprog(row, y, margin), atol=1e-12)
    measured = frfx.measure(inverse, x, labels)
    assert measured.consistent.shape == (2,)
    if margin:
        assert measured.label_consistency == 1


def test_consistency_of_dense_labels_is_the_share_of_places():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 2, 1)).double().requires_grad_(False)
    for layer in model:
        layer.weight.fill_(1.0)
        layer.bias.zero_()
    model[1].weight[1] = -1.0  # class 0 wins where the feature is positive
    x = torch.tensor([[-3.0, 1.0, 2.0, 3.0], [1.0, 2.0, -1.0, -1.0]]).double()[:, None, None]
    labels = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]])[:, None]
    policy = frfx.policy.paper().override(op=nn.Conv2d, damping=1e12)  # the feature stays
    measured = frfx.measure(frfx.invert(model, "0", policy=policy), x, labels)
    assert measured.consistent.tolist() == [0.75, 0.75]
    assert measured.label_consistency == 0.75


def test_dense_labels_jointly():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 1)).double().eval()
    x = normal(0, 2, 1, 5, 6)
    labels = torch.arange(24).reshape(2, 3, 4) % 2
    policy = frfx.policy.joint(constraint="equality", margin=0.1)
    inverse = frfx.invert(model, "1", policy=policy)
    with torch.no_grad():
        feature = model[:2](x)
        wanted = frfx.nearest_embedding(model(x), labels, 0.1, dim=1)
        kernel = model[2].weight.flatten(1)
        step = torch.linalg.pinv(kernel) @ (wanted - model(x)).flatten(2)
    torch.testing.assert_close(
        inverse(x, labels), feature + step.reshape(feature.shape), atol=1e-3, rtol=0
    )
    assert frfx.measure(inverse, x, labels).label_consistency == 1
