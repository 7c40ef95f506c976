"""The drawings of how it works inside, as SVG in the colours of the page: the packages on their floors, read off the
real imports, and the path of a batch and of a sample.

    python docs/_ext/drawing.py FOLDER     # house.svg, batch.svg, sample.svg, to look at by themselves
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from html import escape
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[2] / "fewstep"
COMMANDS = "commands"
TOP = "cli"  # what stands in the package itself and in no folder of it

WIDTH, ROW, GAP = 900, 64, 26
STYLE = """
.box { fill: var(--color-background-secondary, #f3f5f8); stroke: var(--color-foreground-border, #8a94a6); }
.sure { fill: var(--color-brand-primary, #1f5fbf); fill-opacity: 0.14; stroke: var(--color-brand-primary, #1f5fbf); }
.name { font: 600 15px ui-monospace, monospace; fill: var(--color-foreground-primary, #111); }
.says { font: 12px sans-serif; fill: var(--color-foreground-secondary, #555); }
.floor { font: 12px sans-serif; fill: var(--color-foreground-muted, #777); }
.way { stroke: var(--color-foreground-muted, #888); stroke-opacity: 0.55; fill: none; }
.flow { stroke: var(--color-brand-primary, #1f5fbf); stroke-width: 1.6; fill: none; }
.tip { fill: var(--color-brand-primary, #1f5fbf); }
"""


def imports(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Which packages each package needs, by name. Imports inside functions and for types alone are not among them, but
    for the commands, all of whose imports wait until one runs."""
    names = sorted(folder.name for folder in package.iterdir() if (folder / "__init__.py").is_file())
    found: dict[str, set[str]] = {name: set() for name in [TOP, *names]}
    for file in sorted(package.rglob("*.py")):
        inside = file.relative_to(package).parts
        of = inside[0] if len(inside) > 1 else TOP
        if inside == ("__init__.py",) or of not in found:  # which only says where the public names live
            continue
        for module in _modules(ast.parse(file.read_text()), package.name, of == COMMANDS):
            to = module.split(".")[1:2]
            if module.startswith(f"{package.name}.") and to[0] in found and to[0] != of:
                found[of].add(to[0])
    return found


def _modules(tree: ast.Module, name: str, inside: bool) -> Iterator[str]:
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == name)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def reached(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """All that each package imports, straight or by way of others."""
    reach = {name: set(others) for name, others in found.items()}
    for middle in reach:
        for others in reach.values():
            if middle in others:
                others |= reach[middle]
    return reach


def floors(found: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each package: 1 for one that imports none, else one above the highest that it imports from. Packages
    that import each other in a circle share a floor."""
    reach = reached(found)
    circle = {name: frozenset(to for to in reach[name] if name in reach[to]) | {name} for name in found}

    @cache
    def floor(of: frozenset[str]) -> int:
        below = {circle[to] for name in of for to in found[name] if to not in of}
        return 1 + max(map(floor, below), default=0)

    return {name: floor(circle[name]) for name in found}


def first_line(name: str, package: Path = PACKAGE) -> str:
    """What a package says it is, in the first sentence of its docstring."""
    file = package / ("cli.py" if name == TOP else f"{name}/__init__.py")
    text = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].split())
    return text.replace("``", "").replace("`", "").partition(". ")[0].removesuffix(".")


def house(package: Path = PACKAGE) -> str:
    """The packages, each above all that it imports from."""
    found = imports(package)
    floor = floors(found)
    rows = [sorted(name for name in floor if floor[name] == level) for level in range(max(floor.values()), 0, -1)]
    place, shapes = {}, []
    for number, row in enumerate(rows):
        y = 10 + number * (ROW + GAP)
        shapes.append(f'<text class="floor" x="4" y="{y + ROW / 2 + 4:g}">{len(rows) - number}</text>')
        wide = (WIDTH - 40 - 16 * (len(row) - 1)) / len(row)
        for column, name in enumerate(row):
            x = 30 + column * (wide + 16)
            place[name] = (x, y, wide)
            shapes += [_box(x, y, wide, name, _wrapped(first_line(name, package), wide))]
    ways = []
    for name, to in _direct(found):
        (x, y, wide), (there, below, room) = place[name], place[to]
        start = x + wide * (0.2 + 0.6 * _share(there + room / 2))
        end = there + room * (0.2 + 0.6 * _share(x + wide / 2))
        ways.append(_curve(start, y + ROW, end, below))
    return _svg(
        WIDTH, 10 + len(rows) * (ROW + GAP), [*ways, *shapes], "The packages of fewstep, each above what it imports"
    )


def _direct(found: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that say something: one that two others say together is left out, as are those of a circle."""
    reach = reached(found)
    down = {name: {to for to in others if name not in reach[to]} for name, others in found.items()}
    return [
        (name, to)
        for name, others in sorted(down.items())
        for to in sorted(others)
        if not any(to in reach[other] for other in others - {to})
    ]


def _share(x: float) -> float:
    return min(max(x / WIDTH, 0.0), 1.0)


def _curve(x: float, y: float, to: float, end: float) -> str:
    bend = max(12.0, (end - y) / 2)
    return f'<path class="way" d="M{x:.1f} {y:g} C{x:.1f} {y + bend:.1f} {to:.1f} {end - bend:.1f} {to:.1f} {end:g}"/>'


def _wrapped(text: str, wide: float, lines: int = 2) -> list[str]:
    """Text in lines that fit a box, cut where it does not."""
    most, made = max(int((wide - 16) / 6.1), 6), [""]
    for word in text.split():
        if len(made[-1]) + len(word) + 1 > most:
            made.append("")
        made[-1] = f"{made[-1]} {word}".strip()
    if len(made) > lines:
        made = [*made[: lines - 1], f"{made[lines - 1][: most - 1].rstrip(' ,:;')}…"]
    return made


def _box(x: float, y: float, wide: float, name: str, says: list[str], high: float = ROW, kind: str = "box") -> str:
    top = y + (high - 18 - 15 * len(says)) / 2 + 15
    lines = [
        f'<text class="says" x="{x + wide / 2:.1f}" y="{top + 17 + 15 * i:.1f}">{escape(text)}</text>'
        for i, text in enumerate(says)
    ]
    return (
        f'<g text-anchor="middle">'
        f'<rect class="{kind}" x="{x:.1f}" y="{y:g}" width="{wide:.1f}" height="{high:g}" rx="7"/>'
        f'<text class="name" x="{x + wide / 2:.1f}" y="{top:.1f}">{escape(name)}</text>{"".join(lines)}</g>'
    )


class Stop(NamedTuple):
    """One step of a path: the call, where it stands (``module:name``), what it does, and what it hands on."""

    call: str
    at: str
    says: str
    out: str = ""

    @property
    def file(self) -> str:
        return self.at.partition(":")[0].replace(".", "/") + ".py"


BATCH = (
    Stop(
        "Batches.micro(step, index)", "training.batches:Batches.micro",
        "rows of the data, and a generator for each chunk from (seed, step, chunk)", "batch: data (B, ...), conditions",
    ),
    Stop(
        "objective(student, batch, ...)", "objectives.two_time:TwoTime.forward",
        "draws noise and times; some rows have s = t, the others s < t", "noise, data, s, t",
    ),
    Stop("path.sample(noise, data, s)", "flows.paths:Path.sample", "mixes noise and data at time s", "x at time s"),
    Stop(
        "objective.goal(student, rows, now)", "objectives.two_time:TwoTime.goal",
        "without grad: the teacher's velocity where s = t, the method's goal elsewhere", "goal (B, ...)",
    ),
    Stop(
        "student.average_velocity(x, s, t)", "flows.maps:FlowMap.average_velocity",
        "one call of the network, with grad, for all rows", "u (B, ...)",
    ),
    Stop(
        "squared_error(u, goal)", "objectives.base:squared_error", "the mean over rows, with the method's weights",
        "Loss: one scalar, and terms to log",
    ),
    Stop(
        "loss.backward(), update(...)", "training.step:update", "clips the gradients; one step of AdamW", "new weights"
    ),
    Stop("Ema.update(step)", "training.ema:Ema.update", "the averaged copies: of the result and of the goal"),
)  # fmt: skip

SAMPLE = (
    Stop(
        "fewstep.load(model)", "runs.loading:load", "a run becomes what it trained; exports and diffusers folders too",
        "a FlowMap or a VelocityField",
    ),
    Stop(
        "sample_generators(seed, ...)", "common.randomness:sample_generators",
        "sample i of a seed has a generator of its own, whatever the batch", "noise (B, ...)",
    ),
    Stop("step_grid(steps)", "flows.times:step_grid", "the times of the steps, from 0 to 1", "t0 = 0, ..., tN = 1"),
    Stop(
        "sample(model, noise, steps)", "flows.sampling:sample", "a map takes one call a step, a field an ODE solver",
        "x, from one time to the next",
    ),
    Stop(
        "FlowMap.forward(x, s, t)", "flows.maps:FlowMap.forward", "x + (t - s) u(x, s, t), u from one network call",
        "x at t = 1",
    ),
    Stop(
        "finished(model, samples)", "generation.drawing:finished", "latents go through the VAE; all is to be finite",
        "images, or rows",
    ),
    Stop("write(samples, cond, out)", "generation.images:write", "a grid of images or an array, as one file"),
)  # fmt: skip


def path(stops: tuple[Stop, ...], title: str) -> str:
    """A path from top to bottom: what each function does, where it stands, and what it hands on."""
    high, gap, wide, x = 58, 34, 520, 30
    shapes = []
    for number, stop in enumerate(stops):
        y = 8 + number * (high + gap)
        shapes.append(_box(x, y, wide, stop.call, [stop.says], high, "sure" if number % 2 else "box"))
        shapes.append(f'<text class="floor" x="{x + wide + 18}" y="{y + high / 2 + 4:g}">{escape(stop.file)}</text>')
        if stop.out:
            middle = x + wide / 2
            shapes.append(f'<path class="flow" d="M{middle:g} {y + high:g} V{y + high + gap - 7:g}"/>')
            tip = y + high + gap
            shapes.append(f'<path class="tip" d="M{middle - 5:g} {tip - 8:g} h10 l-5 8 z"/>')
            shapes.append(
                f'<text class="says" x="{middle + 12:g}" y="{y + high + gap / 2 + 4:g}">{escape(stop.out)}</text>'
            )
    return _svg(740, 16 + len(stops) * (high + gap) - gap, shapes, title)


def _svg(width: float, height: float, shapes: list[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>{''.join(shapes)}</svg>"
    )


def drawings() -> dict[str, str]:
    """Each drawing by its name."""
    return {
        "house": house(),
        "batch": path(BATCH, "One batch through a training step"),
        "sample": path(SAMPLE, "One sample from noise to a file"),
    }


if __name__ == "__main__":
    for name, svg in drawings().items():
        (Path(sys.argv[1]) / f"{name}.svg").write_text(svg)
