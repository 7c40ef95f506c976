"""The parts `fit` and `loss` of overhead.py: a training and ITVM's loss over the same written by hand."""

# ruff: noqa: B023  (each function is called in its own turn of the loop)

import time
from collections.abc import Callable
from typing import Any

from overhead_common import Found, cpu_time, network_of, ratio


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


def measure_fit(rounds: int) -> Found:
    import math
    from copy import deepcopy

    import torch

    import fewstep
    from fewstep.common.randomness import generator

    rows, steps = 1024, 40
    found: Found = {}
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


def measure_loss(rounds: int) -> Found:
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
    objective, data = fewstep.ITVM(teacher, ends=0.02), torch.randn(1024, 2)
    found: Found = {}
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
