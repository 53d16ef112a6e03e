"""frfx runs trained networks backwards: a graph-rewriting compiler over torch.fx."""

from frfx import networks, policy, rules
from frfx.api import invert, layers
from frfx.compiler.inverse import Inverse
from frfx.errors import (
    BackendError,
    ConditionWarning,
    ConvergenceError,
    ConvergenceWarning,
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
    UnreachedError,
    UnreachedWarning,
    UnsupportedOpsError,
)
from frfx.metrics import Measurement, measure
from frfx.posttrain import EpochRecord, Losses, PostTraining, accuracy, post_train
from frfx.registry import register_rule
from frfx.rules import maximum_assignment, nearest_embedding, one_hot, register_elementwise

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "ConditionWarning",
    "ConvergenceError",
    "ConvergenceWarning",
    "DataError",
    "EpochRecord",
    "FrfxError",
    "InputError",
    "Inverse",
    "LayerError",
    "Losses",
    "Measurement",
    "ModeWarning",
    "ModelError",
    "NonFiniteError",
    "PolicyError",
    "PostTraining",
    "RegistryError",
    "TargetError",
    "TraceError",
    "TraceMismatchError",
    "UnreachedError",
    "UnreachedWarning",
    "UnsupportedOpsError",
    "accuracy",
    "invert",
    "layers",
    "maximum_assignment",
    "measure",
    "nearest_embedding",
    "networks",
    "one_hot",
    "policy",
    "post_train",
    "register_elementwise",
    "register_rule",
    "rules",
]
