"""Models by name: the paper's networks, torchvision's, or a factory in a file."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frfx import networks
from frfx.errors import ModelError, first_line, nearest

KINDS = "paper:NAME, torchvision:NAME or FILE.py:FACTORY"


def load_model(spec: str, weights: str | Path | None = None) -> nn.Module:
    """Build a model, and load its weights.

    Args:
        spec: ``paper:mnist`` (any of `frfx.networks.NETWORKS`), ``torchvision:resnet18`` (any
            of torchvision's classifiers), or ``path/file.py:factory``, a function of no arguments
            that returns a module.
        weights: A state dict: ``.safetensors``, or what `torch.save` wrote, loaded with
            `weights_only=True`. None leaves the model as its factory makes it.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        ModelError: If there is no such model, or the weights cannot be read or do not fit it.
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
        load_weights(model, Path(weights))
    return model.eval()


def _torchvision(name: str) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise ModelError("torchvision's models need it: pip install 'frfx[data]'") from error
    known = models.list_models(module=models)  # others would download weights of their backbones
    if name not in known:
        raise ModelError(f"torchvision has no classifier {name!r}.{nearest(name, known)}")
    return models.get_model(name, weights=None)


def _from_file(path: Path, factory: str) -> nn.Module:
    if not path.is_file():
        raise ModelError(f"no file {str(path)!r}; a model is {KINDS}")
    module_spec = importlib.util.spec_from_file_location(f"frfx_model_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ModelError(f"{str(path)!r} is no Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses, pickle and fx look it up there
    folder = str(path.parent.resolve())
    if folder not in sys.path:  # it may import what lies beside it, as a script may
        sys.path.append(folder)
    module_spec.loader.exec_module(module)
    make = getattr(module, factory, None)
    if not callable(make):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise ModelError(f"{str(path)!r} has no function {factory!r}.{nearest(factory, known)}")
    required = [p.name for p in inspect.signature(make).parameters.values() if _is_required(p)]
    if required:
        raise ModelError(f"{path}:{factory} needs {', '.join(required)}; it must take no arguments")
    model = make()
    if not isinstance(model, nn.Module):
        raise ModelError(f"{path}:{factory} returned {type(model).__name__}, not a module")
    return model


def _is_required(parameter: inspect.Parameter) -> bool:
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in optional


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Read a state dict into a model, from safetensors if the name ends so.

    Args:
        model: Any module.
        path: What `save_weights` or ``torch.save(model.state_dict(), ...)`` wrote.

    Raises:
        ModelError: If there is no such file, it cannot be read or does not fit the model, or
            safetensors is missing (extra `frfx[cli]`).
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no weights at {str(path)!r}")
    safe = _safetensors() if path.suffix == ".safetensors" else None
    try:
        if safe is not None:
            state = safe.load_file(path)
        else:
            state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a file of another kind fails in many ways
        raise ModelError(
            f"{str(path)!r} cannot be read as weights: {first_line(error).partition('. ')[0]}. "
            "A state dict is expected, as safetensors or as torch.save(model.state_dict(), ...) "
            "writes it"
        ) from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"the weights {str(path)!r} do not fit the model: {error}") from error


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a model's state dict, as safetensors if the name ends so, else as `torch.save` does.

    Args:
        model: Any module.
        path: Where to write; folders are made.

    Raises:
        ModelError: If safetensors is missing (extra `frfx[cli]`).
    """
    save_tensors(model.state_dict(), path)


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors by name, as safetensors if the file's name ends so, else as `torch.save` does.

    Args:
        tensors: Any shapes and dtypes.
        path: Where to write; folders are made.

    Raises:
        ModelError: If safetensors is missing (extra `frfx[cli]`).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        # Copies, for safetensors refuses tensors that share memory, such as tied weights.
        copies = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        _safetensors().save_file(copies, path)
    else:
        torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ModelError("safetensors is missing: pip install 'frfx[cli]'") from error
    return safetensors.torch
