"""The parts `draw`, `start`, `evaluation` and `derivative` of overhead.py."""

# ruff: noqa: B023  (each function is called in its own turn of the loop)

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from overhead_common import Found, cpu_time, dit, ratio

COMMANDS = {
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    "distill checkerboard-itvm --steps 10": ["distill", "checkerboard-itvm", "--steps", "10"],
    "refused by its recipe": ["plan", "sdxl-itvm", "--training.batch", "100", "--training.chunk", "64"],
    "refused by its parts": ["plan", "sdxl-itvm", "--objective", "ITVX"],
}


def measure_draw(rounds: int) -> Found:
    import torch
    from torch import nn

    from fewstep.flows.maps import FlowMap
    from fewstep.generation.drawing import draw

    class Idle(nn.Module):
        def forward(self, x: Any, *_: Any, **__: Any) -> Any:
            return x

    student = FlowMap.from_field(dit()).eval().requires_grad_(False)
    idle = FlowMap(Idle(), student.native, student.prediction, path=student.path)
    x, label = torch.randn(1, 4, 16, 16), torch.zeros(1, dtype=torch.long)

    @torch.no_grad()
    def bare() -> None:
        student.network(x, torch.zeros(1), torch.ones(1), class_labels=label)

    def drawn(model: FlowMap, steps: int) -> None:
        draw(model, 1, steps, shape=(4, 16, 16), given={"class_labels": label})

    drawn(student, 1)
    own = {
        n: ratio(lambda n=n: cpu_time(lambda: drawn(idle, n), 50), lambda: cpu_time(bare, 20), rounds) for n in (1, 9)
    }
    found: Found = {
        "a DiT of 4 million parameters": {
            "one step": ratio(lambda: cpu_time(lambda: drawn(student, 1), 20), lambda: cpu_time(bare, 20), 3 * rounds),
            "own_share_of_one_step": own[1]["ratio"],
            "own_us_of_one_step": 1e3 * own[1]["ours_ms"],
            "own_us_of_a_step_more": 1e3 * (own[9]["ours_ms"] - own[1]["ours_ms"]) / 8,
        }
    }
    print(f"draw: {found}", flush=True)
    return found


def measure_start(rounds: int) -> Found:
    env: dict[str, str] = {**os.environ, "OMP_NUM_THREADS": "1"}
    found: Found = {}
    for name, words in COMMANDS.items():
        times = []
        for _ in range(min(rounds, 3)):
            with tempfile.TemporaryDirectory() as folder:
                command = words if words[0] == sys.executable else [sys.executable, "-m", "fewstep", *words]
                command = [*command, "--out", f"{folder}/run"] if words[0] == "distill" else command
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run(command, env=env, capture_output=True, check=False)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        found[name] = {"cpu_seconds": statistics.median(times)}
        print(f"start: {name}: {found[name]['cpu_seconds']:.2f} s of CPU", flush=True)
    return found


def measure_evaluation(rounds: int) -> Found:
    import torch

    from fewstep.flows import exact

    def everywhere(x: Any, sides: Any, a: Any, s: Any) -> tuple[Any, ...]:
        low, high = sides.unbind(1)
        middle, width = (low + high) / 2, high - low
        z, d = (x - a * middle) / s, a * width / s
        narrow = (d < 0.02) & (d * z.abs() < 2)
        some = exact._narrow(z.where(narrow, 0.0), d.where(narrow, 0.0), middle, width)
        l, u = ((x - a * side) / s for side in (high, low))
        others = exact._wide(l.where(~narrow, -1.0), u.where(~narrow, 0.0), z, d.where(~narrow, 1.0), middle, width)
        log, data, noise = (torch.where(narrow, one, other) for one, other in zip(some, others, strict=True))
        return width.log() + log, data.clamp(low, high), noise

    field, x, ours = exact.CheckerboardField(), torch.randn(10_000, 2), exact._truncated
    times = torch.linspace(0, 1, 11)

    def run(form: Any) -> float:
        exact._truncated = form
        return cpu_time(lambda: [field(x, float(t)) for t in times])

    found = ratio(lambda: run(ours), lambda: run(everywhere), rounds)
    exact._truncated = ours
    print(f"evaluation: {found}", flush=True)
    return {"checkerboard": {**found}}


def gradients_apart(student: Any, teacher: Any, batch: Any) -> float:
    """How far the gradient of LMD by differences is from that of forward mode, of the same rows and times."""
    import torch

    import fewstep

    gradients = []
    for mode in ("forward", "difference"):
        student.zero_grad()
        draw = torch.Generator().manual_seed(1)
        loss = fewstep.LMD(teacher, jvp=mode)(student, batch, target=None, progress=1.0, step=0, generator=draw)
        loss.total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


def measure_derivative(rounds: int) -> Found:
    import torch
    from families import FAMILIES

    import fewstep
    from fewstep.evaluation.cost import compare_costs, probes
    from fewstep.objectives.derivative import derivative

    found: Found = {}
    for name in ("MLP", "UNet2DModel", "DiTTransformer2DModel"):
        family = FAMILIES[name]
        teacher, batch = family.field(), family.batch()
        student = fewstep.FlowMap.from_field(teacher).requires_grad_(True)
        entries = {"trained": probes(student)["trained"]}
        for mode in ("forward", "difference"):
            entries[f"MeanFlow, {mode}"] = student, fewstep.MeanFlow(diagonal=0.25, jvp=mode), None
            entries[f"LMD, {mode}"] = student, fewstep.LMD(teacher, jvp=mode), None
        costs = compare_costs(entries, batch, rounds)
        of = {label: cost.over(costs["trained"]) for label, cost in costs.items() if label != "trained"}
        errors = {}
        noise = torch.randn_like(batch.data)
        for mode in ("forward", "difference"):
            slopes = []
            for dtype, how in ((torch.float32, mode), (torch.float64, "forward")):
                model = student.to(dtype)
                x, s = noise.to(dtype), torch.linspace(0.05, 0.45, len(noise), dtype=dtype)
                cond = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.cond.items()}
                along = (batch.data.to(dtype) - x, torch.ones_like(s))
                with torch.no_grad():
                    call = lambda x, s: model.average_velocity(x, s, s + 0.5, **cond)  # noqa: E731
                    slopes.append(derivative(call, (x, s), along, how)[1].double())
            student.to(torch.float32)
            errors[mode] = float((slopes[0] - slopes[1]).norm() / slopes[1].norm())
        found[name] = {
            "time_over_flow_matching": of,
            "relative_error_of_the_derivative": errors,
            "gradient_of_LMD_off_by": gradients_apart(student, teacher, batch),
        }
        print(f"derivative: {name}: {found[name]}", flush=True)
    return found
