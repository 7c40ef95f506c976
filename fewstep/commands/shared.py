"""What several commands share: flags of models and devices, and how they are read."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.commands.parser import OldSpelling
from fewstep.common.console import print_table
from fewstep.common.errors import shown

MODEL = "a run, an export, a diffusers folder or hub name, an exact field, or FILE.py:FUNCTION"


def add_variant(parser: argparse.ArgumentParser) -> None:
    text = "weights of a diffusers model, such as fp16 (default: the plain ones, or the only ones that there are)"
    parser.add_argument("--variant", metavar="NAME", help=text)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)")


def add_guidance_scale(parser: argparse.ArgumentParser, experts: bool = False) -> None:
    """``--guidance-scale``, and with ``experts`` that of a second one (see :func:`guided_by`)."""
    text = "strength of guidance, for a model of text or one that takes it"
    parser.add_argument("--guidance-scale", type=float, metavar="W", help=text)
    parser.add_argument("--guidance", action=OldSpelling, now="--guidance-scale", type=float)
    if experts:
        text = "the same where the second of two experts answers, as of Wan 2.2"
        parser.add_argument("--guidance-scale-2", type=float, metavar="W", help=text)


def guided_by(args: argparse.Namespace, model: Any) -> tuple[Any, float | None]:
    """A model guided as both strengths say, where a second is given, and the strength that is left to be told it.

    Raises:
        ValueError: a second strength without a first, or for a model that has no two experts.
    """
    from fewstep.flows.guided import Guided
    from fewstep.flows.maps import FlowMap
    from fewstep.latents.encoders import kept_null

    first, second = args.guidance_scale, args.guidance_scale_2
    if second is None:
        return model, first
    if first is None:
        raise ValueError(f"--guidance-scale-2 {second:g} is for the second expert: say --guidance-scale too")
    if isinstance(model, FlowMap | Guided) or model.text is None:
        raise ValueError(f"--guidance-scale-2 {second:g} is for a teacher of text with two experts: leave it out")
    return Guided(model, first, null=kept_null(model.text), scale_2=second), None


def add_source(parser: argparse.ArgumentParser) -> None:
    text = "the data set that samples start from, for a model between two data sets (default: that of its run)"
    parser.add_argument("--source", metavar="DATA", help=text)


def with_flags(argv: Sequence[str], flags: Mapping[str, str]) -> list[str]:
    """The words of a command with other values of some flags: a next command that keeps all else that was said."""
    kept, words = [], iter(argv)
    for word in words:
        name, has_value, _ = word.partition("=")
        if name not in flags:
            kept.append(word)
        elif not has_value:
            next(words, None)
    return kept + [word for pair in flags.items() for word in pair]


def numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text}: whole numbers with commas between are needed, such as 3,5") from None


def size_of(text: str) -> tuple[int, int]:
    """Height and width, of 768 or 768x1024."""
    from fewstep.data.decode import LARGEST

    found = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", text.lower())
    if found is None:
        raise ValueError(f"--size {shown(text)}: pixels are needed, such as 768, or 768x1024 for height and width")
    size = int(found[1][:9]), int((found[2] or found[1])[:9])
    if max(size) > LARGEST:
        raise ValueError(f"--size {shown(text)}: {LARGEST} pixels at most")
    return size


def open_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model that is asked for (with --teacher, the teacher of the run), and its run if it is one."""
    from fewstep.runs.loading import find_model, make_teacher, open_run
    from fewstep.training.run_files import is_run

    run = open_run(args.model) if is_run(Path(args.model).expanduser()) else None
    if args.teacher and (run is None or run.recipe.teacher is None):
        raise ValueError(f"--teacher: {args.model} is no run that has a teacher")
    if args.variant and run is not None:
        raise ValueError(f"--variant {args.variant}: {args.model} is a run; its recipe says that of its teacher")
    model = find_model(args.model, {"variant": args.variant} if args.variant else None) if run is None else run.model
    if args.teacher and run is not None and run.recipe.teacher is not None:
        model = make_teacher(run.recipe.teacher)
        model.moments = run.model.moments  # it knows the data as the run does
    if getattr(args, "source", None):
        model.starts_from = _source(args.source, model)
    return model, run


def _source(name: str, model: Any) -> Any:
    """What samples start from: a data set by name, or ``{name: NAME, ...}``."""
    from fewstep.common.options import parse_value
    from fewstep.flows.sources import RowsOf
    from fewstep.runs.datasets import data_of
    from fewstep.runs.recipe import Named

    if not model.path.two_sided:
        raise ValueError(f"--source {name}: this model starts from noise, not from a data set")
    return RowsOf(data_of(Named.model_validate(parse_value("source", name)), model))


def add_engine(p: argparse.ArgumentParser) -> None:
    text = "who does the work: processes (default: this one, or those of torchrun or SLURM), or ray (RAY_ADDRESS)"
    p.add_argument("--engine", default="processes", metavar="NAME", help=text)
    text = "of ray (default: one a GPU, or one a machine)"
    p.add_argument("--workers", type=int, metavar="N", help=text)


def print_evaluation(evaluation: Any) -> None:
    """Its table, where there is one."""
    if evaluation is not None:
        print_table(*evaluation.table())
