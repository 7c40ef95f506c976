"""A user's code that touches every public name; pyright reads it in strict mode (test_user_code.py), nobody runs it.

What is assigned to an annotated name says what a user may count on.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fewstep
from fewstep.data import ArrayData
from fewstep.networks import MLP, ParallelTimes
from fewstep.training.run import Run


def fields_and_paths(network: nn.Module, scheduler: object, x: Tensor, t: Tensor) -> Tensor:
    paths = [fewstep.Linear(), fewstep.Trigonometric(), fewstep.VariancePreserving(beta_max=12.0)]
    table = fewstep.Tabulated((1.0, 0.0, -1.0))
    alpha: Tensor = paths[0].alpha(t)
    x_t, dx_t = paths[1].sample(x, x, t)
    velocity: Tensor = table.to_velocity(x, x_t, t, "noise")

    own: fewstep.VelocityField = fewstep.NetworkField(network, path=fewstep.Linear())
    diffusion = fewstep.DiffusionField(network, scheduler)
    gaussian = fewstep.GaussianField(torch.zeros(2), torch.eye(2))
    mixture = fewstep.MixtureField(torch.zeros(3, 2), torch.ones(3), torch.ones(3) / 3)
    board = fewstep.CheckerboardField()
    formula = fewstep.PSDField.fitted(lambda x: x.square().sum(1), x, x, eta=2.0, ridge=1e-6)
    logs: Tensor = formula.log_prob(x) + formula.mass(x, x) + formula.normalizer + formula.covariance.sum()
    guided = fewstep.Guided(own, 2.0, (0.1, 0.9), null={"label": torch.tensor(10)})
    recentred = fewstep.Recentred(own, 0.05, x)
    total = logs.sum() + alpha.sum() + dx_t.sum() + velocity.sum()
    for field in (own, diffusion, gaussian, mixture, board, formula, guided, recentred):
        moved: fewstep.VelocityField = field.on(fewstep.Trigonometric())
        total = total + moved(x, t).sum() + field.velocity(x, 0.5).sum() + field.score(x, t).sum()
    return total


def maps(field: fewstep.VelocityField, network: nn.Module, x: Tensor) -> Tensor:
    student: fewstep.FlowMap = fewstep.FlowMap.from_field(field, network)
    average: Tensor = student.average_velocity(x, 0.0, 1.0)
    jumped: Tensor = student(x, 0.0, 1.0)
    here: Tensor = student.velocity(x, 0.5)
    again: Tensor = fewstep.FlowMap(network)(x, 0.2, 0.4)
    generator = torch.Generator().manual_seed(0)
    few: Tensor = fewstep.sample(student, x, steps=4, gamma=0.5, generator=generator)
    many: Tensor = fewstep.sample(field, x, 100, solver="heun", label=torch.zeros(len(x)))
    grid: Tensor = fewstep.optimal_grid(student, field, x, steps=4, candidates=12, cost="local")
    steps: int = fewstep.step_errors(student, student, x, grid, label=torch.zeros(len(x))).steps_within(0.1)
    along: Tensor = fewstep.sample(student, x, steps, grid=grid)
    shape: dict[str, float] = fewstep.geometry(student, x, field, times=24, label=torch.zeros(len(x))).summary()
    print(shape["slope"])
    enough = fewstep.sample_adaptive(student, x, tolerance=0.02)
    counts: Tensor = enough.steps + enough.tried
    return average + jumped + here + again + few + many + along + enough.samples + counts.sum()


def editing(student: fewstep.FlowMap, field: fewstep.VelocityField, x: Tensor) -> Tensor:
    state, residual = fewstep.invert(student, x, 4, strength=0.8, tolerance=0.5, label=torch.zeros(len(x)))
    again: Tensor = fewstep.resume(student, state, 4, strength=0.8, label=torch.ones(len(x)))
    generator = torch.Generator().manual_seed(0)
    noised: Tensor = fewstep.sdedit(student, x, 2, strength=0.5, generator=generator, label=torch.ones(len(x)))
    source, target = {"label": torch.zeros(len(x))}, {"label": torch.ones(len(x))}
    edited: Tensor = fewstep.flow_edit(field, x, source, target, 28, average=2, generator=generator)
    control: fewstep.VelocityField = fewstep.Controlled(field, 0.9, data=x, interval=(0, 0.25))
    drawn: Tensor = fewstep.sample(control, state, 28)
    losses: Tensor = fewstep.rfds(field, x, generator=generator) + fewstep.rfds_rev(student, x, generator=generator)
    return again + noised + edited + drawn + residual.sum() + losses + fewstep.irfds(field, x, state)


def steering(student: fewstep.FlowMap, field: fewstep.VelocityField, x: Tensor) -> Tensor:
    def bright(images: Tensor, label: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3)) + label

    reward = fewstep.Reward(bright, lambda t: t**2, gradient=True, strength=20.0)
    generators = [torch.Generator().manual_seed(i) for i in range(len(x))]
    particles: fewstep.Particles = fewstep.steer(student, x, 4, reward, groups=2, generator=generators, label=x[:, 0])
    images: Tensor = particles.draw(torch.Generator())
    guided = fewstep.Guided(field, 2.0, null={"label": torch.tensor(10)})
    mixed = fewstep.steer(guided, x, 100, fewstep.Mixed.of(guided), eps=lambda t: 1 - t, ess=0.8)
    product = fewstep.steer(field, x, 100, fewstep.Mixed({field: 1.0, guided: 1}, scale=0.5))
    climbed = fewstep.steer(student, x, 4, fewstep.Reward(bright), groups=len(x), greedy=True)
    kept: Tensor = mixed.mean(mixed.x) + product.log_normalizer + mixed.ess[-1] + mixed.unique
    return images + kept + climbed.x + particles.x[particles.ancestors] * particles.log_weights.exp()


def blocks(network: nn.Module, x: Tensor) -> Tensor:
    block = fewstep.NetworkField(network, fewstep.Interpolant())
    chain: fewstep.Chained = fewstep.fit_blocks(block, x, 100, ou_times=(0.1, 0.2), out="runs/local", batch=64).ema
    other = fewstep.Chained([block, block], edges=(0.0, 0.3, 1.0))
    return fewstep.sample(chain, x, 6, solver="midpoint") + other(x, 0.5)


def all_times(x: Tensor) -> Tensor:
    network = ParallelTimes(MLP(2, times=2), [0.5, 1.0], modes=1)
    student = fewstep.FlowMap(network)
    fewstep.fit(student, fewstep.Trajectory(diagonal=0.0, parallel=True), x, 10)
    return fewstep.sample(student, x, 1)


def clusters(field: fewstep.VelocityField) -> Tensor:
    found = fewstep.cluster(field, fewstep.load_data("digits"), 10, at=0.9, layer="mid_block")
    print(found.layer, found.agreement, found.sizes.sum())
    labels: Tensor = found.labels
    return labels


def objectives(teacher: fewstep.VelocityField) -> dict[str, nn.Module]:
    with_teacher: list[Callable[[fewstep.VelocityField], nn.Module]] = [
        fewstep.AYF,
        fewstep.CTM,
        fewstep.ConsistencyDistillation,
        fewstep.EMD,
        fewstep.ITVM,
        fewstep.LMD,
        fewstep.PFMM,
        fewstep.AlphaFlow,
        fewstep.ESD,
        fewstep.ImprovedMeanFlow,
        fewstep.LSD,
        fewstep.MeanFlow,
        fewstep.PSD,
        fewstep.SCM,
        fewstep.Shortcut,
        fewstep.SplitMeanFlow,
        fewstep.TVM,
        fewstep.Trajectory,
    ]
    alone: list[Callable[[], nn.Module]] = [
        fewstep.ConsistencyTraining,
        fewstep.ContrastiveFlowMatching,
        fewstep.Denoising,
        fewstep.DiffTuning,
        fewstep.FlowMatching,
        fewstep.FMM,
    ]
    made = [make(teacher) for make in with_teacher] + [make() for make in alone]
    made.append(fewstep.Corrected(fewstep.ITVM(teacher), weight=0.2, rollout=(1, 2), begin=0.5))
    critic = fewstep.Diffused(fewstep.TeacherCritic(teacher, layers=["hidden.0"], width=8), target=0.5)
    made.append(fewstep.LearnedNoise(fewstep.FlowMatching(), {"width": 32}, beta=5.0))
    made.append(fewstep.Adversarial(fewstep.ITVM(teacher), critic, weight=0.03, loss="hinge", rollout=(1, 2)))
    return {type(objective).__name__: objective for objective in made}


class Own(fewstep.TwoTime):
    """A method of a user's own."""

    def __init__(self, teacher: fewstep.VelocityField) -> None:
        super().__init__(teacher, diagonal=0.5, times="logit_normal", weights=(1.0, 2.0))


def draw(run: Run) -> None:
    print(run.step, run.losses, run.ema)


def training(student: fewstep.FlowMap, teacher: fewstep.VelocityField, points: Tensor, out: Path) -> fewstep.FlowMap:
    data = fewstep.load_data("checkerboard", count=1000)
    first = fewstep.fit(student, Own(teacher), data, steps=20, out=out, device="cpu", callbacks=[draw])
    result = fewstep.fit(first.ema, fewstep.ITVM(teacher, ema=0.9), points, max_seconds=60)
    losses: dict[str, float] = result.losses
    print(first.step, first.stopped, losses, fewstep.sample(result.ema, points, steps=2).shape)
    return result.student


def loop_of_ones_own(student: fewstep.FlowMap, teacher: fewstep.VelocityField) -> fewstep.FlowMap:
    objective = fewstep.ITVM(teacher)
    average = fewstep.Ema(student, 0.999)
    batches = fewstep.Batches(fewstep.load_data("checkerboard"), batch=256, chunk=64, seed=0)
    for number in range(3):
        batch, generators = batches.micro(number, 0)
        rows: fewstep.Batch = batch.to("cpu")
        loss = objective(student, rows, target=average.module, step=number, generator=generators)
        total: Tensor = loss.total
        total.backward()  # pyright: ignore[reportUnknownMemberType] (torch does not annotate it)
        print(len(rows), {name: float(term) for name, term in loss.terms.items()})
        average.update(number)
    averaged: fewstep.FlowMap = average.module
    return averaged


def judging(student: fewstep.FlowMap, teacher: fewstep.VelocityField, data: Tensor) -> str:
    judged = fewstep.evaluate(
        student, teacher=teacher, data=data, steps=(1, 2), count=100, metrics=["w2"], training=data
    )
    header, rows = fewstep.compare({"ours": judged})
    wrong = fewstep.diagnose(student, teacher, data, times=[0.0, 0.5, 1.0])
    methods = fewstep.compare_methods("checkerboard-itvm", ["ITVM", "LMD"], seeds=[0, 1], seconds=60.0)
    print(wrong, methods)
    return f"{header[0]} {len(rows)} {judged}"


def from_data_to_data(threes: Tensor, eights: Tensor, network: nn.Module, denoiser: nn.Module) -> Tensor:
    path = fewstep.Interpolant(latent="sine")
    both: fewstep.Between = fewstep.Between(eights, threes)
    field = fewstep.DenoisedField(network, denoiser, path)
    fewstep.fit(field, fewstep.StochasticInterpolant(), both, steps=20)
    field.starts_from = fewstep.RowsOf(threes)
    end: Tensor = fewstep.sample(field, threes, 50, eps=0.5)
    return end


def likely(field: fewstep.VelocityField, x: Tensor) -> Tensor:
    noisy: Tensor = fewstep.sample(field, x, 50, eps=lambda t: 0.5 * (1 - t), solver="heun", last_step="none")
    log_p: Tensor = fewstep.log_likelihood(field, noisy, probes=4)
    return fewstep.bits_per_dim(log_p, dims=784, level=1 / 127.5)


def spaces(network: nn.Module, angles: Tensor) -> list[str]:
    space = fewstep.Tokens(tuple("abc"))
    exact: fewstep.VelocityField = fewstep.TokensField(torch.tensor([[0, 1]]), torch.ones(1), space)
    text: fewstep.FlowMap = fewstep.FlowMap.from_field(exact, network)
    field = fewstep.NetworkField(network, fewstep.Interpolant(), space=fewstep.Torus())
    fewstep.fit(field, fewstep.FlowMatching(), angles, steps=20)
    both = fewstep.Product(((fewstep.Euclid(), (3,)), (fewstep.Box(0, 1), (2,))))
    start: Tensor = fewstep.Uniform(0, 1).log_prob(fewstep.Normal().sample((4, 5), torch.default_generator))
    board = fewstep.BoxesInBoxField(torch.tensor([[[0.1, 0.4]]]), fewstep.Box(0, 1))
    print(both.shape, start, board.inside(angles), fewstep.MarkovChain("uniform"))
    score: fewstep.VelocityField = fewstep.NetworkField(network, fewstep.Reflected(0, 1, sigma_max=5.0), "noise")
    fewstep.fit(score, fewstep.ReflectedDiffusion(), angles, steps=20)
    return space.text(fewstep.sample(text, torch.randn(4, 2, 3), 1))


def folders(out: Path) -> str:
    model: fewstep.VelocityField | fewstep.FlowMap = fewstep.load("./my-ddpm", device="cpu")
    if not isinstance(model, fewstep.FlowMap):
        print(fewstep.convert(model, out / "flow", count=4))
    rows: int = fewstep.encode("./my-model", "./captioned-pictures", out / "encoded", size=512)
    folder: Path = fewstep.export(model, out / "pipeline", overwrite=True)
    address: str = fewstep.push(folder, "owner/name", private=True)
    papers: str = fewstep.cite(out)
    return f"{rows} {address} {papers}"


def seen_beside(field: fewstep.NetworkField, photos: Tensor) -> Tensor:
    wide: fewstep.NetworkField = fewstep.with_image(field, 3)
    fast: fewstep.FlowMap = fewstep.with_image(fewstep.FlowMap.from_field(field), channels=3)
    depth: Tensor = fewstep.sample(fast, torch.randn(4, 1, 16, 16), steps=1, image=photos)
    return wide(depth, 0.5, image=photos)


def what_is_missing(field: fewstep.NetworkField, fine: Tensor, known: Tensor) -> Tensor:
    data = fewstep.Residual(ArrayData(fine, {"image": known}), reference="image")
    fewstep.fit(field, fewstep.FlowMatching(), data, steps=20)
    drawn: Tensor = data.denormalize(fewstep.sample(field, torch.randn_like(fine), 50, image=known), known)
    return drawn


def adapters(model: fewstep.FlowMap, folder: Path) -> fewstep.FlowMap:
    fewstep.add_lora(model, rank=4, targets=["to_q", "to_v"])
    kept: Path = fewstep.save_adapter(model, folder)
    fewstep.load_adapter(model, kept)
    merged: fewstep.FlowMap = fewstep.merge_lora(model)
    return merged


version: str = fewstep.__version__
