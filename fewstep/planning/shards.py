"""What each of several GPUs keeps, gathers and sends where a training is sharded (``training.shard: fsdp2``)."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fewstep.planning.parts import Part, parts_of
from fewstep.training.sharding import units_of

Places = list[tuple[nn.Module, str]]
# A network is whole in units: the one that computes, and the next, which comes in the meantime.
AT_ONCE = 2


@dataclass
class Calls:
    """How often a network is called in a micro-batch, and how often of these it is gone back through."""

    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Network:
    """A network that is shared out, in bytes as they are sent. ``blocks``, and ``root``, which no block has. ``call``
    is brought together by a call. What follows from numbers that need no gradient, times and labels, goes the way back
    once for all calls: ``once`` of it is brought together, ``of_root`` of its gradients are added up. ``widest``: the
    gradients of a block, ``back`` those of all that go back with every call."""

    root: int
    blocks: tuple[int, ...]
    call: int
    once: int
    back: int
    of_root: int
    widest: int
    calls: Calls


@dataclass(frozen=True)
class Shards:
    """What the processes of a sharded training keep, by their number; all but ``parts`` on the busiest one.

    ``parts`` is called with a number of GPUs; ``whole``: bytes of gradients of what is not sharded, which every
    micro-batch adds up.
    """

    networks: tuple[Network, ...]
    whole: int
    holders: dict[str, Any]
    sharded: frozenset[int]
    offload: bool

    @classmethod
    def of(
        cls,
        networks: Mapping[nn.Module, Places],
        calls: Mapping[nn.Module, Calls],
        half: torch.dtype | None,
        offload: bool,
        holders: dict[str, Any],
    ) -> "Shards":
        """Of the networks of a run, called so often in a micro-batch.

        Args:
            half: the autocast type, in which blocks are sent.
            holders: the arguments of :func:`parts_of`.
        """
        sharded = frozenset(id(p) for network in networks for p in network.parameters())
        found = tuple(_network(net, places[0][0], calls[net], half) for net, places in networks.items())
        whole = sum(p.nbytes for p in holders["trained"] if id(p) not in sharded)
        return cls(found, whole, holders, sharded, offload)

    def parts(self, gpus: int) -> tuple[Part, ...]:
        """What lies in the memory of a GPU throughout; of a sharded tensor its share of the rows, the last of which a
        process without them keeps empty. With ``offload`` this is the memory of the CPU."""
        return parts_of(**self.holders, kept=lambda tensor: self._kept(tensor, gpus))

    def _kept(self, tensor: Tensor, gpus: int) -> int:
        if id(tensor) not in self.sharded:
            return tensor.numel()
        return -(-len(tensor) // gpus) * math.prod(tensor.shape[1:])

    def fixed(self, gpus: int) -> int:
        """Bytes of a GPU throughout."""
        if self.offload:  # what is not shared out stays
            whole = lambda tensor: 0 if id(tensor) in self.sharded else tensor.numel()  # noqa: E731
            return sum(part.bytes for part in parts_of(**self.holders, kept=whole))
        return sum(part.bytes for part in self.parts(gpus))

    @property
    def gathered(self) -> int:
        """Bytes of what is whole at once, at most: the root of the network that computes, the largest two of its
        blocks, and their gradients before they are shared out."""

        def most(network: Network) -> int:
            blocks = sum(sorted(network.blocks)[-AT_ONCE:])
            return network.root + blocks + network.of_root + min(AT_ONCE, len(network.blocks)) * network.widest

        return max(map(most, self.networks), default=0)

    def sent(self, gpus: int) -> int:
        """Bytes that a GPU sends in a micro-batch, and as many that it gets: blocks of every call, and of every call
        that is gone back through once more, with their gradients."""
        total = 0
        for network in self.networks:
            ways = network.calls.backward
            total += network.calls.forward * network.call + ways * (sum(network.blocks) - network.once + network.root)
            total += ways * network.back + (network.once + network.of_root if ways else 0)
        return math.ceil((total + 2 * self.whole) * (gpus - 1) / gpus)


def _network(network: nn.Module, holder: nn.Module, calls: Calls, half: torch.dtype | None) -> Network:
    seen: set[int] = set()
    blocks, gradients = [], []
    for unit in units_of(network, holder):
        own = [p for p in unit.parameters() if id(p) not in seen]
        seen.update(map(id, own))
        blocks.append(sum(p.numel() * (p.itemsize if half is None else half.itemsize) for p in own))
        gradients.append(sum(_gradient(p) for p in own))
    root = [p for p in network.parameters() if id(p) not in seen]
    of_root = sum(p.nbytes for p in root)
    apart = len(getattr(holder, "apart", ()))  # they come first, and are called inside a block and from outside of it
    return Network(
        root=of_root,
        blocks=tuple(blocks),
        call=of_root + sum(blocks) + sum(blocks[:apart]),
        once=of_root + sum(blocks[:apart]),
        back=sum(gradients[apart:]),
        of_root=sum(map(_gradient, root)) + sum(gradients[:apart]),
        widest=max(gradients, default=0),
        calls=calls,
    )


def _gradient(parameter: nn.Parameter) -> int:
    """Bytes of its gradient as it is summed: float32 at least."""
    return parameter.numel() * max(4, parameter.itemsize) if parameter.requires_grad else 0


@contextmanager
def calls_of(networks: Mapping[nn.Module, Places]) -> Iterator[dict[nn.Module, Calls]]:
    """Counts, inside, how often networks are called."""
    calls = {network: Calls() for network in networks}

    def hook(network: nn.Module, _: Any, output: Any) -> None:
        calls[network].forward += 1
        leaves = (value for value in tree_leaves(output) if isinstance(value, Tensor))
        calls[network].backward += any(value.requires_grad for value in leaves)

    handles = [network.register_forward_hook(hook) for network in networks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
