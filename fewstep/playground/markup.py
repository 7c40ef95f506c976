"""What the page of the playground shows, as HTML."""

import html
import math
import re
import shlex
from pathlib import Path

from fewstep.generation.requests import prompt_flags
from fewstep.playground.shown import Panel, Playground, Wish

CSS = """
.gradio-container {max-width: 1500px !important; margin: 0 auto !important; padding: 28px 32px !important}
#head, #shown, #head > div, #shown > div {padding: 0 !important}
#head h1 {font-size: 1.7rem; font-weight: 650; margin: 0; letter-spacing: -.01em}
#head p {color: var(--body-text-color); opacity: .72; margin: .25rem 0 0}
.fs-row {display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(155px, 1fr)); margin: 6px 0 2px}
.fs-row figure {max-width: 420px; margin: 0}
.fs-row figcaption {font-weight: 600; margin-bottom: 6px}
.fs-row .frame {aspect-ratio: var(--ratio); background: #f3f4f6; border: 1px solid #e6e8eb; border-radius: 8px;
  overflow: hidden; position: relative}
.fs-row img {width: 100%; height: 100%; display: block; margin: 0}
.fs-row .wait {position: absolute; inset: 0; display: grid; place-items: center; color: #80868b; font-size: .85rem}
.fs-row small, .fs-foot {color: var(--body-text-color); opacity: .72; font-size: .82rem}
.fs-row small {display: block; margin-top: 6px; line-height: 1.45}
.fs-row a, .fs-foot a {color: var(--link-text-color); text-decoration: none; padding: 0; margin: 0}
.fs-row a:hover, .fs-foot a:hover {text-decoration: underline}
.fs-file {display: block; margin: 8px 0}
.fs-foot {margin: 10px 0 0; line-height: 1.6}
.fs-foot code {font-size: .95em; background: var(--background-fill-secondary); padding: 2px 6px; border-radius: 4px}
.gradio-container input[type=number] {width: 62px !important; min-width: 0 !important}
.gradio-container [data-testid=block-info] {white-space: nowrap}
.fs-error {border-left: 3px solid #c5221f; padding: 8px 14px; margin: 8px 0; color: var(--body-text-color);
  background: rgba(197, 34, 31, .08); border-radius: 0 6px 6px 0}
"""


def row_of_figures(playground: Playground, wish: Wish, panels: list[Panel], made: Path) -> str:
    """The figures: those that are drawn, and frames where others will be."""
    names = [name for name, _, _ in playground.plan(wish)]
    figures = []
    for i, name in enumerate(names):
        inside, below = '<span class="wait"></span>', "&nbsp;"
        if i < len(panels):
            url = _url(made / f"{file_name(panels[i])}.png")
            inside = f'<img src="{url}" alt="{html.escape(name)}">'
            below = f'{panels[i].cost}<br><a href="{url}" download="{file_name(panels[i])}.png">download</a>'
        elif i == len(panels):
            inside = '<span class="wait">drawing ...</span>'
        figures.append(
            f'<figure><figcaption>{html.escape(name)}</figcaption><div class="frame">{inside}</div>'
            f"<small>{below}</small></figure>"
        )
    return f'<div class="fs-row" style="--ratio: {_ratio(playground, wish.count):.4f}">{"".join(figures)}</div>'


def row_of(figures: list[tuple[str, Path, str]], ratio: float) -> str:
    """Images in a row: the name, the file and what stands below of each; ``ratio`` is width by height."""
    row = ""
    for name, file, below in figures:
        url, said = _url(file), html.escape(name)
        row += f'<figure><figcaption>{said}</figcaption><div class="frame"><img src="{url}" alt="{said}"></div>'
        row += f'<small>{below}<br><a href="{url}" download>download</a></small></figure>'
    return f'<div class="fs-row" style="--ratio: {ratio:.4f}">{row}</div>'


def footer(playground: Playground, source: str, wish: Wish, made: Path) -> str:
    """Under the images: all of them as one file, and the command that draws the same."""
    words = ["fewstep", "sample", source, "--steps", str(wish.steps), "--seed", str(wish.seed)]
    words += ["--count", str(wish.count)]
    words += ["--gamma", f"{wish.gamma:g}"] if wish.gamma is not None else []
    words += (
        ["--guidance-scale", f"{wish.guidance:g}"] if wish.guidance is not None and playground.takes_strength else []
    )
    words += ["--labels", str(wish.label)] if wish.label is not None else []
    words += prompt_flags(wish.prompts)
    url = _url(made / "pictures.zip")
    return (
        f'<p class="fs-foot"><a href="{url}" download="{_safe(playground.name)}.zip">download all</a> '
        f"&nbsp;&middot;&nbsp; the image of {wish.steps} step{'s' * (wish.steps > 1)} again: "
        f"<code>{html.escape(shlex.join(words))}</code></p>"
    )


def header(playground: Playground) -> str:
    """The name of the model, and what it is."""
    weights = sum(p.numel() for p in playground.model.parameters())
    shape = playground.picture_shape
    facts = [
        "flow map" if playground.is_map else "velocity field",
        "points in the plane" if playground.is_plane else f"images of {shape[1]} x {shape[2]}",
        f"{weights:,} weights" if weights else "in closed form",
    ]
    facts += [f"{len(playground.classes)} classes"] if playground.classes else []
    about = f"{' &middot; '.join(facts)}. All images start from the same noise."
    return f"<h1>{html.escape(playground.name)}</h1><p>{about}</p>"


def _ratio(playground: Playground, count: int) -> float:
    """Width by height of an image."""
    if playground.is_plane:
        return 1.0
    columns = math.ceil(math.sqrt(count))
    _, height, width = playground.picture_shape
    return columns * width / (-(-count // columns) * height)


def file_name(panel: Panel) -> str:
    return panel.name.replace(",", "").replace(" ", "-")


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _url(file: Path) -> str:
    return f"gradio_api/file={html.escape(str(file))}"
