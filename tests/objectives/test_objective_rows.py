"""Which rows, calls, types and gradients the objectives use; and what they refuse."""

import pytest
import torch
from torch import Tensor, nn
from toys.gaussian import GaussianAverageVelocity
from toys.objectives import (
    ALL,
    DISTILLS,
    FROM_DATA,
    Moving,
    MovingNetwork,
    Perturbed,
    batch_of,
    gradient,
    loss_of,
    moving_rows,
    teacher_of,
    value,
)

import fewstep
from fewstep.common.randomness import generator
from fewstep.data.batch import Batch
from fewstep.flows.calls import count_calls
from fewstep.flows.exact import GaussianField
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.objectives import (
    AYF,
    ITVM,
    LMD,
    OBJECTIVES,
    PFMM,
    PSD,
    AlphaFlow,
    Denoising,
    DiffTuning,
    MarkovChain,
    ReflectedDiffusion,
    StochasticInterpolant,
)  # fmt: skip
from fewstep.objectives.base import split_rows


def student_of(teacher: NetworkField) -> FlowMap:
    """A student whose second time speaks."""
    student = FlowMap.from_field(teacher)
    torch.manual_seed(1)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.3)
    return student


def perturbed(gaussian: GaussianField) -> FlowMap:
    return FlowMap(Perturbed(GaussianAverageVelocity(gaussian), 2, 0.3))


# Rows


def test_rows_are_shared_out_within_each_chunk():
    chunks = [generator(0), generator(1)]
    parts = split_rows(16, {"a": 0.5, "b": 0.25, "c": 0.25, "none": 0.0}, chunks)
    assert {name: part.tolist() for name, part in parts.items()} == {
        "a": [0, 1, 2, 3, 8, 9, 10, 11],
        "b": [4, 5, 12, 13],
        "c": [6, 7, 14, 15],
        "none": [],
    }


@pytest.mark.parametrize("shares", [(0.3, 0.7), (1.0, 1.0, 1.0), (0.13, 0.5, 0.37)])
def test_every_row_has_one_part_and_shares_are_met(shares: tuple[float, ...]):
    names = dict(zip("abc", shares, strict=False))
    parts = split_rows(53, names, generator(0))
    rows = {name: torch.arange(53)[part] for name, part in parts.items()}  # slices, as there is one chunk
    assert sorted(torch.cat(list(rows.values())).tolist()) == list(range(53))
    for name, share in names.items():
        assert abs(len(rows[name]) - 53 * share / sum(shares)) <= 1


@pytest.mark.parametrize("name", ALL)
def test_slices_and_indices_of_rows_give_the_same_bits(gaussian: GaussianField, name: str, monkeypatch):
    def of() -> tuple[float, Tensor, dict]:
        student = perturbed(gaussian)
        loss = loss_of(ALL[name](gaussian), student, batch_of(gaussian, 64))
        return value(loss), gradient(loss, student), loss.times

    total, slope, times = of()

    def indices(rows, shares, generators, device="cpu"):
        return {name: torch.arange(rows)[part] for name, part in split_rows(rows, shares, generators, device).items()}

    monkeypatch.setattr("fewstep.objectives.two_time.split_rows", indices)
    again, same_slope, same_times = of()
    assert total == again
    assert torch.equal(slope, same_slope)
    assert all(torch.equal(same_times[term], rows) for term, rows in times.items())


def test_a_part_that_would_get_no_row_is_an_error(gaussian: GaussianField):
    one_each = [generator(n) for n in range(8)]
    assert split_rows(32, {"made": 0.99, "": 0.01}, generator(0))["made"] == slice(0, 32)
    with pytest.raises(ValueError, match="is a multiple of 1000, or a larger share"):
        split_rows(32, {"made": 0.001, "": 0.999}, generator(0))
    with pytest.raises(ValueError, match=r"'initial' has 0.5 of the rows, which is none in chunks of 1: use larger"):
        loss_of(ITVM(gaussian, diagonal=0.5), perturbed(gaussian), batch_of(gaussian, 8), generator=one_each)


@pytest.mark.parametrize("name", ALL)
def test_two_processes_see_what_one_sees(gaussian: GaussianField, name: str):
    def of(batch: Batch, chunks: list[int]) -> tuple[float, Tensor]:
        student = perturbed(gaussian)
        loss = loss_of(ALL[name](gaussian), student, batch, generator=[generator(0, chunk) for chunk in chunks])
        return value(loss), gradient(loss, student)

    whole = batch_of(gaussian, 64)
    total, slope = of(whole, [0, 1, 2, 3])
    halves = [of(Batch(data), chunks) for data, chunks in zip(whole.data.chunk(2), ([0, 1], [2, 3]), strict=True)]
    assert total == pytest.approx((halves[0][0] + halves[1][0]) / 2, rel=1e-12)
    torch.testing.assert_close(slope, (halves[0][1] + halves[1][1]) / 2, rtol=1e-11, atol=1e-12)
    assert total == of(whole, [0, 1, 2, 3])[0]
    assert total != of(whole, [0, 1, 2, 4])[0]


@pytest.mark.parametrize("name", ALL)
def test_coupled_noise_is_used_as_it_is(gaussian: GaussianField, name: str):
    student, data = perturbed(gaussian), batch_of(gaussian).data
    drawn = torch.randn(64, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    one, two = (value(loss_of(ALL[name](gaussian), student, Batch(data, noise=noise))) for noise in (drawn, -drawn))
    assert one != two
    assert one == value(loss_of(ALL[name](gaussian), student, Batch(data, noise=drawn)))


# Calls

# Calls and rows of the student, of its copy (the target, or the frozen one), of the teacher, for a batch of 64.
CALLS = {
    "ITVM interval": ((1, 64), (2, 64), (1, 32)),
    "ITVM integral": ((1, 64), (1, 32), (2, 64)),
    "ITVM step": ((1, 64), (1, 32), (3, 96)),
    "ITVM derivative": ((1, 64), (1, 32), (2, 64)),
    # 16 rows on two trajectories of 16 steps, two calls each.
    "ITVM trajectory": ((1, 64), (2, 32), (33, 96)),
    # The diagonal is at the student's own states.
    "ITVM from the prior": ((2, 96), (1, 32), (2, 64)),
    "ITVM at its own states": ((2, 128), (2, 64), (1, 32)),
    # Eight trajectories of 16 steps.
    "Trajectory": ((1, 64), (0, 0), (33, 272)),
    "LMD from the prior": ((3, 80), (0, 0), (2, 64)),
    "LMD at its own states": ((3, 128), (0, 0), (2, 64)),
    "ITVM of two targets": ((1, 64), (3, 56), (3, 48)),
    "LMD": ((2, 64), (0, 0), (2, 64)),
    "LMD by difference": ((3, 112), (0, 0), (2, 64)),
    "EMD": ((3, 112), (0, 0), (2, 64)),
    "EMD full": ((2, 64), (0, 0), (2, 64)),
    "AYF": ((2, 112), (0, 0), (2, 64)),
    "AYF LMD": ((1, 64), (1, 48), (3, 112)),
    "PFMM": ((1, 64), (2, 96), (1, 16)),
    "ConsistencyDistillation": ((1, 64), (1, 64), (2, 128)),
    "CTM": ((2, 64), (3, 144), (5, 208)),
    "SCM distilled": ((2, 128), (0, 0), (1, 64)),
    "MeanFlow distilled": ((2, 80), (0, 0), (2, 64)),
    "MeanFlow distilled, by difference": ((3, 96), (0, 0), (2, 64)),
    "ImprovedMeanFlow distilled": ((3, 128), (0, 0), (2, 64)),
    "AlphaFlow distilled": ((2, 96), (0, 0), (2, 64)),
    "LSD distilled": ((3, 80), (0, 0), (1, 48)),
    "ESD distilled": ((4, 96), (0, 0), (1, 48)),
    "PSD distilled": ((3, 96), (0, 0), (1, 48)),
    "TVM distilled": ((2, 64), (1, 32), (1, 32)),
    "Shortcut distilled": ((1, 64), (2, 32), (1, 48)),
    "SplitMeanFlow distilled": ((3, 128), (0, 0), (1, 32)),
    "SCM": ((2, 128), (0, 0), (0, 0)),
    "MeanFlow": ((2, 80), (0, 0), (0, 0)),
    "ImprovedMeanFlow": ((3, 128), (0, 0), (0, 0)),
    "AlphaFlow": ((2, 96), (0, 0), (0, 0)),
    "FMM": ((2, 128), (0, 0), (0, 0)),
    "LSD": ((3, 80), (0, 0), (0, 0)),
    "ESD": ((4, 96), (0, 0), (0, 0)),
    "PSD": ((3, 96), (0, 0), (0, 0)),
    "TVM": ((2, 64), (1, 32), (0, 0)),
    "Shortcut": ((1, 64), (2, 32), (0, 0)),
    "SplitMeanFlow": ((3, 128), (0, 0), (0, 0)),
    "ConsistencyTraining": ((2, 128), (0, 0), (0, 0)),
    "FlowMatching": ((1, 64), (0, 0), (0, 0)),
    "ContrastiveFlowMatching": ((1, 64), (0, 0), (0, 0)),
}
# The same with other options.
MORE_CALLS = {
    "ITVM as it comes": (lambda v: ITVM(v), CALLS["ITVM interval"]),
    "ITVM half and half": (lambda v: ITVM(v, "mixed"), ((1, 64), (3, 48), (2, 48))),
    "ITVM, none diagonal": (lambda v: ITVM(v, diagonal=0.0), ((1, 64), (2, 128), (0, 0))),
    "LMD, none diagonal": (lambda v: LMD(v, diagonal=0.0), ((1, 64), (0, 0), (1, 64))),
    "PSD, none diagonal": (lambda v: PSD(v, diagonal=0.0), ((3, 192), (0, 0), (0, 0))),
}
COUNTED = {name: (ALL[name], expected) for name, expected in CALLS.items()} | MORE_CALLS


@pytest.mark.parametrize("name", COUNTED)
def test_no_call_and_no_row_is_wasted(name: str):
    make, expected = COUNTED[name]
    teacher = teacher_of()
    student, target = student_of(teacher), student_of(teacher)
    objective = make(teacher)
    objective.adopt(target)
    with (
        count_calls(student) as a,
        count_calls(getattr(objective, "frozen", None) or target) as b,
        count_calls(teacher) as c,
    ):
        loss = loss_of(objective, student, Batch(torch.randn(64, 2)), target=target)
        loss.total.backward()
    assert tuple((calls.count, calls.rows) for calls in (a, b, c)) == expected
    shares = {name: len(times) for name, times in loss.times.items()}
    two_terms = {"inverse", "contrast"}  # on the rows of another
    assert sum(count for name, count in shares.items() if name not in two_terms) == 64
    assert set(shares) == set(loss.terms)


def test_alpha_flow_calls_what_its_a_needs():
    for progress, calls_of_student in ((0.0, (1, 64)), (0.5, (2, 96)), (1.0, (2, 96))):
        student = student_of(teacher_of())
        with count_calls(student) as calls:
            loss_of(AlphaFlow(), student, Batch(torch.randn(64, 2)), progress=progress)
        assert (calls.count, calls.rows) == calls_of_student


def test_the_first_round_of_pfmm_is_the_teachers():
    teacher = teacher_of()
    objective, student = PFMM(teacher), student_of(teacher)
    objective.adopt(student)
    with count_calls(objective.frozen) as frozen, count_calls(teacher) as calls:  # pyright: ignore
        loss_of(objective, student, Batch(torch.randn(64, 2)), progress=0.0)
    assert (frozen.count, calls.count, calls.rows) == (0, 5, 16 + 4 * 48)


def test_every_method_is_in_these_tests(gaussian: GaussianField):
    # Denoising trains no map, and no velocity, DiffTuning no map: test_denoising.py, test_diff_tuning.py.
    # What stands around another: test_finishing.py and test_learned_noise.py. Two heads: flows/test_interpolants.py.
    # Chains: flows/test_chains.py. Walls: test_reflected_diffusion.py.
    alone = {Denoising, DiffTuning, MarkovChain, ReflectedDiffusion, StochasticInterpolant}
    methods = {method for method in OBJECTIVES.values() if not method.around} - alone
    assert {type(make(gaussian)) for make in ALL.values()} == methods
    assert all(make(gaussian).sources for make in ALL.values())
    assert {type(ALL[name](gaussian)) for name in CALLS} == methods


# Gradients


@pytest.mark.parametrize("name", DISTILLS | FROM_DATA)
def test_neither_teacher_nor_target_learns(name: str):
    teacher = teacher_of()
    student, target = student_of(teacher), student_of(teacher)
    objective = ALL[name](teacher)
    for parameter in target.parameters():
        parameter.requires_grad_(name != "CTM")  # which compares after its fixed copy
    if name in DISTILLS:
        for parameter in teacher.parameters():  # frozen by the objective; thawed here to see what would reach it
            assert not parameter.requires_grad
            parameter.requires_grad_(name != "LMD through the teacher")
    loss = loss_of(objective, student, Batch(torch.randn(32, 2)), target=target)
    loss.total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
    assert all(p.grad is None for p in (*target.parameters(), *teacher.parameters()))
    assert not any(term.requires_grad for term in (*loss.terms.values(), *loss.times.values()))


def test_goals_have_no_gradient(gaussian: GaussianField):
    """The student's own weights make the goal of many: moving them there would change the gradient."""
    for name in ("PSD", "SplitMeanFlow", "MeanFlow", "ImprovedMeanFlow", "AlphaFlow", "ConsistencyTraining", "SCM"):
        student, calls = perturbed(gaussian), []
        student.network.register_forward_hook(lambda _m, _a, out, calls=calls: calls.append(out.requires_grad))
        loss_of(ALL[name](gaussian), student, batch_of(gaussian))
        assert calls.count(True) == 1


@pytest.mark.parametrize("name", ALL)
def test_the_teacher_is_no_part_of_the_objective_but_moves_with_it(name: str):
    objective = ALL[name](teacher_of().train())
    own = [key for key in objective.state_dict() if not key.startswith("log_weight.")]
    assert own == (["round"] if name == "PFMM" else [])
    objective.to(torch.float64)
    if name in DISTILLS:
        assert not objective.train().teacher.training
        assert next(objective.teacher.parameters()).dtype == torch.float64
    student = student_of(teacher_of())
    groups = objective.parameter_groups(student)
    assert groups == {"student": [*student.parameters(), *objective.parameters()]}
    learns = name in ("SCM", "SCM distilled", "LSD distilled, weighted", "PSD, weighted")
    assert len(list(objective.parameters())) == (4 if learns else 0)


def test_which_copies_the_methods_want(gaussian: GaussianField):
    wanted = {type(make(gaussian)).__name__ for make in ALL.values() if make(gaussian).ema is not None}
    assert wanted == {"ITVM", "AYF", "PFMM", "ConsistencyDistillation", "CTM", "TVM", "Shortcut"}
    assert (AYF(gaussian).ema, AYF(gaussian, "LMD").ema) == (None, 0.99)
    gammas = {type(make(gaussian)).__name__ for make in ALL.values() if make(gaussian).gamma == 1}
    assert gammas == {"ConsistencyDistillation", "ConsistencyTraining", "SCM"}


# Shapes, types, conditions


@pytest.mark.parametrize("name", DISTILLS | FROM_DATA)
def test_conditions_follow_their_rows(name: str):
    labels = torch.arange(48) % 5 - 2
    batch = moving_rows(labels)
    loss = loss_of(ALL[name](Moving()), FlowMap(MovingNetwork()), batch)
    assert value(loss) < 1e-7
    wrong = Batch(batch.data, {"class_labels": labels.roll(1)}, noise=batch.noise)
    with pytest.raises(AssertionError, match="the condition of another"):
        loss_of(ALL[name](Moving()), FlowMap(MovingNetwork()), wrong)


@pytest.mark.parametrize("name", ALL)
def test_images_as_their_points(gaussian: GaussianField, name: str):
    # The Gaussian of eight independent points, as images (2, 2, 2) and as vectors (8,).
    losses = []
    for shape in ((8,), (2, 2, 2)):
        field = GaussianField(torch.linspace(-1, 1, 8).double().reshape(shape), torch.eye(8).double() * 0.5)
        flat = GaussianField(field.mean.flatten(), torch.eye(8).double() * 0.5)
        student = FlowMap(Perturbed(GaussianAverageVelocity(flat), 8, 0.2))
        losses.append(value(loss_of(ALL[name](field), student, batch_of(field, 32))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0] > 1e-3


# Weights in half precision are too coarse for differences.
HALVES = [("autocast", name) for name in ALL] + [("weights", name) for name in ALL if "difference" not in name]


@pytest.mark.parametrize(("how", "name"), HALVES)
def test_half_precision(how: str, name: str):
    teacher = teacher_of()
    student, batch = student_of(teacher), Batch(torch.randn(64, 2, generator=torch.Generator().manual_seed(4)))
    # States a small gap apart are one in half precision.
    progress = 0.3 if name.startswith("ConsistencyTraining") else 1.0
    full = value(loss_of(ALL[name](teacher), student, batch, progress=progress))
    if how == "weights":
        student, batch = student.to(torch.bfloat16), Batch(batch.data.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        objective = ALL[name](teacher).to(next(student.parameters()).dtype)
        loss = loss_of(objective, student, batch, progress=progress)
    assert loss.total.dtype == torch.float32
    assert value(loss) == pytest.approx(full, rel=0.05)
    loss.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("name", ["LMD", "MeanFlow", "EMD"])
def test_differences_give_the_gradient_of_forward_mode(gaussian: GaussianField, name: str):
    """In float64, where the step of 1e-5 leaves an error of second order: 1e-10."""
    slopes = []
    for mode in ("forward", "difference"):
        student = perturbed(gaussian)
        objective = getattr(fewstep, name)(gaussian, jvp=mode)
        slopes.append(gradient(loss_of(objective, student, batch_of(gaussian, 64)), student))
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-7)
