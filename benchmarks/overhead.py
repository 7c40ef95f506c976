"""What fewstep costs beside the work it is for: ratios, all in one run, medians of interleaved rounds.

    python benchmarks/overhead.py                        # all parts, some 15 minutes on two cores
    python benchmarks/overhead.py --parts threads fit --rounds 7 --out overhead.json

* threads: steps a second of ``fit`` with torch's default threads, with one, with threads that sleep at once, and as
  fewstep settles it; alone, and beside a program that takes one core. (!) marks what is under 0.7 of the best.
* fit: a training of the checkerboard over a loop by hand with the same bits, for one chunk and for chunks of 64.
* loss: ITVM's loss over the same by hand, with networks that take no time.
* draw: one sample in one step over a bare call of a DiT of 4 million parameters, and what a step more takes by itself.
* start: CPU seconds of commands, and of importing torch alone.
* evaluation: the exact field of the checkerboard over the same with both of its forms at every row.
* derivative: MeanFlow and LMD with the derivative forward and by differences: time over flow matching, and how far the
  derivative is from that in float64.

CPU time on one thread, except for threads (the clock). Writes what was measured, with the command, commit and machine.
"""

# ruff: noqa: B023  (each function is called in its own turn of the loop)

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

PARTS = ("threads", "fit", "loss", "draw", "start", "evaluation", "derivative")
CORES = len(os.sched_getaffinity(0))
# What a child of the part `threads` has in its environment; the first imports torch before fewstep, which leaves it.
WAYS = {
    "torch's default": {"OMP_NUM_THREADS": str(CORES)},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "sleep at once": {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "PASSIVE"},
    "fewstep": {},
}
NETWORKS = ("mlp", "unet", "dit")
COMMANDS = {
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    "distill checkerboard-itvm --steps 10": ["distill", "checkerboard-itvm", "--steps", "10"],
    "refused by its recipe": ["plan", "sdxl-itvm", "--training.batch", "100", "--training.chunk", "64"],
    "refused by its parts": ["plan", "sdxl-itvm", "--objective", "ITVX"],
}


def cpu_time(function: Callable[[], Any], times: int = 1) -> float:
    start = time.process_time()
    for _ in range(times):
        function()
    return (time.process_time() - start) / times


def ratio(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> dict[str, float]:
    """The median of the ratios within rounds, in which now one and now the other is first."""
    ours(), theirs()
    found = []
    for n in range(rounds):
        first, second = (ours, theirs) if n % 2 else (theirs, ours)
        a, b = first(), second()
        found.append((a, b) if n % 2 else (b, a))
    return {
        "ratio": statistics.median(a / b for a, b in found),
        "ours_ms": 1e3 * statistics.median(a for a, _ in found),
        "reference_ms": 1e3 * statistics.median(b for _, b in found),
    }


# Threads: children that train when they are told to, for some seconds


def network_of(kind: str) -> tuple[Any, Any, Any, int]:
    """A student, its teacher, its data and its batch."""
    import torch

    import fewstep
    from fewstep import networks
    from fewstep.data import load_data
    from fewstep.data.arrays import ArrayData

    torch.manual_seed(0)
    if kind == "mlp":
        teacher = fewstep.CheckerboardField()
        network = networks.MLP(2, width=128, times=2)
        return fewstep.FlowMap.from_field(teacher, network), teacher, load_data("checkerboard"), 1024
    if kind == "unet":
        teacher, shape, batch = fewstep.load("fewstep:fashion-mnist"), (1, 28, 28), 64
    else:
        teacher, shape, batch = dit(), (4, 16, 16), 16
    data = ArrayData(torch.randn(256, *shape), {"class_labels": torch.arange(256) % 10})
    return fewstep.FlowMap.from_field(teacher), teacher, data, batch


def dit() -> Any:
    from diffusers import DiTTransformer2DModel

    from fewstep import networks
    from fewstep.flows.fields import NetworkField
    from fewstep.flows.paths import Linear, VariancePreserving

    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=48, in_channels=4, out_channels=4, num_layers=6, sample_size=16,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return NetworkField(networks.DiT(model), VariancePreserving(), "noise", path=Linear())


def child(way: str) -> None:
    if way == "torch's default":
        import torch  # noqa: F401
    import fewstep

    made = {}
    for line in sys.stdin:
        kind, seconds = line.split()
        student, teacher, data, batch = made.setdefault(kind, network_of(kind))
        stamps: list[float] = []
        threads: list[int] = []

        def note(run: Any, stamps: list[float] = stamps, threads: list[int] = threads) -> None:
            stamps.append(time.perf_counter())
            threads.append(run.threads)

        fewstep.fit(
            student, fewstep.ITVM(teacher), data, max_seconds=float(seconds), batch=batch, chunk=batch, quiet=True,
            callbacks=[note],
        )  # fmt: skip
        steps = [b - a for a, b in pairwise(stamps)] or [float(seconds)]
        print(json.dumps({"rate": 1 / statistics.median(steps), "threads": threads[0]}), flush=True)


def measure_threads(rounds: int) -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_", "GOMP_", "KMP_"))}
    children = {
        way: subprocess.Popen(
            [sys.executable, __file__, "--child", way], env=env | more, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, bufsize=1,
        )
        for way, more in WAYS.items()
    }  # fmt: skip

    def ask(way: str, kind: str, seconds: float) -> dict[str, Any]:
        process: Any = children[way]
        process.stdin.write(f"{kind} {seconds}\n")
        return json.loads(process.stdout.readline())

    found: dict[str, Any] = {}
    for kind in NETWORKS:
        for way in WAYS:
            ask(way, kind, 0.5)  # made, and warm
        for state in ("idle", "busy"):
            rates: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for n in range(rounds):
                for way in list(WAYS)[:: 1 if n % 2 else -1]:
                    busy = [sys.executable, "-S", "-c", "while True: pass"]
                    neighbour = subprocess.Popen(busy) if state == "busy" else None
                    time.sleep(0.3)
                    rates[way].append(ask(way, kind, 1.5 if kind == "mlp" else 4.0))
                    if neighbour is not None:
                        neighbour.kill()
                        neighbour.wait()
            middle = {way: statistics.median(r["rate"] for r in some) for way, some in rates.items()}
            best = max(middle.values())
            found[f"{kind}, {state}"] = {
                "steps_per_second": middle,
                "of_the_best": {way: rate / best for way, rate in middle.items()},
                "fewstep_threads": sorted(r["threads"] for r in rates["fewstep"]),
            }
            shown = ", ".join(
                f"{way} {rate:.3g}{' (!)' if rate < 0.7 * best and way == 'fewstep' else ''}"
                for way, rate in middle.items()
            )
            print(
                f"threads: {kind}, {state}: {shown} steps/s; fewstep took {rates['fewstep'][0]['threads']}", flush=True
            )
    for process in children.values():
        process.kill()
    return found


# By hand: the loss of ITVM and the loop around it


def draw_by_hand(rows: int, chunk: int, generators: list[Any]) -> tuple[Any, ...]:
    import torch

    def each(draw: Callable[[Any], Any]) -> Any:
        return draw(generators[0]) if len(generators) == 1 else torch.cat([draw(g) for g in generators])

    noise = each(lambda g: torch.randn((chunk, 2), generator=g))
    a, b, to_zero, to_one, start, _ = (each(lambda g: torch.rand(chunk, generator=g)) for _ in range(6))
    s = torch.where(to_zero < 0.02, 0.0, torch.minimum(a, b))
    t = torch.where(to_one < 0.02, 1.0, torch.maximum(a, b))
    return noise, s, t, start


def split_by_hand(rows: int, chunk: int) -> tuple[Any, Any]:
    import torch

    if chunk == rows:
        return slice(0, rows // 2), slice(rows // 2, rows)
    first = torch.arange(rows) % chunk < chunk // 2
    return first.nonzero().flatten(), (~first).nonzero().flatten()


def loss_by_hand(
    network: Any, slow: Any, teacher: Any, data: Any, parts: tuple[Any, Any], drawn: tuple[Any, ...]
) -> Any:
    import torch

    (noise, s, t, start), (first, others) = drawn, parts
    s[first] = t[first] = start[first]
    x = s[:, None] * data + (1 - s)[:, None] * noise
    with torch.no_grad():
        velocity = teacher(x[first], s[first])
        far, near, end = x[others], s[others], t[others]
        middle = near + 0.5 * (end - near)
        half = slow(far, near, middle)
        mean = 0.5 * half + 0.5 * slow(far + (middle - near)[:, None] * half, middle, end)
        goal = torch.empty_like(x)
        goal[first], goal[others] = velocity, mean
    error = (network(x, s, t) - goal).square().mean(1)
    return error[first].mean() + error[others].mean()


def measure_fit(rounds: int) -> dict[str, Any]:
    import math
    from copy import deepcopy

    import torch

    import fewstep
    from fewstep.common.randomness import generator

    rows, steps, found = 1024, 40, {}
    for chunk in (1024, 64):
        parts, chunks = split_by_hand(rows, chunk), range(rows // chunk)
        bits: dict[str, Any] = {}

        def by_hand() -> float:
            student, teacher, data, _ = network_of("mlp")
            slow, average = (deepcopy(student).requires_grad_(False) for _ in range(2))
            weights = list(student.parameters())
            optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.0, fused=True)
            copies = [(list(slow.parameters()), lambda n: 0.1), (list(average.parameters()), average_share)]
            start, chosen = time.process_time(), torch.zeros(chunk, dtype=torch.long)
            for n in range(steps):
                drawn = draw_by_hand(rows, chunk, [generator(0, n, c, 2) for c in chunks])
                x = torch.cat([data.rows(chosen, generator(0, n, c, 1)).data for c in chunks])
                loss_by_hand(student.network, slow.network, teacher, x, parts, drawn).backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.param_groups[0]["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * n / steps))
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    for copy, share in copies:
                        torch._foreach_lerp_(copy, weights, share(n))
            bits["by hand"] = weights
            return (time.process_time() - start) / steps

        def fitted() -> float:
            student, teacher, data, _ = network_of("mlp")
            stamps: list[float] = []
            fewstep.fit(
                student, fewstep.ITVM(teacher, ends=0.02), data, steps=steps, batch=rows, chunk=chunk, lr=3e-3,
                quiet=True, callbacks=[lambda run: stamps.append(time.process_time())],
            )  # fmt: skip
            bits["fit"] = list(student.parameters())
            return (stamps[-1] - stamps[0]) / (steps - 1)

        found[f"chunk {chunk}"] = ratio(fitted, by_hand, rounds)
        found[f"chunk {chunk}"]["same_bits"] = all(torch.equal(a, b) for a, b in zip(*bits.values(), strict=True))
        print(f"fit: chunk {chunk}: {found[f'chunk {chunk}']}", flush=True)
    return found


def average_share(step: int) -> float:
    return 1 - min(0.999, (1 + step) / (10 + step))


def measure_loss(rounds: int) -> dict[str, Any]:
    import torch
    from torch import nn

    import fewstep
    from fewstep.common.randomness import generator
    from fewstep.data.batch import Batch
    from fewstep.flows.fields import NetworkField

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Any, *_: Any) -> Any:
            return x * self.scale if self.scale.requires_grad else x

    teacher, student, target = NetworkField(Idle()), fewstep.FlowMap(Idle()), fewstep.FlowMap(Idle())
    objective, data, found = fewstep.ITVM(teacher, ends=0.02), torch.randn(1024, 2), {}
    target.requires_grad_(False)
    for chunk in (1024, 64):
        parts, chunks = split_by_hand(1024, chunk), range(1024 // chunk)

        def ours() -> None:
            draws = [generator(0, 0, c, 2) for c in chunks]
            objective(student, Batch(data), target=target, generator=draws).total.backward()

        def by_hand() -> None:
            drawn = draw_by_hand(1024, chunk, [generator(0, 0, c, 2) for c in chunks])
            loss_by_hand(student.network, target.network, teacher.network, data, parts, drawn).backward()

        found[f"chunk {chunk}"] = ratio(lambda: cpu_time(ours, 50), lambda: cpu_time(by_hand, 50), 3 * rounds)
        print(f"loss: chunk {chunk}: {found[f'chunk {chunk}']}", flush=True)
    return found


def measure_draw(rounds: int) -> dict[str, Any]:
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
    found = {
        "one step": ratio(lambda: cpu_time(lambda: drawn(student, 1), 20), lambda: cpu_time(bare, 20), 3 * rounds),
        "own_share_of_one_step": own[1]["ratio"],
        "own_us_of_one_step": 1e3 * own[1]["ours_ms"],
        "own_us_of_a_step_more": 1e3 * (own[9]["ours_ms"] - own[1]["ours_ms"]) / 8,
    }
    print(f"draw: {found}", flush=True)
    return found


def measure_start(rounds: int) -> dict[str, Any]:
    env, found = {**os.environ, "OMP_NUM_THREADS": "1"}, {}
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
        found[name] = statistics.median(times)
        print(f"start: {name}: {found[name]:.2f} s of CPU", flush=True)
    return found


def measure_evaluation(rounds: int) -> dict[str, Any]:
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
    return found


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


def measure_derivative(rounds: int) -> dict[str, Any]:
    import torch
    from families import FAMILIES

    import fewstep
    from fewstep.evaluation.cost import compare_costs, probes
    from fewstep.objectives.derivative import derivative

    found: dict[str, Any] = {}
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


MEASURES = {part: globals()[f"measure_{part}"] for part in PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description="What fewstep costs beside the work it is for.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("overhead.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child)
    results: dict[str, Any] = {}
    if "threads" in arguments.parts:  # before torch is imported here
        results["threads"] = measure_threads(arguments.rounds)
    if "start" in arguments.parts:
        results["start"] = measure_start(arguments.rounds)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for part in arguments.parts:
        if part not in results:
            results[part] = MEASURES[part](arguments.rounds)
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        here = Path(__file__).parent
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=here, text=True).strip()
    facts = {
        "command": " ".join(["python", *sys.argv]), "commit": commit, "seeds": [0], "rounds": arguments.rounds,
        "machine": platform.machine(), "cores": CORES, "python": platform.python_version(), "torch": torch.__version__,
        "load": os.getloadavg(),
    }  # fmt: skip
    arguments.out.write_text(json.dumps({"facts": facts, **results}, indent=1) + "\n")
    print(f"{arguments.out} has it all")


if __name__ == "__main__":
    main()
