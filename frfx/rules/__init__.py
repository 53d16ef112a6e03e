"""The inverse rules, one family a file. Importing this package registers all of them."""

from frfx.rules.activation import (
    ElementwiseRule,
    PReluRule,
    ReluIdentityRule,
    SinPaperRule,
    register_elementwise,
)
from frfx.rules.affine import ScaleRule
from frfx.rules.base import AffineInversion, FactoredInversion, Inversion, Rule
from frfx.rules.conv import ConvolutionRule
from frfx.rules.interpolate import InterpolateRule
from frfx.rules.label import (
    MaximumAssignmentRule,
    NearestEmbeddingRule,
    OneHotRule,
    SoftmaxRule,
    maximum_assignment,
    nearest_embedding,
    one_hot,
)
from frfx.rules.linear import LinearRule
from frfx.rules.max_pool import MaxPoolCopyRule, MaxPoolMinimalRule
from frfx.rules.mover import PatchMergingRule
from frfx.rules.norm import BatchNormRule, NormalizationRule
from frfx.rules.pad import PadRule
from frfx.rules.pool import AdaptiveAvgPoolRule, AvgPoolRule, MeanRule
from frfx.rules.shape import IdentityRule, PermuteRule, ReshapeRule, TransposeRule
from frfx.rules.shuffle import ChannelShuffleRule, PixelShuffleRule, PixelUnshuffleRule

__all__ = [
    "AdaptiveAvgPoolRule",
    "AffineInversion",
    "AvgPoolRule",
    "BatchNormRule",
    "ChannelShuffleRule",
    "ConvolutionRule",
    "ElementwiseRule",
    "FactoredInversion",
    "IdentityRule",
    "InterpolateRule",
    "Inversion",
    "LinearRule",
    "MaxPoolCopyRule",
    "MaxPoolMinimalRule",
    "MaximumAssignmentRule",
    "MeanRule",
    "NearestEmbeddingRule",
    "NormalizationRule",
    "OneHotRule",
    "PReluRule",
    "PadRule",
    "PatchMergingRule",
    "PermuteRule",
    "PixelShuffleRule",
    "PixelUnshuffleRule",
    "ReluIdentityRule",
    "ReshapeRule",
    "Rule",
    "ScaleRule",
    "SinPaperRule",
    "SoftmaxRule",
    "TransposeRule",
    "maximum_assignment",
    "nearest_embedding",
    "one_hot",
    "register_elementwise",
]
