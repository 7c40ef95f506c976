"""The tab that edits a picture: what it sends, what comes back, what it refuses, in HTTP and in a real browser."""

import base64
import html
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from toys.chromium import EXECUTABLE, Browser
from toys.unet import tiny_field, tiny_student

import fewstep
from fewstep.cli import make_parser
from fewstep.common.randomness import sample_generators
from fewstep.evaluation.grids import image_grid
from fewstep.playground.shown import Playground

gradio = pytest.importorskip("gradio")
from fewstep.playground import page as playground_page  # noqa: E402
from fewstep.playground.editing import can_edit, edit_page, picture_of, sent_by_the_page  # noqa: E402

GREY = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
VALUES = (1, 3, "flow-edit", 0.6, 2, 7)  # what it is, what it is to be, by what, strength, steps, seed


def sent(pixels: np.ndarray = GREY) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def units() -> torch.Tensor:
    return torch.from_numpy(GREY).float().sub(127.5).div(127.5)[None, None]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Playground]]:
    play = Playground(tiny_student(classes=5), "tiny", classes=["shirt", "<bag>", *"xyz"])
    address, close = playground_page.serve(play, "runs/tiny")
    yield address.rstrip("/"), play
    close()


def api(address: str, *values: Any) -> str:
    made = requests.post(f"{address}/gradio_api/call/edit", json={"data": values}, timeout=20)
    said = requests.get(f"{address}/gradio_api/call/edit/{made.json()['event_id']}", timeout=20).text
    assert "event: error" not in said, said
    return [json.loads(line[6:])[0] for line in said.splitlines() if line.startswith("data: [")][-1]


@pytest.mark.takes_seconds
@pytest.mark.parametrize("method", ["flow-edit", "sdedit", "invert"])
def test_the_page_edits_what_the_command_edits(method: str, served: tuple[str, Playground]) -> None:
    address, play = served
    said = api(address, sent(), 1, 3, method, 0.6, 2, 7)
    was, to = ({"class_labels": torch.tensor([k])} for k in (1, 3))
    noise: Any = {"strength": 0.6, "generator": sample_generators(7, [0])}
    if method == "flow-edit":
        wanted = fewstep.flow_edit(play.model, units(), was, to, 2, **noise)
    elif method == "sdedit":
        wanted = fewstep.sdedit(play.model, units(), 2, **noise, **to)
    else:
        state, residual = fewstep.invert(play.model, units(), 2, strength=0.6, **was)
        wanted = fewstep.resume(play.model, state, 2, strength=0.6, **to)
        assert f"comes back to within {float(residual):.2g}" in said
    urls = re.findall(r'<img src="(.*?)"', said)
    assert [requests.get(f"{address}/{url}", timeout=20).content for url in urls] == [
        image_grid(units()),
        image_grid(wanted),
    ]
    words = shlex.split(html.unescape(re.findall("<code>(.*)</code>", said)[0]))
    args = make_parser()[0].parse_args(words[1:])
    assert (args.command, args.model, args.pictures, args.label) == ("edit", "runs/tiny", ["PICTURE"], "3")
    assert (args.steps, args.seed, args.strength, args.method) == (2, 7, 0.6, method)
    assert args.from_label == (None if method == "sdedit" else "1")


def test_other_sizes_and_kinds_of_pictures_are_taken() -> None:
    wide = np.random.default_rng(1).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    for shape in ((1, 8, 8), (3, 16, 24)):
        assert picture_of(sent(wide), shape).shape == (1, *shape)
    assert np.array_equal(picture_of(sent(), (1, 8, 8))[0, 0], GREY)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, "", "choose a picture first"),
        (0, None, "choose a picture first"),
        (0, 7, "choose a picture first"),
        (0, "data:image/png;base64,", "the picture cannot be read"),
        (0, "data:image/png;base64,!!!", "the picture cannot be read"),
        (0, "data:text/html;base64,PGI+", "the picture cannot be read"),
        (0, "/etc/passwd", "the picture cannot be read"),
        (1, 9, "is_label is"),
        (2, "<b>", "to_label is"),
        (3, "<b>flow</b>", "unknown method"),
        (4, 0, "strength is 0"),
        (4, float("nan"), "strength is"),
        (5, 10**12, "edit_steps is"),
        (6, True, "edit_seed is"),
    ],
)
def test_what_cannot_be_is_a_sentence(place: int, value: Any, said: str, tmp_path: Path) -> None:
    play = Playground(tiny_student(classes=5), "tiny")
    names = ("picture", "is_label", "to_label", "method", "strength", "edit_steps", "edit_seed")
    asked = dict(zip(names, (sent(), *VALUES), strict=True)) | {names[place]: value}
    (answer,) = edit_page(play, "x", lambda: tmp_path, asked)
    assert answer.startswith('<p class="fs-error" role="alert">')
    assert said in answer
    assert "<b>" not in answer
    assert not list(tmp_path.iterdir())


def test_a_message_above_a_mebibyte_is_turned_away(served: tuple[str, Playground]) -> None:
    address, _ = served
    data = {"data": ["x" * (1 << 20), *VALUES]}
    assert requests.post(f"{address}/gradio_api/call/edit", json=data, timeout=20).status_code == 413


def test_only_models_that_are_told_what_they_draw_have_the_tab(served: tuple[str, Playground]) -> None:
    config = requests.get(f"{served[0]}/config", timeout=20).json()
    labels = [part["props"].get("label") for part in config["components"]]
    assert {"Edit a picture", "It is", "Make it", "Strength"} <= set(labels)
    assert not can_edit(Playground(tiny_field(), "no classes"))
    assert not can_edit(Playground(fewstep.CheckerboardField(), "points"))
    blocks = playground_page.make_page(Playground(tiny_field(), "field"), "field", Path("."))
    assert "Edit a picture" not in [part["props"].get("label") for part in blocks.get_config_file()["components"]]


def test_large_pictures_are_sent_as_jpeg() -> None:
    play = Playground(tiny_student(classes=5), "tiny")
    assert "canvas.width, canvas.height] = [16, 16]" in sent_by_the_page(play)
    assert "'image/png'" in sent_by_the_page(play)
    play.picture_shape = (3, 512, 768)
    assert "canvas.width, canvas.height] = [768, 512]" in sent_by_the_page(play)
    assert "'image/jpeg'" in sent_by_the_page(play)


@pytest.mark.takes_seconds
@pytest.mark.skipif(EXECUTABLE is None, reason="needs Chromium")
def test_a_browser_sends_a_picture_and_shows_its_edit(served: tuple[str, Playground], tmp_path: Path) -> None:
    address, _ = served
    file = tmp_path / "photo.png"
    Image.fromarray(np.kron(GREY, np.ones((5, 5), np.uint8))).convert("RGB").save(file)
    with Browser(tmp_path) as page:
        page.open(address)
        page.wait("document.querySelector('#shown img') !== null")
        page.run("[...document.querySelectorAll('[role=tab]')].find(t => t.innerText.includes('Edit')).click()")
        page.wait("document.querySelector('#fs-picture') !== null && document.querySelector('#edit') !== null")
        page.run("document.querySelector('#edit').click()")
        page.wait("document.querySelector('#edited .fs-error') !== null")
        assert "choose a picture first" in page.run("document.querySelector('#edited').innerText")
        root = page.call("DOM.getDocument")["root"]["nodeId"]
        node = page.call("DOM.querySelector", nodeId=root, selector="#fs-picture")["nodeId"]
        page.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])
        page.run("document.querySelector('#edit').click()")
        page.wait("document.querySelectorAll('#edited img').length == 2")
        page.wait("[...document.querySelectorAll('#edited img')].every(i => i.naturalWidth > 0)")
        shown = page.run("document.querySelector('#edited img').getAttribute('src')")
        content = requests.get(f"{address}/{shown}", timeout=20).content
        taken = np.asarray(Image.open(io.BytesIO(content)).convert("L")).astype(int)
        wanted = np.asarray(Image.open(io.BytesIO(image_grid(units()))).convert("L")).astype(int)
        assert np.abs(taken - wanted).mean() < 25, "the picture, scaled by the browser and again"
        assert page.problems == []
        foreign = [url for url in page.requests if not url.startswith((address, "data:", "blob:", "about:", "chrome"))]
        assert foreign == []
