"""Save a run of post-training after every epoch, and resume it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frfx.errors import FrfxError
from frfx.posttrain.step import PostTraining


@dataclass(frozen=True)
class EpochRecord:
    """What an epoch of post-training came to.

    Attributes:
        epoch: Counted from 1.
        loss: The mean over samples, of all processes, of the total loss (Eq. 3).
        classification: The mean of Eq. 1; None where alpha is 1.
        reconstruction: The mean of Eq. 2; None where alpha is 0.
        val_accuracy: The share of right predictions on `val_loader` after the epoch, if given.
        seconds: Wall time of the training part, without the validation.
    """

    epoch: int
    loss: float
    classification: float | None
    reconstruction: float | None
    val_accuracy: float | None
    seconds: float


class Checkpoint:
    """A file that holds everything that a resume needs.

    Args:
        path: The file; its folder is made, and what cannot be written is told at once.
        step: What is trained.
        optimizer: Its optimizer.
        fabric: A `lightning.fabric.Fabric`, which saves; None for plain torch.
    """

    def __init__(
        self, path: str | Path, step: PostTraining, optimizer: torch.optim.Optimizer, fabric: Any
    ) -> None:
        self.path, self.step, self.optimizer, self.fabric = Path(path), step, optimizer, fabric
        self._partial = Path(f"{path}.partial")
        if fabric is None:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            self._partial.touch()
            self._partial.unlink()

    def save(self, history: list[EpochRecord]) -> None:
        """Write it; an interrupted save leaves the last one whole."""
        targets = self.step.targets
        state = {
            "trained": {name: t.detach() for name, t in self.step.trained_tensors().items()},
            "optimizer": self.optimizer.state_dict(),
            "kind": _kind(self.optimizer),
            "reference": None if targets is None else targets.state(),
            "history": [asdict(record) for record in history],
        }
        if self.fabric is not None:
            self.fabric.save(self.path, state)
            return
        torch.save(state, self._partial)
        self._partial.replace(self.path)

    def load(self) -> list[EpochRecord]:
        """Take up what `save` left, if it is there; return the history.

        Raises:
            FrfxError: If the file is none of these, or of other layers or another optimizer;
                nothing has been changed then.
        """
        if not self.path.exists():
            return []
        shown, tensors = repr(str(self.path)), self.step.trained_tensors()
        try:
            state = torch.load(self.path, weights_only=True, map_location="cpu")
            history = [EpochRecord(**record) for record in state["history"]]
            shapes = {name: saved.shape for name, saved in state["trained"].items()}
            kind, groups = state["kind"], [*map(_group, state["optimizer"]["param_groups"])]
            reference = state["reference"]
            reference_shapes = _shapes(reference or [])
        except Exception as error:  # a file of another kind fails in many ways
            raise FrfxError(f"{shown} is no checkpoint of post-training") from error
        if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
            raise FrfxError(
                f"the checkpoint {shown} is of other layers: it holds {_some(shapes)}, and what is "
                f"trained here is {_some(tensors)}"
            )
        if (kind, groups) != (_kind(self.optimizer), [*map(_group, self.optimizer.param_groups)]):
            raise FrfxError(
                f"the checkpoint {shown} is of another optimizer: of another kind ({kind}) than "
                "`optimizer` makes, or its groups of parameters have other sizes or options"
            )
        targets = self.step.targets if reference else None
        if targets is not None and reference_shapes != _shapes(targets.state()):
            raise FrfxError(f"the checkpoint {shown} holds targets of another network")
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(state["trained"][name])
        if targets is not None:
            targets.load(reference)
        return history


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """Return the class of an optimizer, which Fabric wraps."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _group(group: dict[str, Any]) -> tuple[list[str], int]:
    """Return the names of a group's options, and how many parameters it has."""
    return sorted(group), len(group["params"])


def _shapes(tensors: list[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _some(names: Any) -> str:
    first, *others = map(repr, names)
    return first + (f" and {len(others)} more" if others else "")
