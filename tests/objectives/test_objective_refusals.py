"""Options that cannot be, and students that cannot be trained: one clear line before anything is computed."""

from typing import Any

import pytest
from toys.gaussian import GaussianAverageVelocity
from toys.objectives import DISTILLS, Perturbed, batch_of, teacher_of

from fewstep.common.randomness import generator
from fewstep.flows.exact import GaussianField
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Trigonometric
from fewstep.networks import MLP
from fewstep.objectives import (
    AYF,
    CTM,
    EMD,
    FMM,
    ITVM,
    LMD,
    PFMM,
    PSD,
    SCM,
    TVM,
    AlphaFlow,
    ConsistencyDistillation,
    ConsistencyTraining,
    ContrastiveFlowMatching,
    FlowMatching,
    MeanFlow,
    Shortcut,
)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (ITVM, {"target": "intervall"}, "unknown target of ITVM 'intervall': did you mean 'interval'"),
        (ITVM, {"target": {"interval": 1.0, "jump": 1.0}}, "unknown target of ITVM 'jump'"),
        (ITVM, {"target": {"interval": -1.0}}, "not negative"),
        (ITVM, {"target": {"interval": 0.0}}, "not all shares are 0"),
        (ITVM, {"diagonal": 1.0}, "ITVM's diagonal is 1: that leaves no row for the map itself"),
        (ITVM, {"diagonal": 1.5}, r"ITVM's diagonal is 1.5: it lies in \[0, 1\]"),
        (ITVM, {"ema": -0.1}, "ITVM's ema is -0.1"),
        (ITVM, {"middle": 2.0}, "ITVM's middle is 2.0"),
        (ITVM, {"step_size": float("nan")}, "ITVM's step_size is nan"),
        (ITVM, {"warmup": -1.0}, "ITVM's warmup is -1.0"),
        (ITVM, {"initial_weight": -1.0}, r"ITVM's weights are \(-1.0, 1.0\): they are not negative"),
        (ITVM, {"times": "unifrom"}, "unknown distribution of times 'unifrom': did you mean 'uniform'"),
        (ITVM, {"times": "natve"}, "unknown distribution of times 'natve': did you mean 'native'"),
        (LMD, {"times": "normal"}, "unknown distribution of times 'normal'"),
        (LMD, {"diagonal": -0.1}, "LMD's diagonal is -0.1"),
        (LMD, {"diagonal": 1.0}, "LMD's diagonal is 1: that leaves no row"),
        (LMD, {"ends": 2.0}, "LMD's ends is 2.0"),
        (LMD, {"jvp": "forwards"}, "unknown jvp of LMD 'forwards': did you mean 'forward'"),
        (EMD, {"error_in": "dat"}, "unknown error_in of EMD 'dat': did you mean 'data'"),
        (AYF, {"variant": "EMDD"}, "unknown variant of AYF 'EMDD': did you mean 'EMD'"),
        (AYF, {"ramp": 1.1}, "AYF's ramp is 1.1"),
        (AYF, {"step_size": 2.0}, "AYF's step_size is 2.0"),
        (AYF, {"variant": "LMD", "ema": 1.0}, r"AYF's ema is 1.0: it lies in \[0, 1\)"),
        (AYF, {"bound": "clam"}, "unknown bound of AYF 'clam': did you mean 'clamp'"),
        (SCM, {"bound": "max"}, "unknown bound of SCM 'max'"),
        (SCM, {"warmup": -0.1}, "SCM's warmup is -0.1"),
        (PFMM, {"rounds": 0}, "PFMM's rounds are 0: at least one"),
        (PFMM, {"ema": 1.0}, "PFMM's ema is 1.0"),
        (ConsistencyDistillation, {"gap": 0.0}, "gap is 0: a step of no length teaches nothing"),
        (ConsistencyDistillation, {"gap": 1.5}, "ConsistencyDistillation's gap is 1.5"),
        (ConsistencyDistillation, {"huber": -1.0}, "ConsistencyDistillation's huber is -1.0"),
        (CTM, {"solver_steps": 0}, "CTM's solver_steps are 0: at least one"),
        (MeanFlow, {"adaptive": 1.5}, "MeanFlow's adaptive is 1.5"),
        (AlphaFlow, {"sharpness": 0.0}, "AlphaFlow's sharpness is 0.0: it is more than 0"),
        (PSD, {"middle": "midpiont"}, "unknown middle of PSD 'midpiont': did you mean 'midpoint'"),
        (Shortcut, {"finest": 100}, "Shortcut's finest is 100: it is a power of 2, such as 128"),
        (Shortcut, {"finest": 1}, "Shortcut's finest is 1"),
        (TVM, {"ema": -0.5}, "TVM's ema is -0.5"),
    ],
)
def test_options_that_cannot_be(gaussian: GaussianField, method: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        method(gaussian, **options)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (FlowMatching, {"times": "cosine"}, "unknown distribution of times 'cosine'"),
        (ContrastiveFlowMatching, {"weight": 1.0}, r"ContrastiveFlowMatching's weight is 1.0: it lies in \[0, 1\)"),
        (ContrastiveFlowMatching, {"times": "cosine"}, "unknown distribution of times 'cosine'"),
        (FMM, {"first": 0.0}, "FMM's first is 0: a strip of no width teaches nothing"),
        (FMM, {"widening": 1.5}, "FMM's widening is 1.5"),
        (ConsistencyTraining, {"stages": 0}, "ConsistencyTraining has stages=0, q=2.0: at least one stage"),
        (ConsistencyTraining, {"q": 1.0}, "and q above 1"),
    ],
)
def test_options_that_cannot_be_from_data(method: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_pfmm_needs_its_copy(gaussian: GaussianField):
    student = FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2))
    with pytest.raises(ValueError, match="no copy of its student yet: call objective"):
        PFMM(gaussian)(student, batch_of(gaussian), target=student, progress=1.0, generator=generator(0))


def test_students_that_cannot_be_trained(gaussian: GaussianField):
    for objective in (DISTILLS[name](gaussian) for name in DISTILLS):
        with pytest.raises(ValueError, match=r"trains a FlowMap, not a NetworkField: FlowMap.from_field\(field\)"):
            objective.check_student(teacher_of())
        with pytest.raises(ValueError, match="trains a FlowMap, not a MLP"):
            objective.check_student(MLP(2, times=2))
        elsewhere = FlowMap(MLP(2, times=2), Trigonometric())
        with pytest.raises(
            ValueError, match=r"student is on Trigonometric\(\), the teacher on Linear\(\): use teacher.on"
        ):
            objective.check_student(elsewhere)
        objective.check_student(FlowMap(MLP(2, times=2)))
    for student in (teacher_of(), elsewhere):
        FlowMatching().check_student(student)
    with pytest.raises(ValueError, match="FlowMatching trains a VelocityField or a FlowMap, not a MLP"):
        FlowMatching().check_student(MLP(2))
    with pytest.raises(ValueError, match="FlowMatching was made without a teacher and needs one"):
        _ = FlowMatching().teacher
