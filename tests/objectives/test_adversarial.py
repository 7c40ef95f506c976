"""The adversarial term in closed form: its games, its penalties, whose gradients are whose, and what is refused."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fewstep.common.randomness import generator
from fewstep.data.batch import Batch
from fewstep.flows.exact import GaussianField, eight_gaussians
from fewstep.flows.fields import NetworkField
from fewstep.flows.maps import FlowMap
from fewstep.networks import MLP, ConvCritic, MLPCritic
from fewstep.objectives import ITVM, Loss, Objective
from fewstep.objectives.adversarial import GAMES, Adversarial
from fewstep.objectives.diffused import Diffused
from fewstep.objectives.finishing import Made
from fewstep.objectives.penalties import slope, slope_by_difference
from fewstep.objectives.teacher_critic import TeacherCritic
from fewstep.training.fit import fit

F64 = torch.float64


class Along(nn.Module):
    """``D(x) = w x``, of numbers (n, 1)."""

    def __init__(self, w: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x[:, 0]


class Quadratic(nn.Module):
    """``D(x) = x A x``, A symmetric."""

    def __init__(self, dim: int = 3) -> None:
        super().__init__()
        half = torch.randn(dim, dim, dtype=F64, generator=generator(7))
        self.a = nn.Parameter(half + half.T)

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.a) * x).sum(1)


class Shift(nn.Module):
    """A student whose samples are its noise, moved: ``u = by``."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(dim, dtype=F64))
        self.shape = (dim,)

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return self.by.expand_as(x)


class Nothing(Objective):
    """A base without a say."""

    def forward(self, student: Any, batch: Batch, **_: Any) -> Loss:
        return Loss(sum((0 * p.sum() for p in student.parameters()), torch.zeros(())))


def around(critic: Any, base: Objective | None = None, **options: Any) -> Adversarial:
    defaults: dict[str, Any] = {"weight": 1.0, "penalty": 0.0, "share": 1.0, "rollout": (1,), "begin": 0.0, "ramp": 0.0}
    return Adversarial(base or Nothing(), critic, **{**defaults, **options})


def judge(objective: Adversarial, student: FlowMap, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The term of the student and the loss of the critic."""
    judged = objective.judged(student, Made(x, x.detach(), real, {}, generator(0)))
    assert judged.player is not None
    return judged.student if judged.student is not None else torch.zeros(()), judged.player


def grid(n: int) -> Tensor:
    """Standard normal numbers (n,) at the middles of n parts of equal weight."""
    return math.sqrt(2) * torch.erfinv(2 * (torch.arange(n, dtype=F64) + 0.5) / n - 1)


def pairs(m: float, n: int = 400) -> tuple[Tensor, Tensor]:
    """Every pair of real numbers N(m, 1) and made ones N(0, 1), (n n, 1) each."""
    real, made = torch.meshgrid(m + grid(n), grid(n), indexing="ij")
    return real.reshape(-1, 1), made.reshape(-1, 1)


def test_at_equal_distributions_the_best_critic_has_log_2_and_moves_nothing():
    real, made = pairs(0.0)
    critic, student = Along(0.0), FlowMap(Shift())
    by = student.network.by  # pyright: ignore
    term, loss = judge(around(critic), student, made + by, real)
    assert float(loss.detach()) == pytest.approx(math.log(2))
    (of_w,), (of_student,) = torch.autograd.grad(loss, [critic.w]), torch.autograd.grad(term, [by])
    assert float(of_w) == pytest.approx(0.0, abs=1e-12)  # it is the best of these critics
    assert float(of_student) == 0.0
    with torch.no_grad():
        critic.w += 0.3
    _, worse = judge(around(critic), student, made + by, real)
    assert float(worse) > math.log(2)


def stationary(m: float, b: float) -> float:
    """w at which ``E[(x_r - x_f) sigmoid(-w (x_r - x_f))] = 2 b w``: the difference is N(m, 2)."""
    d = m + math.sqrt(2) * grid(20_000)
    low, high = 0.0, 20.0
    for _ in range(60):
        w = (low + high) / 2
        low, high = (w, high) if float((d * torch.sigmoid(-w * d)).mean()) > 2 * b * w else (low, w)
    return low


@pytest.mark.parametrize("m", [2.0, -1.0, 0.5])
def test_the_linear_critic_of_two_normals_rests_where_it_should_and_draws_the_samples_to_the_data(m: float):
    b = 0.1
    w = math.copysign(stationary(abs(m), b), m)
    critic, student, (real, made) = Along(w), FlowMap(Shift()), pairs(m)
    by = student.network.by  # pyright: ignore
    term, loss = judge(around(critic, penalty=b), student, made + by, real)
    assert float(torch.autograd.grad(loss, critic.w)[0]) == pytest.approx(0.0, abs=2e-3)
    gradient = float(torch.autograd.grad(term, by)[0])
    d = m + math.sqrt(2) * grid(20_000)
    assert gradient == pytest.approx(float(-w * torch.sigmoid(w * d).mean()), abs=1e-4)
    assert gradient * m < 0  # descending it goes towards m


@pytest.mark.parametrize("loss", GAMES)
def test_games_are_as_they_are_written(loss: str):
    critic, student = Along(0.7), FlowMap(Shift())
    real, x = torch.randn(2, 50, 1, dtype=F64, generator=generator(3))
    term, player = judge(around(critic, loss=loss), student, x + student.network.by, real)  # pyright: ignore
    r, f = 0.7 * real[:, 0], 0.7 * x[:, 0]
    log = lambda v: torch.log1p(torch.exp(v))  # noqa: E731
    by_hand = {
        "relativistic": (log(f - r), log(r - f)),
        "hinge": ((1 - r).clamp(min=0) + (1 + f).clamp(min=0), -f),
        "logistic": (log(-r) + log(f), log(-f)),
    }[loss]
    assert float(player) == pytest.approx(float(by_hand[0].mean()))
    assert float(term) == pytest.approx(float(by_hand[1].mean()))


def test_both_penalties_of_a_quadratic_critic_are_the_closed_form():
    critic, b = Quadratic(), 0.3
    real, x = torch.randn(2, 20, 3, dtype=F64, generator=generator(4))
    student = FlowMap(Shift(3))
    _, plain = judge(around(critic), student, x, real)
    _, loss = judge(around(critic, penalty=b), student, x, real)
    by_hand = b / 2 * sum((2 * rows @ critic.a).square().sum(1).mean() for rows in (real, x))
    assert float(loss - plain) == pytest.approx(float(by_hand))
    # And the penalty trains the critic: d/dA of b/2 |(A + A') x|^2.
    (gradient,) = torch.autograd.grad(loss - plain, critic.a)
    outer = sum(rows.T @ rows / len(rows) for rows in (real, x))
    torch.testing.assert_close(gradient, 2 * b * (critic.a @ outer + outer @ critic.a))


def test_differences_have_the_slope_for_their_mean():
    """Of x A x, ``E ((D(x + h e) - D(x)) / h)^2 = 4 |A x|^2 + h^2 (tr(A)^2 + 2 tr(A A))``."""
    critic, count = Quadratic(), 400_000
    x = torch.tensor([[0.3, -1.0, 0.5]], dtype=F64).expand(count, 3)
    noise = torch.randn(count, 3, dtype=F64, generator=generator(5))
    logits, steep = slope_by_difference(critic, x, noise)
    a = critic.a.detach()
    extra = 0.01 * (a.trace() ** 2 + 2 * (a @ a).trace())
    assert float(steep.mean()) == pytest.approx(float(4 * (x[0] @ a).square().sum() + extra), rel=0.01)
    assert torch.equal(logits, critic(x))
    assert float(slope(critic, x[:2])[1][0]) == pytest.approx(float(4 * (x[0] @ a).square().sum()))
    linear = Along(0.7)
    assert float(slope_by_difference(linear, noise[:, :1], noise[:, 1:2])[1].mean()) == pytest.approx(0.49, rel=0.01)


def small(critic: Any = "mlp", seed: int = 0, **options: Any) -> tuple[Adversarial, FlowMap, Batch]:
    """Around ITVM, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = FlowMap(MLP(2, width=16, depth=2, times=2)).double()
        nn.init.normal_(student.network.second_time.last.weight, std=0.1)  # pyright: ignore
    objective = around(critic, ITVM(eight_gaussians(), ema=0.9), penalty=0.1, share=0.5, **options)
    objective.check_student(student)
    objective.adopt(student)
    objective.double()
    return objective, student, Batch(torch.randn(64, 2, dtype=F64, generator=generator(1)))


def losses(objective: Objective, student: FlowMap, batch: Batch, step: int = 0) -> Loss:
    return objective(student, batch, target=student, progress=0.6, step=step, generator=generator(2))


@pytest.mark.parametrize("options", [{}, {"slopes": "difference"}, {"diffused": True}, {"loss": "hinge"}], ids=str)
def test_gradients_of_the_one_scalar_are_those_of_each_loss_alone_to_the_bit(options: dict[str, Any]):
    objective, student, batch = small(**options)
    theirs, critics = list(student.parameters()), objective.player_parameters()

    def gradients(part: str) -> list[Tensor]:
        for p in (*theirs, *critics):
            p.grad = None
        loss = losses(objective, student, batch)
        {"one": loss.descended, "student": loss.total, "critic": loss.others["critic"]}[part].backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in (*theirs, *critics)]

    both, of_student, of_critic = gradients("one"), gradients("student"), gradients("critic")
    for index in range(len(both)):
        is_students = index < len(theirs)
        assert torch.equal(both[index], (of_student if is_students else of_critic)[index])
        assert not (of_critic if is_students else of_student)[index].any()  # and the other loss has none here
    assert all(g.any() for g in (*both[: len(theirs)], *both[len(theirs) :]) if g.numel() > 1)


def test_where_the_student_stands_still_only_the_critic_has_a_loss():
    objective, student, batch = small(every=2)
    loss = losses(objective, student, batch, step=1)
    assert not loss.total.requires_grad
    assert loss.others["critic"].requires_grad
    assert "adversarial" not in loss.terms
    assert losses(objective, student, batch, step=2).total.requires_grad


def test_the_term_is_the_student_s_own_with_the_weight():
    objective, student, batch = small()
    base = losses(objective.base, student, batch).total
    loss = losses(objective, student, batch)
    assert float(loss.total - base) == pytest.approx(float(loss.terms["adversarial"]))
    objective.weight = 0.25
    assert float(losses(objective, student, batch).total - base) == pytest.approx(
        0.25 * float(loss.terms["adversarial"])
    )


def test_the_adaptive_weight_makes_both_gradients_of_the_last_layer_equal():
    objective, student, batch = small(adaptive=True)
    weight = student.network.output.weight  # pyright: ignore
    base = losses(objective.base, student, batch).total
    total = losses(objective, student, batch).total
    (of_base,) = torch.autograd.grad(base, weight, retain_graph=True)
    (of_all,) = torch.autograd.grad(total, weight)
    assert float((of_all - of_base).norm()) == pytest.approx(float(of_base.norm()), rel=1e-5)
    # Held within 0 and 10,000.
    grown = objective.scale(student, 1e9 * (base := losses(objective.base, student, batch).total), base)
    assert float(grown) == 1e4
    assert objective._last == "network.output.weight"  # pyright: ignore[reportPrivateUsage]


def test_the_critic_is_the_one_that_fits():
    def made(critic: Any, student: FlowMap, base: Objective | None = None, **options: Any) -> Any:
        objective = around(critic, base, **options)
        objective.check_student(student)
        return objective.critic

    class Image(Shift):
        def __init__(self, side: int) -> None:
            super().__init__()
            self.shape, self.classes = (1, side, side), 3

    teacher = NetworkField(MLP(2, width=8))
    assert isinstance(made("auto", FlowMap(MLP(2, times=2))), MLPCritic)
    assert isinstance(made("auto", FlowMap(Image(8))), ConvCritic)
    assert isinstance(made("auto", FlowMap(Image(7))), MLPCritic)
    wide = made({"name": "conv", "width": 8}, FlowMap(Image(8)), diffused={"sd": 0.2})
    assert isinstance(wide, Diffused)
    assert wide.sd == 0.2
    assert wide.critic.stem.out_channels == 8  # pyright: ignore
    assert wide.critic.takes_level
    assert wide.critic.head.label.num_embeddings == 3  # pyright: ignore
    assert isinstance(made("teacher", FlowMap(MLP(2, times=2)), ITVM(teacher)), TeacherCritic)


@pytest.mark.parametrize(
    ("critic", "exact"), [("mlp", True), ({"name": "teacher", "width": 4}, False), (Quadratic(2), True)], ids=str
)
def test_slopes_are_exact_where_there_is_a_second_derivative(critic: Any, exact: bool):
    student = FlowMap(MLP(2, width=8, times=2)).double()
    objective = around(critic, ITVM(NetworkField(MLP(2, width=8, depth=3)).double()), penalty=0.1)
    objective.check_student(student)
    objective.double()
    batch = Batch(torch.randn(64, 2, dtype=F64))
    losses(objective, student, batch).descended.backward()
    assert objective._exact is exact  # pyright: ignore[reportPrivateUsage]


class Fused(torch.autograd.Function):
    """As a kernel without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grads[0]


class FusedCritic(Along):
    def forward(self, x: Tensor) -> Tensor:
        return self.w * Fused.apply(x)[:, 0]  # pyright: ignore


def test_a_critic_without_a_second_derivative_has_differences():
    critic, student = FusedCritic(0.5), FlowMap(Shift())
    objective = around(critic, penalty=0.1)
    real, x = torch.randn(2, 64, 1, dtype=F64, generator=generator(6))
    _, loss = judge(objective, student, x, real)
    loss.backward()
    assert objective._exact is False  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        judge(around(critic, penalty=0.1, slopes="exact"), student, x, real)[1].backward()


class Noise(nn.Module):
    """A critic that says the level it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.w * level


def test_pairs_have_one_level_of_noise_and_say_how_sure_the_critic_is():
    student, rows = FlowMap(Shift(2)), torch.zeros(64, 2)
    for loss, share in (("relativistic", 0.0), ("logistic", 0.5)):
        objective = around(Noise(), loss=loss, diffused={"steps": (1000, 1000)})
        _, player = judge(objective, student, rows, rows)
        critic = objective.critic
        assert isinstance(critic, Diffused)
        # No pair differs; by itself a real row is above 0 where it has noise, half of them.
        assert float(critic.signs / critic.rows) == pytest.approx(share, abs=0.15)
        if loss == "relativistic":
            assert float(player) == pytest.approx(math.log(2))


class Told(nn.Module):
    """A critic with a condition of its own, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.seen: list[list[str]] = []

    def forward(self, x: Tensor, class_labels: Tensor) -> Tensor:
        return (x * self.w).sum(1) + class_labels


def test_a_critic_gets_the_conditions_that_it_names():
    rows = {"class_labels": torch.tensor([0, 1]), "text": torch.zeros(2, 3)}
    made = Made(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2, 2), rows, generator(0))
    for diffused in (False, True):
        objective = around(Told(), diffused=diffused)
        terms = objective.judged(FlowMap(MLP(2, times=2)), made).terms
        assert torch.isfinite(terms["critic_real"])


class Wrong(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.w, self.out = nn.Parameter(torch.ones(())), shape

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x.new_ones(len(x), *self.out)


class Fails(Wrong):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(5, 1)


class Normed(Wrong):
    def __init__(self) -> None:
        super().__init__(())
        self.norm = nn.BatchNorm1d(2)


def test_what_cannot_be_is_said_in_one_line_before_anything_is_computed(tmp_path):
    code = tmp_path / "critics.py"
    code.write_text(
        "from torch import nn\ndef broken(width: int = 1) -> nn.Module:\n    raise KeyError('x')\n"
        "def deep() -> nn.Module:\n    return nn.Linear(2, 1)\n"
    )
    student, data = FlowMap(MLP(2, times=2)), torch.zeros(64, 2)
    for critic, said in [
        (Wrong((1,)), r"the critic Wrong gave \(4, 1\) for 4 rows, and one logit a row is wanted, \(4,\): end its"),
        (Wrong((8, 8)), r"gave \(4, 8, 8\) for 4 rows"),
        (Fails(()), r"the critic Fails does not take rows of shape \(4, 2\) \(mat1"),
        ("conv", r"critic conv is for images .* samples are \(2,\): take the critic mlp"),
        ("teacher", "there is no teacher: take conv"),
        ({"name": "mlp", "shape": [3]}, r"the critic MLPCritic does not take rows of shape \(4, 2\)"),
        (f"{code}:broken", r"objective.critic: .*:broken cannot be made of these options \(KeyError: 'x'\)"),
        (f"{code}:deep", r"the critic Linear gave \(4, 1\) for 4 rows"),
    ]:
        with pytest.raises(ValueError, match=said):
            fit(student, around(critic), data, 1, quiet=True)
    with pytest.raises(ValueError, match="a GaussianField has none"):
        fit(student, around("teacher", ITVM(GaussianField(torch.zeros(2), torch.eye(2)))), data, 1, quiet=True)
    with pytest.raises(ValueError, match="did you mean 'conv'"):
        around("konv")
    with pytest.raises(ValueError, match=r"critic.widht.*did you mean 'objective.critic.width'"):
        around({"name": "mlp", "widht": 3})
    with pytest.raises(ValueError, match="and no name: say which it is"):
        around({"width": 3})
    for options, said in [
        ({"sdd": 0.5}, "unknown recipe key 'objective.diffused.sdd': did you mean 'objective.diffused.sd'"),
        ({"sd": "big"}, "objective.diffused.sd is 'big': input should be a valid number"),
        ({"steps": [10]}, "objective.diffused.steps.1 is needed"),
    ]:
        with pytest.raises(ValueError, match=said):
            Adversarial(ITVM(GaussianField(torch.zeros(2), torch.eye(2))), diffused=options)
    assert Adversarial(ITVM(GaussianField(torch.zeros(2), torch.eye(2))), diffused={}).diffused  # its defaults
    with pytest.raises(ValueError, match="did you mean 'relativistic'"):
        around("mlp", loss="relativstic")
    with pytest.raises(ValueError, match="slopes of Adversarial"):
        around("mlp", slopes="both")
    with pytest.raises(ValueError, match="penalty is -1"):
        around("mlp", penalty=-1.0)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        around(Wrong(()).requires_grad_(False))
    with pytest.raises(ValueError, match="adopt"):
        judge(around("mlp"), student, data, data)

    class Silent(nn.Module):
        def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match=r"critic: {name: conv, shape"):
        fit(FlowMap(Silent()), around("conv"), data, 1, quiet=True)


def test_batch_norms_are_warned_of_once():
    with pytest.warns(UserWarning, match="the critic Normed has batch norms"):
        objective = around(Normed())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective.check_student(FlowMap(MLP(2, times=2)))


def test_a_wrong_shape_that_shows_later_is_named_too():
    student = FlowMap(Shift())
    with pytest.raises(ValueError, match=r"gave \(8, 2\) for 8 rows"):
        judge(around(Wrong((2,))), student, torch.zeros(8, 1, dtype=F64), torch.zeros(8, 1, dtype=F64))


def test_it_trains_and_goes_on_with_the_same_bits(tmp_path: Any):
    def run(out: Any = None, stop: int = 0) -> Adversarial:
        def kill(run: Any) -> None:
            if run.step == stop:
                raise InterruptedError

        objective, student, _ = small(diffused={"images": 500, "interval": 2})
        objective.float()
        student.float()
        data = TensorDataset(eight_gaussians().data(500, generator(9)))
        fit(student, objective, data, 20, out=out, batch=64, checkpoint_every=4, callbacks=[kill], quiet=True)
        return objective

    whole = run()
    assert isinstance(whole.critic, Diffused)
    assert float(whole.critic.p) > 0 or float(whole.critic.rows) > 0
    with pytest.raises(InterruptedError):
        run(tmp_path, stop=15)
    again = run(tmp_path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
