"""`diagnose`: the shape of a model's trajectories, and what few steps lose."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.commands.parser import Commands, add_command
from fewstep.commands.shared import MODEL, add_device, add_guidance_scale, add_source, add_variant, open_model
from fewstep.common.console import print_table, say, say_next

if TYPE_CHECKING:
    from fewstep.evaluation.geometry import Geometry


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "diagnose",
        run,
        "draw the shape of a model's trajectories, and what few steps lose",
        examples=["diagnose runs/checkerboard", "diagnose runs/checkerboard --teacher --solver heun --out teacher.png"],
        may_run_code=True,
    )
    p.add_argument("model", help=MODEL)
    p.add_argument("--out", type=Path, metavar="PATH", help="the figure (default: diagnosis.png, in a run's folder)")
    p.add_argument("--count", type=int, metavar="N", help="trajectories (default: 8 images, 64 points)")
    p.add_argument("--steps", type=int, default=4, metavar="N", help="steps of the grid that is drawn (default: 4)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default: 0)")
    p.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="texts, for a model of text")
    add_source(p)
    add_guidance_scale(p)
    p.add_argument("--solver", default="euler", metavar="NAME", help="for a velocity field: euler, midpoint, heun")
    p.add_argument("--teacher", action="store_true", help="the teacher of the run instead")
    add_variant(p)
    add_device(p)


def run(args: argparse.Namespace) -> int:
    from fewstep.common.disk import replace_file
    from fewstep.common.distributed import World, choose_device
    from fewstep.evaluation.geometry import CANDIDATES
    from fewstep.evaluation.plots import geometry_figure
    from fewstep.evaluation.style import png
    from fewstep.flows.fields import VelocityField
    from fewstep.flows.signature import shape_of
    from fewstep.flows.step_grids import check_steps
    from fewstep.generation.drawing import settled
    from fewstep.generation.requests import Requests
    from fewstep.runs.datasets import given_by
    from fewstep.runs.diagnosis import described, geometry_of, trajectories
    from fewstep.runs.loading import teacher_of
    from fewstep.runs.objective import follows_teacher
    from fewstep.training.run_files import DIAGNOSIS_FIGURE

    check_steps(args.steps, CANDIDATES)
    device = choose_device(args.device, World())
    model, run = open_model(args)
    shape = shape_of(model) if run is None else run.shape
    count = trajectories(shape) if args.count is None else args.count
    if count < 1:
        raise ValueError(f"count is {count}: at least one trajectory is needed")
    out = args.out or (Path(DIAGNOSIS_FIGURE) if run is None else Path(args.model).expanduser() / DIAGNOSIS_FIGURE)
    if out.suffix != ".png":
        raise ValueError(f"--out {out}: a figure is written as .png")
    prompts = args.prompt or []
    given = {} if run is None else given_by(run.recipe, model, count=count, text=not prompts)
    requests = settled(model, Requests(count, args.seed, prompts=prompts), given)
    is_field = args.teacher or isinstance(model, VelocityField)
    teacher = None if run is None or is_field or not follows_teacher(run.recipe) else teacher_of(run.recipe)
    if args.solver != "euler" and not is_field:
        raise ValueError(f"--solver {args.solver}: a flow map takes its steps itself; --teacher is a field")
    say(f"{args.model}" + ("" if teacher is None else " and its teacher") + f": along {count} of its trajectories")
    told = {"solver": args.solver, "shape": shape, "given": given, "guidance": args.guidance_scale}
    found = geometry_of(model.to(device), None if teacher is None else teacher.to(device), requests, **told)
    print_table(*_shape(found))
    if found.few:
        print_table(*_errors(found))
    replace_file(out, png(geometry_figure(found, args.steps)))
    print(f"{out}: {described(found)}")
    if run is not None:
        better = [grid.steps for grid in found.few if not grid.is_uniform]
        grid = ["--grid", "optimal"] if better else []
        words = ["--trust"] if args.trust else []
        steps = ["--steps", str(min(better, default=args.steps))]
        say_next(
            [
                shlex.join(
                    ["fewstep", "sample", args.model, *(["--teacher"] if args.teacher else []), *steps, *grid, *words]
                )
            ]
        )
    return 0


def _shape(found: "Geometry") -> tuple[list[str], list[list[object]]]:
    """The numbers of the two curves as a table."""
    rows = [
        [name, *map(float, curve.planarity), curve.length, float(curve.off_chord.max())]
        for name, curve in (("x_t", found.state), ("D_t(x_t)", found.denoised))
    ]
    return ["part", "variance in 1 component", "in 2", "in 3", "length / chord", "farthest off it / chord"], rows


def _errors(found: "Geometry") -> tuple[list[str], list[list[object]]]:
    """The error of each number of steps as a table."""
    rows: list[list[object]] = [[grid.steps, grid.uniform_error, grid.error] for grid in found.few]
    return ["steps", "error at the end, uniform", "best grid"], rows
