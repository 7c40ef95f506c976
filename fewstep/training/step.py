"""What one update is made of: the loss as a module (so that DDP sees one forward), gradients, optimizers."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import CheckpointError

from fewstep.common.distributed import World, summed
from fewstep.common.errors import TrainingError, briefly, is_out_of_memory
from fewstep.common.randomness import Generators, mix
from fewstep.common.shards import is_shard, local
from fewstep.data.batch import Batch
from fewstep.objectives.base import Objective, Player
from fewstep.training.adamw import AdamW
from fewstep.training.eight_bits import adamw8bit

_DROPOUT = 3  # after the words of the rows (1) and the noise (2) of a step
_SMALLEST_SCALE = 1e-4


class Step(nn.Module):
    """The loss of one micro-batch. An objective calls the student several times, by several methods; wrapping both
    in one module gives DistributedDataParallel the single forward that it wants."""

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.student, self.objective = student, objective

    def forward(
        self, batch: Batch, noise: Generators, target: nn.Module | None, progress: float, step: int
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The scalar to descend, all numbers to log, and the times that each term saw."""
        try:
            loss = self.objective(self.student, batch, target=target, progress=progress, step=step, generator=noise)
        except (RuntimeError, TypeError, ArithmeticError, LookupError) as error:
            if step > 0 or is_out_of_memory(error):
                raise
            conditions = f" and conditions {', '.join(batch.cond)}" if batch.cond else ""
            raise ValueError(
                f"the first step failed on {len(batch)} rows of shape {tuple(batch.data.shape[1:])}{conditions}: do "
                f"the data fit the network? ({briefly(error)})"
            ) from error
        numbers = {f"loss/{name}": value.detach() for name, value in (loss.terms | loss.others).items()}
        if loss.total.requires_grad:  # the student's own, and only where it moves
            numbers = {"loss": loss.total.detach(), **numbers}
        return loss.descended, numbers, loss.times


def rehearsal(model: Step) -> Step:
    """A copy of the model, to take steps with that change nothing; what does not train in it is the same tensors."""
    still = [p for p in (*model.student.parameters(), *model.objective.parameters()) if not p.requires_grad]
    teachers = [model.objective.teacher] if model.objective.has_teacher else []
    return deepcopy(model, {id(part): part for part in (*still, *teachers)})


def parallel(model: Step, world: World) -> nn.Module:
    """The model, its gradients averaged over processes during the backward pass."""
    if world.size == 1:
        return model
    # A term may use no part of some parameter (a label embedding, a phase of training): their gradients stay None on
    # all processes then, as they do on one. Where all are used, torch warns of the cost, which is small.
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
    return DistributedDataParallel(model, find_unused_parameters=True)


def syncing(model: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
    """Processes share gradients in the last micro-batch of a step alone."""
    return nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def players_of(objective: Objective, student: nn.Module) -> dict[str, Player]:
    """Who trains.

    Raises:
        ValueError: a player has nothing to train.
    """
    players = {name: Player.of(group) for name, group in objective.parameter_groups(student).items()}
    for name, player in players.items():
        if not player.parameters:
            raise ValueError(f"{name!r} has no parameter with requires_grad: there is nothing to train")
    return players


def adamw(
    players: dict[str, Player],
    device: torch.device,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eight_bit: bool = False,
) -> dict[str, torch.optim.Optimizer]:
    """One AdamW a player, of the shares of its parameters that this process keeps; its moments in 8 bits, if so."""
    made: dict[str, torch.optim.Optimizer] = {}
    for name, player in players.items():
        parameters = [nn.Parameter(local(p)) if is_shard(p) else p for p in player.parameters]
        options: dict[str, Any] = {"betas": player.betas or betas, "weight_decay": weight_decay}
        if eight_bit:
            made[name] = adamw8bit(parameters, lr=lr * player.lr, **options)
        else:  # fused is three times as fast as foreach on small networks
            made[name] = AdamW(parameters, lr=lr * player.lr, fused=device.type in ("cpu", "cuda"), **options)
    return made


def update(
    players: dict[str, Player],
    optimizers: dict[str, torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    lr: float,
    clip: float | None,
) -> dict[str, Tensor]:
    """The step of every player that has gradients; returns their norms before clipping. A player without any stands
    still: in half precision too, where the scaler would not take it."""
    norms: dict[str, Tensor] = {}
    for name, player in players.items():
        optimizer, parameters = optimizers[name], [p for p in player.parameters if p.grad is not None]
        if not parameters:
            continue
        own = [p for group in optimizer.param_groups for p in group["params"]]
        for share, parameter in zip(own, player.parameters, strict=True):
            if share is not parameter:
                share.grad = None if parameter.grad is None else local(parameter.grad)
        scaler.unscale_(optimizer)
        norms[name] = norm = gradient_norm(parameters)
        if (limit := clip if player.clip == "training" else player.clip) is not None:
            clip_grads_with_norm_(own, limit, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr * player.lr
        scaler.step(optimizer)
        for parameter in (*own, *parameters):  # optimizer.zero_grad, without its detour of 100 us through dynamo
            parameter.grad = None
    if norms:
        scaler.update()
    return norms


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of the gradients of parameters, those that are sharded over all processes."""
    shards = [local(p.grad) for p in parameters if p.grad is not None and is_shard(p)]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None and not is_shard(p)])
    if not shards:
        return norm
    return torch.hypot(norm.to(shards[0].device), summed(get_total_norm(shards).square()).sqrt())


def norm_names(norms: dict[str, Tensor], players: dict[str, Player]) -> dict[str, Tensor]:
    """The norms of gradients as they are logged: by player, where there is more than one."""
    return {"grad_norm" if len(players) == 1 else f"grad_norm/{name}": norm for name, norm in norms.items()}


def check_scale(scaler: torch.amp.GradScaler, step: int) -> None:
    """Refuse to go on when fp16 gradients overflow at any scale: no update is made any more."""
    if scaler.is_enabled() and scaler.get_scale() < _SMALLEST_SCALE:
        raise TrainingError(
            f"step {step}: the fp16 gradients overflow at every scale (now {scaler.get_scale():.1g}), so no update is "
            "made any more. The last checkpoint is whole; use precision='bf16' or 'float32'"
        )


@contextmanager
def checkpoints_followed(objective: Objective) -> Iterator[None]:
    """Says so, where gradient checkpoints cannot follow what an objective asks of the network.

    Raises:
        ValueError: it goes back through a forward derivative of the network.
    """
    try:
        yield
    except CheckpointError:
        raise ValueError(
            f"gradient_checkpointing: {type(objective).__name__} differentiates the network forward and back through "
            "that, which checkpoints cannot follow: leave it out, or have differences in the place of the derivative "
            "(jvp: difference) where the objective has the choice"
        ) from None


def seed_dropout(device: torch.device, seed: int, step: int, rank: int) -> None:
    """Fix what draws from torch's global generators (dropout), anew at each step: there is no state to restore."""
    word = mix(seed, step, rank, _DROPOUT)
    # Not torch.manual_seed, which visits every kind of device and takes ten times as long.
    torch.default_generator.manual_seed(word)
    if device.type == "cuda":
        torch.cuda.manual_seed(word)
