"""From labels to logits: argmax and what may follow the logits (Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frfx import vocabulary
from frfx.errors import TargetError
from frfx.linalg.pseudo_inverse import solve_dtype
from frfx.ops import Op
from frfx.recording import is_recorded
from frfx.registry import register_rule
from frfx.rules.base import Inversion, Rule, one_input, spans_batch


def nearest_embedding(logits: Tensor, labels: Tensor, margin: float = 0.0, dim: int = -1) -> Tensor:
    """Return the logits nearest in L2 under which every label wins by a margin.

    The projection on `{a : a_y >= a_i + margin for all i != y}`: the largest competitors and the
    label meet at one level, everything else stays. With a margin of 0 that level is a tie.

    Args:
        logits: Shape (..., K), floating point, or with the K classes in another dimension.
        labels: The shape of the logits without the classes, any integer dtype, in [0, K).
        margin: By how much the label must exceed every other entry, in units of the logits.
        dim: The dimension of the classes: the last, or 1 for logits (N, K, H, W) of a dense
            prediction.

    Returns:
        The embedding, shape and dtype of the logits.

    Raises:
        TargetError: If the labels do not fit the logits, or the margin is negative.

    Reference:
        Problem 21 in the L2 norm, Eq. 24-33, Algorithm 1; the margin shifts the competitors.
    """
    check_labels(labels, logits.shape, dim)
    found = _nearest_embedding(logits.to(solve_dtype(logits.dtype)), labels, dim, margin)
    return found.to(logits.dtype)


def _nearest_embedding(logits: Tensor, labels: Tensor, dim: int, margin: float) -> Tensor:
    if not margin >= 0:
        raise TargetError(f"the margin must not be negative, got {margin}")
    index = labels.long().unsqueeze(dim)
    own = logits.gather(dim, index)
    excess = (logits + margin - own).scatter(dim, index, 0)  # d of Algorithm 1, 0 at the label
    total = excess.sort(dim, descending=True).values.cumsum(dim)
    count = torch.arange(2, logits.shape[dim] + 2, device=logits.device, dtype=logits.dtype)
    count = count.reshape([-1 if d == dim % logits.ndim else 1 for d in range(logits.ndim)])
    # Eq. 31 with the s largest, whichever s. It grows with s as long as these are active (formula
    # 33: d_s > (d_1 + ... + d_{s - 1}) / s), so the largest is the one.
    raise_by = (total / count).amax(dim, keepdim=True).clamp(min=0)
    level = own + raise_by  # Eq. 26
    embedded = torch.where(excess > raise_by, level - margin, logits)  # Eq. 27
    return embedded.scatter(dim, index, level)


def maximum_assignment(
    logits: Tensor, labels: Tensor, margin: float = 0.0, dim: int = -1
) -> Tensor:
    """Return the logits nearest in L1 under which every label wins by a margin.

    Only the label's entry changes: it becomes the maximum (plus the margin over the others).

    Args:
        logits: Shape (..., K), floating point, or with the K classes in another dimension.
        labels: The shape of the logits without the classes, any integer dtype, in [0, K).
        margin: By how much the label must exceed every other entry, in units of the logits.
        dim: The dimension of the classes: the last, or 1 for logits (N, K, H, W) of a dense
            prediction.

    Returns:
        The embedding, shape and dtype of the logits.

    Raises:
        TargetError: If the labels do not fit the logits, or the margin is negative.

    Reference:
        Problem 21 in the L1 norm, Eq. 22-23.
    """
    check_labels(labels, logits.shape, dim)
    return _maximum_assignment(logits, labels, dim, margin)


def _maximum_assignment(logits: Tensor, labels: Tensor, dim: int, margin: float) -> Tensor:
    if not margin >= 0:
        raise TargetError(f"the margin must not be negative, got {margin}")
    index = labels.long().unsqueeze(dim)
    others = logits.scatter(dim, index, -torch.inf).amax(dim, keepdim=True)
    own = torch.maximum(logits.gather(dim, index), others + margin)
    return logits.scatter(dim, index, own)


def one_hot(logits: Tensor, labels: Tensor, dim: int = -1) -> Tensor:
    """Return 1 at the label and 0 elsewhere, whatever the logits: the paper's control (Sec. 4.2).

    Args:
        logits: Shape (..., K), floating point; gives shape, dtype and device only.
        labels: The shape of the logits without the classes, any integer dtype, in [0, K).
        dim: The dimension of the classes.

    Returns:
        The embedding, shape and dtype of the logits.

    Raises:
        TargetError: If the labels do not fit the logits.
    """
    check_labels(labels, logits.shape, dim)
    return _one_hot(logits, labels, dim)


def _one_hot(logits: Tensor, labels: Tensor, dim: int) -> Tensor:
    return torch.zeros_like(logits).scatter(dim, labels.long().unsqueeze(dim), 1)


def check_labels(labels: Tensor, logits: Sequence[int], dim: int = -1) -> None:
    """Raise `TargetError` for labels that do not fit logits of a shape."""
    if not isinstance(labels, Tensor):
        raise TargetError(f"expected a tensor of labels, got {type(labels).__name__}")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TargetError(f"labels have an integer dtype, not {labels.dtype}")
    sizes = list(logits)
    classes = sizes.pop(dim)
    if list(labels.shape) != sizes:
        raise TargetError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape "
            f"{tuple(logits)}: expected {tuple(sizes)}"
        )
    check_range(labels, classes)


def check_range(labels: Tensor, classes: int) -> None:
    """Raise `TargetError` for labels outside [0, classes)."""
    if labels.numel() == 0:
        return
    labels = labels.long()  # torch has no aminmax of the wider unsigned types
    low, high = torch.stack(labels.aminmax()).tolist()
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        position = (labels == wrong).nonzero()[0].tolist()
        raise TargetError(
            f"label {wrong} at position {position} is out of range: the network has {classes} "
            f"classes, 0 to {classes - 1}"
        )


def predicted_labels(logits: Tensor, dim: int) -> Tensor:
    """Return the class of the largest logit; of an output (N,) without classes, its place."""
    return logits.argmax(dim if logits.ndim > 1 else -1)


class Embedding(Inversion):
    """Embeds integer labels near the logits; a float target is the target of the logits already.

    Args:
        embed: Maps logits, labels and the dimension of the classes to logits.
        dim: The dimension of the classes.
        **options: Further arguments of `embed`.
    """

    def __init__(self, embed: Callable[..., Tensor], dim: int, **options: float) -> None:
        super().__init__()
        self.embed, self.dim, self.options = embed, dim, options

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        if target.is_floating_point():
            return target
        (logits,) = inputs
        # Half types are solved in single, as everywhere.
        return self._embedded(logits.to(solve_dtype(logits.dtype)), target)

    def _embedded(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.embed(logits, labels, self.dim, **self.options)


class NearestEmbedding(Embedding):
    """Embeds integer labels at the nearest logits.

    Args:
        dim: The dimension of the classes.
        margin: By how much the label wins.
    """

    def __init__(self, dim: int, margin: float) -> None:
        super().__init__(_nearest_embedding, dim, margin=margin)

    def _embedded(self, logits: Tensor, labels: Tensor) -> Tensor:
        kernels = self.backend.kernels_for(logits)
        last, margin = self.dim in (-1, logits.ndim - 1), self.options["margin"]
        if kernels and last and margin >= 0:
            return kernels.nearest_embedding(logits, labels, margin)
        return super()._embedded(logits, labels)


class _LabelRule(Rule):
    """What the embeddings have in common: argmax over the classes, sample by sample."""

    def supports(self, op: Op) -> str | None:
        if op.type is not vocabulary.argmax:
            return f"{type(self).__name__} is for the argmax that ends the network"
        reason = one_input(op, "dim")
        if reason:
            return reason
        dim = op.arguments["dim"]
        if dim is None:
            return "argmax over the flattened batch: name the dimension of the classes (dim=1)"
        if spans_batch(op, [dim]):
            return f"argmax over dimension {dim}, the batch: name the dimension of the classes"
        return None


@register_rule(vocabulary.argmax)
@dataclass(frozen=True)
class NearestEmbeddingRule(_LabelRule):
    """The nearest logits in L2 under which the label wins.

    Attributes:
        label_margin: By how much it wins, in units of the logits; 0 is a tie.
    """

    equation = "Eq. 21, 24-33, Algorithm 1"
    accuracy = "exact in L2"
    label_margin: float = 0.0

    def build(self, op: Op) -> Inversion:
        return NearestEmbedding(op.arguments["dim"], self.label_margin)


@dataclass(frozen=True)
class MaximumAssignmentRule(_LabelRule):
    """The nearest logits in L1 under which the label wins.

    Attributes:
        label_margin: By how much it wins, in units of the logits; 0 is a tie.
    """

    equation = "Eq. 21-23"
    accuracy = "exact in L1"
    label_margin: float = 0.0

    def build(self, op: Op) -> Inversion:
        return Embedding(_maximum_assignment, op.arguments["dim"], margin=self.label_margin)


@dataclass(frozen=True)
class OneHotRule(_LabelRule):
    """1 at the label and 0 elsewhere."""

    equation = "Sec. 4.2"
    accuracy = "approximate: the same whatever the logits were"

    def build(self, op: Op) -> Inversion:
        return Embedding(_one_hot, op.arguments["dim"])


def nearest_distribution(values: Tensor, dim: int) -> Tensor:
    """Return the probability distributions nearest in L2, along a dimension.

    What is a distribution already, but for rounding, comes back as it is.

    Args:
        values: Floating point.
        dim: The dimension of the classes.

    Returns:
        Of the same shape and dtype.

    Reference:
        Held, Wolfe and Crowder (1974), Validation of subgradient optimization.
    """
    rounding = torch.finfo(values.dtype).eps ** 0.5
    total = values.sum(dim, keepdim=True)
    sound = ((total - 1).abs() <= rounding) & (values.amin(dim, keepdim=True) >= 0)
    if values.is_cpu and not is_recorded(values) and bool(sound.all()):
        return values  # as targets mostly are: sorting takes longer than all else
    ordered = values.movedim(dim, -1).sort(-1, descending=True).values
    count = torch.arange(1, ordered.shape[-1] + 1, device=values.device, dtype=values.dtype)
    # What the largest k have too much, each: the k that gives the most is their number.
    excess = ((ordered.cumsum(-1) - 1) / count).amax(-1, keepdim=True).movedim(-1, dim)
    return torch.where(sound, values, (values - excess).clamp(min=0))


class SoftmaxInversion(Inversion):
    """Lets labels pass, for softmax keeps their order; inverts a float target.

    Args:
        dim: The dimension of the classes.
        log: Whether the op is log-softmax.
        margin: Targets below `margin / K` count as that, and stay where the probability is so
            small already.
    """

    def __init__(self, dim: int, log: bool, margin: float) -> None:
        super().__init__()
        self.dim, self.log, self.margin = dim, log, margin

    def forward(self, target: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        if not target.is_floating_point():
            return target
        (x,) = inputs
        if self.log:
            shift = target - output
        else:
            floor = self.margin / x.shape[self.dim]
            wanted = nearest_distribution(target, self.dim).clamp(min=floor)
            had = output.to(target.dtype).clamp(min=floor)
            logs = torch.log_softmax(x.to(target.dtype), self.dim)
            shift = torch.where(wanted == had, 0, wanted.log() - logs)
        moves = torch.isfinite(x)  # what is masked by -inf does not, whatever is wanted of it
        shift = torch.where(moves, shift, 0)
        count = moves.sum(self.dim, keepdim=True).clamp(min=1)
        return x + torch.where(moves, shift - shift.sum(self.dim, keepdim=True) / count, 0)


@register_rule(vocabulary.softmax)
@register_rule(vocabulary.log_softmax)
@dataclass(frozen=True)
class SoftmaxRule(Rule):
    """The nearest of the preimages `log p* + c`: `z^ + e - mean(e)` with `e = log p* - log p^`.

    A target of softmax that is no distribution is brought to the nearest one first. Logits of -inf,
    as masks make them, stay.

    Attributes:
        clamp_margin: Target probabilities below `clamp_margin / K` are raised to it, unless the
            forward probability is below it, too: then it stays.
    """

    equation = "Eq. 4 along the preimage"
    accuracy = "exact, but for `clamp_margin`; of log-softmax, for normalised targets"
    clamp_margin: float = 1e-3

    def supports(self, op: Op) -> str | None:
        reason = one_input(op, "dim")
        if reason or op.spelling is torch.nn.Softmax2d:
            return reason
        dim = op.arguments["dim"]
        if dim is None:
            return "softmax without a dimension: name that of the classes (dim=1)"
        if spans_batch(op, [dim]):
            return "it normalises over the batch, so samples depend on each other"
        return None

    def build(self, op: Op) -> Inversion:
        dim = op.arguments["dim"]
        return SoftmaxInversion(
            -3 if dim is None else dim, op.type is vocabulary.log_softmax, self.clamp_margin
        )
