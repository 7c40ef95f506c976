"""Objectives: one file a family, one class a method; ``base`` holds what they share."""

from fewstep.objectives.base import Loss, Objective
from fewstep.objectives.flow_matching import FlowMatching
from fewstep.objectives.itvm import ITVM
from fewstep.objectives.lmd import LMD

OBJECTIVES: dict[str, type[Objective]] = {cls.__name__: cls for cls in (FlowMatching, ITVM, LMD)}

__all__ = ["ITVM", "LMD", "OBJECTIVES", "FlowMatching", "Loss", "Objective"]
