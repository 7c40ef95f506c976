"""fewstep turns a diffusion or flow model into a generator that needs 1 to 8 network calls instead of 50.

>>> teacher = fewstep.load("./my-ddpm")
>>> student = fewstep.FlowMap.from_field(teacher)
>>> fewstep.fit(student, fewstep.ITVM(teacher), data, steps=20_000)
>>> images = fewstep.sample(student, torch.randn(64, 3, 32, 32), steps=2)

The names below are imported when they are first used, so that ``fewstep --help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.data import load_data
    from fewstep.evaluation.diagnostics import diagnose
    from fewstep.evaluation.evaluate import compare, evaluate
    from fewstep.exact import CheckerboardField, GaussianField, MixtureField
    from fewstep.exporting import export
    from fewstep.fields import DiffusionField, Guided, NetworkField, VelocityField
    from fewstep.loading import load
    from fewstep.maps import FlowMap
    from fewstep.objectives import ITVM, LMD, FlowMatching
    from fewstep.paths import Linear, Tabulated, Trigonometric, VariancePreserving
    from fewstep.sampling import sample
    from fewstep.training.fit import fit

__version__ = "0.1.0"

# Where each public name lives.
_HOMES = {
    "CheckerboardField": "exact",
    "DiffusionField": "fields",
    "FlowMap": "maps",
    "FlowMatching": "objectives",
    "GaussianField": "exact",
    "Guided": "fields",
    "ITVM": "objectives",
    "LMD": "objectives",
    "Linear": "paths",
    "MixtureField": "exact",
    "NetworkField": "fields",
    "Tabulated": "paths",
    "Trigonometric": "paths",
    "VariancePreserving": "paths",
    "VelocityField": "fields",
    "compare": "evaluation.evaluate",
    "diagnose": "evaluation.diagnostics",
    "evaluate": "evaluation.evaluate",
    "export": "exporting",
    "fit": "training.fit",
    "load": "loading",
    "load_data": "data",
    "sample": "sampling",
}

__all__ = [
    "ITVM",
    "LMD",
    "CheckerboardField",
    "DiffusionField",
    "FlowMap",
    "FlowMatching",
    "GaussianField",
    "Guided",
    "Linear",
    "MixtureField",
    "NetworkField",
    "Tabulated",
    "Trigonometric",
    "VariancePreserving",
    "VelocityField",
    "compare",
    "diagnose",
    "evaluate",
    "export",
    "fit",
    "load",
    "load_data",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    value = getattr(import_module(f"fewstep.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
