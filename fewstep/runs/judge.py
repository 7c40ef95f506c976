"""A run judged: quality against network calls, as a table, plots and a report in its folder."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fewstep.common.console import progress_bar, say
from fewstep.common.disk import replace_file
from fewstep.common.distributed import World
from fewstep.common.options import parse_value
from fewstep.common.sharing import told
from fewstep.data.batch import Data, has_classes, is_prior
from fewstep.data.buckets import InBucket, of_one_shape
from fewstep.evaluation import measure
from fewstep.evaluation.checks import support_of
from fewstep.evaluation.evaluate import evaluate
from fewstep.evaluation.extractor import trained_classifier
from fewstep.evaluation.grids import image_grid
from fewstep.evaluation.inception import inception
from fewstep.evaluation.likelihoods import LIKELIHOODS
from fewstep.evaluation.plots import geometry_figure, loss_figure, points_figure, quality_figure
from fewstep.evaluation.report import write_report
from fewstep.evaluation.results import Evaluation, alike, compare
from fewstep.evaluation.style import png
from fewstep.flows.fields import VelocityField
from fewstep.flows.maps import FlowMap
from fewstep.flows.signature import Model
from fewstep.generation.drawing import draw, settled
from fewstep.generation.images import suffix_of
from fewstep.generation.requests import Requests
from fewstep.models.stock_steps import a_prompt
from fewstep.runs.datasets import data_of, given_by
from fewstep.runs.diagnosis import described, geometry_of, trajectories
from fewstep.runs.objective import follows_teacher, strength_of
from fewstep.runs.recipe import MADE, Named, Recipe
from fewstep.training.run_files import METRICS, QUALITY, QUALITY_FIGURE, REPORT
from fewstep.training.trackers import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is plotted, the first that there is heading the report; what there is of the others, where none of these is.
_PLOTTED = ("fid", "fd", "rmse", "error_median", "sliced_w2", "feature_w2", "outside", "diversity")
# What a metric is called in reports.
LABELS = {
    "rmse": "RMSE to the end points of the teacher's ODE",
    "error_median": "median distance to the end points of the teacher's ODE",
    "sliced_w2": "sliced W2 to the data",
    "fd": "Frechet distance to the data",
    "fid": "FID",
    "feature_w2": "sliced W2 of the features to those of the data",
    "outside": "share of samples where the data never are",
    "diversity": "distance between samples, over that of the teacher (1 is as diverse; higher is better)",
    "nll": "-log p of rows of the data, nats",
    "bits_per_dim": "bits per dimension of images of the data",
    "memorisation": "share of samples as near to a training row as 5 % of the held-out rows are",
}
_POINTS, _IMAGES, _DECODED = 8192, 24, 6  # in an image; a VAE takes its time
_SHARE = 64  # samples that are measured for each trajectory whose shape is, at some 350 to 750 network calls


def prepare(recipe: Recipe, data: Data, model: Model) -> Data:
    """What samples of a model are held against; called before the training too, so that it does not fail after it.

    Raises:
        ValueError: data of another shape, or too few. FileNotFoundError: data or Inception weights that are not there.
    """
    section = recipe.evaluation
    held_out = of_one_shape(data_of(section.data, model, recipe.training.quiet), data.shape) if section.data else data
    if tuple(held_out.shape) != tuple(data.shape):
        raise ValueError(
            f"evaluation.data {held_out.shape} and data {data.shape} differ in the shape of a sample: they must agree"
        )
    if held_out.size is not None and held_out.size < 4:
        bucket = f" in {held_out.shape}, the bucket with the most," if isinstance(held_out, InBucket) else ""
        raise ValueError(
            f"{held_out.size} rows of data{bucket} are too few to judge by: 4 at least, or evaluation.count: 0"
        )
    if is_prior(held_out) and (wanted := set(section.metrics or ()) - {*measure.ENDS, "outside", "diversity"}):
        raise ValueError(
            f"evaluation.metrics asks for {sorted(wanted)[0]}, and data: prior has no rows to hold samples against: "
            "say evaluation.data"
        )
    if section.extractor not in ("auto", "none") and not Path(section.extractor).expanduser().is_file():
        raise FileNotFoundError(
            f"evaluation.extractor: no file {section.extractor}; auto and none are the other choices"
        )
    return held_out


def judge(
    model: Model,
    recipe: Recipe,
    data: Data,
    teacher: VelocityField | None,
    out: Path,
    *,
    quiet: bool = False,
    world: World | None = None,
) -> Evaluation | None:
    """Measure a model as its recipe says, and write ``quality.json``, ``quality.png`` and ``report.html``.

    Args:
        world: the processes that share the samples, which are joined; the main one writes. By default this one alone.

    Returns None, and writes the report alone, where there is nothing to measure: images without teacher and labels.
    """
    world = World() if world is None else world
    section, held_out = recipe.evaluation, prepare(recipe, data, model)
    judged_by = held_out if recipe.data.name in MADE else data
    # Trained and read once: all processes judge by the same bits.
    extractor = told(_extractor(section.extractor, judged_by, model) if world.is_main else None, world)
    if extractor is not None:
        extractor.to(next(model.parameters()).device)
    found, metrics, training = None, section.metrics, _training(recipe, data)
    if is_prior(held_out):  # there is nothing but the teacher to hold it against
        metrics = measure.ENDS if metrics is None else metrics
    if metrics is None and not follows_teacher(recipe):  # the teacher's end points are not where it should end
        metrics = measure.possible_metrics(
            data.shape,
            False,
            extractor,
            has_classes(getattr(held_out, "cond", {})),
            has_edges=support_of(held_out, teacher) is not None,
            has_training=training is not None,
            has_tokens=hasattr(held_out, "words"),
        )
    if metrics != () and (teacher is not None or extractor is not None or len(data.shape) != 3):
        with progress_bar("evaluating", quiet or not world.is_main) as progress:
            found = evaluate(
                model,
                teacher=teacher,
                data=held_out,
                steps=section.steps,
                teacher_steps=section.teacher_steps,
                count=section.count,
                extractor=extractor,
                seed=recipe.seed,
                batch=section.batch,
                guidance=strength_of(recipe),
                metrics=metrics,
                progress=progress,
                decode=model.latents.decode if model.latents is not None and section.extractor != "auto" else None,
                training=training,
                shared=world.size > 1,
            )
    if world.is_main:
        if found is not None:
            replace_file(out / QUALITY, found.to_json().encode())
        _report(model, teacher, recipe, found, out)
    return found


def _training(recipe: Recipe, data: Data) -> Data | None:
    """The rows that a run was trained on, where it is judged by others of the same source."""
    is_apart = recipe.evaluation.data not in (None, recipe.data) and recipe.data.name != "teacher"
    return data if is_apart and data.size is not None and data.size > 1 else None


Table = tuple[str, list[str], list[list[Any]]]


def compare_runs(evaluations: dict[str, Evaluation], out: Path) -> list[Table]:
    """The tables of several runs, and ``compare.html`` with them and a plot a metric in the folder ``out``. Runs that
    were measured alike share a table; a caption says what sets them apart from the others."""
    tables, figures = [], []
    for number, group in enumerate(groups := alike(evaluations)):
        facts = next(iter(group.values())).facts
        says = f"samples of {' x '.join(map(str, facts['shape']))}, {facts['count']} of them"
        caption = "Side by side" if len(groups) == 1 else f"{', '.join(group)}: {says}"
        columns, rows = compare(group)
        tables.append((caption, columns, rows))
        lines = _lines(group, "teacher" in columns)
        for metric in _plotted(lines):
            name = metric if number == 0 else f"{metric}-{number + 1}"
            label = LABELS.get(metric, metric) + ("" if len(groups) == 1 else f": {', '.join(group)}")
            figures.append((label, png(quality_figure(lines, metric), out / f"{name}.png")))
    write_report(
        out / "compare.html",
        title=" · ".join(evaluations),
        recipe_text="\n".join(f"{name}: {evaluation.facts}" for name, evaluation in evaluations.items()),
        figures=figures,
        tables=tables,
    )
    return tables


def _lines(group: dict[str, Evaluation], is_one_teacher: bool) -> list[dict[str, Any]]:
    """The rows of runs that were measured alike, as their plot names them."""
    rows = [(name, row) for name, evaluation in group.items() for row in evaluation.rows]
    students = [{**row, "model": name} for name, row in rows if row["model"] == "student"]
    first = next(iter(group))
    teachers = [
        {**row, "model": "teacher" if is_one_teacher else f"teacher of {name}"}
        for name, row in rows
        if row["model"] == "teacher" and (name == first or not is_one_teacher)
    ]
    return students + teachers


def next_commands(out: Path, recipe: Recipe, model: Model) -> list[str]:
    """What one may type after a run that has trained ``model``."""
    is_map, suffix = isinstance(model, FlowMap), suffix_of(model)
    if recipe.blocks is not None:
        count, name = len(recipe.blocks) + 1, f"{out}-states"
        sample = ["sample", str(out), "--steps", str(4 * count), "--solver", "midpoint", "--out", out.name + suffix]
        reflow = ["reflow", str(out), "--steps", str(8 * count), "--states", "8", "--count", "50000", "--out", name]
        return [shlex.join(["fewstep", *words]) for words in (sample, reflow)]
    run, name, data = str(out), out.name, [] if recipe.data.name in MADE else data_flags(recipe.data)
    steps, export = "2" if is_map else "50", ["export", run, f"{name}-export"]
    sample = ["sample", run, "--steps", steps, "--count", "64", "--out", f"{name}{suffix}"]
    if model.text is not None:
        sample += ["--prompt", a_prompt(model)]
    evaluate = ["evaluate", run, "--steps", "1", "2", "4", "8", "16"]
    student = ["--student.network", recipe.student.network] if recipe.student.kind == "denoised" else []
    if student and recipe.student.options:  # a velocity of two networks is no start for one
        student += ["--student.options", json.dumps(recipe.student.options)]
    distill = ["distill", "--teacher", run, *data, *student, "--out", f"{run}-itvm"]
    return [shlex.join(["fewstep", *words]) for words in (sample, evaluate if is_map else distill, export)]


def data_flags(section: Named) -> list[str]:
    """The flags that name a data set, with all that is said of it."""
    words = ["--data", section.name]
    for key, value in section.options.items():
        is_plain = isinstance(value, str) and parse_value(key, value) == value
        words += [f"--data.{key}", value if is_plain else json.dumps(value)]
    return words


def _extractor(choice: str, data: Data, model: Model) -> nn.Module | None:
    """The network whose features stand for an image; None for points, and where there are no labels to train one."""
    if choice == "none" or len(data.shape) != 3 or is_prior(data):
        return None
    if choice != "auto":
        found: nn.Module = inception(choice)
    elif has_classes(getattr(data, "cond", {})) and min(data.shape[1:]) >= 8 and max(data.shape[1:]) <= 64:
        with progress_bar("features of images: a small classifier, trained once", quiet=False) as progress:
            found = trained_classifier(data, progress=progress)
    else:
        return None
    return found


def _plotted(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = [m for m in (*_PLOTTED, *measure.METRICS) if m not in LIKELIHOODS]  # which no number of steps changes
    measured = [m for m in names if any(row.get(m) is not None for row in rows)]
    return [m for m in _PLOTTED if m in measured] or measured[:1]


def _report(model: Model, teacher: VelocityField | None, recipe: Recipe, found: Evaluation | None, out: Path) -> None:
    figures, tables = [], []
    if found is not None:
        tables.append(("Quality against network calls", *found.table()))
        for metric in _plotted(found.rows):
            figures.append((LABELS.get(metric, metric), quality_figure(found.rows, metric)))
        if figures:
            png(figures[0][1], out / QUALITY_FIGURE)
        figures += (pictures := _pictures(model, teacher, recipe, found))
        figures += _geometry(model, teacher, recipe, tuple(found.facts["shape"]))
        if pictures and (captions := found.captions[: _shown(model)]):
            tables.append(("The images' prompts, row by row", ["picture", "prompt"], list(enumerate(captions, 1))))
    lines = read_metrics(out / METRICS)
    if sum(row.get("loss") is not None for row in lines) > 1:  # one point is no line
        figures.append(("Loss", loss_figure(lines)))
    write_report(
        out / REPORT,
        title=recipe.name,
        recipe_text=recipe.as_yaml(),
        figures=figures,
        tables=tables,
        next_commands=next_commands(out, recipe, model),
    )


def _pictures(
    model: Model, teacher: VelocityField | None, recipe: Recipe, found: Evaluation
) -> "list[tuple[str, bytes | Figure]]":
    """Samples at each step count, the teacher's beside them, and the data."""
    shape, steps = found.facts["shape"], recipe.evaluation.steps
    if shape == [2]:
        models = {"student": model} if teacher is None else {"student": model, "teacher": teacher}
        return [
            (f"Samples of the {name}", points_figure({_steps(n): _points(who, n, recipe.seed) for n in steps}))
            for name, who in models.items()
        ]
    if len(shape) != 3 or (model.latents is None and shape[0] not in (1, 3)):
        return []
    seen = model.latents.decode if model.latents is not None else lambda x: x
    # The student's and the teacher's of one step count side by side, as two fit in a line of the page.
    has_data = recipe.data.name != "prior" or recipe.evaluation.data is not None
    shown = [name for name in found.samples if has_data or name != "data"]
    names = sorted(shown, key=lambda name: (name == "data", int(name.split()[-1]) if name != "data" else 0))
    return [
        (name if name == "data" else f"{name.split()[0]}, {_steps(int(name.split()[1]))}", image_grid(few, columns=6))
        for name in names
        for few in [seen(found.samples[name][: _shown(model)])]
    ]


def _geometry(
    model: Model, teacher: VelocityField | None, recipe: Recipe, shape: tuple[int, ...]
) -> "list[tuple[str, bytes | Figure]]":
    """The shape of some trajectories, a share of the samples that are measured; nothing where these are few."""
    rows = min(trajectories(shape), recipe.evaluation.count // _SHARE)
    if rows < 2:
        return []
    try:
        given = given_by(recipe, model, rows)
        requests = settled(model, Requests(rows, recipe.seed), given)
        by = teacher if follows_teacher(recipe) else None
        found = geometry_of(model, by, requests, shape=shape, given=given, guidance=strength_of(recipe))
    except ValueError as error:  # such as a consistency model without its teacher
        say(f"the report goes without the geometry of trajectories: {error}")
        return []
    return [(f"Trajectories, and the errors of few steps ({described(found)})", geometry_figure(found))]


def _shown(model: Model) -> int:
    return _IMAGES if model.latents is None else _DECODED


def _points(model: Model, steps: int, seed: int) -> Tensor:
    return draw(model, _POINTS, steps, shape=(2,), seed=seed, batch=_POINTS)[0]


def _steps(n: int) -> str:
    return f"{n} step{'s' * (n > 1)}"
