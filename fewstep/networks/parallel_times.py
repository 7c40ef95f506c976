"""Several times in one call: a network whose rows at K times of one sample see each other, through Fourier layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from fewstep.common.options import arguments
from fewstep.networks.mlp import MLP


class FourierLayer(nn.Module):
    """``h + leaky_relu(S h)`` over the K times of each sample: S keeps the first ``modes`` of the DFT over them, and
    multiplies each by a complex matrix of channels: a block-circulant matrix (arXiv 2211.13449, in float32 at least).

    Args:
        channels: the second axis of h. count: K; rows come in groups of K. modes: all of them are K // 2 + 1.
    """

    def __init__(self, channels: int, count: int, modes: int) -> None:
        super().__init__()
        self.count = count
        # Real and imaginary parts; small, so that at first the network is nearly what it was.
        self.weight = nn.Parameter(torch.rand(modes, channels, channels, 2) / channels**2)

    def forward(self, h: Tensor) -> Tensor:
        """(B K, C, ...), of the shape and type of h."""
        with torch.autocast(h.device.type, enabled=False):
            rows = h.reshape(len(h) // self.count, self.count, h.shape[1], -1)
            rows = rows.to(torch.promote_types(h.dtype, torch.float32))
            weight = torch.view_as_complex(self.weight.to(rows))
            modes = torch.einsum("bmip,mio->bmop", torch.fft.rfft(rows, dim=1)[:, : len(weight)], weight)
            mixed = torch.fft.irfft(modes, n=self.count, dim=1).reshape(h.shape)
            return h + leaky_relu(mixed).to(h.dtype)


class _Mixing(nn.Module):
    """A layer, and after it the mixing of times."""

    def __init__(self, layer: nn.Module, fourier: FourierLayer) -> None:
        super().__init__()
        self.layer, self.fourier = layer, fourier

    def forward(self, *given: Any, **named: Any) -> Tensor:
        return self.fourier(self.layer(*given, **named))


class ParallelTimes(nn.Module):
    """A two-time network at s = 0 and K times at once (diffusion operator learning, arXiv 2211.13449): the rows of one
    sample at all times go through it together, and after each layer a :class:`FourierLayer` lets them see each other.

    It is called as any other, ``net(x, s, t)``, and knows these times alone. A row is computed at all K whichever is
    asked for; rows that come as one x at each of the times, in order, share that, as in training by
    ``Trajectory(parallel=True)``. Reconstructed from the authors' code; they have one time, we keep the silent second.

    Args:
        network: with two times, an MLP (or the options of one) or a U-Net of diffusers; it is changed in place.
            ``FlowMap.from_field(teacher).network`` starts near its teacher.
        times: the K, as the network is told them: in [0, 1], or for flows of diffusers 1000 (1 - t).
        modes: of the DFT over the times that are kept; the paper has 2 of 3 for K = 4.
        start: the time s = 0, as the network is told it: 0, or 1000.
        layers: names of the modules that are followed by a Fourier layer, with channels on the second axis of their
            output; by default the hidden layers, or residual blocks.

    Raises:
        ValueError: no layers, modes or times; when called at any other time.

    >>> network = ParallelTimes(MLP(2, times=2), [0.25, 0.5, 0.75, 1.0])
    >>> fit(FlowMap(network), Trajectory(diagonal=0, parallel=True), Pairs("states"), steps=20_000)
    """

    times: Tensor

    def __init__(
        self, network: Any, times: Sequence[float], modes: int = 2, start: float = 0.0, layers: Sequence[str] = ()
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            network = MLP(**arguments("the network of ParallelTimes", MLP, network))
        modules = dict(network.named_modules())
        names = list(layers) or [
            name
            for name, layer in modules.items()
            if type(layer).__name__ == "ResnetBlock2D" or (isinstance(network, MLP) and name.startswith("hidden."))
        ]
        if not names or not 1 <= modes <= len(times) // 2 + 1:
            raise ValueError(
                f"ParallelTimes of {len(names)} layers, {len(times)} times and {modes} modes: there is one layer at "
                "least (say layers for a network of your own), and 1 to K // 2 + 1 modes"
            )
        for name in names:
            parent, _, own = name.rpartition(".")
            sizes = vars(modules[name])
            channels = sizes["out_features"] if "out_features" in sizes else sizes["out_channels"]
            setattr(modules[parent], own, _Mixing(modules[name], FourierLayer(channels, len(times), modes)))
        self.network, self.start, self.modes, self.layers = network, start, modes, list(layers)
        self.register_buffer("times", torch.tensor(list(times), dtype=torch.float64), persistent=False)

    @property
    def config(self) -> dict[str, Any]:
        """What it is made again from, around an MLP."""
        if not isinstance(self.network, MLP):
            raise ValueError("a ParallelTimes is made again around an MLP alone: of another keep state_dict()")
        said = {"times": self.times.tolist(), "modes": self.modes, "start": self.start, "layers": self.layers}
        return {"network": self.network.config, **said}

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.network.config["dim"],) if isinstance(self.network, MLP) else self.network.shape  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor, s: Tensor, t: Tensor, **cond: Any) -> Tensor:
        times, count = self.times.to(t), len(self.times)
        which, slack = (t[:, None] - times).abs().argmin(1), 1e-4 * max(1.0, abs(self.start))
        if ((s - self.start).abs() > slack).any() or ((t - times[which]).abs() > slack).any():
            raise ValueError(
                f"this ParallelTimes knows the way from {self.start:g} to {times.tolist()} alone, and no other times: "
                "sample it in one step"
            )
        order = torch.arange(count, device=x.device)
        if torch.equal(which, order.repeat(len(x) // count)) and torch.equal(x, x[::count].repeat_interleave(count, 0)):
            return self.network(x, s, t, **cond)

        def each(value: Any) -> Any:
            return value.repeat_interleave(count, 0) if isinstance(value, Tensor) and value.ndim else value

        told = {name: each(value) for name, value in cond.items()}
        y = self.network(each(x), each(s), times.repeat(len(x)), **told)
        return y.unflatten(0, (len(x), count))[torch.arange(len(x), device=x.device), which]
