"""frfx runs trained networks backwards: a graph-rewriting compiler over torch.fx."""

from frfx import policy, rules
from frfx.api import invert, layers
from frfx.compiler.inverse import Inverse
from frfx.errors import (
    BackendError,
    ConditionWarning,
    DataError,
    FrfxError,
    InputError,
    LayerError,
    ModelError,
    ModeWarning,
    NonFiniteError,
    PolicyError,
    RegistryError,
    TargetError,
    TraceError,
    TraceMismatchError,
    UnsupportedOpsError,
)
from frfx.registry import register_rule
from frfx.rules import maximum_assignment, nearest_embedding, one_hot, register_elementwise

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "ConditionWarning",
    "DataError",
    "FrfxError",
    "InputError",
    "Inverse",
    "LayerError",
    "ModeWarning",
    "ModelError",
    "NonFiniteError",
    "PolicyError",
    "RegistryError",
    "TargetError",
    "TraceError",
    "TraceMismatchError",
    "UnsupportedOpsError",
    "invert",
    "layers",
    "maximum_assignment",
    "nearest_embedding",
    "one_hot",
    "policy",
    "register_elementwise",
    "register_rule",
    "rules",
]
