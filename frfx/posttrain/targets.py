"""Targets of post-training: what the layer of the network before training should have produced.

The paper reconstructs the features once, before training, from the network as it is then. Here the
same targets are recomputed for every batch, from a reference that keeps the trained parameters as
they were and shares everything that is frozen: no data set of features is stored, random
augmentation is allowed, and a change of a frozen weight is never missed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from frfx.api import invert
from frfx.policy import Policy
from frfx.view import evaluation_view


class Targets:
    """Reconstructs features as the network before training would.

    Args:
        model: The network.
        trained: The parameters and buffers that training will change.
        upto_layer: The layer whose feature is reconstructed.
        policy: As for `frfx.invert`.
        backend: As for `frfx.invert`.
        example_input: As for `frfx.invert`.
        output: As for `frfx.invert`.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: list[Tensor],
        *,
        upto_layer: int | str,
        policy: Policy | str,
        backend: str,
        example_input: Tensor | None,
        output: str | int | None = None,
    ) -> None:
        self.inverse = invert(
            evaluation_view(model, own=trained),
            upto_layer,
            policy=policy,
            backend=backend,
            example_input=example_input,
            output=output,
        )
        self._model, then = model, named_tensors(self.inverse.model)
        shared = set(map(id, named_tensors(model).values()))
        self._names = [name for name, tensor in then.items() if id(tensor) not in shared]
        self._own = [*{id(then[name]): then[name] for name in self._names}.values()]
        self._trained, self._dtype = trained[0], trained[0].dtype

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `a*` for a batch; runs outside of autocast."""
        self._follow()
        if x.is_floating_point():
            x = x.to(next(self.inverse.model.parameters()).dtype)
        with torch.autocast(x.device.type, enabled=False):
            return self.inverse(x, y)

    def before(self, module: nn.Module) -> nn.Module:
        """Return a part of the model as it was before training, in the modes that it has now.

        Its buffers are copies, for in training mode a module writes to its own.
        """
        self._follow()
        then, now = named_tensors(self.inverse.model), named_tensors(self._model)
        own = {id(now[name]): then[name] for name in self._names if name in now}
        copies = {k: t if isinstance(t, nn.Parameter) else t.clone() for k, t in own.items()}
        view = evaluation_view(module, copies)
        for was, part in zip(view.modules(), module.modules(), strict=True):
            was.training = part.training
        return view

    def _follow(self) -> None:
        """Move the reference's own tensors to where the model was moved, as `.to()` would."""
        device, dtype = self._trained.device, self._trained.dtype
        for tensor in self._own:
            cast = dtype != self._dtype and tensor.is_floating_point()
            wanted = dtype if cast else tensor.dtype
            if tensor.device != device or tensor.dtype != wanted:
                tensor.data = tensor.data.to(device, wanted)
        self._dtype = dtype

    def state(self) -> list[Tensor]:
        """Return the reference's own tensors, to be saved beside the model."""
        return [tensor.detach().clone() for tensor in self._own]

    def load(self, state: list[Tensor]) -> None:
        """Take over what `state` returned."""
        for tensor, saved in zip(self._own, state, strict=True):
            tensor.data = saved.to(tensor.device, tensor.dtype)
        self.inverse.refresh()

    @property
    def frozen(self) -> list[Tensor]:
        """The tensors that the targets depend on and that the model may still change."""
        own = set(map(id, self._own))
        every = {id(tensor): tensor for tensor in named_tensors(self.inverse.model).values()}
        return [tensor for key, tensor in every.items() if key not in own]


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return all tensors by all their names."""
    named = dict[str, Tensor](module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))
