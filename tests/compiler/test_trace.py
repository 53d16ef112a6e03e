"""Tracing: every spelling of a network is the same network, and a wrong graph is noticed."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import frfx


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """Keep torch.export's own records out of the reports of failing tests."""
    caplog.set_level(logging.CRITICAL, logger="torch.__trace")


def batch(count: int = 5, size: int = 12):
    """Return images and labels."""
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 1, size, size, generator=generator), torch.arange(count) % 5


class Net(nn.Module):
    """A convolutional network whose body is a function of it and the input."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 2, 3)
        self.next = nn.Conv2d(2, 3, 2)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(48, 5)
        self.act = nn.ReLU()
        self.inplace = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout()
        self.flat = nn.Flatten()
        with torch.no_grad():
            self.norm.running_mean.uniform_(-0.5, 0.5)
            self.norm.running_var.uniform_(0.5, 2)
        self.body = body
        self.requires_grad_(False).eval()

    def forward(self, x):
        return self.body(self, x)


def modules(m, x):
    x = m.pool(m.act(m.conv(x)))
    x = m.act(m.norm(m.next(x)))
    return m.fc(m.drop(m.flat(x)))


def functions(m, x):
    x = F.max_pool2d(F.relu(F.conv2d(x, m.conv.weight, m.conv.bias)), 2)
    x = F.conv2d(x, m.next.weight, m.next.bias)
    n = m.norm
    x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, eps=n.eps)
    x = torch.flatten(torch.relu(x), 1)
    return F.linear(F.dropout(x, training=m.training), weight=m.fc.weight, bias=m.fc.bias)


def methods(m, x):
    x = torch.max_pool2d(m.conv(x).relu(), kernel_size=2)
    x = m.norm(m.next(x)).relu()
    return m.fc(x.flatten(start_dim=1).contiguous())


def in_place(m, x):
    x = m.pool(F.relu_(m.conv(x)))
    x = F.relu(m.norm(m.next(x)), inplace=True)
    return m.fc(m.flat(x))


def in_place_modules(m, x):
    x = m.pool(m.inplace(m.conv(x)))
    return m.fc(m.flat(m.inplace(m.norm(m.next(x)))))


def in_place_methods(m, x):
    x = m.conv(x)
    x.relu_()
    x = m.norm(m.next(m.pool(x)))
    torch.relu_(x)
    return m.fc(m.flat(x))


def arithmetic(m, x):
    x = m.pool(m.act(m.conv(x)))
    x = m.next(x) * 2.0 + 3
    x = (x - 3) / 2
    return m.fc(m.flat(m.act(torch.neg(-m.norm(x)))))


def augmented(m, x):
    x = m.pool(m.act(m.conv(x)))
    x = m.next(x)
    x *= 2.0
    x += 3
    x -= 3
    x /= 2
    return m.fc(m.flat(m.act(m.norm(x))))


def sizes(m, x):
    n = x.size(0)
    x = m.pool(m.act(m.conv(x)))
    x = m.act(m.norm(m.next(x)))
    channels, height, width = x.shape[1], x.shape[2], x.size(-1)
    x = x.view(n, channels, height * width).reshape(x.size()[0], channels, height, width)
    x = x.unsqueeze(1).squeeze(1).permute(0, 2, 3, 1).permute(0, 3, 1, 2)
    return m.fc(x.reshape(x.shape[0], -1))


def keywords(m, x):
    x = m.pool(input=F.relu(input=m.conv(input=x)))
    x = torch.relu(input=m.norm(m.next(x)))
    x = torch.permute(torch.permute(x, dims=(0, 2, 3, 1)), dims=(0, 3, 1, 2))
    x = torch.swapaxes(torch.swapaxes(x, axis0=1, axis1=2), 1, 2).transpose(dim0=2, dim1=2)
    return m.fc(input=torch.flatten(input=x, start_dim=1))


SPELLINGS = [
    functions,
    methods,
    in_place,
    in_place_modules,
    in_place_methods,
    arithmetic,
    augmented,
    sizes,
    keywords,
]


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("body", SPELLINGS)
def test_spellings_of_one_network(body, policy):
    x, y = batch()
    torch.testing.assert_close(Net(body)(x), Net(modules)(x))
    expected = frfx.invert(Net(modules), 0, policy=policy)(x, y)
    result = frfx.invert(Net(body), 0, policy=policy)(x, y)
    torch.testing.assert_close(result, expected)
    assert not torch.equal(x, expected)


@pytest.mark.parametrize("body", [in_place, in_place_modules, in_place_methods, augmented])
def test_in_place_ops_do_not_destroy_the_forward_values(body):
    """The feature that the result deviates from is the one before it is overwritten."""
    x, y = batch()
    model = Net(body)
    found = frfx.invert(model, "conv", policy="minimal").reconstruct(x, y)
    torch.testing.assert_close(found["conv"].forward, model.conv(x), rtol=0, atol=0)
    kept = x.clone()
    frfx.invert(model, "x")(x, y)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)


def input_in_place(m, x):
    x *= 2
    x.relu_()
    return m.fc(m.flat(m.act(m.norm(m.next(m.pool(m.conv(x)))))))


def test_in_place_ops_do_not_write_to_the_users_batch():
    x, y = batch()
    kept = x.clone()
    inverse = frfx.invert(Net(input_in_place), "conv", example_input=x)
    inverse(x, y)
    inverse.reconstruct(x, y)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)


def shapes_only(m, x):
    before = m.conv(x)
    x = m.pool(m.act(before))
    x = m.act(m.norm(m.next(x)))
    area = x.shape[2] * x.shape[3]
    return m.fc(x.view(before.shape[0], (before.size(1) + 1) * area // before.dim() * 4))


def test_arithmetic_of_shapes_is_no_branch():
    """The value of `conv` is read by one op; its shape by others."""
    x, y = batch()
    result = frfx.invert(Net(shapes_only), "conv")(x, y)
    torch.testing.assert_close(result, frfx.invert(Net(modules), "conv")(x, y))


# --- what only torch.export can follow ---


def control_flow(m, x):
    if x.shape[0] < 1 or x.shape[1] != 1:
        raise ValueError("one channel")
    return modules(m, x)


def rank_check(m, x):
    assert x.ndim == 4
    return modules(m, x)


def type_check(m, x):
    if not isinstance(x, Tensor):
        raise TypeError("no tensor")
    return modules(m, x)


def unpacking(m, x):
    n, *_ = x.shape
    x = m.act(m.norm(m.next(m.pool(m.act(m.conv(x))))))
    return m.fc(x.reshape(n, -1))


def loop_over_sizes(m, x):
    for _ in range(x.shape[1]):
        x = x + 0
    return modules(m, x)


def hidden_slice(m, x):
    """`y` is a view of `x`, so writing to one writes to the other."""
    x = m.next(m.pool(m.act(m.conv(x))))
    x = m.norm(x)
    y = x.flatten(1)
    x.relu_()
    return m.fc(y)


def hidden_branch(m, x):
    """Takes another way when it is traced, without an error."""
    return modules(m, x) if isinstance(x, Tensor) else modules(m, x * 2)


UNTRACEABLE = [control_flow, rank_check, type_check, unpacking, loop_over_sizes]
WRONGLY_TRACED = [hidden_slice, hidden_branch]


@pytest.mark.parametrize("body", UNTRACEABLE)
def test_untraceable_model_asks_for_an_example(body):
    with pytest.raises(frfx.TraceError) as caught:
        frfx.invert(Net(body), 0)
    text = str(caught.value)
    assert text.startswith("torch.fx cannot trace Net: ")
    assert "Give example_input, a batch of the model's input, and torch.export will be" in text
    assert caught.value.__cause__ is not None
    with pytest.raises(frfx.TraceError):
        frfx.layers(Net(body))


@pytest.mark.parametrize("body", [*UNTRACEABLE, *WRONGLY_TRACED])
def test_exported_model_gives_what_its_symbolic_twin_gives(body):
    x, _ = batch()
    inverse = frfx.invert(Net(body), "conv", policy="minimal", example_input=x)
    assert inverse.traced.front_end == "torch.export"
    assert "traced by torch.export" in str(inverse.summary())
    expected = frfx.invert(Net(modules), "conv", policy="minimal")
    for count in (5, 3, 1):
        torch.testing.assert_close(inverse(*batch(count)), expected(*batch(count)))


def test_layers_of_an_exported_model():
    rows = frfx.layers(Net(rank_check), batch()[0])
    last = "drop" if "drop" in [row.name for row in rows] else "flat"  # as export leaves it or not
    assert [(row.index, row.name) for row in rows if row.index is not None] == [
        (0, "x"),
        (1, "pool"),
        (2, last),
        (3, "fc"),
    ]


def test_example_of_one_sample():
    """torch.export would take a size of one for a constant."""
    inverse = frfx.invert(Net(rank_check), "conv", example_input=batch(1)[0])
    expected = frfx.invert(Net(modules), "conv")
    for count in (1, 4):
        torch.testing.assert_close(inverse(*batch(count)), expected(*batch(count)))


class Pooled(nn.Module):
    """Fits any image size; `check` decides whether symbolic tracing can follow."""

    def __init__(self, check: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.check = check
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        self.register_buffer("shift", torch.randn(4, 1, 1))
        self.eval()

    def forward(self, x):
        if self.check and x.ndim != 4:
            raise ValueError("rank")
        x = torch.tanh(self.norm(self.conv(x)) + self.shift)
        return F.log_softmax(self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)), dim=1)


def exported() -> frfx.Inverse:
    """Return the inverse of an exported network with buffers and a head."""
    return frfx.invert(Pooled(True), "conv", example_input=batch()[0])


def test_exported_model_at_other_image_sizes():
    inverse, expected = exported(), frfx.invert(Pooled(False), "conv")
    assert inverse.traced.front_end == "torch.export"
    for size in (12, 8, 15, 12):
        x, y = batch(3, size)
        torch.testing.assert_close(inverse(x, y), expected(x, y))


@pytest.mark.parametrize(
    "twin",
    [
        copy.deepcopy,
        copy.copy,
        lambda inverse: pickle.loads(pickle.dumps(inverse)),
        lambda inverse: copy.deepcopy(inverse.double()).float(),
        lambda inverse: pickle.loads(pickle.dumps(inverse.to(torch.float64))).float(),
    ],
    ids=["deepcopy", "copy", "pickle", "deepcopy of the moved", "pickle of the moved"],
)
def test_copies_of_an_exported_inverse(twin):
    x, y = batch()
    expected = exported()(x, y)
    torch.testing.assert_close(twin(exported())(x, y), expected)


def test_exported_inverse_in_double():
    x, y = batch()
    result = exported().double()(x.double(), y)
    assert result.dtype == torch.float64
    expected = frfx.invert(Pooled(False).double(), "conv")(x.double(), y)
    torch.testing.assert_close(result, expected)


def test_exported_inverse_notices_changed_weights():
    x, y = batch()
    model, twin = Pooled(True), Pooled(False)
    inverse = frfx.invert(model, "conv", example_input=x)
    inverse(x, y)
    with torch.no_grad():
        for m in (model, twin):
            m.fc.weight.mul_(-0.3)
            m.norm.running_var.mul_(5)
            m.conv.bias.add_(1)
    torch.testing.assert_close(inverse(x, y), frfx.invert(twin, "conv")(x, y))


def test_fixed_batch_size_is_an_error_and_no_wrong_answer():
    def body(m, x):
        x = m.act(m.norm(m.next(m.pool(m.act(m.conv(x))))))
        return m.fc(x.reshape(len(x), -1))

    inverse = frfx.invert(Net(body), "conv", example_input=batch(4)[0])
    torch.testing.assert_close(inverse(*batch(4)), frfx.invert(Net(modules), "conv")(*batch(4)))
    with pytest.raises(frfx.InputError) as caught:
        inverse(*batch(3))
    text = str(caught.value)
    assert "fixed the batch size of this model to 4" in text
    assert "got a batch of 3" in text
    assert "Read x.shape[0] there instead" in text


def test_exported_graph_is_checked_at_every_image_size():
    """Python took a size for a number: right at that size, wrong at others, and noticed."""

    class Scaled(Pooled):
        def forward(self, x):
            return super().forward(x * (2.0 if x.shape[2] > 10 else 1.0))

    inverse = frfx.invert(Scaled(True), "conv", example_input=batch()[0])
    inverse(*batch())
    with pytest.raises(frfx.TraceMismatchError):
        inverse(*batch(5, 9))
    inverse(*batch())


def test_checks_of_the_models_own_forward_are_kept():
    """They are no part of the graph, and yet a batch that the model refuses is refused."""

    class Careful(Pooled):
        def forward(self, x):
            if x.shape[2] < 10:
                raise ValueError("too small for me")
            return super().forward(x)

    inverse = frfx.invert(Careful(True), "conv", example_input=batch()[0])
    with pytest.raises(frfx.InputError) as caught:
        inverse(*batch(5, 9))
    text = "the model itself refuses a batch of shape (5, 1, 9, 9): ValueError: too small for me"
    assert str(caught.value) == text


# --- what neither can follow ---


def data_dependent(m, x):
    return modules(m, x) if x.sum() > 0 else modules(m, -x)


def test_model_that_neither_front_end_follows():
    with pytest.raises(frfx.TraceError) as caught:
        frfx.invert(Net(data_dependent), "conv", example_input=batch()[0])
    text = str(caught.value)
    assert text.startswith("Net can be traced neither by torch.fx (")
    assert "symbolically traced variables cannot be used as inputs to control flow" in text
    assert ") nor by torch.export (" in text
    assert text.count("\n") == 0


# --- wrongly traced models ---


def random_front(m, x):
    return modules(m, F.dropout(x, 0.5))


@pytest.mark.parametrize("body", [*WRONGLY_TRACED, random_front])
def test_wrong_graph_is_noticed_at_the_first_call(body):
    inverse = frfx.invert(Net(body), "conv")
    for call in (inverse, inverse, inverse.reconstruct):
        with pytest.raises(frfx.TraceMismatchError) as caught:
            call(*batch())
        text = str(caught.value)
        assert "the graph that torch.fx traced does not compute what the model computes" in text
        assert "Give example_input to invert" in text


def test_random_model_is_refused_with_an_example_too():
    with pytest.raises(frfx.TraceMismatchError, match="draws random numbers"):
        frfx.invert(Net(random_front), "conv", example_input=batch()[0])


def test_dropout_that_is_always_on_has_no_rule():
    def body(m, x):
        return m.fc(F.dropout(m.flat(m.act(m.norm(m.next(m.pool(m.conv(x)))))), 0.5))

    with pytest.raises(frfx.UnsupportedOpsError, match=r"pass training=self\.training"):
        frfx.invert(Net(body), "conv")


# --- arguments of the model ---


class Optional(Net):
    """Takes further arguments that have defaults."""

    def __init__(self) -> None:
        super().__init__(modules)

    def forward(self, image, mask=None, *rest, scale=1.0, **options):
        if mask is not None:
            image = image * mask
        return self.body(self, image * scale)


def test_further_arguments_keep_their_defaults():
    x, y = batch()
    inverse = frfx.invert(Optional(), "conv")
    torch.testing.assert_close(inverse(x, y), frfx.invert(Net(modules), "conv")(x, y))
    torch.testing.assert_close(inverse(x=x, target=y), inverse(x, y))
    assert frfx.layers(Optional())[0].name == "image"


class Target(Net):
    """Calls its input as the inverse calls its second argument."""

    def __init__(self) -> None:
        super().__init__(modules)

    def forward(self, target):
        return self.body(self, target)


def test_input_may_have_any_name():
    x, y = batch()
    expected = frfx.invert(Net(modules), "conv")(x, y)
    torch.testing.assert_close(frfx.invert(Target(), "conv")(x, y), expected)
    torch.testing.assert_close(frfx.invert(Target(), "conv")(x=x, target=y), expected)


@pytest.mark.parametrize(
    ("forward", "needed"),
    [
        (lambda self, x, other: x + other, "x, other"),
        (lambda self, x, *, scale: x * scale, "x, scale"),
    ],
)
@pytest.mark.parametrize("example", [None, torch.zeros(2, 3)])
def test_models_of_two_inputs(forward, needed, example):
    kind = type("Two", (nn.Module,), {"forward": forward})
    with pytest.raises(frfx.TraceError) as caught:
        frfx.invert(kind(), 0, example_input=example)
    text = str(caught.value)
    assert text.startswith(f"Two.forward needs {needed}; only models of one input tensor can be")
    assert "wrap the model in one that fixes the other arguments" in text


class Catchall(Net):
    """Declares nothing."""

    def __init__(self) -> None:
        super().__init__(modules)

    def forward(self, *args):
        return self.body(self, *args)


def test_variadic_forward():
    x, y = batch()
    expected = frfx.invert(Net(modules), "conv")(x, y)
    torch.testing.assert_close(frfx.invert(Catchall(), "conv")(x, y), expected)


# --- tensors that the forward makes or holds otherwise ---


class Constants(nn.Module):
    """Computes with tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 5)
        self.scale = torch.linspace(1, 2, 6)
        self.held = [torch.linspace(2, 1, 6)]

    def forward(self, x):
        x = torch.tanh(x * self.scale) * self.held[0] + torch.arange(6.0)
        return self.fc(x)


def test_constants():
    model = Constants().double()
    x, y = 0.3 * torch.randn(5, 6, dtype=torch.float64), torch.arange(5)
    target = model(x + 0.01 * torch.randn(5, 6))
    inverse = frfx.invert(model, "x", policy="minimal")
    torch.testing.assert_close(model(inverse(x, target)), target)
    torch.testing.assert_close(pickle.loads(pickle.dumps(inverse))(x, y), inverse(x, y))
    torch.testing.assert_close(copy.deepcopy(inverse)(x, y), inverse(x, y))
    assert [name for name, _ in model.named_buffers()] == []
    model.scale.mul_(1.5)
    model.held[0].mul_(0.5)
    torch.testing.assert_close(inverse(x, y), frfx.invert(model, "x", policy="minimal")(x, y))


class Baked(nn.Module):
    """Computes with a buffer before it meets the input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(-1, 1, 6))
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(torch.tanh(x - self.mean.view(1, 6) * 2))


def test_constant_that_was_computed_from_a_buffer_is_never_stale():
    model = Baked()
    x, y = torch.randn(5, 6), torch.arange(5)
    inverse = frfx.invert(model, "x")
    expected = inverse(x, y)
    for moved in (copy.deepcopy(inverse), pickle.loads(pickle.dumps(inverse))):
        torch.testing.assert_close(moved(x, y), expected)
    before = model.mean.clone()
    model.mean.mul_(3)
    for call in (inverse, inverse.reconstruct):
        with pytest.raises(frfx.TraceMismatchError, match="a buffer that has changed"):
            call(x, y)
    assert not torch.allclose(frfx.invert(model, "x")(x, y), expected)
    model.mean.copy_(before)
    torch.testing.assert_close(inverse(x, y), expected)


def test_partial_and_wrapped_forwards():
    """A forward that was decorated or replaced on the instance."""
    model = Net(modules)
    x, y = batch()
    expected = frfx.invert(model, "conv")(x, y)

    @functools.wraps(Net.forward)
    def wrapped(self, x):
        return Net.forward(self, x)

    kind = type("Wrapped", (Net,), {"forward": wrapped})
    torch.testing.assert_close(frfx.invert(kind(modules), "conv")(x, y), expected)
    model.forward = functools.partial(model.forward)
    torch.testing.assert_close(frfx.invert(model, "conv")(x, y), expected)


def test_forward_that_reaches_around_the_view():
    """A closure over the user's own modules cannot be redirected: an error, not a guess."""
    model = Net(modules)
    fc, conv = model.fc, model.conv
    model.forward = lambda x: fc(conv(x).flatten(1)[:, :48])
    with pytest.raises(frfx.TraceError, match="not installed as a submodule"):
        frfx.invert(model, "conv")


def made_of_sizes(m, x):
    """Tensors made by the forward, as long as its input."""
    ones = torch.ones(x.shape[0], 1, x.shape[2], 1)
    rows = torch.arange(x.size(3)).to(x.dtype) / x.size(3)
    x = torch.tanh(m.conv(x * ones + rows))
    x = F.avg_pool2d(x, x.shape[2] // 5)
    return m.fc((x + torch.full((1,), 0.5)).flatten(1)[:, :48])


def test_tensors_made_of_sizes():
    """They are no activations, and fit every batch."""
    names = [row.name for row in frfx.layers(Net(made_of_sizes))]
    assert not {"ones", "arange", "to", "full"} & set(names)
    assert "avg_pool2d" in names


def test_tracing_leaves_fx_as_it_is():
    wrapped = dict(fx._symbolic_trace._wrapped_fns_to_patch)
    inverse = frfx.invert(Net(functions), "conv2d")
    inverse(*batch())
    frfx.invert(Net(functions), "conv2d")
    assert fx._symbolic_trace._wrapped_fns_to_patch == wrapped
    assert not hasattr(F.avg_pool2d, "__wrapped__")
    assert not hasattr(torch.zeros, "__wrapped__")


class Chosen(nn.Module):
    """Calls functions of torch that it has kept: in an attribute, a default, a partial."""

    def __init__(self):
        super().__init__()
        self.activation = F.relu
        self.last = functools.partial(F.leaky_relu, negative_slope=0.1)

    def forward(self, x, pool=F.adaptive_avg_pool2d):
        return self.last(pool(self.activation(x), 2))


def test_functions_that_were_kept_are_those_of_torch():
    traced = frfx.invert(Chosen(), "relu").traced
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == [F.relu, F.adaptive_avg_pool2d, F.leaky_relu]


def test_the_copy_that_is_traced_goes_at_once():
    def weights() -> int:
        return sum(type(item) is nn.Parameter for item in gc.get_objects())

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    frfx.invert(model.eval(), "0")  # whatever is made once
    gc.collect()
    gc.disable()  # which would tidy up some time
    try:
        before = weights()
        inverse = frfx.invert(model, "0")
        assert weights() == before
        assert inverse.layer == "0"
    finally:
        gc.enable()


class WritesInPlace(nn.Module):
    """Writes by methods that have no twin of the name without its end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        x.requires_grad_()
        x = self.first(x)
        with torch.no_grad():
            self.mean.copy_(0.9 * self.mean + 0.1 * x.mean(0))
        scale = torch.empty_like(x).fill_(0.5)
        offset = torch.ones_like(x).zero_()
        return self.last(torch.tanh(x) * scale + offset)


def test_methods_that_write_in_place_and_have_no_twin():
    model, x = WritesInPlace().eval(), torch.randn(5, 4)
    target = model(x + 0.05 * torch.randn(5, 4)).detach()
    model.mean.zero_()
    found = frfx.invert(model, "first", policy="minimal")(x, target)
    assert not model.mean.any()
    assert not x.requires_grad
    reached = model.last(0.5 * torch.tanh(found))
    torch.testing.assert_close(reached, target, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("front_end", ["torch.fx", "torch.export"])
def test_memory_that_is_not_written_to_yet_may_hold_anything(front_end):
    class Filled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            x = self.first(x)
            return self.last(x * torch.empty_like(x).fill_(0.5) + x.new_empty(3).fill_(0.25))

    model, x = Filled().eval(), torch.randn(5, 4)
    target = model(x).detach()
    example = None if front_end == "torch.fx" else x
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # it is NaN then
    try:
        found = frfx.invert(model, "first", policy="minimal", example_input=example)(x, target)
    finally:
        torch.use_deterministic_algorithms(before)
    torch.testing.assert_close(found, model.first(x))
