"""What `sample` draws, and how: prepared by each process, and by each worker of a cluster, from the same flags."""

import argparse
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.commands.shared import guided_by, numbers, open_model, size_of
from fewstep.commands.steered import steered_by
from fewstep.common.distributed import World, choose_device
from fewstep.common.errors import shown
from fewstep.common.reading import check_memory
from fewstep.common.received import without_places
from fewstep.flows.calls import count_calls
from fewstep.flows.fields import VelocityField
from fewstep.flows.identity import identity
from fewstep.flows.maps import FlowMap
from fewstep.flows.signature import rate_of, shape_of, sized
from fewstep.flows.spaces import Tokens
from fewstep.generation import drawing
from fewstep.generation.beside import images_for
from fewstep.generation.images import check_out, claim, missing, picture_name, save_pictures, says
from fewstep.generation.placement import place
from fewstep.generation.requests import Requests, class_names, class_numbers, class_words, is_number, read_lines
from fewstep.generation.sharing import shares
from fewstep.generation.sounds import save_sounds
from fewstep.latents.encoders import text_identity, vae_identity
from fewstep.runs.datasets import given_by
from fewstep.runs.loading import teacher_of
from fewstep.runs.objective import follows_teacher
from fewstep.runs.step_grids import found_with, grid_for

_MOST = 10_000_000  # samples: what is known of each takes memory


@dataclass
class Drawn:
    """What is asked for, of a model that is open.

    Attributes:
        run: the run that the model is of, if it is of one.
        told: what the drawing is told besides: conditions, sizes, the times of the steps.
        options: those of them that the flags say, and ``how`` it is steered, for files.
        rate: how many numbers are a second, where samples are written as sound.
    """

    args: argparse.Namespace
    model: Any
    run: Any
    requests: Requests
    steps: int
    shape: tuple[int, ...]
    out: Path
    steered: Any
    told: dict[str, Any]
    options: dict[str, Any]
    how: dict[str, Any] = field(default_factory=dict)
    rate: int | None = None

    @property
    def suffix(self) -> str:
        """Of the files in a folder."""
        return ".png" if self.rate is None else ".wav"

    @property
    def is_folder(self) -> bool:
        return self.out.suffix == ""

    @property
    def counts(self) -> list[float]:
        """What became of the populations so far, see ``Steered.counts``."""
        return [0.0, 0.0, 0.0] if self.steered is None else [*self.steered.counts]

    def place(self, device: torch.device) -> None:
        self.model = place(self.model, device, self.args.dtype, self.args.compile)

    def batches(self, world: World) -> list[range]:
        """The rows of each call of the network, those of all processes."""
        most = self.args.batch if self.steered is None else max(1, self.args.batch // self.steered.particles)
        return shares(self.requests.count, most, world)

    def left(self, batches: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Those rows that are not in the folder yet, where it is one."""
        if not self.is_folder:
            return [*batches]
        return [
            rows for rows in (missing(self.out, rows, self.requests.count, self.suffix) for rows in batches) if rows
        ]

    def claim(self) -> None:
        """Begin the folder, where it is one."""
        if self.is_folder:
            found = {"grid": self.told["grid"].tolist()} if self.args.grid == "optimal" else {}
            options = {"steps": self.steps, **self.options, **self.how}
            facts = _facts(self.args, self.model, self.requests, self.told["given"], self.shape, options)
            claim(self.out, facts | found, self.requests, self.suffix)

    def draw(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], Tensor | None]]:
        """The samples of each batch as they are done; None where they are in the folder. What cannot be is refused at
        once."""
        how: dict[str, Any] = {"shape": self.shape, "steered": self.steered, **self.told}
        drawn = drawing.draw_batches(self.model, self.requests, batches, self.steps, **how)

        def made() -> Iterator[tuple[Sequence[int], Tensor | None]]:
            name, count = without_places(self.args.model), self.requests.count  # an image goes to others
            for rows, samples in drawn:
                if self.is_folder:
                    files = [self.out / picture_name(i, count, self.suffix) for i in rows]
                    if self.rate is not None:
                        save_sounds(samples, self.rate, files)
                        yield rows, None
                        continue
                    said = {"steps": self.steps, **self.options, **self.how}
                    texts = [{"model": name, **says(self.requests, i), **said} for i in rows]
                    save_pictures(samples, files, texts)
                yield rows, None if self.is_folder else samples

        return made()


def prepared(args: argparse.Namespace, device: torch.device, alone: bool = True, grid: Tensor | None = None) -> Drawn:
    """What the flags of ``sample`` ask for; nothing is computed yet, but an optimal grid where ``grid`` has none.

    Args:
        alone: whether no other process finds that grid.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: what cannot be.
    """
    steered, how = steered_by(args)
    model, run = open_model(args)
    model, guidance = guided_by(args, model)
    if args.guidance_scale_2 is not None:
        how = {**how, "guidance": [args.guidance_scale, args.guidance_scale_2]}
    size = size_of(args.size) if args.size else None
    own = None if run is None else run.shape
    shape = (own or shape_of(model)) if size is None else sized(model, own, size)
    steps = args.steps if args.steps is not None else 2 if isinstance(model, FlowMap) else 50
    latents = None if args.latents else model.latents
    written = shape if latents is None else latents.image_shape_of(shape)
    is_drawn = (len(written) == 3 and written[0] in (1, 3)) or written == (2,)
    is_text = isinstance(model.space, Tokens)
    rate = None if args.latents and model.latents is not None else rate_of(model)
    usual = "samples.txt" if is_text else "samples.png" if is_drawn else "samples.npy"
    usual = "samples" if rate is not None else usual
    requests = _requests(args, model)
    out = args.out or Path(usual)
    check_out(out, written, is_text, rate, requests.count)
    rows = {"count": requests.count, "first": requests.first, "text": not requests.prompts}
    given = {} if run is None or args.image else given_by(run.recipe, model, **rows)
    given |= {"image": images_for(model, args.image, shape)} if args.image else {}
    requests = drawing.settled(model, requests, given)

    named = args.grid or getattr(model, "grid", "uniform")
    options = {"grid": named, "gamma": args.gamma, "solver": args.solver, "guidance": guidance}
    options |= {"eps": _eps(args.eps), "last_step": args.last_step}
    options = {name: value for name, value in options.items() if value is not None}
    if out.suffix:
        wanted = 4 * requests.count * prod(written)
        check_memory(f"{requests.count:,} samples in one file", wanted, "fewer (--count), or a folder (--out samples)")
    told = {"size": size, "given": given, "decode": not args.latents, **options}
    if args.grid == "optimal":
        if options.get("eps"):
            raise ValueError(f"--eps {args.eps}: an optimal grid is that of the ODE; leave out one of --eps and --grid")
        found = _optimal(args, model, run, requests, steps, shape, told, device, alone) if grid is None else grid
        told["grid"] = found
    return Drawn(args, model, run, requests, steps, shape, out, steered, told, options, how, rate)


Share = tuple[Sequence[int], Tensor | None, int, list[float]]


def share_maker(args: argparse.Namespace, grid: Tensor | None) -> Callable[[Sequence[int]], Share]:
    """What draws rows in a worker of a cluster: the rows, their samples unless they are in the folder, the calls of the
    network, and what became of populations."""
    device = choose_device(args.device, World())
    work = prepared(args, device, grid=grid)
    work.place(device)

    def make(rows: Sequence[int]) -> Share:
        before = work.counts
        with count_calls(work.model) as calls:
            ((_, samples),) = work.draw([rows])
        return rows, samples, calls.rows, [now - then for now, then in zip(work.counts, before, strict=True)]

    return make


def _eps(text: str | None) -> str | float | None:
    """A strength of noise: a number, or the name of one."""
    try:
        return text if text is None else float(text)
    except ValueError:
        return text


def _optimal(
    args: argparse.Namespace,
    model: Any,
    run: Any,
    requests: Any,
    steps: int,
    shape: tuple[int, ...],
    told: dict[str, Any],
    device: Any,
    alone: bool,
) -> Any:
    """The times of ``--grid optimal``: those kept in the run, or found now, as the network computes them in float32."""
    is_field = args.teacher or isinstance(model, VelocityField)
    teacher = None if run is None or is_field or not follows_teacher(run.recipe) else teacher_of(run.recipe)
    by = "itself" if teacher is None else identity(teacher)
    solver, gamma, guidance = args.solver or "euler", args.gamma, told.get("guidance")
    facts = found_with(model, identity(model), solver=solver, gamma=gamma, guidance=guidance, shape=shape, by=by)
    model, reference = model.to(device), None if teacher is None else teacher.to(device)
    return grid_for(
        model,
        reference or model,
        requests,
        steps,
        facts,
        folder=None if run is None else Path(args.model).expanduser(),
        alone=alone,
        solver=solver,
        gamma=gamma,
        batch=args.batch,
        shape=shape,
        size=told["size"],
        given=told["given"],
        guidance=guidance,
    )


def _requests(args: argparse.Namespace, model: Any) -> Any:
    """Which samples are asked for."""
    seeds = numbers("--seeds", args.seeds) if args.seeds else []
    if seeds and (args.seed is not None or args.first or args.count is not None):
        raise ValueError("--seeds draws the first sample of each: leave out --seed, --first and --count")
    first, prompts, noise = args.first, args.prompt or [], [(seed, 0) for seed in seeds]
    labels = class_words("--labels", args.labels)
    known = len(seeds) or None
    if args.prompts:
        lines = read_lines(args.prompts)
        known = max(len(lines.prompts), len(lines.labels), len(lines.noise))
        if lines.labels and labels:
            raise ValueError(f"--labels {args.labels}: {args.prompts} has labels of its own")
        if lines.noise and seeds:
            raise ValueError(f"--seeds {args.seeds}: {args.prompts} has seeds of its own")
        if seeds and len(seeds) != known:
            raise ValueError(f"{len(seeds)} seeds and {known} prompts in {args.prompts}: sample i takes prompt i")
        if first + (args.count or 1) > known:
            raise ValueError(
                f"--count {args.count or 1}{f' --first {first}' if first else ''}: {args.prompts} has {known} prompts, "
                "and sample i takes prompt i. --prompt TEXT ... gives texts in turn"
            )
        prompts, labels, noise = lines.prompts, lines.labels or labels, lines.noise or noise
    count = args.count if args.count is not None else known - first if known else 64
    if count < 1 or args.batch < 1 or first < 0:
        raise ValueError(f"count is {count}, batch {args.batch} and first {first}: at least one sample, from 0 on")
    if count > _MOST:
        raise ValueError(f"--count {shown(count)}: {_MOST:,} samples at most, --first goes on after them")
    has_names = any(isinstance(word, str) and not is_number(word) for word in labels)
    names = class_names(model) if has_names else {}
    return Requests(count, args.seed or 0, first, prompts, class_numbers(labels, names), noise)


def _facts(
    args: argparse.Namespace, model: Any, requests: Any, given: dict[str, Any], shape: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """What all images of a folder are drawn with: what would make others of them."""
    # What makes images of latents, and conditions of prompts, where that is what is done.
    vae = None if model.latents is None or args.latents else vae_identity(model.latents)
    text = None if model.text is None or not requests.prompts else text_identity(model.text)
    digest = hashlib.sha256()
    for name, value in sorted(given.items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return {
        "format": 1, "model": args.model, "weights": identity(model), "vae": vae, "text": text, "shape": list(shape),
        "dtype": args.dtype, "latents": args.latents,
        **options, "count": requests.count, "seed": requests.seed, "first": requests.first,
        **({"source": args.source} if args.source else {}),
        "seeds, prompts and labels": requests.digest(), "conditions": digest.hexdigest()[:16] if given else None,
    }  # fmt: skip
