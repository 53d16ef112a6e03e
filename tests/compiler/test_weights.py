"""Factors fit the weights and the image sizes: never stale, and within their memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import frfx
from tests.oracles import Apply


def network(seed: int = 0) -> nn.Sequential:
    """Return a network with convolution, batch norm, PReLU and linear ops to be inverted."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.Tanh(),
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.PReLU(3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 4),
    )
    model(torch.randn(8, 1, 9, 9))  # statistics
    return model.eval()


def batch(count: int = 5, size: int = 9):
    """Return images and labels."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(count, 1, size, size, generator=generator), torch.arange(count) % 4


def fresh(model: nn.Module, layer: int | str = 1):
    """Return what an inverse gives that has never seen other weights."""
    return frfx.invert(model, layer)(*batch()).detach()


def backward(model: nn.Module) -> None:
    model(batch()[0]).square().sum().backward()


def step(kind: type[torch.optim.Optimizer], **options) -> Callable[[nn.Module], None]:
    """Return a change of weights by an optimizer."""

    def change(model: nn.Module) -> None:
        optimizer = kind(model.parameters(), lr=0.1, **options)
        for _ in range(2):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()

    return change


def by_hand(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)


def replace_parameters(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(2 * parameter.detach()))


def swap_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.detach() * 2


def train_statistics(model: nn.Module) -> None:
    """Only the buffers of batch norm change."""
    model.train()
    with torch.no_grad():
        model(5 * batch()[0] + 3)
    model.eval()


def one_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model[7].weight[2, 1] += 0.5


def move_and_back(model: nn.Module) -> None:
    model.double()
    by_hand(model)
    model.float()


CHANGES = {
    "in place": by_hand,
    "one entry": one_weight,
    "replaced": replace_parameters,
    ".data =": swap_data,
    "load_state_dict": lambda model: model.load_state_dict(network(1).state_dict()),
    "load_state_dict(assign)": lambda model: model.load_state_dict(
        network(1).state_dict(), assign=True
    ),
    "SGD": step(torch.optim.SGD, foreach=False),
    "SGD, foreach": step(torch.optim.SGD, foreach=True),
    "SGD, fused": step(torch.optim.SGD, fused=True),
    "Adam": step(torch.optim.Adam, foreach=False),
    "Adam, foreach": step(torch.optim.Adam, foreach=True),
    "Adam, fused": step(torch.optim.Adam, fused=True),
    "AdamW, fused": step(torch.optim.AdamW, fused=True),
    "statistics": train_statistics,
    "init": lambda model: nn.init.orthogonal_(model[7].weight),
    "vector_to_parameters": lambda model: nn.utils.vector_to_parameters(
        2 * nn.utils.parameters_to_vector(model.parameters()), model.parameters()
    ),
    "moved": move_and_back,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(change):
    model = network()
    inverse = frfx.invert(model, 1)
    before = inverse(*batch()).detach()
    CHANGES[change](model)
    after = fresh(model)
    assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(inverse(*batch()).detach(), after, rtol=0, atol=0)
    torch.testing.assert_close(inverse.reconstruct(*batch()).feature, after, rtol=0, atol=0)


def test_frozen_weights_are_not_factored_again(monkeypatch):
    """An optimizer that trains the front alone costs no factorisation of the tail."""
    model = network()
    for parameter in model[2:].parameters():
        parameter.requires_grad_(False)
    inverse = frfx.invert(model, 1)
    inverse(*batch())
    made = []
    for solver in (frfx.linalg.Dense, frfx.linalg.Spectral):
        original = solver.prepare
        monkeypatch.setattr(solver, "prepare", lambda *args, f=original: made.append(1) or f(*args))
    step(torch.optim.Adam, fused=True)(model)
    inverse(*batch())
    assert made == []
    one_weight(model)
    inverse(*batch())
    assert made == [1]


def test_write_through_data_needs_refresh():
    """The one write that nobody counts, and the documented way out."""
    model = network()
    inverse = frfx.invert(model, 1)
    inverse(*batch())
    model[7].weight.data.mul_(-2)
    assert not torch.allclose(inverse(*batch()), fresh(model))
    inverse.refresh()
    torch.testing.assert_close(inverse(*batch()).detach(), fresh(model), rtol=0, atol=0)
    assert ".data" in frfx.Inverse.__doc__
    assert "refresh" in frfx.Inverse.__doc__


def test_a_new_weight_at_an_old_address_is_noticed():
    """Memory that is freed and handed out again must not look like the weight that lay there."""
    model = network()
    inverse = frfx.invert(model, 1)
    inverse(*batch())
    for seed in range(20):
        torch.manual_seed(seed)
        model[7].weight = None
        model[7].weight = nn.Parameter(torch.randn(4, 3))
        torch.testing.assert_close(inverse(*batch()).detach(), fresh(model), rtol=0, atol=0)


def test_failed_refactorisation_leaves_nothing_stale():
    """NaN, noticed; then mended: the answer is that of the mended weights."""
    model = network()
    inverse = frfx.invert(model, 1)
    inverse(*batch())
    with torch.no_grad():
        model[7].weight.mul_(2)
        model[2].weight[0] = torch.nan
    for _ in range(2):
        with pytest.raises(frfx.NonFiniteError, match="'2': its weight"):
            inverse(*batch())
    with torch.no_grad():
        model[2].weight[0] = 0.3
    torch.testing.assert_close(inverse(*batch()).detach(), fresh(model), rtol=0, atol=0)


# --- weights that are computed ---


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return weight / 2


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(81, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def flat_batch():
    x, y = batch()
    return x.flatten(1), y


def legacy_weight_norm(model):
    nn.utils.weight_norm(model[2])
    return model[2].weight_g


def legacy_spectral_norm(model):
    nn.utils.spectral_norm(model[2])
    model(flat_batch()[0])
    model.eval()
    return model[2].weight_orig


def pruned(model):
    prune.l1_unstructured(model[2], "weight", 0.4)
    return model[2].weight_orig


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [legacy_weight_norm, legacy_spectral_norm, pruned])
def test_weights_that_hooks_compute(wrap):
    """Right at once and after a change, as the plain network with the computed weight."""
    model = mlp()
    source = wrap(model)
    inverse = frfx.invert(model, "1")

    def plain() -> torch.Tensor:
        model(flat_batch()[0])
        twin = mlp()
        with torch.no_grad():
            twin[2].weight.copy_(model[2].weight)
        return frfx.invert(twin, "1")(*flat_batch())

    torch.testing.assert_close(inverse(*flat_batch()), plain())
    with torch.no_grad():
        source.mul_(torch.linspace(0.5, 2, source.numel()).view(source.shape))
    torch.testing.assert_close(inverse(*flat_batch()), plain())


def with_parametrization(model):
    parametrize.register_parametrization(model[2], "weight", Halved())


def with_weight_norm(model):
    parametrizations.weight_norm(model[2])


def with_spectral_norm(model):
    parametrizations.spectral_norm(model[2])


def with_orthogonal_weight(model):
    parametrizations.orthogonal(model[2])


PARAMETRIZED = [with_parametrization, with_weight_norm, with_spectral_norm, with_orthogonal_weight]


@pytest.mark.filterwarnings("ignore::frfx.ConditionWarning")
@pytest.mark.parametrize("wrap", PARAMETRIZED)
def test_parametrized_weights_are_computed_as_the_model_does(wrap):
    """Right at once and after a change; the numbers of the layers stay what they were."""
    model = mlp()
    numbers = [row.index for row in frfx.layers(model) if row.index is not None]
    wrap(model)
    assert [row.index for row in frfx.layers(model) if row.index is not None] == numbers
    inverse = frfx.invert(model.eval(), 1)

    def plain() -> torch.Tensor:
        twin = mlp()
        with torch.no_grad():
            twin[2].weight.copy_(model[2].weight)
            twin[2].bias.copy_(model[2].bias)
        return frfx.invert(twin, 1)(*flat_batch())

    torch.testing.assert_close(inverse(*flat_batch()), plain())
    assert next(row for row in inverse.summary() if row.node == "2.linear").solver == "dense"
    (factor,) = inverse.inverse.linear.factors.values()
    inverse(*flat_batch())
    assert inverse.inverse.linear.factors[()] is factor  # nothing has changed
    source = next(model[2].parametrizations.weight.parameters())
    with torch.no_grad():
        source.mul_(torch.linspace(0.5, 2, source.numel()).view(source.shape))
    torch.testing.assert_close(inverse(*flat_batch()), plain())
    assert inverse.inverse.linear.factors[()] is not factor
    doubled = copy.deepcopy(inverse).double()
    x, y = flat_batch()
    torch.testing.assert_close(doubled(x.double(), y).float(), plain(), rtol=1e-3, atol=1e-3)


class Scaled(nn.Module):
    """A convolution whose output is scaled by a view of a parameter, and a head of cosines."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.scale = nn.Conv2d(3, 4, 3), nn.Parameter(torch.linspace(0.5, 2, 4))
        self.shift, self.head = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(5, 16))

    def forward(self, x):
        x = self.conv(x) * self.scale.view(-1, 1, 1).exp() + self.shift[:, None, None]
        return nn.functional.linear(torch.tanh(x).flatten(1), nn.functional.normalize(self.head))


def test_parameters_may_be_viewed_scaled_and_normalised():
    model, x, y = Scaled().eval(), torch.randn(3, 3, 4, 4), torch.tensor([1, 0, 4])
    inverse = frfx.invert(model, "x")
    for _ in range(2):
        nodes = inverse.reconstruct(x, y)
        with torch.no_grad():
            head = nn.functional.normalize(model.head).double()
            scale = model.scale.view(-1, 1, 1).exp()
            tanh = nodes["flatten"].forward.double()
            logits = tanh @ head.T
            wanted = frfx.nearest_embedding(logits, y)
            expected = tanh + (wanted - logits) @ torch.linalg.pinv(head).T
            found = nodes["flatten"].target.double()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            shifted = nodes["mul"].target
            torch.testing.assert_close(nodes["conv"].target, shifted / scale)
            model.scale.add_(1)
            model.head.neg_()


READ = {
    "conv": (lambda x, w: F.conv2d(x, w), (3, 2, 2, 2), (2, 5, 5)),
    "conv_transpose": (lambda x, w: F.conv_transpose2d(x, w), (2, 3, 2, 2), (2, 5, 5)),
    "linear": (lambda x, w: F.linear(x, w), (3, 5), (5,)),
    "batch_norm": (lambda x, w: F.batch_norm(x, w[0], w[1]), (2, 3), (3, 4)),
    "group_norm": (lambda x, w: F.group_norm(x, 1, w), (3,), (3, 4)),
    "layer_norm": (lambda x, w: F.layer_norm(x, (4,), w), (4,), (3, 4)),
    "mul": (lambda x, w: x * w, (4,), (3, 4)),
    "add": (lambda x, w: x + w, (4,), (3, 4)),
    "prelu": (lambda x, w: F.prelu(x, w), (3,), (3, 4)),
    "matmul": (lambda x, w: x @ w, (4, 5), (3, 4)),
    "einsum": (lambda x, w: torch.einsum("nij,jk->nik", x, w), (4, 5), (3, 4)),
    "addmm": (lambda x, w: torch.addmm(w[0], x, w), (4, 5), (4,)),
}


@pytest.mark.parametrize("function", [lambda w: w.exp() / 2, lambda w: w.abs().clamp(min=0.1)])
@pytest.mark.parametrize(("op", "shape", "size"), READ.values(), ids=READ)
def test_what_is_computed_is_a_tensor_like_any_other(op, shape, size, function):
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randn(3, *size)
    model = Apply(lambda x, w: op(x, function(w)), w=weight).eval()
    plain = Apply(op, w=function(weight)).eval()
    target = plain(x).detach() + 0.1 * torch.rand(plain(x).shape)
    inverse, expected = (frfx.invert(m, "x", policy="minimal") for m in (model, plain))
    torch.testing.assert_close(inverse(x, target), expected(x, target))
    with torch.no_grad():
        model.w.add_(0.3)
        plain.w.copy_(function(model.w))
    torch.testing.assert_close(inverse(x, target), expected(x, target))


class FromActivations(nn.Module):
    """Its weight depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.randn(5, 6))

    def forward(self, x):
        return nn.functional.linear(torch.tanh(x), self.head * x.mean())


def test_weights_that_depend_on_the_input_are_a_clear_error():
    with pytest.raises(frfx.UnsupportedOpsError) as caught:
        frfx.invert(FromActivations(), "tanh")
    assert "linear" in [op.path for op in caught.value.ops]


def test_parametrized_weights_before_the_layer_are_followed():
    model = mlp()
    with_parametrization(model)
    inverse = frfx.invert(model, 2)
    before = inverse(*flat_batch())
    with torch.no_grad():
        model[2].parametrizations.weight.original.mul_(3)
    after = frfx.invert(model, 2)(*flat_batch())
    torch.testing.assert_close(inverse(*flat_batch()), after, rtol=0, atol=0)
    assert not torch.allclose(before, after)


def test_tied_weights_are_factored_for_each_op():
    model = mlp()
    model.add_module("5", nn.Linear(4, 5))
    with torch.no_grad():
        model[5].weight = nn.Parameter(model[4].weight.T.contiguous())
    model.add_module("6", nn.Linear(5, 4))
    model[6].weight = model[4].weight
    inverse = frfx.invert(model, "3")
    twin = copy.deepcopy(model)
    twin[6].weight = nn.Parameter(model[6].weight.detach().clone())
    with torch.no_grad():
        for _ in range(2):
            expected = frfx.invert(twin, "3")(*flat_batch())
            torch.testing.assert_close(inverse(*flat_batch()), expected)
            for weight in (model[4].weight, twin[4].weight, twin[6].weight):
                weight.mul_(1.5)


# --- memory ---


def conv_bytes(size: int) -> int:
    """Return what the factor of the second convolution holds for an image of this size."""
    operator = frfx.linalg.Convolution(torch.ones(3, 2, 3, 3), (size - 2, size - 2))
    return frfx.linalg.Spectral().prepare(operator).nbytes  # counted in tests/linalg


@pytest.fixture
def factored(monkeypatch):
    """Record the feature sizes for which convolutions are factored."""
    sizes: list[int] = []
    prepare = frfx.linalg.Solver.prepare

    def record(self, operator, backend):
        if isinstance(operator, frfx.linalg.Convolution):
            sizes.append(operator.size[0] + 2)
        return prepare(self, operator, backend)

    monkeypatch.setattr(frfx.linalg.Solver, "prepare", record)
    return sizes


def others(model: nn.Module) -> int:
    """Return what the other factors of the network hold; they do not depend on the size."""
    inverse = frfx.invert(model, "2")
    inverse(*batch())
    return inverse.prepare.nbytes


def test_factors_are_made_once_a_size(factored):
    inverse = frfx.invert(network(), 1)
    for size in (9, 9, 12, 9, 12, 12):
        inverse(*batch(5, size))
        inverse(*batch(2, size))
    assert factored == [9, 12]


def test_memory_is_counted_and_bounded(factored):
    model = network()
    inverse = frfx.invert(model, 1)
    rest = others(model)
    for size in (8, 9, 10):
        inverse(*batch(1, size))
    assert inverse.prepare.nbytes == rest + sum(map(conv_bytes, (8, 9, 10)))
    bound = rest + conv_bytes(12) + conv_bytes(11)
    inverse.factor_memory = bound
    for size in (11, 12, 7, 10, 12, 9, 11):
        inverse(*batch(1, size))
        assert inverse.prepare.nbytes <= bound
    assert inverse.factor_memory == bound


def test_least_recently_used_goes_first(factored):
    model = network()
    inverse = frfx.invert(model, 1)
    inverse.factor_memory = others(model) + 3 * conv_bytes(11)
    for size in (9, 10, 11):
        inverse(*batch(1, size))
    inverse(*batch(1, 9))  # now 10 is the one that was not used for longest
    inverse(*batch(1, 12))
    factored.clear()
    for size in (12, 9):
        inverse(*batch(1, size))
    assert factored == []
    inverse(*batch(1, 10))
    assert factored == [10]


def test_what_the_current_call_needs_is_kept_whatever_the_bound(factored):
    model = network()
    inverse = frfx.invert(model, 1)
    inverse.factor_memory = 0
    for size in (9, 12, 9):
        x, y = batch(2, size)
        torch.testing.assert_close(inverse(x, y), frfx.invert(model, 1)(x, y))
        assert inverse.prepare.nbytes == others(model) + conv_bytes(size)
        inverse(x, y)
    assert factored == [9, 9, 12, 12, 9, 9]  # by the inverse and by the fresh one, in turns


def test_default_bound_is_stated():
    assert frfx.invert(network(), 1).factor_memory == 1 << 30
    assert "bytes" in frfx.Inverse.factor_memory.__doc__


def test_refresh_frees_everything():
    inverse = frfx.invert(network(), 1)
    inverse(*batch())
    assert inverse.prepare.nbytes > 0
    inverse.refresh()
    assert inverse.prepare.nbytes == 0
    inverse(*batch())
    assert inverse.prepare.nbytes > 0


def test_changed_weights_free_the_old_factors():
    model = network()
    inverse = frfx.invert(model, 1)
    for size in (9, 10, 11):
        inverse(*batch(1, size))
    by_hand(model)
    inverse(*batch(1, 9))
    assert inverse.prepare.nbytes == others(model) + conv_bytes(9)
