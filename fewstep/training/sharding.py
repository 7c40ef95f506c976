"""Weights, gradients, moments and averages shared out over the processes, by torch's ``fully_shard``.

An objective calls student, teacher and copies several times in a step, by several methods. All of these end in a call
of a network, so it is the networks that are sharded: each block of one is a unit, which is whole on a process only
while it computes. Between two calls every parameter of a network is a ``DTensor``, of which a process keeps its rows:
averages follow, and optimizers move, those rows alone. What has no network, such as the weights of an objective and a
small critic, stays whole on every process, and its gradients are averaged after the backward pass.
"""

import warnings
from collections.abc import Iterable, Iterator
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewstep.common.distributed import World
from fewstep.common.errors import unknown
from fewstep.common.shards import is_shard
from fewstep.networks import OfDiffusers
from fewstep.objectives.base import Objective
from fewstep.objectives.teacher_critic import TeacherCritic

SHARDS = ("fsdp2",)


def check_sharding(
    shard: str | None, offload: bool, student: nn.Module, objective: Objective, *, precision: str, compile: bool
) -> None:
    """Refuse, before anything is spent, what a sharded training does not do.

    Raises:
        ValueError: one line with the way out.
    """
    if shard is None:
        if offload:
            raise ValueError("offload keeps the shards of a sharded training on the CPU: say shard: fsdp2 too")
        return
    if shard not in SHARDS:
        raise unknown("shard", shard, SHARDS)
    if precision == "fp16":
        raise ValueError("shard: fsdp2 has no gradient scaler, which precision: fp16 needs: take bf16 or float32")
    if compile:
        raise ValueError("compile and shard: fsdp2 do not go together yet: leave one of them out")
    for part in (part for whole in (student, objective, *_teachers(objective)) for part in whole.modules()):
        if why := getattr(part, "needs_whole", ""):
            name = type(getattr(part, "model", part)).__name__
            raise ValueError(f"shard: fsdp2 does not go with a {name}: {why}")


def check_alike(network: nn.Module) -> None:
    """That all processes call the same blocks of a network, whatever their rows are.

    Raises:
        ValueError: it has two experts, and a process whose rows ask for one alone would not gather the other's blocks.
    """
    if any(hasattr(part, "is_second") for part in network.modules()):
        raise ValueError(
            "shard: fsdp2 gathers a block on all processes at once, and which of its two experts a "
            f"{type(network).__name__} calls hangs on the rows of each: leave shard out, or train one expert alone"
        )


class Sharding:
    """The networks of a training, shared out over the processes, and what it takes to train them.

    Args:
        world: the processes, one of which may be all there are.
        device: that of this process.
        half: the autocast type. Blocks are then gathered in it, which halves what is sent; the rest of a network, its
            time embedding and its last layer among it, stays as it is. Gradients are summed in float32.
        offload: keep the shards on the CPU; a block comes to the device for its call, and the optimizer runs here.
    """

    def __init__(self, world: World, device: torch.device, half: torch.dtype | None, offload: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        # Of views that are changed in place after a block: none of the models here does, as their gradients show.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        self.world, self.device = world, device
        self._mesh = init_device_mesh(device.type, (world.size,))
        self._half, self._offload = half, offload
        # The networks, who holds each by what name, and a copy without numbers.
        self._roots: list[tuple[Any, list[tuple[nn.Module, str]], nn.Module]] = []
        self._plain: list[nn.Parameter] = []
        self._buffers: list[tuple[nn.Module, str]] = []
        self._seen: dict[tuple[int, str], tuple[int, int]] = {}

    def begin_alike(self, model: nn.Module) -> None:
        """Give every process the weights and the buffers of the main one, before they are copied and shared out."""
        for tensor in chain(model.parameters(), model.buffers()):
            dist.broadcast(tensor.detach(), 0)

    def shard(self, student: nn.Module, objective: Objective, copies: Iterable[nn.Module]) -> None:
        """Share out every network of these, and move the rest to the device."""
        parts = list(dict.fromkeys([student, *copies, objective, *_teachers(objective)]))
        held = networks_of(student, objective, copies)
        shared = _shared_weights(held)
        for network, places in held.items():
            self._roots.append((network, places, _emptied(network)))
            self._share_out(network, units_of(network, places[0][0]))
        for first, *others in shared:  # one shard of a frozen weight serves all networks that have it
            for module, name in others:
                module._parameters[name] = getattr(*first)
        for part in parts:
            part._apply(self._moved_there)
        both = [*student.modules(), *objective.modules()]
        self._plain = [p for part in both for p in part._parameters.values() if p is not None and not is_shard(p)]
        self._plain = list(dict.fromkeys(p for p in self._plain if p.requires_grad))
        self._buffers = [(part, name) for part in both for name in part._buffers]
        self._moved()

    def _moved_there(self, tensor: Any) -> Tensor:
        return tensor if is_shard(tensor) else tensor.to(self.device)

    def _share_out(self, network: nn.Module, units: Iterable[nn.Module]) -> None:
        # Here, as its import takes two seconds.
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        check_alike(network)
        kinds = {p.dtype for p in network.parameters() if p.requires_grad}
        if len(kinds) > 1 or any(not p.is_floating_point() for p in network.parameters()):
            found = sorted({str(p.dtype).removeprefix("torch.") for p in network.parameters()})
            raise ValueError(
                f"shard: fsdp2 shares out weights of which those that train have one type, and none is quantised; a "
                f"{type(network).__name__} here has {', '.join(found)}: leave shard out, or load it in one type"
            )
        policy = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self._offload else OffloadPolicy()
        options: Any = {"mesh": self._mesh, "reshard_after_forward": True, "offload_policy": policy}
        sums = {"reduce_dtype": torch.float32 if kinds <= {torch.float32} else None, "cast_forward_inputs": False}
        for unit in units:
            fully_shard(unit, mp_policy=MixedPrecisionPolicy(param_dtype=self._half, **sums), **options)
        fully_shard(network, mp_policy=MixedPrecisionPolicy(**sums), **options)

    def average_gradients(self) -> None:
        """Average the gradients of what stays whole, over the processes; one that no process has stays absent."""
        if self.world.size == 1 or not self._plain:
            return
        kept = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._plain]
        has = kept[0].new_tensor([p.grad is not None for p in self._plain])
        flat = torch.cat([has, *(grad.flatten().to(has.dtype) for grad in kept)])
        dist.all_reduce(flat)
        has, sums = flat[: len(kept)], flat[len(kept) :].div_(self.world.size)
        for parameter, there, total in zip(
            self._plain, has.tolist(), sums.split([p.numel() for p in self._plain]), strict=True
        ):
            parameter.grad = total.view_as(parameter).to(parameter.dtype) if there else None

    def sync_buffers(self) -> None:
        """Give every process those buffers of the main one that moved in the last step, as DDP does with all."""
        for buffer in self._moved():
            if self.world.size > 1:
                dist.broadcast(buffer, 0)
        self._moved()

    def _moved(self) -> list[Tensor]:
        """The buffers that are others than they were at the last call."""
        places = [(id(part), name, part._buffers[name]) for part, name in self._buffers]
        now = {(part, name): (id(buffer), buffer._version) for part, name, buffer in places if buffer is not None}
        before, self._seen = self._seen, now
        return [x for part, name, x in places if x is not None and before.get((part, name)) != now[part, name]]

    def forget_calls(self) -> None:
        """torch notes each call of a network until its next backward pass, which those that only answer never have."""
        for network, _, _ in self._roots:
            order = getattr(network._get_fsdp_state()._comm_ctx, "post_forward_order", [])  # there from its first call
            order.clear()
            part: Any
            for part in network.modules():
                state = part._get_fsdp_state() if hasattr(part, "_get_fsdp_state") else None
                for group in () if state is None else state._fsdp_param_groups:
                    group._post_forward_indices.clear()

    def put_back(self, student: nn.Module, average: nn.Module, objective: Objective) -> None:
        """Put whole networks, on the CPU, in the place of the sharded ones of student, average and teachers. All
        processes call it."""
        wanted = {place for part in (student, average, *_teachers(objective)) for place in _networks(part)}
        for network, places, whole in self._roots:
            if wanted.isdisjoint(places):
                continue
            weights = {key: _whole(value) for key, value in network.state_dict().items()}
            whole.load_state_dict(weights, assign=True)
            for holder, name in places:
                setattr(holder, name, whole.train(network.training))


def networks_of(
    student: nn.Module, objective: Objective, copies: Iterable[nn.Module]
) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """The networks that are shared out, and who holds each of them by what name."""
    held: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for part in dict.fromkeys([student, *copies, objective, *_teachers(objective)]):
        for holder, name in _networks(part):
            places = held.setdefault(getattr(holder, name), [])
            if (holder, name) not in places:
                places.append((holder, name))
    return held


def units_of(network: nn.Module, holder: nn.Module) -> list[nn.Module]:
    """What is whole while it computes, and a share otherwise: the blocks of a network, and what is called by itself."""
    apart: tuple[str, ...] = getattr(holder, "apart", ())
    return [*map(network.get_submodule, apart), *_blocks(network)]


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The entries of a network's outermost lists of modules, those that have weights."""
    for child in network.children() if not isinstance(network, nn.Sequential) else [network]:
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for entry in child:
                if isinstance(entry, nn.ModuleList):
                    yield from _blocks(entry)
                elif has_weights(entry):
                    yield entry
        else:
            yield from _blocks(child)


def has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _networks(part: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where a part has networks: who holds each, and by which name."""
    for module in part.modules():
        if isinstance(module, OfDiffusers):
            yield module, "model"
            continue
        network = getattr(module, "network", None)
        if isinstance(network, nn.Module) and not isinstance(network, OfDiffusers) and has_weights(network):
            yield module, "network"


def _teachers(objective: Objective) -> list[nn.Module]:
    """The fields that an objective and the parts of it ask, which are no parts of it as modules go."""
    found: list[nn.Module] = []
    for part in objective.modules():
        if isinstance(part, Objective) and part.has_teacher:
            found.append(part.teacher)
        elif isinstance(part, TeacherCritic):
            found.append(part.field)
    return found


def _shared_weights(networks: Iterable[nn.Module]) -> list[list[tuple[nn.Module, str]]]:
    """Frozen weights that several networks have: where each of them is."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for network in networks:
        inside: set[int] = set()
        for module in network.modules():
            for name, weight in module._parameters.items():
                if weight is not None and not weight.requires_grad and id(weight) not in inside:
                    inside.add(id(weight))
                    places.setdefault(id(weight), []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


def _emptied(network: nn.Module) -> nn.Module:
    """A copy of a network whose weights have no numbers."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in network.parameters()
    }
    return deepcopy(network, memo)


def _whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if is_shard(tensor) else tensor).detach().cpu()
