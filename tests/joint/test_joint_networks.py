"""Any tail that torch can trace: branches, attention, norms, writes in place, every front end."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import frfx
from frfx.rules.label import nearest_embedding
from tests.networks_zoo import snapshot


class Block(nn.Module):
    """A residual block as ResNet has it: batch norm, ReLU in place, addition in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x
        return self.relu(y)


class Residual(nn.Module):
    """Residual blocks, and a shortcut from the stem over the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(2, 10, 3), nn.MaxPool2d(3, 2, 1)
        self.block1, self.block2 = Block(10), Block(10)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(10, 7)

    def forward(self, x):
        stem = self.pool(F.relu(self.stem(x), inplace=True))
        x = self.block1(stem)
        x = self.block2(torch.cat([x[:, :5], stem[:, 5:] * x.size(0) / stem.size(0)], 1)) + stem
        return self.fc(self.drop(x.mean((2, 3))))


class Encoder(nn.Module):
    """A small transformer encoder over patches, with a class token and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 12, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.position = nn.Parameter(torch.randn(1, 10, 12))
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.up, self.down, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 7)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x[:, 0])


class Scaled(nn.Module):
    """Attention by hand through the fused function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 7)

    def forward(self, x):
        x = x.flatten(2)[..., :128].reshape(x.shape[0], -1, 8)
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean(1))


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 2, 12, 12)


def trained(model: nn.Module) -> nn.Module:
    """Train on labels that can be learned, so that every class is within reach."""
    torch.manual_seed(0)
    directions = torch.randn(288, 7)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        x = images(64)
        optimizer.zero_grad()
        F.cross_entropy(model(x), (x.flatten(1) @ directions).argmax(1)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


MODELS: dict[type, nn.Module] = {}


def fresh(kind: type) -> nn.Module:
    """Return a trained network of its own."""
    if kind not in MODELS:
        torch.manual_seed(0)
        MODELS[kind] = trained(kind())
    return copy.deepcopy(MODELS[kind])


def batch(model: nn.Module, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images, and as their labels the classes that come second."""
    torch.manual_seed(1)
    x = images(count)
    with torch.no_grad():
        return x, model(x).topk(2).indices[:, 1]


CASES = [
    (Residual, "stem"),
    (Residual, "block1.relu_1"),
    (Residual, "block1.conv2"),
    (Residual, "block2"),
    (Residual, "x"),
    (Encoder, "patch"),
    (Encoder, "norm1"),
    (Encoder, "up"),
    (Scaled, "qkv"),
    (Scaled, "x"),
]


@pytest.mark.parametrize(("kind", "layer"), CASES)
@pytest.mark.parametrize("constraint", ["inequality", "equality"])
def test_the_label_survives(kind, layer, constraint):
    model = fresh(kind)
    x, y = batch(model, 20)
    before = snapshot(model)
    policy = frfx.policy.joint(constraint=constraint, steps=40, unreached="ignore")
    inverse = frfx.invert(model, layer, policy=policy)
    measured = frfx.measure(inverse, x, y)
    report = inverse.report[inverse.layer]
    assert report.reached.double().mean() >= 0.95
    assert bool(measured.consistent[report.reached].all())
    torch.testing.assert_close(
        report.deviation / inverse.reconstruct(x, y)[inverse.layer].forward.flatten(1).norm(dim=1),
        measured.deviation,
        check_dtype=False,
    )
    assert snapshot(model) == before
    if constraint == "equality":
        logits = model(x).detach()
        missing = (nearest_embedding(logits, y, 0.01) - logits).norm(dim=1)
        assert bool((report.violation <= 1.1e-3 * missing + 1e-4)[report.reached].all())


def test_inequality_deviates_less_than_equality():
    model = fresh(Residual)
    x, y = batch(model, 30)
    deviations = []
    for constraint in ("inequality", "equality"):
        policy = frfx.policy.joint(constraint=constraint, steps=40, unreached="ignore")
        inverse = frfx.invert(model, "block1", policy=policy)
        inverse(x, y)
        deviations.append(inverse.report[inverse.layer].deviation.mean())
    assert deviations[0] < 0.9 * deviations[1]


def test_summary_and_code_show_the_region():
    model = fresh(Residual)
    inverse = frfx.invert(model, "block1", policy="joint")
    x, y = batch(model, 4)
    inverse(x, y)
    (row,) = inverse.summary()
    assert (row.node, row.op) == ("fc", "region")
    assert row.rule == "JointRule(inequality, margin=0.01)"
    assert row.shapes.endswith(" -> 7")
    assert "self.inverse.fc(prepare, fc" in inverse.code
    assert set(inverse.state_dict()) <= {f"model.{name}" for name in inverse.model.state_dict()}


def test_pickled_and_copied():
    model = fresh(Residual)
    x, y = batch(model, 8)
    inverse = frfx.invert(model, "block1", policy=frfx.policy.joint(margin=0.1))
    expected = inverse(x, y)
    for twin in (pickle.loads(pickle.dumps(inverse)), copy.deepcopy(inverse), copy.copy(inverse)):
        assert twin.report == {}
        torch.testing.assert_close(twin(x, y), expected)


def test_weights_that_change_are_seen():
    model = fresh(Residual)
    x, y = batch(model, 30)
    inverse = frfx.invert(model, "block1", policy=frfx.policy.joint(steps=30))
    first = inverse(x, y)
    with torch.no_grad():
        model.fc.weight.neg_()
    model.block2.conv1.weight = nn.Parameter(model.block2.conv1.weight * 1.1)
    second = inverse(x, y)
    assert not torch.equal(first, second)
    torch.testing.assert_close(
        second, frfx.invert(model, "block1", policy=frfx.policy.joint(steps=30))(x, y)
    )
    assert frfx.measure(inverse, x, y).label_consistency == 1


def test_moved_to_double():
    model = fresh(Residual)
    x, y = batch(model, 8)
    inverse = frfx.invert(model, "block1", policy="joint").double()
    assert inverse(x.double(), y).dtype == torch.float64
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_solved_in_single(dtype):
    model = fresh(Encoder)
    x, y = batch(model, 12)
    model = copy.deepcopy(model).to(dtype)
    seen = []  # what runs in single is a view: the model's own tensors stay as they are
    model.up.register_forward_hook(lambda *_: seen.append(model.up.weight.dtype))
    inverse = frfx.invert(model, "norm1", policy="joint")
    found = inverse(x.to(dtype), y)
    assert found.dtype == dtype
    assert len(seen) > 2
    assert set(seen) == {dtype}
    assert bool(inverse.report["norm1"].reached.all())
    assert inverse.report["norm1"].deviation.dtype == torch.float32


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_autograd(context):
    model = fresh(Encoder)
    x, y = batch(model, 12)
    expected = frfx.invert(model, "norm1", policy="joint")(x, y)
    with context():
        found = frfx.invert(model, "norm1", policy="joint")(x.clone(), y.clone())
    assert torch.equal(found, expected)
    assert not expected.requires_grad
    assert all(p.grad is None for p in model.parameters())


class Branchy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for _ in range(int(x.shape[0] > 0)):  # a size that symbolic tracing cannot know
            x = x + torch.sin(x)
        return self.second(x)


def test_export_front_end():
    torch.manual_seed(0)
    model, x, y = Branchy().eval(), torch.randn(9, 8), torch.arange(9) % 5
    inverse = frfx.invert(model, "tanh", policy="joint", example_input=x)
    assert inverse.traced.front_end == "torch.export"
    assert frfx.measure(inverse, x, y).label_consistency == 1
    again, labels = torch.randn(4, 8), torch.arange(4)
    assert frfx.measure(inverse, again, labels).label_consistency == 1


class FixedBatch(Branchy):
    def forward(self, x):
        rows = [torch.tanh(self.first(x[i])) for i in range(len(x))]
        return self.second(torch.stack(rows))


def test_a_batch_of_fixed_size():
    """The region runs on whole batches, filled up with repeats, though samples leave."""
    torch.manual_seed(0)
    model, x, y = FixedBatch().eval(), torch.randn(6, 8), torch.arange(6) % 5
    inverse = frfx.invert(model, "x", policy="joint", example_input=x)
    assert inverse.traced.batch == 6
    assert frfx.measure(inverse, x, y).label_consistency == 1


class Checkpointed(Residual):
    def forward(self, x):
        stem = self.pool(F.relu(self.stem(x), inplace=True))
        x = checkpoint(self.block2, checkpoint(self.block1, stem, use_reentrant=False),
                       use_reentrant=False)  # fmt: skip
        return self.fc(x.mean((2, 3)))


def test_checkpointed_modules():
    model = fresh(Checkpointed)
    x, y = batch(model, 20)
    inverse = frfx.invert(model, "pool", policy=frfx.policy.joint(steps=30), example_input=x)
    assert frfx.measure(inverse, x, y).label_consistency == 1


def test_hooks_that_change_a_value_are_run():
    model = fresh(Residual)
    x, y = batch(model, 20)
    model.block2.conv1.register_forward_hook(lambda module, args, output: output * 0.5)
    inverse = frfx.invert(model, "block1", policy=frfx.policy.joint(steps=30))
    assert frfx.measure(inverse, x, y).label_consistency == 1


def test_compiles():
    model = fresh(Residual)
    x, y = batch(model, 6)
    inverse = frfx.invert(model, "block1", policy="joint")
    compiled = torch.compile(inverse, backend="eager")
    torch.testing.assert_close(compiled(x, y), inverse(x, y))


def test_the_batch_comes_first():
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(torch.tanh(x.transpose(0, 1)).mean(0))

    inverse = frfx.invert(Sequence().eval(), "tanh", policy="joint")
    with pytest.raises(frfx.InputError, match=r"'tanh' has shape \(3, 4, 8\).*\(4, 5\): cut else"):
        inverse(torch.randn(4, 3, 8), torch.arange(4))


class Centred(nn.Module):
    """Takes the mean of the batch away."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize("constraint", ["inequality", "equality"])
@pytest.mark.parametrize(
    "mix", [Centred(), nn.BatchNorm1d(6, track_running_stats=False)], ids=["mean", "statistics"]
)
def test_samples_that_depend_on_each_other_are_refused(mix, constraint):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), mix, nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
    )
    model.double().eval()
    x, y = torch.randn(3, 5).double(), torch.tensor([1, 2, 0])
    policy = frfx.policy.joint(constraint=constraint, unreached="ignore")
    with pytest.raises(frfx.InputError, match="takes samples one by one, but"):
        frfx.invert(model, "0", policy=policy)(x, y)
    frfx.invert(model, "3", policy=policy)(x, y)  # behind it they do not
    frfx.invert(model[3:], 0, policy=policy)(torch.randn(1, 6).double(), y[:1])


def test_a_tail_without_a_derivative_is_named():
    class Rounded(nn.Module):
        def forward(self, x):
            return x.round().detach()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Rounded(), nn.Linear(6, 3)).eval()
    x, y = torch.randn(3, 5), torch.tensor([1, 2, 0])
    for constraint in ("inequality", "equality"):
        inverse = frfx.invert(model, "0", policy=frfx.policy.joint(constraint=constraint))
        with pytest.raises(frfx.UnsupportedOpsError, match="cannot be differentiated"):
            inverse(x, y)
