"""The page of ``fewstep ui`` in gradio: pictures in a row, and below them what is drawn; nothing comes from the web."""

import html
import math
import os
import re
import secrets
import shlex
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fewstep.common.errors import shortened
from fewstep.flows.maps import FlowMap
from fewstep.generation.requests import prompt_flags
from fewstep.playground.door import check_port, opened
from fewstep.playground.shown import POINTS, Panel, Playground, Wish

# Drawings whose files are kept: those of pages that are open, mostly.
_KEPT = 32
_CSS = """
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
.fs-foot {margin: 10px 0 0; line-height: 1.6}
.fs-foot code {font-size: .95em; background: var(--background-fill-secondary); padding: 2px 6px; border-radius: 4px}
.gradio-container input[type=number] {width: 62px !important; min-width: 0 !important}
.gradio-container [data-testid=block-info] {white-space: nowrap}
.fs-error {border-left: 3px solid #c5221f; padding: 8px 14px; margin: 8px 0; color: var(--body-text-color);
  background: rgba(197, 34, 31, .08); border-radius: 0 6px 6px 0}
"""


def serve(
    playground: Playground,
    source: str,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
) -> tuple[str, Callable[[], None]]:
    """Serve the page; returns its address, and what to call to end it.

    Args:
        source: what the model is called on the command line. host: this machine alone by default. port: the first
            free one from 7860 by default.

    Raises:
        ImportError: without the package gradio.
        OSError: a port that is taken, an address that is not this machine's.
    """
    check_gradio()
    if port is not None:
        check_port(host, port)
    folder = Path(tempfile.mkdtemp(prefix="fewstep-ui-"))
    try:
        page = make_page(playground, source, folder)
        page.queue(api_open=True)
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,  # which would start node
            footer_links=[],
            allowed_paths=[str(folder)],
            app_kwargs={"lifespan": lambda app: opened(app, host)},
            css=_CSS,
            theme=_theme(),
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise

    def close() -> None:
        page.close(verbose=False)
        shutil.rmtree(folder, ignore_errors=True)

    return address, close


def check_gradio() -> None:
    """That gradio is there, before a model is loaded.

    Raises:
        ImportError: it is not.
    """
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise ImportError("the playground needs the package gradio: pip install 'fewstep[ui]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported, too


def make_page(playground: Playground, source: str, folder: Path) -> Any:
    """The page as gradio's ``Blocks``; pictures are kept in ``folder``, which it is to be allowed to serve."""
    import gradio as gr

    class Page(gr.Blocks):
        """Says what is wrong with values that its controls do not have on the page, and nothing in the terminal."""

        async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            try:
                return await super().process_api(*args, **kwargs)
            except Exception as error:
                said = str(error.message if isinstance(error, gr.Error) else error) or type(error).__name__
                raise gr.Error(html.escape(_line(said.strip().splitlines()[0])), print_exception=False) from None

    limits, (count, unit) = _limits(playground), _counts(playground)
    plain: Any = {"buttons": [], "min_width": 185}
    with Page(title=f"{playground.name} - fewstep", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_head(playground), elem_id="head")
        inputs: dict[str, Any] = {}
        if playground.has_text:
            inputs["prompts"] = gr.Textbox(
                "a cat", label="Prompt", info="several, one a line, are given to the pictures in turn", lines=1,
                max_lines=4, elem_id="prompts",
            )  # fmt: skip
        shown = gr.HTML(_row(playground, Wish(count=count), [], folder), elem_id="shown")
        with gr.Row():
            inputs["steps"] = gr.Slider(*limits["steps"], 8, step=1, label="Steps, up to", elem_id="steps", **plain)
            inputs["seed"] = gr.Slider(*limits["seed"], 0, step=1, label="Seed", elem_id="seed", **plain)
            inputs["count"] = gr.Slider(*limits["count"], count, step=1, label=unit, elem_id="count", **plain)
            if playground.teacher is not None:
                label = "Teacher steps" if playground.called else "Steps of the last"
                inputs["teacher_steps"] = gr.Slider(*limits["teacher_steps"], 50, step=1, label=label, **plain)
            if isinstance(playground.model, FlowMap):
                inputs["gamma"] = gr.Slider(
                    *limits["gamma"], playground.model.gamma, step=0.05, label="Stochasticity", elem_id="gamma", **plain
                )
            if playground.takes_strength:
                inputs["guidance"] = gr.Slider(
                    *limits["guidance"], playground.strength, step=0.1, label="Guidance", elem_id="guidance", **plain
                )
            if playground.classes:
                choices: Any = [("all, in turn", -1), *((name, i) for i, name in enumerate(playground.classes))]
                inputs["label"] = gr.Dropdown(choices, value=-1, label="Class", elem_id="label", min_width=150)
        with gr.Row():
            button = gr.Button("Draw", variant="primary", scale=0, min_width=150, elem_id="draw")
            other = gr.Button("Other noise", scale=0, min_width=150, elem_id="other")

        def answer(*values: Any) -> Iterator[str]:
            yield from draw_page(playground, source, folder, dict(zip(inputs, values, strict=True)))

        given = list(inputs.values())
        for part in given:
            part.preprocess = lambda value: value  # looked at by `wish_of`, whose words are plainer than gradio's
        sliders = [part for part in given if isinstance(part, gr.Slider)]
        moved = [slider.release for slider in sliders]
        moved += [part.change for name, part in inputs.items() if name == "label"]
        moved += [part.submit for name, part in inputs.items() if name == "prompts"]
        # One drawing at a time; of all that is asked for meanwhile, the last is drawn.
        how: Any = {"show_progress": "hidden", "concurrency_limit": 1, "concurrency_id": "model"}
        gr.on(
            [button.click, *moved, page.load], answer, given, shown, trigger_mode="always_last", api_name="draw", **how
        )
        changed = other.click(
            lambda seed: (int(seed) + 1) % 1000, inputs["seed"], inputs["seed"], api_visibility="private"
        )
        changed.then(answer, given, shown, api_visibility="private", **how)
    return page


def draw_page(playground: Playground, source: str, folder: Path, asked: dict[str, Any]) -> Iterator[str]:
    """The row of pictures as it fills, for the values of the controls; an error is a sentence in it."""
    panels: list[Panel] = []
    wish = Wish(count=1)
    try:
        wish = wish_of(asked, _limits(playground))
        if playground.has_text and not wish.prompts:
            raise ValueError("the model draws what a prompt says: write one")
        made = _new_folder(folder)
        yield _row(playground, wish, [], made)
        for panel in playground.panels(wish):
            panels.append(panel)
            (made / f"{_file(panel)}.png").write_bytes(playground.picture(panel.samples))
            yield _row(playground, wish, panels, made)
        with zipfile.ZipFile(made / "pictures.zip", "w") as pack:
            for name in dict.fromkeys(map(_file, panels)):  # a field may be held against itself at as many steps
                pack.write(made / f"{name}.png", f"{playground.name}/{name}.png")
        yield _row(playground, wish, panels, made) + _foot(playground, source, wish, made)
    except (ValueError, OSError, ImportError, RuntimeError, TypeError) as error:
        yield f'<p class="fs-error" role="alert">{html.escape(_line(error))}</p>'


def _line(said: Any) -> str:
    """What is said, as one line of a length that can be read."""
    return shortened(str(said))


def wish_of(asked: dict[str, Any], limits: dict[str, tuple[int, int]]) -> Wish:
    """The values of the controls, as they come from a page or a program.

    Raises:
        ValueError: not a number where one is needed, or one that its control does not have.
    """
    values: dict[str, Any] = {}
    for name, (low, high) in limits.items():
        value = asked.get(name)
        if name not in asked or (name == "label" and value in (None, -1)):  # all classes
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"{name} is {str(value)[:40]!r}: a number from {low} to {high} is needed")
        values[name] = float(value) if name in ("gamma", "guidance") else int(value)
    values["prompts"] = tuple(line.strip() for line in str(asked.get("prompts") or "").splitlines() if line.strip())
    return Wish(**values)


def _row(playground: Playground, wish: Wish, panels: list[Panel], made: Path) -> str:
    """The figures: those that are drawn, and frames where others will be."""
    names = [name for name, _, _ in playground.plan(wish)]
    figures = []
    for i, name in enumerate(names):
        inside, below = '<span class="wait"></span>', "&nbsp;"
        if i < len(panels):
            url = _url(made / f"{_file(panels[i])}.png")
            inside = f'<img src="{url}" alt="{html.escape(name)}">'
            below = f'{panels[i].cost}<br><a href="{url}" download="{_file(panels[i])}.png">download</a>'
        elif i == len(panels):
            inside = '<span class="wait">drawing ...</span>'
        figures.append(
            f'<figure><figcaption>{html.escape(name)}</figcaption><div class="frame">{inside}</div>'
            f"<small>{below}</small></figure>"
        )
    return f'<div class="fs-row" style="--ratio: {_ratio(playground, wish.count):.4f}">{"".join(figures)}</div>'


def _foot(playground: Playground, source: str, wish: Wish, made: Path) -> str:
    """Under the pictures: all of them as one file, and the command that draws the same."""
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
        f"&nbsp;&middot;&nbsp; the picture of {wish.steps} step{'s' * (wish.steps > 1)} again: "
        f"<code>{html.escape(shlex.join(words))}</code></p>"
    )


def _head(playground: Playground) -> str:
    """The name of the model, and what it is."""
    weights = sum(p.numel() for p in playground.model.parameters())
    shape = playground.picture_shape
    facts = [
        "flow map" if playground.is_map else "velocity field",
        "points in the plane" if playground.is_plane else f"images of {shape[1]} x {shape[2]}",
        f"{weights:,} weights" if weights else "in closed form",
    ]
    facts += [f"{len(playground.classes)} classes"] if playground.classes else []
    about = f"{' &middot; '.join(facts)}. All pictures start from the same noise."
    return f"<h1>{html.escape(playground.name)}</h1><p>{about}</p>"


def _limits(playground: Playground) -> dict[str, tuple[int, int]]:
    """The least and the most of each control that takes numbers."""
    return {
        "steps": (1, 64),
        "seed": (0, 999),
        "count": (1, 4 * POINTS if playground.is_plane else 64),
        "teacher_steps": (1, 200),
        "gamma": (0, 1),
        "guidance": (0, 15),
        "label": (0, len(playground.classes) - 1),
    }


def _counts(playground: Playground) -> tuple[int, str]:
    """How many samples a picture starts with, and what they are called."""
    if playground.is_plane:
        return POINTS, "Points"
    side = max(playground.picture_shape[1:])
    return 16 if side <= 64 else 4 if side <= 256 else 1, "Images"


def _ratio(playground: Playground, count: int) -> float:
    """Width by height of a picture."""
    if playground.is_plane:
        return 1.0
    columns = math.ceil(math.sqrt(count))
    _, height, width = playground.picture_shape
    return columns * width / (-(-count // columns) * height)


def _new_folder(folder: Path) -> Path:
    """A folder for the files of one drawing, whose name nobody guesses; the oldest go."""
    for old in sorted((f for f in folder.iterdir() if f.is_dir()), key=lambda f: f.stat().st_mtime)[: 1 - _KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    made = folder / secrets.token_hex(8)
    made.mkdir()
    return made


def _file(panel: Panel) -> str:
    return panel.name.replace(",", "").replace(" ", "-")


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _url(file: Path) -> str:
    return f"gradio_api/file={html.escape(str(file))}"


def _theme() -> Any:
    """gradio's own, in fonts that every machine has."""
    import gradio as gr

    return gr.themes.Default(
        primary_hue="blue",
        neutral_hue="gray",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )
