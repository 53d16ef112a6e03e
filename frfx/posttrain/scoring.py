"""How often a classifier is right."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from frfx.compiler.outputs import follow, locate
from frfx.errors import InputError, TargetError, first_line
from frfx.posttrain.batches import Batch, pairs
from frfx.view import evaluation_view


@torch.no_grad()
def accuracy(model: nn.Module, loader: Iterable[Batch], output: str | int | None = None) -> float:
    """Return the share of samples whose largest output is the label, in evaluation mode.

    Args:
        model: Any classifier, of outputs (N, K, ...), or of labels (N, ...) if it ends in argmax;
            its mode is not touched.
        loader: Yields batches (x, y) of inputs and integer labels (N, ...); inputs are moved and
            cast to the model's type.
        output: Which of several tensors that the model returns is its output, as for
            `frfx.invert`.

    Raises:
        InputError: If the model cannot take a batch.
        LayerError: If there is no such output.
        TargetError: If the labels do not fit the outputs, or there are none; or if the loader
            yields anything else than pairs.
    """
    view = evaluation_view(model, inplace=True)
    weight = next((p for p in view.parameters() if p.is_floating_point()), None)
    right: Tensor | int = 0
    count = 0
    for x, y in pairs(loader):
        if weight is not None:
            x = x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)
        try:
            value = view(x)
        except Exception as error:  # whatever torch says of an input that does not fit
            raise InputError(
                f"the model cannot take a batch of shape {tuple(x.shape)}: {first_line(error)}"
            ) from error
        scores = follow(value, locate(value, output))
        predicted = scores.argmax(1) if scores.is_floating_point() else scores
        if predicted.shape != y.shape:
            raise TargetError(
                f"labels of shape {tuple(y.shape)} do not fit outputs of shape "
                f"{tuple(scores.shape)}: expected {tuple(predicted.shape)}"
            )
        right = right + (predicted == y.to(predicted.device)).sum()
        count += y.numel()
    if count == 0:
        raise TargetError(
            "the accuracy of no batch: the loader gave none; it must yield batches anew every time"
        )
    return int(right) / count
