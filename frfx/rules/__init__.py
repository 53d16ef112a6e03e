"""The inverse rules, one family a file. Importing this package registers all of them."""

from frfx.rules.activation import (
    ElementwiseRule,
    PReluRule,
    ReluIdentityRule,
    SinPaperRule,
    register_elementwise,
)
from frfx.rules.attention import AttentionRule, MultiheadAttentionRule
from frfx.rules.base import AffineInversion, FactoredInversion, Inversion, Rule
from frfx.rules.bilinear import BilinearRule
from frfx.rules.conv import ConvolutionRule, TransposedConvolutionRule
from frfx.rules.extremum import ExtremumRule
from frfx.rules.interpolate import InterpolateRule
from frfx.rules.join import CatRule, SplitRule, StackRule
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
from frfx.rules.product import ProductRule, QuotientRule
from frfx.rules.region import RegionRule
from frfx.rules.repeat import RepeatRule
from frfx.rules.select import SelectRule
from frfx.rules.shape import (
    CastRule,
    FlipRule,
    IdentityRule,
    MovedimRule,
    PermuteRule,
    ReshapeRule,
    RollRule,
    Rot90Rule,
    TransposeRule,
)
from frfx.rules.shuffle import ChannelShuffleRule, PixelShuffleRule, PixelUnshuffleRule
from frfx.rules.sum import SumRule

__all__ = [
    "AdaptiveAvgPoolRule",
    "AffineInversion",
    "AttentionRule",
    "AvgPoolRule",
    "BatchNormRule",
    "BilinearRule",
    "CastRule",
    "CatRule",
    "ChannelShuffleRule",
    "ConvolutionRule",
    "ElementwiseRule",
    "ExtremumRule",
    "FactoredInversion",
    "FlipRule",
    "IdentityRule",
    "InterpolateRule",
    "Inversion",
    "LinearRule",
    "MaxPoolCopyRule",
    "MaxPoolMinimalRule",
    "MaximumAssignmentRule",
    "MeanRule",
    "MovedimRule",
    "MultiheadAttentionRule",
    "NearestEmbeddingRule",
    "NormalizationRule",
    "OneHotRule",
    "PReluRule",
    "PadRule",
    "PatchMergingRule",
    "PermuteRule",
    "PixelShuffleRule",
    "PixelUnshuffleRule",
    "ProductRule",
    "QuotientRule",
    "RegionRule",
    "ReluIdentityRule",
    "RepeatRule",
    "ReshapeRule",
    "RollRule",
    "Rot90Rule",
    "Rule",
    "SelectRule",
    "SinPaperRule",
    "SoftmaxRule",
    "SplitRule",
    "StackRule",
    "SumRule",
    "TransposeRule",
    "TransposedConvolutionRule",
    "maximum_assignment",
    "nearest_embedding",
    "one_hot",
    "register_elementwise",
]
