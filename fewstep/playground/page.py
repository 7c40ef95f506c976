"""The page of ``fewstep ui`` in gradio: images in a row, and below them what is drawn; nothing comes from the web."""

import html
import os
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fewstep.common.errors import shortened
from fewstep.flows.maps import FlowMap
from fewstep.playground.door import check_port, opened
from fewstep.playground.editing import can_edit, controls, edit_page, sent_by_the_page
from fewstep.playground.markup import CSS, file_name, footer, header, row_of_figures
from fewstep.playground.shown import POINTS, Panel, Playground, Wish

# Drawings whose files are kept: those of pages that are open, mostly.
_KEPT = 32


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
            css=CSS,
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
    """The page as gradio's ``Blocks``; images are kept in ``folder``, which it is to be allowed to serve."""
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
    with (
        Page(title=f"{playground.name} - fewstep", analytics_enabled=False, fill_width=True) as page,
        ExitStack() as tab,
    ):
        gr.HTML(header(playground), elem_id="head")
        if can_edit(playground):
            with gr.Tabs():
                draws, edits = gr.Tab("Draw", elem_id="draws"), gr.Tab("Edit a picture", elem_id="edits")
            with edits:
                _edits(playground, source, folder)
            tab.enter_context(draws)
        inputs: dict[str, Any] = {}
        if playground.has_text:
            inputs["prompts"] = gr.Textbox(
                "a cat", label="Prompt", info="several, one a line, are given to the images in turn", lines=1,
                max_lines=4, elem_id="prompts",
            )  # fmt: skip
        shown = gr.HTML(row_of_figures(playground, Wish(count=count), [], folder), elem_id="shown")
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


def _edits(playground: Playground, source: str, folder: Path) -> None:
    """The tab that edits a picture."""
    import gradio as gr

    shown = gr.HTML("", elem_id="edited")
    inputs = controls(playground)
    button = gr.Button("Edit", variant="primary", scale=0, min_width=150, elem_id="edit")

    def answer(*values: Any) -> Iterator[str]:
        yield from edit_page(playground, source, lambda: _new_folder(folder), dict(zip(inputs, values, strict=True)))

    given = list(inputs.values())
    for part in given:
        part.preprocess = lambda value: value
    moved = [part.release for part in given if isinstance(part, gr.Slider)]
    moved += [part.change for part in given if isinstance(part, gr.Dropdown)]
    moved += [part.submit for name, part in inputs.items() if name.endswith("prompt")]
    gr.on(
        [button.click, *moved], answer, given, shown, trigger_mode="always_last", api_name="edit",
        js=sent_by_the_page(playground), show_progress="hidden", concurrency_limit=1, concurrency_id="model",
    )  # fmt: skip


def draw_page(playground: Playground, source: str, folder: Path, asked: dict[str, Any]) -> Iterator[str]:
    """The row of images as it fills, for the values of the controls; an error is a sentence in it."""
    panels: list[Panel] = []
    wish = Wish(count=1)
    try:
        wish = wish_of(asked, _limits(playground))
        if playground.has_text and not wish.prompts:
            raise ValueError("the model draws what a prompt says: write one")
        made = _new_folder(folder)
        yield row_of_figures(playground, wish, [], made)
        for panel in playground.panels(wish):
            panels.append(panel)
            (made / f"{file_name(panel)}.png").write_bytes(playground.picture(panel.samples))
            yield row_of_figures(playground, wish, panels, made)
        with zipfile.ZipFile(made / "pictures.zip", "w") as pack:
            for name in dict.fromkeys(map(file_name, panels)):  # a field may be held against itself at as many steps
                pack.write(made / f"{name}.png", f"{playground.name}/{name}.png")
        yield row_of_figures(playground, wish, panels, made) + footer(playground, source, wish, made)
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
    """How many samples an image starts with, and what they are called."""
    if playground.is_plane:
        return POINTS, "Points"
    side = max(playground.picture_shape[1:])
    return 16 if side <= 64 else 4 if side <= 256 else 1, "Images"


def _new_folder(folder: Path) -> Path:
    """A folder for the files of one drawing, whose name nobody guesses; the oldest go."""
    for old in sorted((f for f in folder.iterdir() if f.is_dir()), key=lambda f: f.stat().st_mtime)[: 1 - _KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    made = folder / secrets.token_hex(8)
    made.mkdir()
    return made


def _theme() -> Any:
    """gradio's own, in fonts that every machine has."""
    import gradio as gr

    return gr.themes.Default(
        primary_hue="blue",
        neutral_hue="gray",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )
