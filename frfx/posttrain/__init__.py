"""Post-training: train modules of a network against reconstructed features (Eq. 1-3)."""

from frfx.posttrain.checkpoint import EpochRecord
from frfx.posttrain.fit import post_train
from frfx.posttrain.loss import Losses
from frfx.posttrain.scoring import accuracy
from frfx.posttrain.step import PostTraining

__all__ = ["EpochRecord", "Losses", "PostTraining", "accuracy", "post_train"]
