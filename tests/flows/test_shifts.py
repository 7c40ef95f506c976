"""Where pipelines of flow-match models take their steps, by the number of tokens: the noise levels of diffusers' own
scheduler, and training times that follow them."""

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from toys.exports import pipeline, speak
from toys.families import MODELS, tiny_model
from toys.families import conditions as family_conditions

import fewstep
from fewstep.common.randomness import generator
from fewstep.data import ArrayData
from fewstep.flows.description import describe, made_again
from fewstep.flows.editing import resume
from fewstep.flows.fields import DiffusionField
from fewstep.flows.interpolants import DenoisedField, Interpolant
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import check_options
from fewstep.flows.shifts import Shift, shift_of
from fewstep.flows.times import draw_pairs, draw_times
from fewstep.models.diffusers_configs import find_scheduler
from fewstep.models.stock_steps import scheduler_of
from fewstep.networks import FAMILIES, MLP
from fewstep.objectives.finishing import Made, rollout
from fewstep.objectives.native import moved_natively
from fewstep.runs.objective import grid_of
from fewstep.runs.recipe import Recipe

NO_REWARD = fewstep.Reward(lambda x: x.flatten(1).sum(1) * 0)
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
        assert student.shift is not None
        assert student.shift.tokens(shape) == tokens
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
        fewstep.StochasticInterpolant(times="native normal")
    between = DenoisedField(MLP(2), MLP(2), Interpolant(latent="sine"))
    with pytest.raises(ValueError, match="native moves times as the flow-match scheduler"):
        fewstep.StochasticInterpolant(times="native").check_student(between)
    with pytest.raises(ValueError, match="native moves times as the flow-match scheduler"):
        fewstep.Corrected(fewstep.PSD(teacher), times="native").check_student(student)


# The schedulers of Sana, of Wan, and others that have such a shift, as published: factor, levels before it.
FLOW_SIGMAS: dict[str, dict[str, Any]] = {
    "DPMSolverMultistepScheduler": {"flow_shift": 3.0},
    "UniPCMultistepScheduler": {"flow_shift": 5.0},
    "DPMSolverSinglestepScheduler": {"flow_shift": 3.0, "solver_order": 1},
    "DEISMultistepScheduler": {"flow_shift": 7.0, "num_train_timesteps": 500},
    "SASolverScheduler": {"flow_shift": 2.0},
}


@pytest.mark.parametrize("name", FLOW_SIGMAS)
@pytest.mark.parametrize("steps", [2, 4, 20])
def test_steps_by_flow_sigmas(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = getattr(diffusers, name)
    scheduler = made(**FLOW_SIGMAS[name], use_flow_sigmas=True, prediction_type="flow_prediction")
    for network in (None, FAMILIES["SanaTransformer2DModel"](tiny_model("sana"))):
        shift = shift_of(scheduler, network)
        assert shift is not None
        found = shift.grid(steps, 1024)
        with monkeypatch.context() as patch:
            patch.setattr(np, "float32", np.float64)  # which it rounds to at its end
            scheduler.set_timesteps(steps)
        assert scheduler.sigmas.dtype == torch.float64
        # It keeps away from pure noise, where samples begin, and some from the data, where they end.
        torch.testing.assert_close(1 - found[1:-1], scheduler.sigmas[1:-1], atol=1e-12, rtol=0)
        assert (found[0], found[-1]) == (0, 1)
        assert 0.999 < scheduler.sigmas[0] < 1
    karras = made(use_flow_sigmas=True, prediction_type="flow_prediction", use_karras_sigmas=True)
    assert shift_of(karras) is None
    assert shift_of(made(flow_shift=3.0)) is None  # of a diffusion model


def test_the_schedulers_of_flow_maps_and_of_consistency_models() -> None:
    euler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    euler.set_timesteps(4)
    sana = FAMILIES["SanaTransformer2DModel"](tiny_model("sana"))  # whose pipeline leaves steps to the scheduler
    lcm: Any = diffusers.FlowMatchLCMScheduler(shift=5.0)
    lcm.set_timesteps(4)
    anyflow: Any = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
    anyflow.set_timesteps(4)
    for scheduler, network in ((euler, sana), (lcm, sana), (anyflow, None)):
        shift = shift_of(scheduler, network)
        assert shift is not None
        torch.testing.assert_close(shift.grid(4, 16), 1 - scheduler.sigmas.double(), atol=2e-7, rtol=0)


def test_times_move_by_the_ratio_on_any_path() -> None:
    model = field("sd3", shift=3.0)
    curved: Any = FlowMap.from_field(model.on(fewstep.Trigonometric()))
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    moved = moved_natively("native", curved, t, torch.zeros(9, 4, 8, 8))
    path = fewstep.Trigonometric()
    assert (moved[0], moved[-1]) == (0, 1)
    ratios = [path.sigma(times[1:-1]) / path.alpha(times[1:-1]) for times in (moved, t)]
    torch.testing.assert_close(ratios[0], 3 * ratios[1], atol=0, rtol=1e-12)
    assert moved_natively("native", curved, torch.ones(3), torch.zeros(3, 4, 8, 8)).tolist() == [1, 1, 1]


def test_the_corrector_compares_at_native_times() -> None:
    teacher = field("sd3", shift=3.0)
    seen: list[torch.Tensor] = []

    def times_of(objective: Any) -> torch.Tensor:
        student = FlowMap.from_field(teacher)
        objective.check_student(student)
        objective.adopt(student)
        seen.clear()
        forward = student.path.sample
        object.__setattr__(student, "path", Watched(forward, seen))
        x = torch.randn(8, 4, 8, 8, generator=generator(1))
        cond = {"encoder_hidden_states": torch.randn(8, 8, 32), "pooled_projections": torch.randn(8, 32)}
        objective.judged(student, Made(x, x, x, cond, generator(3)))
        return seen[0]

    plain, native = (times_of(fewstep.Corrected(fewstep.PSD(teacher), times=t)) for t in ("uniform", "native"))
    inner = [(r - 0.02) / 0.96 for r in (plain, native)]
    torch.testing.assert_close(inner[1], inner[0] / (inner[0] + 3 * (1 - inner[0])))


class Watched(fewstep.Linear):
    """The path, which notes the times that samples are noised to."""

    def __init__(self, sample: Any, seen: list[torch.Tensor]) -> None:
        object.__setattr__(self, "seen", seen)

    def sample(self, noise: Any, data: Any, t: Any, latent: Any = None) -> Any:
        self.seen.append(t)  # pyright: ignore[reportAttributeAccessIssue]
        return super().sample(noise, data, t, latent)


def test_a_map_that_was_trained_at_native_times_takes_native_steps() -> None:
    teacher = field("flux", **PUBLISHED["flux"])
    student = FlowMap.from_field(teacher)
    cond, noise = conditions(2), torch.randn(2, 4, 16, 24, generator=generator(1))
    uniform, native = (fewstep.sample(student, noise, 3, grid=grid, **cond) for grid in ("uniform", "native"))
    assert (uniform - native).abs().max() > 1e-3
    for times, grid in (("native calls(0.5)", "native"), ("uniform", "uniform")):
        fewstep.Corrected(fewstep.ITVM(teacher, times=times)).adopt(student)
        assert student.grid == grid
        wanted = native if grid == "native" else uniform
        assert torch.equal(fewstep.sample(student, noise, 3, **cond), wanted)
        torch.testing.assert_close(rollout(student, noise, 3, generator(0), **cond), wanted)
        assert torch.equal(fewstep.steer(student, noise, 3, NO_REWARD, gamma=0, **cond).x, wanted)
        assert torch.equal(resume(student, noise, 3, **cond), wanted)
    # Where lengths are its own, that of its diagonal alone is moved.
    fewstep.Shortcut(teacher, times="native").adopt(student)
    assert student.grid == "uniform"


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", ["flux", "lumina2"])  # tokens, and channels for tokens
def test_an_export_draws_at_native_times_too(name: str, tmp_path: Path) -> None:
    kind = FAMILIES[MODELS[name][0]](tiny_model(name))
    student: Any = FlowMap.from_field(DiffusionField(kind, FlowMatchEulerDiscreteScheduler(**PUBLISHED["qwenimage"])))
    student.grid = "native"
    folder = fewstep.export(speak(student), tmp_path / "fast")
    back: Any = fewstep.load(folder)
    assert (back.grid, back.shift) == ("native", student.shift)
    noise, cond = torch.randn(2, 4, 8, 16, generator=generator(1)), family_conditions(name)
    options = {"latents": noise, "num_inference_steps": 3, "output_type": "latent", **cond}
    drawn = {grid: fewstep.sample(student, noise, 3, grid=grid, **cond) for grid in ("uniform", "native")}
    assert (drawn["uniform"] - drawn["native"]).abs().max() > 1e-3
    pipe = pipeline(folder)
    for grid, wanted in {None: drawn["native"], **drawn}.items():
        assert torch.equal(fewstep.sample(back, noise, 3, grid=grid, **cond), wanted)
        torch.testing.assert_close(pipe(grid=grid, **options).images, wanted, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="grid is 'natve'"):
        pipe(grid="natve", **options)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "shift": None}))
    with pytest.raises(ValueError, match="the scheduler of this model moves no times: grid='uniform'"):
        pipeline(folder)(**options)
    (folder / "model_index.json").write_text(json.dumps({**index, "shift": {**index["shift"], "factor": "three"}}))
    with pytest.raises(ValueError, match=r"shift\.factor"):
        fewstep.load(folder)


def test_stock_schedulers_of_exports_move_times_alike(tmp_path: Path) -> None:
    model = field("flux", **PUBLISHED["flux"])
    again = model.on(fewstep.Trigonometric()).on(fewstep.Linear())  # by a field that has no scheduler
    fewstep.export(again, tmp_path / "field")
    assert shift_of(find_scheduler(tmp_path / "field"), model.network) == model.shift
    student = FlowMap.from_field(model, second_time="none")
    for grid in ("uniform", "native"):
        student.grid = grid
        shift = shift_of(scheduler_of(student), model.network)
        assert shift is not None
        assert (shift.line is not None) == (grid == "native")
    assert shift == model.shift


@pytest.mark.parametrize(
    ("objective", "grid"),
    [
        ({"name": "ITVM", "times": "native"}, "native"),
        ({"name": "Corrected", "times": "native", "base": {"name": "PSD", "times": "native logit-normal"}}, "native"),
        ({"name": "Corrected", "times": "native", "base": "ITVM"}, "uniform"),
        ({"name": "PFMM", "times": "native"}, "uniform"),
    ],
)
def test_a_run_knows_where_its_student_takes_steps(objective: dict[str, Any], grid: str) -> None:
    recipe = Recipe.model_validate({"name": "x", "teacher": "./flux", "data": "./photos", "objective": objective})
    assert grid_of(recipe) == grid


def test_a_description_has_the_shift_and_the_grid() -> None:
    student: Any = FlowMap.from_field(field("flux", **PUBLISHED["flux"]))
    student.grid = "native"
    again: Any = made_again(json.loads(json.dumps(describe(student))))
    assert (again.grid, again.shift) == ("native", student.shift)
    with pytest.raises(ValueError, match="grid"):
        made_again({**describe(student), "grid": "natve"})
