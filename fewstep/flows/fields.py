"""Velocity fields: what a flow or diffusion model knows, and the teachers of everything else.

A field gives ``v_t(x) = E[dx_t given x_t = x]``, the marginal velocity of its path. It comes from a network
(:class:`NetworkField`), from a diffusion model and its scheduler (:class:`DiffusionField`), from a field guided by
another (``fewstep.flows.guided``), or in closed form (``fewstep.flows.exact``).
"""

from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn

from fewstep.common.errors import unknown
from fewstep.flows.broadcasting import as_times, expand
from fewstep.flows.change_of_path import Scaling, scaling
from fewstep.flows.paths import Linear, Path
from fewstep.flows.predictions import KINDS
from fewstep.flows.reflected import Reflected
from fewstep.flows.schedules import kind_of, schedule_of
from fewstep.flows.shifts import Shift, shift_of
from fewstep.flows.sources import Source
from fewstep.flows.spaces import Box, Euclid, Space
from fewstep.networks import FAMILIES, WanExperts

if TYPE_CHECKING:
    from fewstep.latents.prompts import Prompts
    from fewstep.latents.vae import Latents


# What is known of a field, and goes with it into those that are made of it.
KNOWN = (
    "latents", "text", "class_names", "moments", "source", "distilled", "coupling", "starts_from", "space", "chain",
    "shift",
)  # fmt: skip


class VelocityField(nn.Module):
    """A velocity ``v_t(x)`` on a ``path``: ``field(x, t, **cond)``, x (B, ...), t (B,) or a number -> (B, ...).

    Attributes:
        latents: what turns images into the x of a latent model and back, None where x is the data itself.
        text: what turns prompts into conditions, None for a model without text or with text of one's own.
        class_names: what its classes are called, in their order, where that is known.
        moments: mean and standard deviation of the data that it was trained on, where these were brought to 0 and 1
            (``data.normalize``): ``std * x + mean`` are its samples in the units of the data.
        source: what ``fewstep.load`` read it from, or the name of an exact field; None for one without a name.
        distilled: what it was distilled into, a model for a few steps that is no velocity
            (``fewstep.models.distilled``); empty for any other, and for one that is to be taken for a velocity all the
            same.
        coupling: how noise and data were paired where it was trained, such as ``ot``; empty where they were
            independent, as a score needs.
        starts_from: what its samples start from, where that is no normal noise (a path between two data sets).
        shift: how its scheduler moves times, where it is a flow-match one (``fewstep.flows.shifts``).
        space: where its samples live (``fewstep.flows.spaces``).
        chain: the kind of a Markov chain of tokens that it is (``fewstep.flows.chains``), which is no velocity.
    """

    path: Path
    has_denoiser: ClassVar[bool] = False  # knows the score by itself
    distilled: str = ""
    coupling: str = ""
    source: str | None = None
    latents: "Latents | None" = None
    text: "Prompts | None" = None
    class_names: tuple[str, ...] = ()
    moments: tuple[float, float] | None = None
    starts_from: Source | None = None
    shift: Shift | None = None
    space: Space = Euclid()
    chain: str = ""

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor: ...

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        raise NotImplementedError

    def known_as(self, field: "VelocityField") -> Self:
        """This field, with all that is known of another beside its numbers."""
        for name in KNOWN:
            setattr(self, name, getattr(field, name))
        return self

    def velocity(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The field itself; the name under which a :class:`FlowMap` gives its own."""
        return self(x, t, **cond)

    def score(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The score of p_t, ``grad log p_t(x)``, (B, ...). Holds where the noise is Gaussian and independent of the
        data: not between two data sets, nor under an optimal-transport coupling. Raises there, and where there is no
        noise (t = 1)."""
        check_score(self, "the score")
        return self.path.from_velocity(self(x, t, **cond), x, t, "score")

    def on(self, path: Path) -> "VelocityField":
        """The same model as a velocity on another path, exactly (arXiv 2506.02221 is diffusion -> linear)."""
        raise NotImplementedError


class NetworkField(VelocityField):
    """A network called ``network(x, t, **cond)`` as a velocity field.

    Args:
        network: any module; its time is that of its own path (``native.network_time``: t itself on the continuous
            paths, the step k on a tabulated schedule).
        native: the path the network was trained on.
        prediction: what it predicts there: velocity, data, noise, v, score, or flow (diffusers' reversed velocity);
            diffusers' names do too: sample, epsilon, v_prediction, flow_prediction.
        path: the path of the velocity wanted, the native one if not given.
        space: where samples live, R^n if not given, and its box on a ``Reflected`` path. In a box or among tokens a
            network predicts data, and its output goes through a sigmoid or a softmax.

    >>> field = NetworkField(my_vit, Linear(), prediction="data")
    >>> eps_model_as_flow = NetworkField(unet, VariancePreserving(), prediction="noise").on(Linear())
    """

    def __init__(
        self,
        network: nn.Module,
        native: Path | None = None,
        prediction: str = "velocity",
        *,
        path: Path | None = None,
        space: Space | None = None,
    ) -> None:
        super().__init__()
        prediction = kind_of(prediction, native or Linear())
        if prediction not in KINDS:
            raise unknown("prediction kind", prediction, KINDS)
        name = type(network).__name__
        if name in FAMILIES and type(network).__module__.startswith("diffusers."):
            raise ValueError(
                f"a {name} of diffusers is called in its own way and returns an object: wrap it first, "
                f"fewstep.networks.{FAMILIES[name].__name__}(model)"
            )
        self.network = network
        self.native = native or Linear()
        self.prediction = prediction
        self.path = path or self.native
        if not (self.native.is_affine and self.path.is_affine):
            if prediction != "velocity" or not self.native.same_as(self.path):
                raise ValueError(f"a network on {self.path} predicts the velocity there, not {prediction}")
        elif self.native.two_sided or self.path.two_sided:
            _check_two_sided(self.native, self.path, prediction)
        if space is None and isinstance(self.path, Reflected):
            space = Box(self.path.low, self.path.high)
        if space is not None:
            space.check_network(self.native, self.path, prediction)
            self.space = space

    def scaling(self, t: Tensor) -> Scaling:
        """How the network's output becomes a velocity at times t (B,)."""
        return scaling(self.native, self.prediction, self.path, t)

    @property
    def bare(self) -> bool:
        """Whether the network's output is the velocity as it stands."""
        return self.prediction == "velocity" and self.native.same_as(self.path)

    @property
    def is_flow(self) -> bool:
        """Whether it is a model of flow matching on the linear path, in either direction of time."""
        return isinstance(self.native, Linear) and self.prediction in ("velocity", "flow")

    @property
    def has_experts(self) -> bool:
        """Whether its network is two experts, each for some of the times (Wan 2.2)."""
        return isinstance(self.network, WanExperts)

    def is_second(self, t: Tensor) -> Tensor:
        """Whether the second expert answers at times t (B,), which is that of little noise."""
        network: Any = self.network
        return network.is_second(self.scaling(t).time)

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        t = as_times(t, x)
        if self.bare:
            output = checked(self.network(x, self.native.network_time(t), **cond), x, self.network)
            return self.space.velocity(self.space.said(output), x, t)
        c = self.scaling(t)
        prediction = checked(self.network(expand(c.into, x) * x, c.time, **cond), x, self.network)
        if self.prediction == "data":
            prediction = self.space.inside(prediction)
        return expand(c.skip, x) * x + expand(c.out, x) * prediction

    def end(self, x: Tensor, s: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The data that a network which predicts them expects at x (B, ...), at the time s: ``x + (1 - s) v``. (t is
        that of a flow map, which has this too.)"""
        return self.space.inside(checked(self.network(x, self.native.network_time(s), **cond), x, self.network))

    def on(self, path: Path) -> "NetworkField":
        space = None if isinstance(self.space, Euclid) else self.space  # which may say that it has no other path
        return NetworkField(self.network, self.native, self.prediction, path=path, space=space).known_as(self)

    def extra_repr(self) -> str:
        return f"native={self.native}, prediction={self.prediction!r}, path={self.path}"


def _check_two_sided(native: Path, path: Path, prediction: str) -> None:
    """That a network of a path between two data sets is asked for what it can say: the velocity on that path."""
    if not native.same_as(path):
        raise ValueError(f"a network on {native} is no velocity on {path}: between two data sets no path is another")
    if not native.has_score and prediction not in ("velocity", "flow", *(("data",) if path.is_straight else ())):
        raise ValueError(
            f"prediction {prediction!r} on {path}: a network between two data sets predicts the velocity, its "
            "negative, flow, or on the straight path the data"
        )


def check_field(field: Any, what: str) -> None:
    """That something is a velocity field.

    Raises:
        ValueError: it is a bare network, a pipeline or something else; says what makes a field of it.
    """
    if isinstance(field, VelocityField):
        return
    name = type(field).__name__
    if name in FAMILIES and type(field).__module__.startswith("diffusers."):
        way = (
            f"fewstep.load(FOLDER) reads a pipeline with its scheduler; of a model in memory, "
            f"DiffusionField(fewstep.networks.{FAMILIES[name].__name__}(model), scheduler)"
        )
    elif hasattr(field, "velocity"):
        way = "a flow map is what is trained; name the field that it was made from"
    elif isinstance(field, str) or hasattr(field, "scheduler"):
        way = "fewstep.load makes one of it"
    else:
        way = "NetworkField(network, path, prediction) makes one of a network called network(x, t)"
    raise ValueError(f"{what} is a {name}, and a VelocityField is needed: {way}")


def check_score(field: VelocityField, what: str) -> None:
    """That the velocity of a field tells the score of p_t.

    Raises:
        ValueError: it does not; says which noise and data it was trained with, and what takes no score.
    """
    if not field.path.is_affine:
        raise ValueError(
            f"{what} needs a path from noise to data, and a chain of blocks has its ODE alone: sample that, without eps"
        )
    if field.path.two_sided and not (field.path.has_score or field.has_denoiser):
        raise ValueError(
            f"{what} needs noise, and this field goes from one data set to another ({field.path}): its velocity says "
            "nothing of a score. Sample its ODE, without eps, or train a DenoisedField (StochasticInterpolant)"
        )
    if field.coupling and not field.has_denoiser:
        raise ValueError(
            f"{what} needs noise that is independent of the data, and this field was trained with the coupling "
            f"{field.coupling!r}, under which its velocity says nothing of a score: sample its ODE, without eps"
        )
    check_velocity(field, what)


def check_velocity(field: VelocityField, what: str) -> None:
    """That a field is a velocity.

    Raises:
        ValueError: it is a chain, or was distilled for a few steps; says into what.
    """
    if field.chain:
        raise ValueError(
            f"{what} needs a velocity, and the model is a {field.chain} Markov chain of tokens, which has none: "
            "train a flow (FlowMatching); samples of the chain can be its data, data: teacher"
        )
    if field.distilled:
        raise ValueError(
            f"{what} needs a velocity, and the model is {field.distilled}, which predicts where a trajectory ends: "
            "take the model that it was made from, or say teacher.distilled: true (Python: field.distilled = '')"
        )


def checked(prediction: Any, x: Tensor, network: nn.Module) -> Tensor:
    """What a network predicted at x (B, ...), which has the shape of x.

    Raises:
        ValueError: it returned something else; the message says what, and how to wrap the network.
    """
    if isinstance(prediction, Tensor) and prediction.shape == x.shape:
        return prediction
    name = type(network).__name__
    if not isinstance(prediction, Tensor):
        way = "its .sample" if hasattr(prediction, "sample") else "the tensor in it"
        known = ", ".join(family.__name__ for family in FAMILIES.values())
        raise ValueError(
            f"the network {name} returned a {type(prediction).__name__}, and a field needs a tensor like x "
            f"{tuple(x.shape)}: wrap it in a module whose forward(x, t, **cond) calls it and returns {way}; for "
            f"diffusers' own models fewstep.networks has {known}"
        )
    shapes = f"{tuple(prediction.shape)} for x {tuple(x.shape)}"
    if prediction.ndim == x.ndim > 1 and prediction.shape[1] == 2 * x.shape[1]:
        raise ValueError(
            f"the network {name} returned {shapes}, twice the channels, as one does that predicts a variance too: "
            f"wrap it in a module whose forward returns the first {x.shape[1]} channels alone, as those of "
            "fewstep.networks do"
        )
    raise ValueError(f"the network {name} returned {shapes}: a prediction has the shape of x")


class DiffusionField(NetworkField):
    """A diffusers model as a velocity on the linear path, through the schedule of its scheduler (Diff2Flow).

    Args:
        network: called ``network(x, timestep, **cond)`` with (continuous) timesteps of the scheduler.
        scheduler: any diffusers scheduler that ``fewstep.flows.schedules.schedule_of`` reads: one with
            ``alphas_cumprod`` (DDPM, DDIM, PNDM, DPM-Solver, UniPC, Euler, ...), of EDM, or flow-match.
        path: the path of the velocity, linear if not given.

    Raises:
        ValueError: for any other scheduler, a prediction type that is not known, or a schedule whose last step has no
            signal at all (zero terminal SNR) beside a noise prediction, which says nothing there.
    """

    def __init__(self, network: nn.Module, scheduler: Any, *, path: Path | None = None) -> None:
        native, prediction = schedule_of(scheduler)
        super().__init__(network, native, prediction, path=path or Linear())
        self.scheduler = scheduler
        self.shift = shift_of(scheduler, network)
