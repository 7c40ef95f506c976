"""Objectives: one file a family, one class a method; ``base`` and ``two_time`` hold what they share."""

from fewstep.objectives.adversarial import Adversarial
from fewstep.objectives.ayf import AYF, SCM
from fewstep.objectives.base import Loss, Objective, Player
from fewstep.objectives.consistency import CTM, ConsistencyDistillation, ConsistencyTraining
from fewstep.objectives.corrected import Corrected
from fewstep.objectives.denoising import Denoising
from fewstep.objectives.diff_tuning import DiffTuning
from fewstep.objectives.diffused import Diffused
from fewstep.objectives.direct import FMM
from fewstep.objectives.eulerian import EMD, ESD
from fewstep.objectives.finishing import Finishing
from fewstep.objectives.flow_matching import ContrastiveFlowMatching, FlowMatching, Recentred
from fewstep.objectives.improved_mean_flow import ImprovedMeanFlow
from fewstep.objectives.interpolant import StochasticInterpolant
from fewstep.objectives.itvm import ITVM
from fewstep.objectives.lagrangian import LMD, LSD, TVM
from fewstep.objectives.learned_noise import LearnedNoise
from fewstep.objectives.markov_chain import MarkovChain
from fewstep.objectives.mean_flow import AlphaFlow, MeanFlow
from fewstep.objectives.progressive import PFMM, PSD, Shortcut, SplitMeanFlow
from fewstep.objectives.reflected import ReflectedDiffusion
from fewstep.objectives.teacher_critic import TeacherCritic
from fewstep.objectives.trajectory import Trajectory
from fewstep.objectives.two_time import TwoTime

_METHODS: tuple[type[Objective], ...] = (
    FlowMatching, ContrastiveFlowMatching, Denoising, ITVM, LMD, EMD, AYF, PFMM, ConsistencyDistillation, CTM, SCM,
    MeanFlow, ImprovedMeanFlow, AlphaFlow, FMM, LSD, ESD, PSD, TVM, Shortcut, SplitMeanFlow, ConsistencyTraining,
    Corrected, Adversarial, Trajectory, StochasticInterpolant, LearnedNoise, MarkovChain,
    DiffTuning, ReflectedDiffusion,
)  # fmt: skip
OBJECTIVES: dict[str, type[Objective]] = {method.__name__: method for method in _METHODS}

__all__ = [
    "AYF", "CTM", "EMD", "ESD", "FMM", "ITVM", "LMD", "LSD", "OBJECTIVES", "PFMM", "PSD", "SCM", "TVM", "Adversarial",
    "AlphaFlow", "ConsistencyDistillation", "ConsistencyTraining", "ContrastiveFlowMatching", "Corrected", "Denoising",
    "DiffTuning", "Diffused", "Finishing", "FlowMatching", "ImprovedMeanFlow", "LearnedNoise", "Loss", "MarkovChain",
    "MeanFlow", "Objective", "Player", "Recentred", "ReflectedDiffusion", "Shortcut", "SplitMeanFlow",
    "StochasticInterpolant", "TeacherCritic", "Trajectory", "TwoTime",
]  # fmt: skip
