"""Joint inversion: a whole region of the network at once, by sequential quadratic programming."""

from frfx.joint.options import JointOptions
from frfx.joint.report import Report
from frfx.joint.rule import REGION, JointInversion, JointRule

__all__ = ["REGION", "JointInversion", "JointOptions", "JointRule", "Report"]
