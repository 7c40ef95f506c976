"""The tab of the playground for a picture of one's own: it in, its edit out."""

import base64
import binascii
import html
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.common.errors import shortened
from fewstep.data.decode import decode
from fewstep.flows.calls import count_calls
from fewstep.generation.edits import METHODS, STRENGTHS, Told, edit_batches, settle
from fewstep.generation.requests import prompt_flags
from fewstep.playground.markup import row_of
from fewstep.playground.shown import Playground, seconds_of

CHOOSE = '<label class="fs-file">Picture <input type="file" id="fs-picture" accept="image/*"></label>'
_LARGE = 256  # pixels along a side: larger ones are sent as JPEG, for the door lets 1 MiB through


def can_edit(playground: Playground) -> bool:
    """Whether a model of images is told by classes or prompts what it draws, and by nothing that no page knows."""
    return not playground.is_plane and not playground.given and bool(playground.classes or playground.has_text)


def sent_by_the_page(playground: Playground) -> str:
    """JavaScript that puts the chosen picture, small enough to be a message, in the place of the first input.

    The browser turns it as the camera says, lays it on white and cuts out the middle; nothing is uploaded as a file.
    """
    _, height, width = playground.picture_shape
    scale = 1 if max(height, width) > _LARGE else 2
    kind = "image/jpeg" if scale == 1 else "image/png"
    return f"""async (_, ...rest) => {{
  const file = document.querySelector('#fs-picture').files[0];
  if (!file) return ['', ...rest];
  try {{
    const image = await createImageBitmap(file);
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [{scale * width}, {scale * height}];
    const pen = canvas.getContext('2d');
    [pen.fillStyle, pen.imageSmoothingQuality] = ['white', 'high'];
    pen.fillRect(0, 0, canvas.width, canvas.height);
    const k = Math.max(canvas.width / image.width, canvas.height / image.height);
    const [w, h] = [k * image.width, k * image.height];
    pen.drawImage(image, (canvas.width - w) / 2, (canvas.height - h) / 2, w, h);
    return [canvas.toDataURL('{kind}', 0.92), ...rest];
  }} catch (error) {{
    return ['data:image/png;base64,', ...rest];
  }}
}}"""


def controls(playground: Playground) -> dict[str, Any]:
    """The controls of the tab by name, in gradio; the picture, which the page fills in, is the first."""
    import gradio as gr

    plain: Any = {"buttons": [], "min_width": 185}
    gr.HTML(CHOOSE)
    made: dict[str, Any] = {"picture": gr.Textbox("", label="", visible="hidden", elem_id="picture")}
    with gr.Row():
        if playground.has_text:
            made["is_prompt"] = gr.Textbox("", label="It is", lines=1, elem_id="is")
            made["to_prompt"] = gr.Textbox("", label="Make it", lines=1, elem_id="to")
        if playground.classes:
            choices: Any = [(name, i) for i, name in enumerate(playground.classes)]
            made["is_label"] = gr.Dropdown(choices, value=0, label="It is", elem_id="is", min_width=150)
            last = len(choices) - 1
            made["to_label"] = gr.Dropdown(choices, value=min(1, last), label="Make it", elem_id="to", min_width=150)
        made["method"] = gr.Dropdown(list(METHODS), value=METHODS[0], label="By", elem_id="by", min_width=150)
        made["strength"] = gr.Slider(0.05, 1, 0.85, step=0.05, label="Strength", elem_id="strength", **plain)
        steps = 4 if playground.is_map else 28
        made["edit_steps"] = gr.Slider(1, 64, steps, step=1, label="Steps", elem_id="edit-steps", **plain)
        made["edit_seed"] = gr.Slider(0, 999, 0, step=1, label="Seed", elem_id="edit-seed", **plain)
        if playground.takes_strength:
            value = playground.strength
            made["edit_guidance"] = gr.Slider(
                0, 15, value, step=0.1, label="Guidance", elem_id="edit-guidance", **plain
            )
    return made


def edit_page(
    playground: Playground, source: str, new_folder: Callable[[], Path], asked: dict[str, Any]
) -> Iterator[str]:
    """The picture and what was made of it, for the values of the controls; an error is a sentence."""
    try:
        pixels = picture_of(asked.get("picture"), playground.picture_shape)
        method, strength, steps, seed, target, origin = _wish(playground, asked)
        model, wanted, told = settle(playground.model, method, 1, seed, target, origin)
        batches = edit_batches(
            model, pixels, method, steps, wanted, told, strength=strength, guidance=(target.guidance, None)
        )
        with playground.lock, count_calls(model) as calls:
            start = time.perf_counter()
            ((_, images, residual),) = batches
            seconds = time.perf_counter() - start
        cost = f"{seconds_of(seconds)} and {calls.rows} network calls"
        if residual is not None:
            cost += f"<br>its noise comes back to within {float(residual):.2g}"
        made = new_folder()
        shown: list[tuple[str, Tensor, str]] = [
            ("the picture, as the model takes it", torch.from_numpy(pixels).float() / 127.5 - 1, "&nbsp;"),
            (f"{method}, {steps} step{'s' * (steps > 1)}", images, cost),
        ]
        for i, (_, image, _) in enumerate(shown):
            (made / f"{i}.png").write_bytes(playground.picture(image))
        figures = [(name, made / f"{i}.png", below) for i, (name, _, below) in enumerate(shown)]
        yield row_of(figures, playground.picture_shape[2] / playground.picture_shape[1]) + _command(
            source, method, strength, steps, seed, target, origin
        )
    except (ValueError, OSError, ImportError, RuntimeError, TypeError) as error:
        yield f'<p class="fs-error" role="alert">{html.escape(shortened(str(error)))}</p>'


def picture_of(sent: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A picture that was sent as a data URL, as (1, C, H, W) uint8 of this shape (C, H, W).

    Raises:
        ValueError: nothing was sent, or something else.
    """
    if not isinstance(sent, str) or not sent:
        raise ValueError("choose a picture first")
    head, _, body = sent.partition(";base64,")
    try:
        content = base64.b64decode(body, validate=True) if head.startswith("data:image/") else b""
    except (binascii.Error, ValueError):
        content = b""
    picture = decode(content, (shape[1], shape[2]), shape[0])
    if isinstance(picture, str):
        raise ValueError(f"the picture cannot be read: {picture}")
    return picture[None].copy()


def _wish(playground: Playground, asked: dict[str, Any]) -> tuple[str, float, int, int, Told, Told]:
    """What is asked for: method, strength, steps, seed, and what the picture is to be, and is."""
    method = str(asked.get("method"))[:40]
    numbers: dict[str, float] = {}
    limits = {"strength": (0, 1), "edit_steps": (1, 64), "edit_seed": (0, 999), "edit_guidance": (0, 15)}
    if playground.classes:
        limits |= dict.fromkeys(("is_label", "to_label"), (0, len(playground.classes) - 1))
    for name, (low, high) in limits.items():
        if name == "edit_guidance" and name not in asked:
            continue
        value = asked.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"{name} is {str(value)[:40]!r}: a number from {low} to {high} is needed")
        numbers[name] = float(value)
    guidance = numbers.get("edit_guidance")
    if playground.has_text:
        to, was = (" ".join(str(asked.get(name) or "").split()) for name in ("to_prompt", "is_prompt"))
        if not to:
            raise ValueError("the model makes what a prompt says: write one")
        target, origin = Told(prompts=[to], guidance=guidance), Told(prompts=[was] if was else [])
    else:
        target = Told(labels=[int(numbers["to_label"])], guidance=guidance)
        origin = Told(labels=[int(numbers["is_label"])])
    steps, seed = int(numbers["edit_steps"]), int(numbers["edit_seed"])
    return method, numbers["strength"], steps, seed, target, Told() if method == "sdedit" else origin


def _command(source: str, method: str, strength: float, steps: int, seed: int, target: Told, origin: Told) -> str:
    """The command that edits the same."""
    words = ["fewstep", "edit", source, "PICTURE"]
    words += ["--method", method] if method != METHODS[0] else []
    words += ["--strength", f"{strength:g}"] if strength != STRENGTHS[method] else []
    words += ["--steps", str(steps), "--seed", str(seed)]
    words += ["--from-label", str(origin.labels[0])] if origin.labels else []
    words += ["--label", str(target.labels[0])] if target.labels else []
    words += [f"--source-prompt={prompt}" for prompt in origin.prompts]
    words += prompt_flags([*target.prompts])
    words += ["--guidance-scale", f"{target.guidance:g}"] if target.guidance is not None else []
    return f'<p class="fs-foot">the same again: <code>{html.escape(shlex.join(words))}</code></p>'
