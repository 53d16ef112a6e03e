"""`frfx.invert` and `frfx.layers` as users meet them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import frfx
from frfx import networks


def digits(dtype: torch.dtype = torch.float32):
    """Return the network of the embedded digits, images, and labels that it does not predict."""
    torch.manual_seed(0)
    model = networks.build("digits").to(dtype).requires_grad_(False).eval()
    x = torch.randn(12, 1, 8, 8, dtype=dtype)
    return model, x, (model(x).argmax(1) + 1 + torch.arange(12) % 9) % 10


def forward_values(model: nn.Sequential, x) -> dict[str, torch.Tensor]:
    values = {"input": x}
    for name, module in model.named_children():
        x = values[name] = module(x)
    return values


def test_public_names():
    for name in frfx.__all__:
        assert getattr(frfx, name) is not None
    assert len(set(frfx.__all__)) == len(frfx.__all__)
    assert frfx.__version__.count(".") == 2


@pytest.mark.parametrize("policy", ["paper", "minimal", frfx.policy.minimal(margin=2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_layer_of_a_network(dtype, policy):
    model, x, y = digits(dtype)
    values = forward_values(model, x)
    numbered = {row.index: row.name for row in frfx.layers(model) if row.index is not None}
    assert list(numbered.values()) == ["input", "pool1", "flatten", "fc1"]
    for row in frfx.layers(model):
        result = frfx.invert(model, row.name, policy=policy)(x, y)
        assert result.shape == values[row.name].shape
        assert result.dtype == dtype
        assert result.isfinite().all()
    for index, name in numbered.items():
        by_number = frfx.invert(model, index, policy=policy)
        assert by_number.layer == name
        by_name = frfx.invert(model, name, policy=policy)
        torch.testing.assert_close(by_number(x, y), by_name(x, y), rtol=0, atol=0)


def test_the_paper_ties_the_label_with_the_rest():
    """Its embedding has no margin, so label and competitor come out equal."""
    model, x, y = digits(torch.float64)
    logits = frfx.invert(model, "fc1")(x, y)
    own = logits.gather(1, y[:, None])
    torch.testing.assert_close(own[:, 0], logits.amax(1), rtol=0, atol=0)
    assert ((logits == own).sum(1) >= 2).all()


@pytest.mark.parametrize("margin", [0.01, 0.5, 5.0])
def test_minimal_makes_the_label_win_by_the_margin(margin):
    """In front of the last layer, whose weight has full row rank, the label is reached exactly."""
    model, x, y = digits(torch.float64)
    inverse = frfx.invert(model, "flatten", policy=frfx.policy.minimal(margin=margin))
    logits = model.fc1(inverse(x, y))
    assert torch.equal(logits.argmax(1), y)
    rest = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    torch.testing.assert_close(
        logits.gather(1, y[:, None])[:, 0] - rest, torch.full_like(rest, margin)
    )


def test_reachable_scores_are_reached():
    """A float target that the features can produce comes out when they run forward again."""
    model, x, _ = digits(torch.float64)
    inverse = frfx.invert(model, "conv2", policy="minimal")
    target = model(x + 0.01 * torch.randn_like(x))
    feature = inverse(x, target)
    reached = model.fc1(model.flatten(model.tanh2(feature)))
    torch.testing.assert_close(reached, target)
    assert (feature - forward_values(model, x)["conv2"]).norm() > 0


def test_the_deviation_is_smallest_where_one_layer_is_inverted():
    """No other feature that gives the target lies nearer: the difference is in the row space."""
    model, x, y = digits(torch.float64)
    inverse = frfx.invert(model, "flatten", policy="minimal")
    difference = inverse(x, y) - forward_values(model, x)["flatten"]
    weight = model.fc1.weight
    projected = difference @ torch.linalg.pinv(weight) @ weight
    torch.testing.assert_close(projected, difference)


def test_example_input_changes_nothing_but_the_time():
    model, x, y = digits()
    plain, ready = frfx.invert(model, 0), frfx.invert(model, 0, example_input=x[:2])
    torch.testing.assert_close(ready(x, y), plain(x, y), rtol=0, atol=0)
    assert plain.code == ready.code


def test_options_are_by_keyword():
    model, _, _ = digits()
    with pytest.raises(TypeError):
        frfx.invert(model, 0, "paper")
    with pytest.raises(TypeError):
        frfx.invert(model)


def test_a_graph_module_is_a_model_like_any():
    model, x, y = digits()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(frfx.invert(traced, 1)(x, y), frfx.invert(model, 1)(x, y))


def test_global_state_is_left_alone():
    """Random numbers, gradient mode, default dtype and thread count."""
    model, x, y = digits()
    states = (torch.get_rng_state, torch.is_grad_enabled, torch.get_default_dtype)
    states += (torch.get_num_threads, torch.is_inference_mode_enabled)
    before = [state() for state in states]
    inverse = frfx.invert(model, 0, example_input=x)
    inverse(x, y)
    inverse.reconstruct(x, y)
    for bad in ((x, y + 10), (x * torch.nan, y)):
        with pytest.raises(frfx.FrfxError):
            inverse(*bad)
    after = [state() for state in states]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_default_dtype_of_the_process_does_not_matter():
    model, x, y = digits()
    expected = frfx.invert(model, 0)(x, y)
    try:
        torch.set_default_dtype(torch.float64)
        result = frfx.invert(model, 0)(x, y)
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected)


def test_channels_last_and_strided_batches():
    model, x, y = digits()
    inverse = frfx.invert(model, 0)
    expected = inverse(x, y)
    torch.testing.assert_close(inverse(x.to(memory_format=torch.channels_last), y), expected)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(inverse(strided, y), expected)
    torch.testing.assert_close(inverse(x, torch.stack([y, y], -1)[:, 0]), expected)
    torch.testing.assert_close(inverse(x.expand(12, 1, 8, 8), y), expected)


def test_two_inverses_of_one_model_do_not_meddle():
    model, x, y = digits()
    first, second = frfx.invert(model, 0), frfx.invert(model, 1, policy="minimal")
    alone = frfx.invert(model, 0)(x, y), frfx.invert(model, 1, policy="minimal")(x, y)
    for _ in range(2):
        torch.testing.assert_close(first(x, y), alone[0], rtol=0, atol=0)
        torch.testing.assert_close(second(x, y), alone[1], rtol=0, atol=0)
    first.double()
    torch.testing.assert_close(second(x, y), alone[1], rtol=0, atol=0)


def test_the_model_may_be_forgotten():
    """The inverse keeps what it needs alive."""
    model, x, y = digits()
    expected = frfx.invert(model, 0)(x, y)
    inverse = frfx.invert(model, 0)
    del model
    torch.testing.assert_close(inverse(x, y), expected)
