"""Where pipelines of flow-match models take their steps, by the number of tokens: the noise levels of diffusers' own
scheduler, and training times that follow them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from toys.families import tiny_model

import fewstep
from fewstep.common.randomness import generator
from fewstep.data import ArrayData
from fewstep.flows.fields import DiffusionField
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import check_options
from fewstep.flows.shifts import Shift, shift_of
from fewstep.flows.signature import token_count
from fewstep.flows.times import draw_pairs, draw_times
from fewstep.networks import FAMILIES
from fewstep.objectives.base import moved_natively

# As the published folders have them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "flux": {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    "qwenimage": {
        "shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192,
        "shift_terminal": 0.02, "time_shift_type": "exponential",
    },
    "ltx": {
        "shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
        "max_image_seq_len": 4096, "shift_terminal": 0.1,
    },
    "lumina2": {"shift": 6.0, "use_dynamic_shifting": False},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 1.5, "max_shift": 4.0},
}  # fmt: skip


def shift_as(config: dict[str, Any]) -> Shift:
    """Of Flux's network, whatever the scheduler says."""
    found = shift_of(FlowMatchEulerDiscreteScheduler(**config), FAMILIES["FluxTransformer2DModel"](tiny_model("flux")))
    assert found is not None
    return found


def mu_of(said: Any, tokens: int) -> float:
    """As ``calculate_shift`` of the pipelines."""
    slope = (said.max_shift - said.base_shift) / (said.max_image_seq_len - said.base_image_seq_len)
    return tokens * slope + said.base_shift - slope * said.base_image_seq_len


def stock(config: dict[str, Any], steps: int, tokens: int) -> torch.Tensor:
    """1 - sigma of a scheduler, told as the pipelines tell it; it computes in float32."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**config)
    mu = mu_of(scheduler.config, tokens) if scheduler.config.use_dynamic_shifting else None
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return 1 - scheduler.sigmas.double()


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("tokens", [256, 1024, 4096, 9000])
def test_steps_are_those_of_the_stock_scheduler(name: str, tokens: int) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**PUBLISHED[name])
    shift = shift_as(PUBLISHED[name])
    for steps in (2, 4, 28):
        found = shift.grid(steps, tokens)
        # Its own functions in float64, and all of it in float32, whose last step magnifies what it rounds.
        sigmas = np.linspace(1.0, 1 / steps, steps)
        if scheduler.config.use_dynamic_shifting:
            sigmas = scheduler.time_shift(mu_of(scheduler.config, tokens), 1.0, sigmas)
        else:
            sigmas = scheduler.shift * sigmas / (1 + (scheduler.shift - 1) * sigmas)
        if scheduler.config.shift_terminal:
            sigmas = scheduler.stretch_shift_to_terminal(torch.from_numpy(sigmas)).numpy()
        np.testing.assert_allclose(1 - found.numpy()[:-1], sigmas, atol=1e-12)
        torch.testing.assert_close(found, stock(PUBLISHED[name], steps, tokens), atol=5e-7, rtol=0)
        assert (found[0], found[-1]) == (0, 1)
    assert shift.grid(1, tokens).tolist() == [0, 1]


@pytest.mark.parametrize("config", [PUBLISHED["flux"], PUBLISHED["linear"], PUBLISHED["lumina2"]])
def test_training_times_move_as_the_steps_do(config: dict[str, Any]) -> None:
    shift = shift_as(config)
    t = torch.linspace(0, 1, 29, dtype=torch.float64)
    torch.testing.assert_close(shift.moved(t, 1024), shift.grid(28, 1024), atol=1e-12, rtol=0)
    # Of the exponential kind a logit-normal time is one again, its mean less mu: larger images have noisier times.
    if shift.line is not None and shift.kind == "exponential":
        mu = math.log(shift.strength(1024))
        u = torch.rand(1000, dtype=torch.float64, generator=generator(0))
        torch.testing.assert_close(torch.logit(shift.moved(u, 1024)), torch.logit(u) - mu, atol=1e-9, rtol=0)
        assert (shift.moved(u, 4096) < shift.moved(u, 1024)).all()


def test_flux2_has_a_rule_of_its_own() -> None:
    network = FAMILIES["Flux2Transformer2DModel"](tiny_model("flux2"))
    shift = shift_of(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), network)
    assert shift is not None
    for tokens in (1024, 4096, 6000):
        for steps in (4, 28, 50):
            mu = compute_empirical_mu(tokens, steps)
            assert shift.strength(tokens, steps) == pytest.approx(math.exp(mu), abs=0, rel=1e-12)
    field = DiffusionField(network, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(ValueError, match="those of a number of steps for Flux"):
        fewstep.FlowMatching("native").check_student(field)


def test_schedulers_without_a_shift() -> None:
    assert shift_of(DDIMScheduler()) is None
    for odd in ("use_karras_sigmas", "use_exponential_sigmas", "invert_sigmas"):
        assert shift_of(FlowMatchEulerDiscreteScheduler(**{odd: True})) is None
    # Tokens of a network that nothing is known of cannot be counted.
    assert shift_of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), torch.nn.Linear(2, 2)) is None
    found = shift_of(FlowMatchEulerDiscreteScheduler(shift=3.0), torch.nn.Linear(2, 2))
    assert found is not None
    assert found.factor == 3


def field(name: str, **config: Any) -> Any:
    kind, model = {"flux": "FluxTransformer2DModel", "sd3": "SD3Transformer2DModel"}[name], tiny_model(name)
    return DiffusionField(FAMILIES[kind](model), FlowMatchEulerDiscreteScheduler(**config))


def test_the_grid_of_a_model_follows_its_noise() -> None:
    model = field("flux", **PUBLISHED["flux"])
    student = FlowMap.from_field(model)
    for shape in ((4, 8, 8), (4, 64, 96)):
        tokens = shape[1] * shape[2] // 4
        assert token_count(student, shape) == tokens
        times = check_options(student, 4, grid="native", shape=shape)
        torch.testing.assert_close(times, stock(PUBLISHED["flux"], 4, tokens), atol=1e-7, rtol=0)
    small, large = (check_options(model, 4, grid="native", shape=(4, side, side)) for side in (8, 128))
    assert (large[1:-1] < small[1:-1]).all()
    with pytest.raises(ValueError, match="steps is 0"):
        check_options(model, 0, grid="native")
    assert model.on(fewstep.Trigonometric()).shift == model.shift
    uneven = check_options(model.on(fewstep.Trigonometric()), 4, grid="native", shape=(4, 8, 8))
    alpha, sigma = (f(uneven) for f in (fewstep.Trigonometric().alpha, fewstep.Trigonometric().sigma))
    torch.testing.assert_close(alpha / (alpha + sigma), small, atol=1e-9, rtol=0)


def test_the_steps_that_sd3_leaves_to_its_scheduler() -> None:
    model = field("sd3", shift=3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for steps in (1, 4, 28):
        scheduler.set_timesteps(steps)
        found = check_options(model, steps, grid="native", shape=(4, 8, 8))
        torch.testing.assert_close(found, 1 - scheduler.sigmas.double(), atol=2e-7, rtol=0)


def test_native_before_a_distribution() -> None:
    plain, native = (draw_times(64, generator(1), name) for name in ("logit-normal", "native logit-normal"))
    assert torch.equal(plain, native)  # the draw is the same, and objectives move it
    assert torch.equal(draw_times(8, generator(1), "native"), draw_times(8, generator(1)))
    for one, other in zip(
        draw_pairs(8, generator(2), "native calls(0.5)", 0.1),
        draw_pairs(8, generator(2), "calls(0.5)", 0.1),
        strict=True,
    ):
        assert torch.equal(one, other)
    model = FlowMap.from_field(field("flux", **PUBLISHED["flux"]))
    small, large = (torch.zeros(64, 4, side, side) for side in (8, 64))
    assert moved_natively("logit-normal", model, plain, large) is plain
    moved = [moved_natively("native logit-normal", model, plain, rows) for rows in (small, large)]
    assert (moved[1] < moved[0]).all()
    assert (moved[0] < plain).all()


OPTIONS: dict[str, Any] = {"LMD": {}, "PSD": {}, "ITVM": {}, "ConsistencyDistillation": {}, "Shortcut": {}, "PFMM": {}}


@pytest.mark.parametrize("name", OPTIONS)
def test_objectives_train_at_times_of_the_tokens(name: str) -> None:
    """The rows of a batch see the times that they would see, moved; ends stay ends, and s <= t."""
    teacher = field("flux", **PUBLISHED["flux"])
    student = FlowMap.from_field(teacher)
    make = getattr(fewstep, name)

    def seen(times: str, side: int) -> dict[str, torch.Tensor]:
        objective = make(teacher, times=times)
        objective.check_student(student)
        if objective.ema is not None:
            target: Any = FlowMap.from_field(teacher)
        rows = ArrayData(torch.randn(16, 4, side, side, generator=generator(3)), conditions(16))
        batch = rows.rows(torch.arange(16), generator(0))
        objective.adopt(student)
        with torch.no_grad() if name != "LMD" else torch.enable_grad():
            loss = objective(student, batch, target=None if objective.ema is None else target, generator=generator(4))
        assert torch.isfinite(loss.total)
        return loss.times

    for side in (8, 16):
        plain, native = seen("uniform", side), seen("native", side)
        for term, pairs in plain.items():
            assert (native[term][:, 0] <= native[term][:, 1] + 1e-6).all()
            if name in ("Shortcut", "PFMM") and term != "tangent":  # whose lengths are their own
                assert torch.equal(native[term], pairs)
                continue
            torch.testing.assert_close(native[term], teacher.shift.moved(pairs, side * side // 4), atol=1e-5, rtol=0)


def conditions(rows: int) -> dict[str, torch.Tensor]:
    draw = generator(5)
    return {
        "encoder_hidden_states": torch.randn(rows, 8, 32, generator=draw),
        "pooled_projections": torch.randn(rows, 16, generator=draw),
    }


def test_native_times_are_for_models_with_such_a_scheduler() -> None:
    teacher = DiffusionField(FAMILIES["UNet2DConditionModel"](tiny_model("sd")), DDIMScheduler())
    student = FlowMap.from_field(teacher)
    for objective in (fewstep.PSD(teacher, times="native"), fewstep.FlowMatching("native logit-normal")):
        with pytest.raises(ValueError, match="native moves times as the flow-match scheduler"):
            objective.check_student(student)
    with pytest.raises(ValueError, match="distribution of times"):
        fewstep.PSD(teacher, times="native normal")
    with pytest.raises(ValueError, match="distribution of times"):
        fewstep.StochasticInterpolant(times="native")
