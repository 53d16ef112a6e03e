"""Whether weights have changed since something was made of them."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary


class Weights:
    """A record of an op's weights that tells whether they have changed since.

    Keeps the tensors' storage, so that no new weight can come to lie at the same address.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._seen = [(tensor.detach(), _version(tensor)) for tensor in tensors]

    def match(self, tensors: list[Tensor]) -> bool:
        """Return whether these are the recorded tensors, unchanged."""
        return len(tensors) == len(self._seen) and all(
            now.data_ptr() == then.data_ptr()
            and now.device == then.device
            and now.dtype == then.dtype
            and now.shape == then.shape
            and _version(now) == version is not None
            for now, (then, version) in zip(tensors, self._seen, strict=True)
        )


def _version(tensor: Tensor) -> tuple[int, int] | None:
    """Return autograd's and our own count of writes; None for inference tensors: nobody counts."""
    return None if tensor.is_inference() else (tensor._version, _steps.get(tensor, 0))


_steps = WeakTensorKeyDictionary()
"""How often an optimizer has changed a parameter. Fused ones do not tell autograd of it."""


def _count_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    del args, kwargs
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            if parameter.grad is not None:
                _steps[parameter] = _steps.get(parameter, 0) + 1


register_optimizer_step_post_hook(_count_step)
