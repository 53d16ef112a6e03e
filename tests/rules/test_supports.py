"""What no rule inverts is refused with its reason, when it is compiled or at the first call."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import frfx
from frfx import rules
from tests.oracles import Apply, normal

BATCH = "samples depend on each other"
W = {"w": torch.ones(3, 3, 1, 1)}

COMPILED = {
    # Convolutions
    "computed kernel": (
        lambda x, w: F.conv2d(x, w * x.size(1)),
        "its weight is computed in the graph, not read from the model",
        W,
    ),
    "kernel from the input": (lambda x, w: F.conv2d(w, x), "it is applied to x, not to one", W),
    # Linear
    "computed weight": (
        lambda x, w: F.linear(x, w.t() / x.size(1)),
        "its weight is computed in the graph, not read from the model",
        {"w": torch.ones(3, 2)},
    ),
    "weight from the input": (
        lambda x, w: F.linear(w, x),
        "it is applied to x, not to one activation",
        {"w": torch.ones(2, 3)},
    ),
    "vector as weight": (
        lambda x, w: F.linear(x, w),
        "its weight is no matrix, but has the shape (3,)",
        {"w": torch.ones(3)},
    ),
    # Max pooling
    "max_pool indices": (
        nn.MaxPool2d(2, return_indices=True),
        "it returns the indices beside the values",
    ),
    "F.max_pool2d indices": (
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        "it returns the indices beside the values",
    ),
    "F.max_pool2d_with_indices": (
        lambda x: F.max_pool2d_with_indices(x, 2)[0],
        "it returns the indices beside the values",
    ),
    "aten indices": (
        lambda x: torch.ops.aten.max_pool3d_with_indices.default(x, 2)[0],
        "it returns the indices beside the values",
    ),
    "adaptive_max_pool indices": (
        nn.AdaptiveMaxPool2d(2, return_indices=True),
        "it returns the indices beside the values",
    ),
    "F.adaptive_max_pool2d indices": (
        lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[0],
        "it returns the indices beside the values",
    ),
    "torch.adaptive_max_pool1d": (
        lambda x: torch.adaptive_max_pool1d(x, 2)[0],
        "it returns the indices beside the values",
    ),
    # Averages
    "mean of all": (lambda x: x.mean(), f"it averages over the batch, so {BATCH}"),
    "mean of the batch": (lambda x: x.mean((0, 1)), f"it averages over the batch, so {BATCH}"),
    "mean of no dimension": (lambda x: x.mean(()), f"it averages over the batch, so {BATCH}"),
    # Normalisation and dropout
    "batch statistics": (
        nn.BatchNorm2d(3, track_running_stats=False),
        f"it normalises with the statistics of the batch, so {BATCH}",
    ),
    "training=True": (
        lambda x, w: F.batch_norm(x, w, w, training=True),
        f"it normalises with the statistics of the batch, so {BATCH}",
        {"w": torch.ones(3)},
    ),
    "computed variance": (
        lambda x, w: F.batch_norm(x, w, w * x.size(1)),
        "its running_var is computed in the graph",
        {"w": torch.ones(3)},
    ),
    "computed scale of a norm": (
        lambda x, w: F.group_norm(x, 1, w * x.size(1)),
        "its weight is computed in the graph",
        {"w": torch.ones(3)},
    ),
    "norm of another": (lambda x, w: F.layer_norm(w, (3,), x), "it is applied to x, not to one", W),
    "active dropout": (
        lambda x: F.dropout(x, 0.5),
        "it drops at random in evaluation mode, too: pass training=self.training",
    ),
    "active dropout2d": (lambda x: F.dropout2d(x), "it drops at random in evaluation mode, too"),
    # Arithmetic
    "computed operand": (
        lambda x, w: x * (w / x.size(1)),
        "its other operand is computed in the graph, not read from the model",
        {"w": torch.ones(3)},
    ),
    "alpha in a tensor": (
        lambda x, w: torch.add(x, w, alpha=w.sum()),
        "its alpha is computed in the graph or a tensor, not a number of the program",
        {"w": torch.ones(3)},
    ),
    "1 / x": (lambda x: 1 / x, "it divides by the activation, which is not affine"),
    "rounded": (
        lambda x: torch.div(x, 2, rounding_mode="floor"),
        "it rounds, so nothing can be told from its result",
    ),
    # Activations
    "computed slopes": (
        lambda x, w: F.prelu(x, w / x.size(1)),
        "its weight is computed in the graph",
        {"w": torch.ones(3)},
    ),
    "ELU that folds": (nn.ELU(-1.0), "no range is known to invert it on with alpha=-1.0"),
    "CELU of a negative alpha": (lambda x: F.celu(x, -0.5), "to invert it on with alpha=-0.5"),
    "softplus upside down": (nn.Softplus(-1.0), "no range is known to invert it on with beta=-1.0"),
    "slope in a tensor": (
        lambda x, w: F.leaky_relu(x, w),
        "its negative_slope must be given as a number, not as a tensor",
        {"w": torch.tensor(0.3)},
    ),
    "empty hardtanh": (
        lambda x: F.hardtanh(x, 1.0, 1.0),
        "no range is known to invert it on with min_val=1.0, max_val=1.0",
    ),
    # Shapes
    "another dtype": (lambda x: x.view(torch.int32), "it reinterprets the bits as another dtype"),
    # Heads
    "argmax of all": (
        lambda x: x.argmax(),
        "argmax over the flattened batch: name the dimension of the classes (dim=1)",
    ),
    "argmax of the batch": (
        lambda x: x.argmax(0),
        "argmax over dimension 0, the batch: name the dimension of the classes",
    ),
    "argmax of a computed dimension": (lambda x: x.argmax(x.dim() - 1), "its dim is computed"),
    "softmax of no dimension": (
        nn.Softmax(),
        "softmax without a dimension: name that of the classes (dim=1)",
    ),
    "log_softmax of no dimension": (nn.LogSoftmax(), "softmax without a dimension"),
    "softmax of the batch": (nn.Softmax(0), f"it normalises over the batch, so {BATCH}"),
    "softmax of a computed dimension": (lambda x: x.softmax(x.dim() - 1), "its dim is computed"),
    # No rule at all
    "cumsum": (lambda x: x.cumsum(1), "no rule is registered for it"),
    "shrinkage": (nn.Hardshrink(), "no rule is registered for it"),
}


def refuse(reason, call):
    """Assert that a call raises an error that lists exactly this reason."""
    with pytest.raises(frfx.UnsupportedOpsError, match=re.escape(reason)) as caught:
        call()
    assert any(reason in op.reason for op in caught.value.ops)


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED)
def test_refused_when_compiled(case, policy):
    function, reason, tensors = case if len(case) == 3 else (*case, {})
    model = Apply(function, **tensors).eval()
    refuse(reason, lambda: frfx.invert(model, "x", policy=policy))


CALLED = {
    "window of the batch": (
        lambda x: F.avg_pool1d(x, x.size(0)),
        (2, 3, 4),
        "its kernel_size is computed from more than the size of the image",
    ),
    "slope of the batch": (
        lambda x: F.leaky_relu(x, x.shape[0] * 0.1),
        (2, 3),
        "its negative_slope is computed from more than the size of the image",
    ),
    "a tensor made of sizes": (
        lambda x: F.leaky_relu(x, torch.full((), x.size(1))),
        (2, 3),
        "its negative_slope is computed from more than the size of the image",
    ),
    "a rule's own reason": (
        lambda x: x.mean(x.dim() - 2),
        (2, 3),
        f"it averages over the batch, so {BATCH}",
    ),
    "conv without a batch": (nn.Conv2d(3, 2, 2), (3, 4, 4), "its input has no batch dimension"),
    "conv1d without a batch": (nn.Conv1d(3, 2, 2), (3, 4), "its input has no batch dimension"),
    "max_pool without a batch": (nn.MaxPool2d(2), (3, 4, 4), "its input has no batch dimension"),
    "ceil_mode without a batch": (
        nn.MaxPool2d(2, ceil_mode=True),
        (3, 4, 4),
        "its input has no batch dimension",
    ),
    "adaptive_max_pool without a batch": (
        nn.AdaptiveMaxPool1d(2),
        (3, 4),
        "its input has no batch dimension",
    ),
    "antialias onto a column": (
        lambda x: F.interpolate(x, (2, 1), mode="bilinear", antialias=True),
        (1, 3, 4, 4),
        "antialias onto a single column, where torch does not filter the rows right",
    ),
    "padded batch": (
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
        (2, 3, 4),
        "it pads the batch, so its samples are not those of the input",
    ),
    "layer norm over the batch": (
        nn.LayerNorm((2, 3), elementwise_affine=False),
        (2, 3),
        f"it normalises over the batch, so {BATCH}",
    ),
    "instance norm without a batch": (
        nn.InstanceNorm1d(2),
        (2, 3),
        "its input has no batch dimension: 3 -> 3",
    ),
    "broadcast": (
        lambda x, w: x * w,
        (2, 3, 1),
        "it broadcasts an activation to more dimensions, so its samples are not the result's",
        {"w": torch.ones(5, 2, 3, 4)},
    ),
    "mean of the batch, counted from the end": (
        lambda x: x.mean(-2, keepdim=True),
        (2, 3),
        f"it averages over the batch, so {BATCH}",
    ),
    "log_softmax of the batch, counted from the end": (
        nn.LogSoftmax(-2),
        (2, 3),
        f"it normalises over the batch, so {BATCH}",
    ),
    "argmax of the batch, counted from the end": (
        lambda x: x.argmax(-2),
        (2, 3),
        "argmax over dimension -2, the batch: name the dimension of the classes",
    ),
}


@pytest.mark.parametrize("policy", ["paper", "minimal"])
@pytest.mark.parametrize("case", CALLED.values(), ids=CALLED)
def test_refused_at_the_first_call(case, policy):
    function, shape, reason, tensors = case if len(case) == 4 else (*case, {})
    inverse = frfx.invert(Apply(function, **tensors).eval(), "x", policy=policy)
    refuse(reason, lambda: inverse(normal(0, *shape).float(), torch.zeros(1)))


def test_no_function_of_single_entries():
    rule = rules.ElementwiseRule(
        rules.activation.Elementwise("twice", lambda y, x: y / 2, lambda: (-1, 1))
    )
    policy = frfx.policy.minimal().override(op=nn.Linear, rule=rule)
    refuse(
        "it is no function of single entries",
        lambda: frfx.invert(Apply(nn.Linear(3, 3)), "x", policy=policy),
    )


def test_every_reason_is_told_at_once():
    model = nn.Sequential(nn.LocalResponseNorm(2), nn.Softmax(0), nn.Flatten(), nn.Hardshrink())
    with pytest.raises(frfx.UnsupportedOpsError) as caught:
        frfx.invert(model, "input")
    assert [op.path for op in caught.value.ops] == ["0", "1", "3"]
    assert [op.reason.split(":")[0] for op in caught.value.ops] == [
        "no rule is registered for it",
        f"it normalises over the batch, so {BATCH}",
        "no rule is registered for it",
    ]
    for op in caught.value.ops:
        assert op.path in op.remedy or "register_rule" in op.remedy
        assert str(op) in str(caught.value)


def test_the_same_op_elsewhere_is_no_obstacle():
    model = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2), nn.Tanh())
    x = normal(0, 1, 3, 5, 5).float()
    inverse = frfx.invert(model, "0")  # stops in front of the convolution
    assert torch.equal(inverse(x, model(x).detach()), model[0](x))
