"""Who looks at what is computed, beside the caller."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

PLAIN = (Tensor, nn.Parameter)
"""The types of tensors that are what they seem: subclasses may compute something else."""


def is_capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph records what a device computes: nothing may wait for it."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def is_recorded(*tensors: Tensor | None) -> bool:
    """Tell whether torch's own ops, out of place, must make the result of these tensors.

    They must where autograd records, in either mode, where `torch.func` transforms, where a
    compiler or a dispatch mode listens, and for subclasses of tensors. None counts for nothing.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if _get_current_dispatch_mode() is not None:
        return True
    backward, forward = torch.is_grad_enabled(), forward_ad._current_level >= 0
    return any(
        type(t) not in PLAIN
        or (backward and t.requires_grad)
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
        or (forward and forward_ad.unpack_dual(t).tangent is not None)
        for t in tensors
        if t is not None
    )
