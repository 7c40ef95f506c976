"""fewstep turns a diffusion or flow model into a generator that needs 1 to 8 network calls instead of 50.

>>> teacher = fewstep.load("./my-ddpm")
>>> student = fewstep.FlowMap.from_field(teacher)
>>> fewstep.fit(student, fewstep.ITVM(teacher), data, steps=20_000)
>>> images = fewstep.sample(student, torch.randn(64, 3, 32, 32), steps=2)

The names below are imported when they are first used, so that ``fewstep --help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fewstep.threads import wait_asleep

if TYPE_CHECKING:
    from fewstep.citing import cite
    from fewstep.comparing import compare_methods
    from fewstep.converting import convert
    from fewstep.data import Batch, load_data
    from fewstep.encoding import encode
    from fewstep.evaluation.diagnostics import diagnose
    from fewstep.evaluation.evaluate import compare, evaluate
    from fewstep.exact import CheckerboardField, GaussianField, MixtureField
    from fewstep.exporting import export
    from fewstep.fields import DiffusionField, Guided, NetworkField, VelocityField
    from fewstep.hub import push
    from fewstep.loading import load
    from fewstep.lora import add_lora, load_adapter, merge_lora, save_adapter
    from fewstep.maps import FlowMap
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
        AlphaFlow,
        ConsistencyDistillation,
        ConsistencyTraining,
        ContrastiveFlowMatching,
        Denoising,
        FlowMatching,
        ImprovedMeanFlow,
        MeanFlow,
        Recentred,
        Shortcut,
        SplitMeanFlow,
        TwoTime,
    )
    from fewstep.paths import Linear, Tabulated, Trigonometric, VariancePreserving
    from fewstep.sampling import sample
    from fewstep.training.batches import Batches
    from fewstep.training.ema import Ema
    from fewstep.training.fit import fit

__version__ = "0.1.0"

wait_asleep()

# Where each public name lives.
_HOMES = {
    "AYF": "objectives",
    "AlphaFlow": "objectives",
    "Batch": "data",
    "Batches": "training.batches",
    "CTM": "objectives",
    "CheckerboardField": "exact",
    "ConsistencyDistillation": "objectives",
    "ConsistencyTraining": "objectives",
    "ContrastiveFlowMatching": "objectives",
    "Denoising": "objectives",
    "DiffusionField": "fields",
    "EMD": "objectives",
    "ESD": "objectives",
    "Ema": "training.ema",
    "FMM": "objectives",
    "FlowMap": "maps",
    "FlowMatching": "objectives",
    "GaussianField": "exact",
    "Guided": "fields",
    "ITVM": "objectives",
    "ImprovedMeanFlow": "objectives",
    "LMD": "objectives",
    "LSD": "objectives",
    "Linear": "paths",
    "MeanFlow": "objectives",
    "MixtureField": "exact",
    "NetworkField": "fields",
    "PFMM": "objectives",
    "PSD": "objectives",
    "Recentred": "objectives",
    "SCM": "objectives",
    "Shortcut": "objectives",
    "SplitMeanFlow": "objectives",
    "TVM": "objectives",
    "Tabulated": "paths",
    "Trigonometric": "paths",
    "TwoTime": "objectives",
    "VariancePreserving": "paths",
    "VelocityField": "fields",
    "add_lora": "lora",
    "cite": "citing",
    "compare": "evaluation.evaluate",
    "compare_methods": "comparing",
    "convert": "converting",
    "diagnose": "evaluation.diagnostics",
    "encode": "encoding",
    "evaluate": "evaluation.evaluate",
    "export": "exporting",
    "fit": "training.fit",
    "load": "loading",
    "load_adapter": "lora",
    "load_data": "data",
    "merge_lora": "lora",
    "push": "hub",
    "sample": "sampling",
    "save_adapter": "lora",
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
    "AlphaFlow",
    "Batch",
    "Batches",
    "CheckerboardField",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "ContrastiveFlowMatching",
    "Denoising",
    "DiffusionField",
    "Ema",
    "FlowMap",
    "FlowMatching",
    "GaussianField",
    "Guided",
    "ImprovedMeanFlow",
    "Linear",
    "MeanFlow",
    "MixtureField",
    "NetworkField",
    "Recentred",
    "Shortcut",
    "SplitMeanFlow",
    "Tabulated",
    "Trigonometric",
    "TwoTime",
    "VariancePreserving",
    "VelocityField",
    "add_lora",
    "cite",
    "compare",
    "compare_methods",
    "convert",
    "diagnose",
    "encode",
    "evaluate",
    "export",
    "fit",
    "load",
    "load_adapter",
    "load_data",
    "merge_lora",
    "push",
    "sample",
    "save_adapter",
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
