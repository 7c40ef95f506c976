"""The teacher's own network as a critic: its features of noised rows, and small heads that train on them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.common.errors import unknown
from fewstep.common.randomness import Generators, normal, uniform
from fewstep.common.shards import is_sharded
from fewstep.flows.fields import NetworkField, VelocityField
from fewstep.flows.guided import unguided
from fewstep.flows.signature import blank_conditions, device_of, shape_of, takes
from fewstep.networks import sinusoidal

_FREQUENCIES = 32


class TeacherCritic(nn.Module):
    """``D(x)``, the mean over layers l of ``head_l(f_l(x_tau, tau))``: f_l are features of the frozen teacher, x_tau is
    x with fresh noise at a random time tau (as in arXiv 2403.12015, reconstructed from its abstract). There is no
    second backbone: only the heads train, and the gradient to x runs through the teacher.

    A head is a layer norm without weights, a hidden layer of ``width`` that is told tau, and a number a token, of which
    the mean is taken. The call of the teacher ends at the last of the layers. A guided teacher is asked without its
    guidance; its conditions are passed on, so the critic knows the class or prompt.

    Args:
        teacher: a field with a network.
        layers: names of modules of its network. If not given, the blocks that end a quarter, a half and three quarters
            of the way: blocks are the entries of the network's outermost lists of modules (``ModuleList``,
            ``Sequential``), in the order in which they run, of those that see x.
        width: of the heads.
        times: tau is uniform between these (0 is noise, 1 data).
        shape: of one sample; else as its network says.
        cond: the conditions of one or more rows; else, zeros of those that its network says it needs.
        seed: decides the first weights of the heads.

    Raises:
        ValueError: a teacher without a network, layers that are not in it or do not see x, times outside [0, 1]; a
            network that does not run on what it is said to need.
    """

    def __init__(
        self,
        teacher: VelocityField,
        layers: Sequence[str] | None = None,
        width: int = 64,
        times: tuple[float, float] = (0.2, 0.9),
        shape: tuple[int, ...] | None = None,
        cond: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        field = unguided(teacher)
        if not isinstance(field, NetworkField):
            raise ValueError(
                f"the critic teacher needs a teacher with a network, and a {type(field).__name__} has none: take the "
                "critic conv or mlp"
            )
        field.path.check_noise("the critic teacher", "take the critic conv or mlp")
        if not 0 <= times[0] <= times[1] <= 1:
            raise ValueError(f"the times of the critic teacher are {times}: two in [0, 1], the smaller first")
        if width < 1:
            raise ValueError(f"the width of the critic teacher is {width}: it is 1 or more")
        # In a tuple, nn.Module does not see it: it is neither trained nor checkpointed with the heads.
        self._teacher = (teacher.eval().requires_grad_(False),)
        self.times, self.width = times, width
        found = self._try(layers or blocks_of(field.network), shape or shape_of(field), cond)
        for name in layers or ():
            if name not in found:
                raise ValueError(f"layers: {name!r} of the teacher's network gives no features of x: name another")
        if not found:
            raise ValueError("the teacher's network has no list of blocks: name modules of it by layers=[...]")
        names = list(found)  # in the order in which they ran
        places = range(len(names)) if layers else sorted({max(0, round(k * len(names) / 4) - 1) for k in (1, 2, 3)})
        self.layers = [names[place] for place in places]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.heads = nn.ModuleList(_Head(found[name], width) for name in self.layers).to(device_of(teacher))

    @property
    def field(self) -> NetworkField:
        """The frozen field whose features these are, without its guidance."""
        return unguided(self._teacher[0])

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "TeacherCritic":
        self._teacher[0]._apply(fn, recurse)  # it moves to the device with its heads
        return super()._apply(fn, recurse)

    def draws(self, x: Tensor, generator: Generators, step: int = 0) -> dict[str, Tensor]:
        """The time (n,) and the noise (n, ...) of rows like x."""
        low, high = self.times
        time = low + (high - low) * uniform(len(x), generator).to(x)
        return {"time": time, "noise": normal(x, generator)}

    def forward(self, x: Tensor, *, time: Tensor, noise: Tensor, **cond: Tensor) -> Tensor:
        field = self.field
        noised, _ = field.path.sample(noise, x, time)
        is_shared = is_sharded(field.network)
        told, output = {name: value for name, value in cond.items() if takes(field, name)}, None
        with recording(field.network, self.layers, stop=not is_shared) as seen, suppress(Enough):
            output = field(noised, time, **told)
        logits = torch.stack([head(seen[name], time) for name, head in zip(self.layers, self.heads, strict=True)])
        # Shards are brought together for the way back by the end of a call: so it leads through that.
        return logits.mean(0) + 0 * output.flatten(1).mean(1) if output is not None else logits.mean(0)

    def _try(self, names: Sequence[str], shape: tuple[int, ...], cond: Mapping[str, Tensor] | None) -> dict[str, int]:
        """The channels of the features of those of these modules that see x, in the order in which they run."""
        field, device = self.field, device_of(self._teacher[0])
        inner = field.network
        if cond is not None:
            rows = {name: value[:1].to(device) for name, value in cond.items()}
        else:
            rows = blank_conditions(field, shape, 1, device)
        dtype = next((p.dtype for p in inner.parameters()), torch.float32)
        x = torch.zeros(1, *shape, device=device, dtype=dtype, requires_grad=True)
        with torch.enable_grad(), recording(inner, names) as seen:
            try:
                field(x, 0.5, **rows)
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"the critic teacher: the network {type(inner).__name__} does not run on a row of shape {shape} "
                    f"with {', '.join(rows) or 'no conditions'} ({str(error).splitlines()[0][:120]}): give "
                    "TeacherCritic(teacher, shape=..., cond=...) rows that it takes"
                ) from error
            return {name: tokens_of(value).shape[-1] for name, value in seen.items() if value.requires_grad}


class _Head(nn.Module):
    """Features (n, ...) at times (n,) as a logit a row, (n,)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(channels, width)
        self.time = nn.Linear(_FREQUENCIES, width, bias=False)
        self.last = nn.Linear(width, 1)

    def forward(self, features: Tensor, time: Tensor) -> Tensor:
        weight = self.first.weight
        tokens = tokens_of(features).to(weight.dtype)
        told = self.time(sinusoidal(time.to(weight.dtype), _FREQUENCIES, low=0.5, high=30.0))
        h = self.first(nn.functional.layer_norm(tokens, tokens.shape[-1:])) + told[:, None]
        return self.last(nn.functional.silu(h)).mean((1, 2))


def tokens_of(features: Tensor) -> Tensor:
    """Features as (n, tokens, channels): of images (n, C, H, W), of tokens (n, T, C) as they are, of points (n, C)."""
    if features.ndim == 2:
        return features[:, None]
    return features if features.ndim == 3 else features.flatten(2).transpose(1, 2)


def blocks_of(network: nn.Module) -> list[str]:
    """The names of a network's blocks: the entries of its outermost lists of modules; without any, its children."""

    def entries(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            if isinstance(module, nn.ModuleList | nn.Sequential):
                yield prefix + name
            else:
                yield from entries(child, f"{prefix}{name}.")

    return list(entries(network, "")) or [name for name, _ in network.named_children()]


class Enough(Exception):  # noqa: N818
    """The last of the layers has run."""


@contextmanager
def recording(network: nn.Module, names: Sequence[str], stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Inside, what modules of a network give, by name, as they run: the last tensor of what a module returns, which in
    the models of diffusers is the state.

    Args:
        stop: leave the call, by an exception, once all have run.

    Raises:
        ValueError: the network has no module of that name.
    """
    modules, seen = dict(network.named_modules()), dict[str, Tensor]()

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, given: Any, output: Any) -> None:
            tensors = [
                value
                for value in (output if isinstance(output, tuple | list) else [output])
                if isinstance(value, Tensor)
            ]
            if tensors:
                seen[name] = tensors[-1]
            if stop and len(seen) == len(names):
                raise Enough

        return keep

    for name in names:
        if name not in modules:
            raise unknown("module of the teacher's network", name, blocks_of(network))
    handles = [modules[name].register_forward_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
