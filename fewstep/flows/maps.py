"""Two-time flow maps ``X_{s,t}``: they carry a sample of p_s to p_t along ``dx/dt = v_t(x)`` in one call."""

import warnings
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fewstep.flows.broadcasting import as_times, expand
from fewstep.flows.change_of_path import scaling
from fewstep.flows.fields import NetworkField, VelocityField, check_field, checked
from fewstep.flows.guided import unguided
from fewstep.flows.paths import Path
from fewstep.flows.shifts import Shift
from fewstep.flows.sources import Source
from fewstep.flows.spaces import Euclid, Space
from fewstep.networks import with_second_time

if TYPE_CHECKING:
    from fewstep.latents.prompts import Prompts
    from fewstep.latents.vae import Latents


class FlowMap(nn.Module):
    """``X_{s,t}(x) = x + (t - s) u(x, s, t)`` with the average velocity u from a network ``net(x, s, t, **cond)``.

    As with a field, the network may predict anything its ``native`` path turns into a velocity: with
    ``v(x, s) = skip(s) x + out(s) F(x, s)`` for a field, ``u(x, s, t) = skip(s) x + out(s) F(x, s, t)`` here. So at
    ``s = t`` a map made from a field has that field as its velocity. A data-predicting network on the linear path
    gives ``X_{s,t} = x + (t - s) / (1 - s) (F - x)``.

    Args:
        network: called ``network(x, s, t, **cond)`` with times in the units of its native path.
        native: the path it belongs to.
        prediction: what it predicts there.
        path: the path of the map.
        space: where samples live, as for a field: in R^n, if not given, a step adds ``(t - s) u`` to x; elsewhere
            ``X_{s,t}(x) = space.move(x, (t - s) u)``.

    Attributes:
        gamma: how ``fewstep.sample`` re-noises between steps if nothing is said: 0, not at all, or 1 for a map that
            only knows the way to t = 1 (a consistency model).
        grid: where ``fewstep.sample`` takes its steps if nothing is said: uniform, or native for a map that was trained
            at native times.
        guidance: the strength of guidance that ``fewstep.sample`` tells it if nothing is said, None for none: of a map
            that takes one.
        latents, text, class_names, moments, source, starts_from, shift, space: as those of a :class:`VelocityField`; a
            map made by ``from_field`` has its field's, all but the source.
    """

    gamma: float = 0.0
    grid: str = "uniform"
    guidance: float | None = None
    latents: "Latents | None" = None
    text: "Prompts | None" = None
    class_names: tuple[str, ...] = ()
    moments: tuple[float, float] | None = None
    source: str | None = None
    starts_from: Source | None = None
    shift: Shift | None = None
    space: Space = Euclid()

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
        # Its checks, and the rules of the conversion.
        field = NetworkField(network, native, prediction, path=path, space=space)
        self.network, self.space = network, field.space
        self.native, self.prediction, self.path, self.bare = field.native, field.prediction, field.path, field.bare

    @classmethod
    def from_field(
        cls,
        field: VelocityField,
        network: nn.Module | None = None,
        *,
        guidance: bool | str = False,
        second_time: str = "t",
        share: bool = False,
        late_share: float | None = None,
    ) -> "FlowMap":
        """A student that starts as its teacher: same weights, and a second time that is silent.

        Args:
            field: the teacher. Of a guided field, the field inside it; a field with no network (an exact one) needs
                ``network``.
            network: a two-time network of one's own; the teacher's weights are loaded into it by name, and a warning
                says which are new.
            guidance: give the student an input for the strength of guidance, the condition ``guidance`` (B,), silent at
                first too; 1, which is none, where it is not given. ``interval``: the times between which it acts too,
                rows (B, 3) of all three; where they are not given, all times.
            second_time: how the second time goes into a model of diffusers: ``t``, an embedding of t beside that of s;
                ``span``, one of t - s; ``late``, the last blocks are told t in the place of s (arXiv 2510.24474), which
                adds no weights. ``none``: it is not told; such a map knows the way to t = 1 alone, as a consistency
                model does, and stock pipelines of diffusers run it.
            late_share: the share of the blocks that ``late`` tells t; else a third of a transformer's, and a U-Net's up
                blocks.
            share: have a model of diffusers use the very weights of the field, and freeze them: for a student of which
                an adapter alone is trained (``add_lora``), with what is new. One copy is teacher and student.

        Raises:
            ValueError: if a network is needed and not given, or has no place for one of the teacher's weights.
        """
        check_field(field, "what a student starts from")
        field = unguided(field)
        if any(hasattr(module, "lora_A") for module in field.modules()):  # whose layers have names of their own
            raise ValueError("the field has an adapter: start from merge_lora(field), which has it in its weights")
        if not isinstance(field, NetworkField):
            if network is None:
                raise ValueError(
                    f"{type(field).__name__} has no network to start from: pass one, network=MLP(2, times=2)"
                )
            return cls(network, field.path, field.space.predicts or "velocity", space=field.space)
        if network is None:
            network = with_second_time(field.network, guidance, second_time, share=share, late_share=late_share)
        else:
            load_by_name(network, field.network)
        student = cls(network, field.native, field.prediction, path=field.path, space=field.space)
        student.latents, student.text, student.class_names = field.latents, field.text, field.class_names
        student.moments, student.starts_from, student.shift = field.moments, field.starts_from, field.shift
        student.gamma = 1.0 if student.ends_alone else 0.0
        return student

    @property
    def ends_alone(self) -> bool:
        """Whether the network is told no second time, so that ``X_{s,1}`` is all it knows."""
        return getattr(self.network, "second_time", "t") == "none"

    def average_velocity(self, x: Tensor, s: Tensor | float, t: Tensor | float, **cond: Any) -> Tensor:
        """u(x, s, t), the mean velocity from s to t of the path through x at s; (B, ...)."""
        s, t = as_times(s, x), as_times(t, x)
        # By themselves times of the path are told apart to its very ends. Where they are held against s they are told
        # as s is, by their signal-to-noise ratio, of which a schedule has not all.
        is_alike = getattr(self.network, "is_told_alike", False) and not self.bare
        second = scaling(self.native, self.prediction, self.path, t).time if is_alike else self.native.network_time(t)
        if self.bare:
            output = checked(self.network(x, self.native.network_time(s), second, **cond), x, self.network)
            return self.space.velocity(self.space.said(output), x, s)
        c = scaling(self.native, self.prediction, self.path, s)
        prediction = checked(self.network(expand(c.into, x) * x, c.time, second, **cond), x, self.network)
        if self.prediction == "data":
            prediction = self.space.inside(prediction)
        return expand(c.skip, x) * x + expand(c.out, x) * prediction

    def end(self, x: Tensor, s: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """What the map points to, ``x + (1 - s) u(x, s, t)``, (B, ...), of a network that predicts data: its output."""
        times = self.native.network_time(s), self.native.network_time(t)
        return self.space.inside(checked(self.network(x, *times, **cond), x, self.network))

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, s: Tensor | float, t: Tensor | float, **cond: Any) -> Tensor: ...

    def forward(self, x: Tensor, s: Tensor | float, t: Tensor | float, **cond: Any) -> Tensor:
        """``X_{s,t}(x)``, (B, ...); x itself, to the last bit, where s = t."""
        s, t = as_times(s, x), as_times(t, x)
        return self.space.move(x, expand(t - s, x) * self.average_velocity(x, s, t, **cond))

    def velocity(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """u(x, t, t): the map's own velocity field."""
        return self.average_velocity(x, t, t, **cond)

    def through(self, x: Tensor, times: Tensor, **cond: Any) -> Tensor:
        """The composition of maps along ``times`` (N + 1,): N calls."""
        for s, t in pairwise(times):
            x = self(x, s, t, **cond)
        return x

    def extra_repr(self) -> str:
        return f"native={self.native}, prediction={self.prediction!r}, path={self.path}"


def load_by_name(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Load the teacher's weights into the student by name; returns, and warns of, the names that are new there.

    Raises:
        ValueError: if the teacher has a weight that the student lacks, or a shape differs; nothing is loaded then.
    """
    have, want = teacher.state_dict(), student.state_dict()
    missing = sorted(set(have) - set(want))
    if missing:
        raise ValueError(
            f"{len(missing)} weights of the teacher's {type(teacher).__name__} have no place in "
            f"{type(student).__name__}, the first is {missing[0]!r}: give the student's modules the teacher's names"
        )
    for name, value in have.items():
        if value.shape != want[name].shape:
            shapes = f"{tuple(value.shape)} in the teacher and {tuple(want[name].shape)} in the student"
            raise ValueError(f"the weight {name!r} is {shapes}: they must agree")
    new = sorted(set(want) - set(have))
    student.load_state_dict(have, strict=False)
    name = type(student).__name__
    if new:
        modules = ", ".join(sorted({weight.rpartition(".")[0] or weight for weight in new}))
        warnings.warn(f"{name} has its teacher's weights, except what is new in it: {modules}", stacklevel=3)
    else:
        warnings.warn(f"{name} has no weight that its teacher lacks: where is its second time?", stacklevel=3)
    return new
