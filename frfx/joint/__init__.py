"""Joint inversion: a whole region of the network at once, by sequential quadratic programming."""

from frfx.joint.options import JointOptions
from frfx.joint.report import Report
from frfx.joint.rule import JointInversion, JointRule

__all__ = ["JointInversion", "JointOptions", "JointRule", "Report"]
