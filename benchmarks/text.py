"""Text in a few calls: a flow of one-hot vectors, a map distilled from it, and a masked chain of the same network.

    python benchmarks/text.py FOLDER                  # what is not in FOLDER yet is trained, then all is judged
    python benchmarks/text.py FOLDER --seeds 0 1 2    # three students of one teacher

All have the recipe text-teacher: 32 letters of the reference that Python's help() prints, a transformer of 3 blocks,
2,500 steps of 64 rows; a student has 800 steps of text-itvm. A call of each is a call of that network.

Writes benchmarks/results/text.json (--out), and the texts of the page to --lines.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from record import FOLDER, here, write

import fewstep
from fewstep.common.randomness import generator, sample_generators
from fewstep.evaluation.tokens import bigram_kl, entropy, spelling
from fewstep.flows.sampling import sample_noise
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

COUNT, CALLS = 500, (1, 2, 4, 8, 32)
METRICS = ("bigram_kl", "spelling", "entropy")


def trained(folder: Path, name: str, recipe: str, overrides: dict[str, str]) -> Any:
    """A run in the folder, opened; trained first where it is not there, or gone on with."""
    out = folder / name
    run(load_recipe(recipe, {"evaluation.count": "0", "training.quiet": "true", **overrides}), out)
    return fewstep.load(out)


def judged(model: Any, steps: int, grid: str, seed: int) -> dict[str, float]:
    data = fewstep.load_data("python-topics", split="test")
    known = fewstep.load_data("python-topics", split="all").words
    real = data.tokens(torch.randint(data.size, (COUNT,), generator=generator(seed, 1)))
    drawn = []
    for first in range(0, COUNT, 500):
        generators = sample_generators(seed, range(first, first + 500))
        noise = sample_noise((500, *data.shape), generators)
        drawn.append(model.space.decode(fewstep.sample(model, noise, steps, grid=grid, generator=generators)))
    tokens = torch.cat(drawn)
    return {
        "bigram_kl": bigram_kl(tokens, real, len(data.symbols)),
        "spelling": spelling(tokens, data.symbols, known),
        "entropy": entropy(tokens, len(data.symbols)),
    }


def data_row(seed: int) -> dict[str, float]:
    """The same of as many rows of the part of the text that was trained on."""
    data, test = fewstep.load_data("python-topics"), fewstep.load_data("python-topics", split="test")
    known = fewstep.load_data("python-topics", split="all").words
    draw = generator(seed, 2)
    rows = data.tokens(torch.randint(data.size, (COUNT,), generator=draw))
    real = test.tokens(torch.randint(test.size, (COUNT,), generator=draw))
    size = len(data.symbols)
    return {
        "bigram_kl": bigram_kl(rows, real, size),
        "spelling": spelling(rows, data.symbols, known),
        "entropy": entropy(rows, size),
    }


def spread(values: list[float]) -> Any:
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return {"mean": f"{statistics.mean(values):.3g}", "std": f"{statistics.stdev(values):.2g}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=FOLDER / "text.json")
    parser.add_argument("--lines", type=Path)
    arguments = parser.parse_args()
    folder, seeds = arguments.folder, arguments.seeds
    teacher = trained(folder, "teacher", "text-teacher", {})
    chain = trained(folder, "chain", "text-teacher", {"objective": "{name: MarkovChain, kind: masked}"})
    students = [
        trained(folder, f"student-{seed}", "text-itvm", {"teacher": str(folder / "teacher"), "seed": str(seed)})
        for seed in seeds
    ]
    ways = [("flow, Euler", [teacher], "tokens"), ("flow, Euler, uniform times", [teacher], "uniform")]
    ways += [("masked chain", [chain], "uniform"), ("map, ITVM", students, "tokens")]
    cells: list[list[Any]] = []
    lines: list[str] = []
    for way, models, grid in ways:
        for steps in CALLS if way != "map, ITVM" else CALLS[:4]:
            found = [
                judged(model, steps, grid, seed)
                for model, seed in zip(models if len(models) > 1 else models * len(seeds), seeds, strict=True)
            ]
            cells.append([way, steps, *(spread([one[name] for one in found]) for name in METRICS)])
            print(*cells[-1], flush=True)
            generators = sample_generators(100, range(4))
            drawn = fewstep.sample(
                models[0], sample_noise((4, 32, 27), generators), steps, grid=grid, generator=generators
            )
            lines += [f"{way:28} {steps:3}  {line}" for line in models[0].space.text(drawn)]
    floor = [data_row(seed) for seed in seeds]
    cells.append(["data", None, *(spread([one[name] for one in floor]) for name in METRICS)])
    facts = here(seeds)
    facts["notes"] = [
        *facts.get("notes", []),
        "One flow and one chain of the recipe text-teacher, students of text-itvm by seed; samples by seed too.",
        "bigram_kl is against 500 rows of the 5 % of the text that were not trained on; spelling is by the words "
        "of the whole text.",
    ]
    write(
        arguments.out,
        title="Text in a few calls",
        group="way",
        formats=dict.fromkeys(METRICS, "{mean} ± {std}"),
        columns=["way", "calls", *METRICS],
        rows=cells,
        **facts,
    )
    if arguments.lines:
        arguments.lines.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
