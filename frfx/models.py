"""Models by name: the paper's networks, torchvision's, or a factory in a file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

from frfx import networks
from frfx.errors import ModelError, nearest

KINDS = "paper:NAME, torchvision:NAME or FILE.py:FACTORY"


def load_model(spec: str, weights: str | Path | None = None) -> nn.Module:
    """Build a model, and load its weights.

    Args:
        spec: ``paper:mnist`` (any of `frfx.networks.NETWORKS`), ``torchvision:resnet18`` (any
            of torchvision's models), or ``path/file.py:factory``, a function of no arguments that
            returns a module.
        weights: A state dict: ``.safetensors``, or what `torch.save` wrote, loaded with
            `weights_only=True`. None leaves the model as its factory makes it.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        ModelError: If there is no such model, or the weights do not fit it.
    """
    kind, separator, name = spec.rpartition(":")
    if not separator:
        raise ModelError(f"model {spec!r}: expected {KINDS}")
    if kind == "paper":
        model: nn.Module = networks.build(name)
    elif kind == "torchvision":
        model = _torchvision(name)
    else:
        model = _from_file(Path(kind), name)
    if weights is not None:
        _load_weights(model, Path(weights))
    return model.eval()


def _torchvision(name: str) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise ModelError("torchvision's models need it: pip install 'frfx[data]'") from error
    known = models.list_models()
    if name not in known:
        raise ModelError(f"torchvision has no model {name!r}.{nearest(name, known)}")
    return models.get_model(name, weights=None)


def _from_file(path: Path, factory: str) -> nn.Module:
    if not path.is_file():
        raise ModelError(f"no file {str(path)!r}; a model is {KINDS}")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise ModelError(f"{str(path)!r} is no Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    make = getattr(module, factory, None)
    if not callable(make):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise ModelError(f"{str(path)!r} has no function {factory!r}.{nearest(factory, known)}")
    model = make()
    if not isinstance(model, nn.Module):
        raise ModelError(f"{path}:{factory} returned {type(model).__name__}, not a module")
    return model


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"no weights at {str(path)!r}")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ModelError("safetensors is missing: pip install 'frfx[cli]'") from error
        state = load_file(path)
    else:
        state = torch.load(path, weights_only=True, map_location="cpu")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"the weights {str(path)!r} do not fit the model: {error}") from error


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a model's state dict, as safetensors if the name ends so, else as `torch.save` does.

    Args:
        model: Any module.
        path: Where to write; folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)
