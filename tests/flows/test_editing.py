"""Inversion and editing against the closed forms of Gaussians: what a wrong sign, or a wrong time, would miss."""

import math

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.common.randomness import generator, normal, sample_generators
from fewstep.flows.calls import count_calls
from fewstep.flows.controlled import Controlled
from fewstep.flows.editing import flow_edit, invert, resume, sdedit
from fewstep.flows.exact import CheckerboardField, GaussianField, eight_gaussians
from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.paths import Linear, Trigonometric
from fewstep.flows.sampling import sample
from fewstep.flows.solvers import integrate
from fewstep.networks import MLP

F64 = torch.float64
C, T0 = 0.25, 0.5  # the variance and the time of the closed forms
BY = {"source": {"mean": torch.zeros(1, dtype=F64)}, "target": {"mean": torch.ones(1, dtype=F64)}}


class ShiftedField(VelocityField):
    """N(mean, .25) along one axis, with the mean as a condition (B,)."""

    def __init__(self, path=None):
        super().__init__()
        self.centred = GaussianField(torch.zeros(1, dtype=F64), torch.full((1, 1), C, dtype=F64), path)
        self.path = self.centred.path

    def _mean(self, x, t, mean, rate):
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        return (rate(t) * mean)[:, None]

    def forward(self, x, t, *, mean, **cond):
        return self._mean(x, t, mean, self.path.alpha_dot) + self.centred(
            x - self._mean(x, t, mean, self.path.alpha), t
        )


class ShiftedMap(FlowMap):
    """Its exact flow map. ``is_two_way``: whether it knows the way back."""

    def __init__(self, path=None, is_two_way=True):
        self.calls = 0
        field = ShiftedField(path)
        super().__init__(nn.Identity(), field.path)
        self.field, self.is_two_way = field, is_two_way

    def forward(self, x, s, t, *, mean, **cond):
        self.calls += 1
        if not self.is_two_way and t < s:
            return torch.full_like(x, math.nan)
        a, start, end = self.path.alpha, self.field._mean, self.field.centred.flow
        return start(x, t, mean, a) + end(x - start(x, s, mean, a), s, t)


def gaussian(path=None) -> GaussianField:
    """N(1, .25), whose map from 0 to 1 is 1 + z / 2."""
    return GaussianField(torch.ones(1, dtype=F64), torch.full((1, 1), C, dtype=F64), path)


def one(value: float, rows: int = 1) -> Tensor:
    return torch.full((rows, 1), value, dtype=F64)


def shifted(rows: int) -> dict[str, dict[str, Tensor]]:
    return {name: {"mean": cond["mean"].expand(rows)} for name, cond in BY.items()}


def close(x: Tensor, y: Tensor | float, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(x, torch.as_tensor(y, dtype=x.dtype).expand_as(x), rtol=0, atol=tolerance)


# FlowEdit


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("average", [1, 3])
def test_flow_edit_with_maps_is_exact_for_shifted_gaussians_whatever_the_noise(steps, average):
    edited = flow_edit(
        ShiftedMap(), one(0.4, 5), **shifted(5), steps=steps, strength=1 - T0, average=average, generator=generator(0)
    )
    close(edited, 0.4 + 1 - T0 * math.sqrt(C / (T0 * T0 * C + (1 - T0) ** 2)))
    close(edited, 0.9527864045000421)


@pytest.mark.parametrize(("steps", "wanted"), [(1, 1.2), (4, 1.0178), (16, 0.9698), (256, 0.9539)])
def test_flow_edit_of_a_field_takes_the_steps_of_euler(steps, wanted):
    edited = flow_edit(ShiftedField(), one(0.4), **BY, steps=steps, strength=1 - T0, generator=generator(0))
    assert float(edited) == pytest.approx(wanted, abs=5e-5)


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=["linear", "trigonometric"])
def test_flow_edit_from_noise_carries_all_the_way(path):
    close(flow_edit(ShiftedMap(path), one(0.4, 3), **shifted(3), strength=1.0, generator=generator(1)), 1.4)


def test_flow_edit_to_the_same_condition_changes_nothing():
    cond = {"mean": torch.tensor([0.3, 0.3], dtype=F64)}
    for model in (ShiftedMap(), ShiftedField()):
        close(flow_edit(model, one(0.4, 2), cond, cond, steps=3, generator=generator(0)), 0.4)


def test_flow_edit_of_a_field_reads_like_its_formula():
    field, y = Labelled(eight_gaussians()), torch.tensor([[2.0, 0.1], [0.3, -2.0]], dtype=F64)
    source, target = {"turn": torch.zeros(2)}, {"turn": torch.full((2,), 1.5)}
    edited = flow_edit(field, y, source, target, 2, strength=0.8, generator=generator(2))
    z, draw = y, generator(2)
    for t, step in ((0.2, 0.4), (0.6, 0.4)):
        x = t * y + (1 - t) * normal(y, draw)
        z = z + step * (field(x + z - y, t, **target) - field(x, t, **source))
    close(edited, z)


def test_flow_edit_averages_over_the_noise():
    """Where the velocity is not linear the noise matters, and the mean of many draws is far nearer to that of more."""
    field, y = Labelled(eight_gaussians()), torch.tensor([[2.0, 0.1]] * 200, dtype=F64)
    told = {"source": {"turn": torch.zeros(200)}, "target": {"turn": torch.full((200,), 1.5)}}

    def spread(average: int) -> float:
        edited = flow_edit(field, y, **told, steps=2, strength=0.9, average=average, generator=generator(2))
        return float(edited.std(dim=0).mean())

    assert spread(16) < 0.5 * spread(1)


def test_flow_edit_that_only_samples_is_sdedit():
    told = shifted(4)
    for model in (ShiftedMap(), ShiftedField()):
        edited = flow_edit(
            model, one(0.4, 4), **told, steps=3, sampled=3, strength=0.6, generator=sample_generators(3, range(4))
        )
        other = sdedit(model, one(0.4, 4), 3, strength=0.6, generator=sample_generators(3, range(4)), **told["target"])
        close(edited, other, 0.0)


def test_flow_edit_samples_its_last_steps_from_where_it_stands():
    """By hand on a linear path: a step of the edit, then the target's map from ``z + x^src - y``."""
    model, told, y = ShiftedMap(), shifted(4), one(0.4, 4)
    edited = flow_edit(model, y, **told, steps=2, sampled=1, strength=0.5, generator=generator(4))
    noise, draw = [], generator(4)
    for _ in range(2):
        noise.append(normal(y, draw))
    x = 0.5 * y + 0.5 * noise[0]
    z = y + model(x, 0.5, 0.75, **told["target"]) - model(x, 0.5, 0.75, **told["source"])
    x = 0.75 * y + 0.25 * noise[1] + z - y
    close(edited, model(x, 0.75, 1.0, **told["target"]))


# SDEdit


@pytest.mark.parametrize("steps", [1, 3])
def test_sdedit_has_the_mean_and_the_variance_of_the_closed_form(steps):
    rows = 200_000
    edited = sdedit(
        ShiftedMap(), one(0.4, rows), steps, strength=1 - T0, generator=generator(5), mean=torch.ones(rows, dtype=F64)
    )
    assert float(edited.mean()) == pytest.approx(0.7316718, abs=4 * math.sqrt(0.2 / rows))
    assert float(edited.var()) == pytest.approx(0.2, rel=0.02)


def test_sdedit_of_full_strength_is_sampling():
    model, y = ShiftedMap(), one(7.0, 6)
    edited = sdedit(model, y, 2, strength=1.0, generator=generator(6), mean=torch.ones(6, dtype=F64))
    close(edited, sample(model, normal(y, generator(6)), 2, mean=torch.ones(6, dtype=F64)))


def test_each_sample_has_its_own_noise():
    model, y = ShiftedMap(), one(0.4, 4)
    whole = sdedit(model, y, generator=sample_generators(1, range(4)), mean=torch.ones(4, dtype=F64))
    part = sdedit(model, y[2:], generator=sample_generators(1, range(2, 4)), mean=torch.ones(2, dtype=F64))
    close(whole[2:], part, 0.0)
    assert len(whole.unique()) == 4


# Inversion


@pytest.mark.takes_seconds
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_a_field_is_solved_backwards(strength):
    field = gaussian()
    found = invert(field, one(1.8), 400, strength=strength)
    close(found.state, field.flow(one(1.8), 1.0, 1 - strength), 1e-5)
    assert strength < 1 or float(found.state) == pytest.approx(1.6, abs=1e-5)
    assert float(found.residual) < 1e-5
    close(resume(field, found.state, 400, strength=strength, solver="heun"), 1.8, 1e-5)


@pytest.mark.parametrize(("iterations", "error"), [(0, 0.2), (1, 0.1), (2, 0.05), (3, 0.025)])
def test_the_fixed_point_contracts_as_the_closed_form_says(iterations, error):
    """u(z, 0, 1) of N(1, .25) is 1 - z / 2: from z = 1.8 the error halves, and the residual is half of it."""
    model = ShiftedMap(is_two_way=False)
    found = invert(model, one(1.8), 1, iterations=iterations, mean=torch.ones(1, dtype=F64))
    assert abs(float(found.state) - 1.6) == pytest.approx(error, abs=1e-12)
    assert float(found.residual) == pytest.approx(error / 2, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_a_map_that_knows_the_way_back_is_asked_for_it(steps, strength):
    model = ShiftedMap()
    found = invert(model, one(1.8), steps, strength=strength, iterations=0, mean=torch.ones(1, dtype=F64))
    exact = model.field.centred.flow(one(0.8), 1.0, 1 - strength) + (1 - strength)
    close(found.state, exact)
    assert float(found.residual) < 1e-12
    assert model.calls == 4 * steps


def test_calls_are_as_the_page_says():
    model = FlowMap(MLP(2, width=8, times=2))
    with count_calls(model) as calls:
        invert(model, torch.randn(3, 2), 2, iterations=5)
    assert calls.count == 2 * (5 + 4)


def test_each_row_keeps_its_best_and_is_its_own():
    """A slope of 3 does not contract: the start is the best that there is, and rows beside it are as if alone."""

    class Steep(nn.Module):
        def forward(self, x, s, t):
            slope = torch.tensor([3.0, 0.5], dtype=x.dtype)[: len(x)][:, None]
            return (slope - 1) * x

    model = FlowMap(Steep())
    found = invert(model, one(1.0, 2), 1, iterations=40)
    assert float(found.state[1]) == pytest.approx(2.0, abs=1e-6)
    assert float(found.residual[0]) > 0.5
    assert float(found.residual[1]) < 1e-6
    alone = invert(model, one(1.0, 1), 1, iterations=40)
    close(alone.state, found.state[:1], 0.0)


def test_data_that_a_map_cannot_make_are_told_or_refused():
    class Flat(nn.Module):
        def forward(self, x, s, t):
            return -x  # X_{0,1} is 0 everywhere

    model = FlowMap(Flat())
    assert float(invert(model, one(0.7, 2), 1).residual[0]) == pytest.approx(0.7)
    with pytest.raises(ValueError, match=r"row 0 of the data is not inverted.*within 0\.7, and tolerance is 0\.1"):
        invert(model, one(0.7, 2), 1, tolerance=0.1)

    class Broken(nn.Module):
        def forward(self, x, s, t):
            return x * math.nan

    with pytest.raises(ValueError, match="is not inverted"):
        invert(FlowMap(Broken()), one(0.7, 2), 1, tolerance=10.0)


@pytest.mark.takes_seconds
def test_images_conditions_and_guidance_go_through():
    torch.manual_seed(0)
    field = Guided(NetworkField(MLP(2, width=8, classes=4)), 2.0, null={"class_labels": 3})
    labels, y = torch.arange(3), torch.randn(3, 2)
    told = {"class_labels": labels, "guidance": torch.ones(3)}
    found = invert(field, y, 200, **told)
    assert float(found.residual.max()) < 1e-3
    plain = invert(field.field, y, 200, class_labels=labels)
    close(found.state, plain.state, 1e-5)
    assert found.state.dtype == torch.float32
    edited = flow_edit(field, y, told, {"class_labels": (labels + 1) % 3, "guidance": torch.full((3,), 4.0)}, steps=2)
    assert edited.shape == y.shape
    assert not edited.requires_grad


def test_a_guided_map_is_told_its_strength_where_nothing_is_said():
    seen = []

    class Net(nn.Module):
        def forward(self, x, s, t, guidance=None):
            seen.append(guidance)
            return torch.zeros_like(x)

    model = FlowMap(Net())
    model.guidance = 3.0
    y = torch.randn(2, 1, 4, 4)
    invert(model, y, 1, iterations=0)
    sdedit(model, y)
    flow_edit(model, y, {}, {"guidance": torch.full((2,), 5.0)})
    assert [float(w[0]) for w in seen] == [3.0] * 4 + [3.0] + [5.0, 3.0]


class Labelled(VelocityField):
    """A field turned by an angle (B,): for a velocity that is not linear."""

    def __init__(self, field):
        super().__init__()
        self.field, self.path = field, field.path

    def forward(self, x, t, *, turn, **cond):
        c, s = turn.to(x).cos(), turn.to(x).sin()
        there = torch.stack([torch.stack([c, s]), torch.stack([-s, c])]).movedim(-1, 0)
        return (self.field((x[:, None] @ there.mT)[:, 0], t)[:, None] @ there)[:, 0]


# RF inversion


def test_control_of_one_arrives_and_none_is_the_field():
    field = gaussian()
    y, y0 = one(1.8), one(-0.3)
    close(invert(Controlled(field, 1.0, noise=y0), y, 50, solver="euler").state, y0, 1e-12)
    close(sample(Controlled(field, 1.0, data=y), one(0.3), 50), y, 1e-12)
    close(sample(Controlled(field, 0.0, data=y), one(0.3), 50), sample(field, one(0.3), 50), 0.0)
    close(sample(Controlled(field, 0.9, data=y, interval=(0, 0)), one(0.3), 50), sample(field, one(0.3), 50), 0.0)


@pytest.mark.parametrize("path", [Linear(), Trigonometric()], ids=["linear", "trigonometric"])
def test_control_is_the_conditional_velocity_of_any_path(path):
    field = gaussian(path)
    y, y0 = one(1.8), one(-0.3)
    x, wanted = path.sample(y0, y, 0.3)
    close(Controlled(field, 1.0, data=y)(x, 0.3), wanted)
    close(Controlled(field, 1.0, noise=y0)(x, 0.3), wanted)


def test_controlled_sampling_has_the_value_of_the_closed_form():
    """eta = .9 on [0, .25] from z = .3 under N(1, .25), towards y = 1.8; the limit of many steps."""
    field = Controlled(
        gaussian(),
        0.9,
        data=one(1.8),
        interval=(0, 0.25),
    )
    assert float(sample(field, one(0.3), 400, solver="midpoint")) == pytest.approx(1.266637, abs=1e-5)


@pytest.mark.takes_seconds
def test_controlled_inversion_ends_at_the_noise_as_its_steps_get_finer():
    """Of N(0, C) and y0 = 0, ``x_t = y (C_t / C)^((1 - gamma) / 2) t^gamma``: to 0 for any gamma > 0. So the result
    hangs on N, and on nothing else."""
    gamma, field = 0.5, ShiftedField().centred
    control = Controlled(field, gamma, noise=one(0.0))
    for t in (1e-2, 1e-4, 1e-6):
        grid = torch.logspace(0, math.log10(t), 300, dtype=F64)
        c_t = t * t * C + (1 - t) ** 2
        wanted = 1.8 * (c_t / C) ** ((1 - gamma) / 2) * t**gamma
        assert float(integrate(control, one(1.8), grid, "midpoint")) == pytest.approx(wanted, rel=1e-3)
    control_to = Controlled(gaussian(), gamma, noise=one(0.3))
    for t, left in ((1e-2, 0.107), (1e-4, 0.0101), (1e-6, 0.0010)):
        grid = torch.logspace(0, math.log10(t), 300, dtype=F64)
        assert float(integrate(control_to, one(1.8), grid, "midpoint")) - 0.3 == pytest.approx(left, rel=0.02)
    ends = [float(invert(control, one(1.8), steps, solver="euler").state) for steps in (4, 28, 200)]
    assert ends[0] > 1.5 * ends[1] > 1.5 * 1.5 * ends[2] > 0


def test_the_residual_of_a_controlled_inversion_is_that_of_the_field_itself():
    field = gaussian()
    found = invert(Controlled(field, 1.0, noise=one(-0.3)), one(1.8), 100, solver="midpoint")
    assert invert(Controlled(field, 0.5, noise=one(-0.3)), one(1.8), 4, solver="heun").state.isfinite().all()
    assert float(found.residual) == pytest.approx(abs(float(field.flow(one(-0.3), 0.0, 1.0)) - 1.8), abs=1e-3)


@pytest.mark.takes_seconds
def test_control_goes_with_the_field_to_another_path():
    field = gaussian(Trigonometric())
    control = Controlled(field, 0.7, data=one(1.8), interval=(0, 0.5))
    fine = sample(control, one(0.3), 400, solver="midpoint")
    close(sample(control.on(Linear()), one(0.3), 400, solver="midpoint"), fine, 1e-4)
    assert control.on(Linear()).interval == pytest.approx((0, 0.5))
    assert Controlled(field, 0.7, data=one(1.8), interval=(0, 0.25)).on(Linear()).interval[1] == pytest.approx(
        math.tan(math.pi / 8) / (1 + math.tan(math.pi / 8))
    )


# What is refused


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sdedit(ShiftedMap(), one(0.4), strength=0.0), "strength is 0.0: above 0"),
        (lambda: sdedit(ShiftedMap(), one(0.4), strength=math.nan), "strength is nan"),
        (lambda: sdedit(ShiftedMap(), one(math.nan)), "not finite"),
        (lambda: sdedit(ShiftedMap(), torch.zeros(1, 1, dtype=torch.uint8)), "of type torch.uint8"),
        (lambda: sdedit(ShiftedMap(), one(0.4), 0), "steps is 0"),
        (lambda: sdedit(ShiftedMap(), one(0.4), solver="heun"), "a flow map takes its steps itself"),
        (lambda: sdedit(ShiftedField(), one(0.4), gamma=0.5), "re-noises between the steps of a flow map"),
        (lambda: sdedit(nn.Linear(2, 2), one(0.4)), "takes a FlowMap or a VelocityField"),
        (lambda: resume(ShiftedMap(), one(math.inf)), "not finite"),
        (lambda: flow_edit(ShiftedMap(), one(0.4), {}, {}, average=0), "average is 0"),
        (lambda: flow_edit(ShiftedMap(), one(0.4), {}, {}, sampled=2), "0 to the 1 steps"),
        (lambda: invert(ShiftedMap(), one(0.4), iterations=-1), "iterations is -1"),
        (lambda: invert(ShiftedMap(), one(0.4), tolerance=math.nan), "tolerance nan"),
        (lambda: Controlled(ShiftedField(), 0.5), "give one of them"),
        (lambda: Controlled(ShiftedField(), 0.5, data=one(1), noise=one(1)), "give one of them"),
        (lambda: Controlled(ShiftedField(), 1.5, data=one(1)), "strength of control is 1.5"),
        (lambda: Controlled(ShiftedField(), 0.5, data=one(1), interval=(0.5, 0.2)), "not within"),
        (lambda: Controlled(ShiftedMap(), 0.5, data=one(1)), "a field is controlled"),
        (lambda: Controlled(ShiftedField(), 0.5, data=one(1, 2))(one(1, 3), 0.5, mean=0), "2 rows of data"),
    ],
)
def test_refusals_are_a_line(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_a_map_that_only_knows_the_way_to_data_is_not_asked_to_stop_between():
    model = ShiftedMap()
    model.gamma = 1.0
    for call in (lambda: invert(model, one(0.4), 2), lambda: flow_edit(model, one(0.4), {}, {}, 2)):
        with pytest.raises(ValueError, match="only knows the way to t = 1"):
            call()
    sdedit(model, one(0.4), 2, mean=torch.ones(1, dtype=F64), generator=generator(0))
    close(flow_edit(model, one(0.4), **BY, strength=0.5), 0.9527864045000421)


def test_the_names_are_public():
    assert fewstep.invert is invert
    assert (fewstep.flow_edit, fewstep.sdedit, fewstep.resume, fewstep.Controlled) == (
        flow_edit,
        sdedit,
        resume,
        Controlled,
    )


@pytest.mark.takes_seconds
def test_exact_fields_of_points_are_inverted():
    for field in (CheckerboardField(), eight_gaussians().on(Trigonometric())):
        y = field.data(6, generator(7)).to(F64)
        found = invert(field, y, 100, strength=0.9)
        assert float(found.residual.max()) < 2e-2
