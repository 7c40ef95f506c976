"""The corrector against closed forms: Gaussian teachers, and maps whose samples are Gaussian."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys.gaussian import GaussianAverageVelocity
from toys.unet import tiny_field

from fewstep.common.randomness import generator
from fewstep.data.batch import Batch
from fewstep.flows.exact import GaussianField, eight_gaussians
from fewstep.flows.guided import Guided
from fewstep.flows.interpolants import Interpolant
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Path, Trigonometric
from fewstep.flows.times import draw_times
from fewstep.networks import MLP
from fewstep.objectives import ITVM, PSD, Adversarial, ConsistencyDistillation, Corrected, MeanFlow
from fewstep.objectives.finishing import Made

MU, VARIANCE = 0.7, 0.36


def gaussian(mean: float, variance: float, path: Path | None = None) -> GaussianField:
    return GaussianField(torch.tensor([mean], dtype=torch.float64), torch.eye(1).double() * variance, path)


class Affine(nn.Module):
    """``X_{0,1}(z) = m + k z``, as u = m + (k - 1) z on the linear path."""

    def __init__(self, m: float, k: float) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.tensor(m, dtype=torch.float64))
        self.k = nn.Parameter(torch.tensor(k, dtype=torch.float64))

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return self.m + (self.k - 1) * x


def gradients(m: float, k: float, rows: int = 4096, path: Path | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Those of the student's term, in m and k, with the exact velocity of the map's own samples; and the times."""
    path = path or Linear()
    teacher, fake = gaussian(MU, VARIANCE, path), gaussian(m, k * k, path)
    network = Affine(m, k)
    student = FlowMap(network, path)
    objective = Corrected(ITVM(teacher), fake=fake, **options)
    noise = torch.randn(rows, 1, generator=generator(1), dtype=torch.float64)
    x = student(noise, 0.0, 1.0)
    judged = objective.judged(student, Made(x, noise, x.detach(), {}, generator(2)))
    assert judged.student is not None
    found = torch.autograd.grad(judged.student, [network.m, network.k])
    r = 0.02 + 0.96 * draw_times(rows, generator(2)).double()
    return torch.stack(found), r


def test_a_shift_is_felt_as_the_closed_form_says():
    """Equal variances: x_fake - x_teacher = (m - mu) (1 - r)^2 / C_r at every point, whatever is drawn."""
    m = 1.1
    (of_m, _), r = gradients(m, math.sqrt(VARIANCE), normalize=False)
    felt = (m - MU) * (1 - r) ** 2 / (r**2 * VARIANCE + (1 - r) ** 2)
    torch.testing.assert_close(of_m, felt.mean(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=str)
def test_nothing_is_felt_where_the_distributions_agree(path: Path):
    found, _ = gradients(MU, math.sqrt(VARIANCE), path=path)
    torch.testing.assert_close(found, torch.zeros(2).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [0.3, 1.2])
def test_a_map_too_narrow_is_widened_and_one_too_wide_narrowed(k: float, normalize: bool):
    (_, of_k), _ = gradients(MU, k, normalize=normalize)
    assert of_k.sign() == math.copysign(1, k * k - VARIANCE)


def test_the_step_descends_the_divergence():
    """Gradient descent on the term alone, the fake exact at each step, ends at the teacher's mean and deviation."""
    m, k = -0.5, 1.4
    for _ in range(200):
        (of_m, of_k), _ = gradients(m, k, rows=1024, normalize=False)
        m, k = m - 0.3 * float(of_m), k - 0.3 * float(of_k)
    assert abs(m - MU) < 0.02
    assert abs(k - math.sqrt(VARIANCE)) < 0.03


def test_the_fake_learns_the_velocity_of_the_samples():
    """Flow matching on the map's own samples: least at their exact field, and there the noise of the pairs."""
    m, k = 1.5, 0.4
    noise = torch.randn(4096, 1, generator=generator(1), dtype=torch.float64)
    student = FlowMap(Affine(m, k))
    x = student(noise, 0.0, 1.0).detach()

    def loss(mean: float, variance: float) -> Tensor:
        objective = Corrected(ITVM(gaussian(MU, VARIANCE)), fake=gaussian(mean, variance))
        judged = objective.judged(student, Made(x, noise, x, {}, generator(2)))
        assert judged.student is None  # the student stands still: its samples have no grad
        assert judged.player is not None
        return judged.player

    least = loss(m, k * k)
    r = 0.02 + 0.96 * draw_times(4096, generator(2)).double()
    floor = k * k / (r**2 * k * k + (1 - r) ** 2)  # Var(x1 - x0 | x_r)
    torch.testing.assert_close(least, floor.mean(), rtol=0.08, atol=0)
    assert all(loss(*wrong) > least * 1.02 for wrong in ((m + 0.3, k * k), (m, 4 * k * k), (MU, VARIANCE)))


def test_normalized_rows_do_not_depend_on_the_unit_of_the_data():
    """|D| is about |X - x_teacher|^0: ten times the data give the same step in the units of D."""
    (small, _), _ = gradients(MU + 0.4, 0.6)
    teacher, fake = gaussian(10 * MU, 100 * VARIANCE), gaussian(10 * (MU + 0.4), 36.0)
    network = Affine(10 * (MU + 0.4), 6.0)
    student = FlowMap(network)
    noise = torch.randn(4096, 1, generator=generator(1), dtype=torch.float64)
    x = student(noise, 0.0, 1.0)
    judged = Corrected(ITVM(teacher), fake=fake).judged(student, Made(x, noise, x.detach(), {}, generator(2)))
    (large,) = torch.autograd.grad(judged.student, network.m)  # pyright: ignore
    assert 0.1 < large / small < 10


def test_guidance_of_the_term_alone():
    """Of a guided teacher the term may have another strength, and an interval."""
    strong, weak = gaussian(0.0, 0.25), gaussian(0.0, 1.0)
    teacher = Guided(strong, 3.0, weak=weak)
    assert Corrected(ITVM(teacher))._judge[0] is teacher
    judge: Any = Corrected(ITVM(teacher), guidance_scale=1.0, interval=(0.2, 0.9))._judge[0]
    assert (judge.scale, judge.interval, judge.field) == (1.0, (0.2, 0.9), strong)
    with pytest.raises(ValueError, match="not guided"):
        Corrected(ITVM(strong), interval=(0.2, 0.9))


def test_one_network_may_play_both_parts():
    """``same``: the fake is the student at (r, 0), which no map uses; its loss is part of the student's."""
    torch.manual_seed(0)
    teacher = eight_gaussians()
    student = FlowMap(MLP(2, width=16, depth=2, times=2))
    objective = Corrected(ITVM(teacher), fake="same", begin=0.0)
    objective.adopt(student)
    assert list(objective.parameter_groups(student)) == ["student"]
    asked = []
    student.network.register_forward_pre_hook(lambda _m, args: asked.append((args[1].detach(), args[2].detach())))
    loss = objective(student, Batch(torch.randn(64, 2)), target=student, progress=0.5, generator=generator(0))
    assert not loss.others
    assert "fake" in loss.terms
    flagged = [(s > t).all() for s, t in asked]
    assert sum(map(bool, flagged)) == 1


def test_the_fake_is_the_student_as_it_is_when_the_term_begins():
    torch.manual_seed(0)
    student = FlowMap(MLP(2, width=16, depth=2, times=2))
    objective = Corrected(ITVM(eight_gaussians()), begin=0.5, ramp=0.0)
    objective.adopt(student)

    def call(progress: float) -> None:
        batch = Batch(torch.randn(64, 2, generator=generator(3)))
        objective(student, batch, target=student, progress=progress, generator=generator(0))

    def is_student() -> bool:
        return all(torch.equal(a, b) for a, b in zip(objective.fake.parameters(), student.parameters(), strict=True))  # pyright: ignore

    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1)
    call(0.4)
    assert not is_student()
    call(0.5)
    assert is_student()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1)
    call(0.6)
    assert not is_student()  # once: from here on it learns by itself
    assert bool(objective.state_dict()["copied"])
    again = Corrected(ITVM(eight_gaussians()), begin=0.5)
    again.adopt(student)
    again.load_state_dict(objective.state_dict())
    before = [p.clone() for p in again.fake.parameters()]  # pyright: ignore
    again(student, Batch(torch.randn(64, 2)), target=student, progress=0.7, generator=generator(0))
    assert all(torch.equal(a, b) for a, b in zip(again.fake.parameters(), before, strict=True))  # pyright: ignore


def test_the_real_velocity_may_be_the_students_own():
    """Then no teacher is needed, and an exact diagonal is as good as one."""
    mean, variance = torch.tensor([MU], dtype=torch.float64), torch.eye(1).double() * VARIANCE
    student = FlowMap(GaussianAverageVelocity(GaussianField(mean, variance)))
    noise = torch.randn(512, 1, generator=generator(1), dtype=torch.float64)
    x = student(noise, 0.0, 1.0).requires_grad_(True)
    fakes = gaussian(MU + 0.3, VARIANCE), gaussian(MU, VARIANCE)
    for fake, told in zip(fakes, (0.01, 0.0), strict=True):
        objective = Corrected(MeanFlow(), fake=fake, real="diagonal")
        judged = objective.judged(student, Made(x, noise, x.detach(), {}, generator(2)))
        (felt,) = torch.autograd.grad(judged.student, x)  # pyright: ignore
        assert float(felt.sum()) > told if told else float(felt.abs().max()) < 1e-12
    with pytest.raises(ValueError, match="real of Corrected 'data'"):
        Corrected(MeanFlow(), real="data")
    with pytest.raises(ValueError, match="are of a teacher, and real is 'diagonal'"):
        Corrected(MeanFlow(), real="diagonal", interval=(0.1, 0.9))


def test_what_is_refused():
    teacher = eight_gaussians()
    with pytest.raises(ValueError, match="fake of Corrected 'copied'"):
        Corrected(ITVM(teacher), fake="copied")
    with pytest.raises(ValueError, match="compares with a teacher, and MeanFlow"):
        Corrected(MeanFlow())
    Corrected(MeanFlow(), teacher=teacher)
    objective = Corrected(ITVM(teacher), begin=0.0)
    student = FlowMap(MLP(2, width=16, depth=2, times=2))
    with pytest.raises(ValueError, match="on"):
        objective.check_student(FlowMap(MLP(2, width=16, depth=2, times=2), Trigonometric()))
    with pytest.raises(ValueError, match="adopt"):
        objective(student, Batch(torch.randn(64, 2)), target=student, progress=0.5, generator=generator(0))


@pytest.mark.takes_seconds
def test_it_finishes_a_consistency_model_that_is_told_no_second_time() -> None:
    field = tiny_field("v_prediction")
    student = FlowMap.from_field(tiny_field("v_prediction"), second_time="none")
    with torch.no_grad():  # at first it says what the teacher does, and feels nothing
        for weight in student.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    objective = Corrected(ConsistencyDistillation(field), begin=0.0, ramp=0.0)
    objective.check_student(student)
    objective.adopt(student)
    assert student.gamma == 1
    batch = Batch(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    for step in range(3):  # samples of 1, 2 and 4 steps
        loss = objective(student, batch, target=student, progress=0.5, step=step, generator=generator(step))
        loss.total.backward()
        assert loss.terms["corrector"] > 0
        assert loss.others["fake"] > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
    Adversarial(ConsistencyDistillation(field)).check_student(student)
    for option, said in (({"fake": "same"}, "fake: same"), ({"real": "diagonal"}, "real: diagonal")):
        with pytest.raises(ValueError, match=f"Corrected with {said} asks the student for other ends"):
            Corrected(ConsistencyDistillation(field), **option).check_student(student)
    with pytest.raises(ValueError, match="Corrected trains ends before t = 1 too"):
        Corrected(PSD(field)).check_student(student)


def test_a_map_between_two_data_sets_is_refused() -> None:
    """Its samples would be noised by normal noise, which its path does not know."""
    student = FlowMap(MLP(2, times=2), Interpolant())
    with pytest.raises(ValueError, match=r"Corrected needs a path that starts from normal noise.*Adversarial"):
        Corrected(PSD(), real="diagonal").check_student(student)
    PSD().check_student(student)
