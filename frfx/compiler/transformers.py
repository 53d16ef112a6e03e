"""torch's transformer layers, opened for symbolic tracing.

Their forward asks for what a proxy cannot tell: whether the fused kernel may run, and how long the
sequence is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

_STACKS: dict[type[nn.Module], Callable[..., Tensor]] = {}
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def is_open(module: nn.Module) -> bool:
    """Tell whether a module is traced into, though it is one of torch's own."""
    return type(module) in _LAYERS or type(module) in _STACKS


def traceable(module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Callable | None:
    """Return the forward to trace for an open module, or None if it has to stay whole.

    Args:
        module: An open module.
        forward: Calls it.
        args: What it is called with.
        kwargs: What it is called with by name.
    """
    if type(module) in _LAYERS:
        masks = [*args[1:], *kwargs.values()]
        asks = type(module) is nn.TransformerEncoderLayer  # for the masks' types
        return None if asks and any(isinstance(mask, fx.Proxy) for mask in masks) else forward
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return None
    return functools.partial(_STACKS[type(module)], module)


@contextlib.contextmanager
def no_fast_path() -> Iterator[None]:
    """Let transformer layers compute by their parts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _encode(
    encoder: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """Compute what the encoder computes. Whether the mask is causal only chooses a kernel."""
    options: dict[str, Any] = {
        "src_mask": mask,
        "is_causal": is_causal is True,
        "src_key_padding_mask": src_key_padding_mask,
    }
    for layer in encoder.layers:
        src = layer(src, **options)
    return src if encoder.norm is None else encoder.norm(src)


def _decode(
    decoder: nn.TransformerDecoder,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Tensor:
    """Compute what the decoder computes, as `_encode` does."""
    options: dict[str, Any] = {
        "tgt_mask": tgt_mask,
        "memory_mask": memory_mask,
        "tgt_key_padding_mask": tgt_key_padding_mask,
        "memory_key_padding_mask": memory_key_padding_mask,
        "tgt_is_causal": tgt_is_causal is True,
        "memory_is_causal": memory_is_causal,
    }
    for layer in decoder.layers:
        tgt = layer(tgt, memory, **options)
    return tgt if decoder.norm is None else decoder.norm(tgt)


_STACKS |= {nn.TransformerEncoder: _encode, nn.TransformerDecoder: _decode}
