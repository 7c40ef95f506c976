"""fewstep turns a diffusion or flow model into a generator that needs 1 to 8 network calls instead of 50.

>>> teacher = fewstep.load("./my-ddpm")
>>> student = fewstep.FlowMap.from_field(teacher)
>>> fewstep.fit(student, fewstep.ITVM(teacher), data, steps=20_000)
>>> images = fewstep.sample(student, torch.randn(64, 3, 32, 32), steps=2)

The names below are imported when they are first used, so that ``fewstep --help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fewstep.common.threads import wait_asleep
from fewstep.common.version import __version__ as __version__

if TYPE_CHECKING:
    from fewstep.data import Batch, Between, Residual, load_data
    from fewstep.evaluation.diagnostics import diagnose
    from fewstep.evaluation.evaluate import evaluate
    from fewstep.evaluation.geometry import geometry
    from fewstep.evaluation.results import compare
    from fewstep.flows.adaptive import sample_adaptive
    from fewstep.flows.beside import with_image
    from fewstep.flows.chained import Chained
    from fewstep.flows.controlled import Controlled
    from fewstep.flows.editing import flow_edit, invert, resume, sdedit
    from fewstep.flows.exact import CheckerboardField, GaussianField, MixtureField
    from fewstep.flows.exact_spaces import BoxesInBoxField, TokensField
    from fewstep.flows.fields import DiffusionField, NetworkField, VelocityField
    from fewstep.flows.guided import Guided
    from fewstep.flows.interpolants import DenoisedField, Interpolant
    from fewstep.flows.likelihood import bits_per_dim, log_likelihood
    from fewstep.flows.maps import FlowMap
    from fewstep.flows.mixed import Mixed
    from fewstep.flows.paths import Linear, Trigonometric, VariancePreserving
    from fewstep.flows.population import Particles
    from fewstep.flows.priors import irfds, rfds, rfds_rev
    from fewstep.flows.products import Product
    from fewstep.flows.psd import PSDField
    from fewstep.flows.reflected import Reflected
    from fewstep.flows.rewards import Reward
    from fewstep.flows.sampling import sample
    from fewstep.flows.sources import Normal, RowsOf, Uniform
    from fewstep.flows.spaces import Box, Euclid, Tokens, Torus
    from fewstep.flows.steering import steer
    from fewstep.flows.step_grids import optimal_grid, step_errors
    from fewstep.flows.tabulated import Tabulated
    from fewstep.generation.clusters import cluster
    from fewstep.models.adapter_files import load_adapter, save_adapter
    from fewstep.models.hub import push
    from fewstep.models.lora import add_lora, merge_lora
    from fewstep.objectives import (
        AYF,
        CTM,
        EMD,
        ESD,
        FMM,
        ITVM,
        LMD,
        LSD,
        PFMM,
        PSD,
        SCM,
        TVM,
        Adversarial,
        AlphaFlow,
        ConsistencyDistillation,
        ConsistencyTraining,
        ContrastiveFlowMatching,
        Corrected,
        Denoising,
        DiffTuning,
        Diffused,
        FlowMatching,
        ImprovedMeanFlow,
        LearnedNoise,
        MarkovChain,
        MeanFlow,
        Recentred,
        ReflectedDiffusion,
        Shortcut,
        SplitMeanFlow,
        StochasticInterpolant,
        TeacherCritic,
        Trajectory,
        TwoTime,
    )
    from fewstep.runs.cite import cite
    from fewstep.runs.compare import compare_methods
    from fewstep.runs.convert import convert
    from fewstep.runs.encode import encode
    from fewstep.runs.export import export
    from fewstep.runs.loading import load
    from fewstep.training.batches import Batches
    from fewstep.training.blocks import fit_blocks
    from fewstep.training.ema import Ema
    from fewstep.training.fit import fit

wait_asleep()

# Where each public name lives.
_HOMES = {
    "AYF": "objectives",
    "Adversarial": "objectives",
    "AlphaFlow": "objectives",
    "Batch": "data",
    "Batches": "training.batches",
    "Between": "data",
    "Box": "flows.spaces",
    "BoxesInBoxField": "flows.exact_spaces",
    "CTM": "objectives",
    "Chained": "flows.chained",
    "CheckerboardField": "flows.exact",
    "ConsistencyDistillation": "objectives",
    "ConsistencyTraining": "objectives",
    "ContrastiveFlowMatching": "objectives",
    "Controlled": "flows.controlled",
    "Corrected": "objectives",
    "DenoisedField": "flows.interpolants",
    "Denoising": "objectives",
    "DiffTuning": "objectives",
    "Diffused": "objectives",
    "DiffusionField": "flows.fields",
    "EMD": "objectives",
    "ESD": "objectives",
    "Ema": "training.ema",
    "Euclid": "flows.spaces",
    "FMM": "objectives",
    "FlowMap": "flows.maps",
    "FlowMatching": "objectives",
    "GaussianField": "flows.exact",
    "Guided": "flows.guided",
    "ITVM": "objectives",
    "ImprovedMeanFlow": "objectives",
    "Interpolant": "flows.interpolants",
    "LMD": "objectives",
    "LSD": "objectives",
    "LearnedNoise": "objectives",
    "Linear": "flows.paths",
    "MarkovChain": "objectives",
    "MeanFlow": "objectives",
    "Mixed": "flows.mixed",
    "MixtureField": "flows.exact",
    "NetworkField": "flows.fields",
    "Normal": "flows.sources",
    "PFMM": "objectives",
    "PSD": "objectives",
    "PSDField": "flows.psd",
    "Particles": "flows.population",
    "Product": "flows.products",
    "Recentred": "objectives",
    "Reflected": "flows.reflected",
    "ReflectedDiffusion": "objectives",
    "Residual": "data",
    "Reward": "flows.rewards",
    "RowsOf": "flows.sources",
    "SCM": "objectives",
    "Shortcut": "objectives",
    "SplitMeanFlow": "objectives",
    "StochasticInterpolant": "objectives",
    "TVM": "objectives",
    "Tabulated": "flows.tabulated",
    "TeacherCritic": "objectives",
    "Tokens": "flows.spaces",
    "TokensField": "flows.exact_spaces",
    "Torus": "flows.spaces",
    "Trajectory": "objectives",
    "Trigonometric": "flows.paths",
    "TwoTime": "objectives",
    "Uniform": "flows.sources",
    "VariancePreserving": "flows.paths",
    "VelocityField": "flows.fields",
    "add_lora": "models.lora",
    "bits_per_dim": "flows.likelihood",
    "cite": "runs.cite",
    "cluster": "generation.clusters",
    "compare": "evaluation.results",
    "compare_methods": "runs.compare",
    "convert": "runs.convert",
    "diagnose": "evaluation.diagnostics",
    "encode": "runs.encode",
    "evaluate": "evaluation.evaluate",
    "export": "runs.export",
    "fit": "training.fit",
    "fit_blocks": "training.blocks",
    "geometry": "evaluation.geometry",
    "flow_edit": "flows.editing",
    "invert": "flows.editing",
    "irfds": "flows.priors",
    "load": "runs.loading",
    "load_adapter": "models.adapter_files",
    "load_data": "data",
    "log_likelihood": "flows.likelihood",
    "merge_lora": "models.lora",
    "optimal_grid": "flows.step_grids",
    "push": "models.hub",
    "resume": "flows.editing",
    "rfds": "flows.priors",
    "rfds_rev": "flows.priors",
    "sample": "flows.sampling",
    "sample_adaptive": "flows.adaptive",
    "save_adapter": "models.adapter_files",
    "sdedit": "flows.editing",
    "steer": "flows.steering",
    "step_errors": "flows.step_grids",
    "with_image": "flows.beside",
}

__all__ = [
    "AYF",
    "CTM",
    "EMD",
    "ESD",
    "FMM",
    "ITVM",
    "LMD",
    "LSD",
    "PFMM",
    "PSD",
    "SCM",
    "TVM",
    "Adversarial",
    "AlphaFlow",
    "Batch",
    "Batches",
    "Between",
    "Box",
    "BoxesInBoxField",
    "Chained",
    "CheckerboardField",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "ContrastiveFlowMatching",
    "Controlled",
    "Corrected",
    "DenoisedField",
    "Denoising",
    "DiffTuning",
    "Diffused",
    "DiffusionField",
    "Ema",
    "Euclid",
    "FlowMap",
    "FlowMatching",
    "GaussianField",
    "Guided",
    "ImprovedMeanFlow",
    "Interpolant",
    "LearnedNoise",
    "Linear",
    "MarkovChain",
    "MeanFlow",
    "Mixed",
    "MixtureField",
    "NetworkField",
    "Normal",
    "PSDField",
    "Particles",
    "Product",
    "Recentred",
    "Reflected",
    "ReflectedDiffusion",
    "Residual",
    "Reward",
    "RowsOf",
    "Shortcut",
    "SplitMeanFlow",
    "StochasticInterpolant",
    "Tabulated",
    "TeacherCritic",
    "Tokens",
    "TokensField",
    "Torus",
    "Trajectory",
    "Trigonometric",
    "TwoTime",
    "Uniform",
    "VariancePreserving",
    "VelocityField",
    "add_lora",
    "bits_per_dim",
    "cite",
    "cluster",
    "compare",
    "compare_methods",
    "convert",
    "diagnose",
    "encode",
    "evaluate",
    "export",
    "fit",
    "fit_blocks",
    "flow_edit",
    "geometry",
    "invert",
    "irfds",
    "load",
    "load_adapter",
    "load_data",
    "log_likelihood",
    "merge_lora",
    "optimal_grid",
    "push",
    "resume",
    "rfds",
    "rfds_rev",
    "sample",
    "sample_adaptive",
    "save_adapter",
    "sdedit",
    "steer",
    "step_errors",
    "with_image",
]


# Hidden from type checkers, which would take any misspelt name for one.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
        value = getattr(import_module(f"fewstep.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
