"""Plans of sharded trainings against the bytes that the processes of twins really keep, and send."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toys.sharded import Latents, field_of, launch, objective_of

import fewstep
from fewstep import FlowMap
from fewstep.commands.plan import shard_table
from fewstep.common.randomness import generator
from fewstep.planning.plan import Plan, plan
from fewstep.planning.shards import Shards, calls_of
from fewstep.runs.recipes import load_recipe
from fewstep.training.ema import Ema
from fewstep.training.sharding import networks_of
from fewstep.training.step import Step, players_of

RUNS: dict[str, tuple[str, str, int | None]] = {
    "dit": ("dit", "ITVM", None),
    "sd3": ("sd3", "ITVM", None),
    "flux": ("flux", "PSD", None),
    "qwenimage": ("qwenimage", "ITVM", None),
    "adapter": ("flux", "ITVM", 4),
}
# What each process keeps once a step is done, and what it sent in the second one, by torch's own calls.
SCRIPT = f"""
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from toys.sharded import train
from fewstep.common.shards import local
from fewstep.training import fit as fitting

folder, sent, update = Path(sys.argv[1]), [0], fitting.update
gather, scatter = dist.ProcessGroup.all_gather_single, dist.ProcessGroup.reduce_scatter_single

def counted(function, place):
    def called(group, *tensors, **options):
        sent[0] += tensors[place].nbytes
        return function(group, *tensors, **options)
    return called

dist.ProcessGroup.all_gather_single = counted(gather, 0)
dist.ProcessGroup.reduce_scatter_single = counted(scatter, 1)

def measured(run):
    seen = set()
    def kept(model):
        tensors = [] if model is None else [*model.parameters(), *model.buffers()]
        new = [x for x in tensors if id(x) not in seen]
        seen.update(map(id, new))
        return sum(local(x).nbytes for x in new)
    trained = [p for player in run.players.values() for p in player.parameters]
    seen.update(map(id, trained))
    moments = 0
    for optimizer in run.optimizers.values():
        for p in optimizer.param_groups[0]["params"]:  # one that no call uses has none yet
            made = optimizer.state[p].values() if p in optimizer.state else [p, p]
            moments += sum(x.nbytes for x in made if x.ndim)
    return {{
        "weights that train": sum(local(p).nbytes for p in trained),
        "weights that stay": kept(run.student),
        "teacher": kept(run.objective.teacher),
        "averaged weights": kept(run.ema),
        "slow copy of the objective": kept(run.target),
        "gradients": gradients[0],
        "two moments of AdamW": moments,
    }}

def watched(players, *more):
    # One that no call uses has none; it is planned to have one.
    trained = [p for player in players.values() for p in player.parameters]
    gradients[0] = sum(local(p if p.grad is None else p.grad).nbytes for p in trained)
    return update(players, *more)

gradients, fitting.update = [0], watched
for name, (twin, method, rank) in json.loads({json.dumps(json.dumps(RUNS))}).items():
    found = {{}}
    def look(run):
        found["before" if run.step == 1 else "after"] = sent[0]
        found["kept"] = measured(run)
    train(twin, method, rank=rank, dtype=torch.float32, shard="fsdp2", steps=2, callbacks=[look])
    (folder / f"{{name}}-{{dist.get_rank()}}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch(SCRIPT, folder, 2)
    return folder


def shards_of(twin: str, method: str, rank: int | None) -> Shards:
    """As ``plan`` makes them, of the training that the processes had."""
    teacher = field_of(twin, torch.float32)
    student = FlowMap.from_field(teacher, share=rank is not None)
    if rank is not None:
        fewstep.add_lora(student, rank=rank)
    objective = objective_of(method, teacher)
    objective.adopt(student.train())
    average, target = (None if decay is None else Ema(student, decay).module for decay in (0.999, objective.ema))
    networks = networks_of(student, objective, [copy for copy in (average, target) if copy is not None])
    rows = Latents(twin, torch.float32).rows(torch.arange(8), generator(0))
    with calls_of(networks) as calls:
        Step(student, objective)(rows, [generator(0), generator(1)], target, 0.5, 0)
    trained = [p for player in players_of(objective, student).values() for p in player.parameters]
    holders: dict[str, Any] = {"trained": trained, "student": student, "teacher": teacher, "objective": objective}
    return Shards.of(networks, calls, None, False, {**holders, "average": average, "target": target})


@pytest.mark.takes_seconds
@pytest.mark.parametrize("name", RUNS)
def test_each_process_keeps_and_sends_what_is_planned(two: Path, name: str) -> None:
    shards = shards_of(*RUNS[name])
    planned = {part.name: part.bytes for part in shards.parts(2)}
    for rank in (0, 1):
        found = json.loads((two / f"{name}-{rank}.json").read_text())
        for part, kept in found["kept"].items():
            assert kept == pytest.approx(planned.get(part, 0), rel=0.05), (part, rank)
    # What two send each other is half of what they gather.
    assert (found["after"] - found["before"]) / 2 == pytest.approx(shards.sent(2), rel=0.05)


def test_a_plan_counts_shards() -> None:
    training = {"steps": 2, "batch": 32, "chunk": 8, "accumulate": 2, "shard": "fsdp2"}
    network = {"network": "mlp", "options": {"width": 64, "depth": 2}}
    recipe = {"name": "points", "teacher": "eight-gaussians", "student": network, "data": "eight-gaussians"}
    recipe |= {"objective": "ITVM", "training": training}
    found = plan(load_recipe(recipe))
    whole = {part.name: part.bytes for part in found.parts}
    assert {part.name: part.bytes for part in found.shards.parts(1)} == whole
    half = {part.name: part.bytes for part in found.shards.parts(2)}
    assert half["gradients"] == pytest.approx(whole["gradients"] / 2, rel=0.05)
    assert [found.rows_of(gpus) for gpus in (1, 2, 4, 3)] == [16, 16, 8, None]
    # Twice the micro-batches on half as many rows each: what is sent by micro-batch is sent as often.
    assert found.sent(4, 8) == found.shards.sent(4)
    assert found.sent(2, 8) == 2 * found.shards.sent(2)
    assert found.shards.sent(1) == 0
    columns, rows = shard_table(found)
    assert [row[0] for row in rows] == [1, 2, 4, 8, 16]
    assert all(len(row) == len(columns) for row in rows)


def test_offloaded_shards_are_not_in_the_memory_of_the_gpu() -> None:
    def planned(offload: bool) -> Plan:
        training = {"steps": 2, "batch": 32, "shard": "fsdp2", "offload": offload}
        recipe = {"name": "points", "teacher": "eight-gaussians", "student": {"network": "mlp"}, "training": training}
        return plan(load_recipe({**recipe, "data": "eight-gaussians", "objective": "ITVM"}))

    here, there = planned(False).shards, planned(True).shards
    assert there.parts(2) == here.parts(2)
    assert there.fixed(2) < here.fixed(2) / 50
    assert there.gathered == here.gathered
