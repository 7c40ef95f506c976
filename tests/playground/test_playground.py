"""The playground: what its images are drawn by, the page over HTTP, and a real browser."""

import html
import io
import json
import os
import re
import shlex
import signal
import socket
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from torch import Tensor, nn
from toys.chromium import EXECUTABLE, Browser
from toys.families import tiny_pipeline
from toys.unet import tiny_field, tiny_student

import fewstep
from fewstep.cli import main, make_parser
from fewstep.common.randomness import sample_generators
from fewstep.evaluation.grids import image_grid
from fewstep.flows.fields import NetworkField
from fewstep.flows.guided import Guided
from fewstep.flows.maps import FlowMap
from fewstep.flows.sampling import sample_noise
from fewstep.generation.drawing import draw
from fewstep.networks import MLP
from fewstep.playground.door import Door
from fewstep.playground.shown import Playground, Wish, step_counts

gradio = pytest.importorskip("gradio")
from fewstep.playground import markup  # noqa: E402
from fewstep.playground import page as playground_page  # noqa: E402


def points_map(**options: Any) -> FlowMap:
    torch.manual_seed(0)
    field = NetworkField(MLP(2, width=8, depth=2, **options))
    student = FlowMap.from_field(field, guidance=bool(options.get("guidance")))
    for weight in student.parameters():
        nn.init.normal_(weight, std=0.3)
    return student.eval()


def noise(count: int, *shape: int, seed: int = 0) -> tuple[Tensor, list[torch.Generator]]:
    generators = sample_generators(seed, range(count))
    return sample_noise((count, *shape), generators), generators


@pytest.mark.parametrize(("most", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_the_row_has_the_powers_of_two_and_the_last(most: int, counts: list[int]) -> None:
    assert step_counts(most) == counts


def test_pictures_are_those_of_sample_from_one_noise() -> None:
    student, teacher = tiny_student(classes=5), tiny_field(classes=5)
    play = Playground(student, "one", teacher=teacher)
    panels = {p.name: p for p in play.panels(Wish(steps=2, seed=3, count=6, gamma=0.5, label=4, teacher_steps=3))}

    labels = torch.full((6,), 4)
    start, generators = noise(6, 1, 8, 8, seed=3)
    assert list(panels) == ["1 step", "2 steps", "teacher, 3 steps"]
    two = fewstep.sample(student, start, 2, gamma=0.5, generator=generators, class_labels=labels)
    assert torch.equal(panels["1 step"].samples, fewstep.sample(student, start, 1, class_labels=labels))
    assert torch.equal(panels["2 steps"].samples, two)
    assert torch.equal(panels["teacher, 3 steps"].samples, fewstep.sample(teacher, start, 3, class_labels=labels))
    assert [p.calls for p in panels.values()] == [1, 2, 3]
    assert all(p.seconds > 0 for p in panels.values())
    assert panels["2 steps"].cost.endswith("2 network calls each")


def test_classes_come_in_turn_where_none_is_chosen() -> None:
    student = tiny_student(classes=5)
    panel = next(iter(Playground(student, "one").panels(Wish(steps=1, count=7))))
    start, _ = noise(7, 1, 8, 8)
    in_turn = torch.arange(7) % 5
    assert torch.equal(panel.samples, fewstep.sample(student, start, 1, class_labels=in_turn))


def test_a_field_is_held_against_itself() -> None:
    field = tiny_field()
    panels = list(Playground(field, "field").panels(Wish(steps=1, count=2, teacher_steps=4)))
    start, _ = noise(2, 1, 8, 8)
    assert [p.name for p in panels] == ["1 step", "4 steps"]
    assert not Playground(fewstep.CheckerboardField(), "exact").takes_strength
    assert torch.equal(panels[1].samples, fewstep.sample(field, start, 4))


def test_the_teacher_is_drawn_again_only_where_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Playground(points_map(), "one", teacher=fewstep.CheckerboardField())
    drawn: list[int] = []
    monkeypatch.setattr("fewstep.playground.shown.draw", lambda *a, **k: drawn.append(a[2]) or draw(*a, **k))
    for wish in (Wish(steps=1, count=4), Wish(steps=2, count=4, gamma=0.3), Wish(steps=1, count=4, seed=1)):
        list(play.panels(wish))
    assert drawn == [1, 50, 1, 2, 1, 50]


def test_guidance_is_told_to_the_student_and_moves_a_guided_teacher() -> None:
    student = points_map(classes=3, guidance=True)
    teacher = Guided(NetworkField(MLP(2, width=8, depth=2, classes=4)), 2.0, null={"class_labels": 3})
    plain = Playground(points_map(classes=3), "plain", teacher=teacher)
    play = Playground(student, "one", teacher=teacher)
    assert play.takes_strength
    assert not plain.takes_strength

    start, _ = noise(5, 2)
    labels = torch.arange(5) % 3
    one, last = play.panels(Wish(steps=1, count=5, guidance=4.0, teacher_steps=2))
    told = {"class_labels": labels, "guidance": torch.full((5,), 4.0)}
    assert torch.equal(one.samples, fewstep.sample(student, start, 1, **told))
    stronger = Guided(teacher.field, 4.0, null={"class_labels": 3})
    assert torch.allclose(last.samples, fewstep.sample(stronger, start, 2, class_labels=labels), atol=1e-6)
    *_, unmoved = plain.panels(Wish(steps=1, count=5, guidance=4.0, teacher_steps=2))
    assert torch.equal(unmoved.samples, fewstep.sample(teacher, start, 2, class_labels=labels))


@pytest.mark.takes_seconds
def test_a_text_model_takes_prompts_and_shows_images(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tiny_pipeline("sd").save_pretrained(tmp_path / "sd")
    play = Playground.open(str(tmp_path / "sd"))
    assert play.has_text
    assert play.takes_strength
    assert play.picture_shape == (3, 16, 16)
    panel = next(iter(play.panels(Wish(steps=1, count=2, prompts=("a cat", "dog"), guidance=3.0))))

    field = fewstep.load(str(tmp_path / "sd"))
    assert field.text is not None
    assert field.latents is not None
    start, _ = noise(2, 4, 8, 8)
    guided = Guided(field, 3.0, null=field.text.null())
    latents = fewstep.sample(guided, start, 1, **field.text.encode(["a cat", "dog"]))
    assert torch.allclose(panel.samples, field.latents.decode(latents), atol=1e-5)


def test_images_are_a_grid_and_points_are_dots_on_one_extent() -> None:
    play = Playground(tiny_student(), "images")
    panel = next(iter(play.panels(Wish(steps=1, count=4))))
    assert play.picture(panel.samples) == image_grid(panel.samples)

    plane = Playground(points_map(), "points", teacher=fewstep.CheckerboardField())
    inside = torch.tensor([[1.5, 1.5]])  # top right, and so a dot there and nowhere else
    pixels = Image.open(io.BytesIO(plane.picture(inside))).convert("L")
    width, height = pixels.size
    assert pixels.crop((width // 2, 0, width, height // 2)).getextrema()[0] < 250
    assert pixels.crop((0, height // 2, width, height)).getextrema()[0] == 255
    assert plane.picture(inside) == plane.picture(torch.cat([inside])), "the extent is not that of the samples"


def test_what_cannot_be_shown_is_refused_with_a_reason() -> None:
    with pytest.raises(ValueError, match=r"samples of shape \(3,\) are no images"):
        Playground(FlowMap.from_field(NetworkField(MLP(3))), "three")


def test_a_teacher_that_does_not_take_these_samples_is_left_out_with_a_note() -> None:
    with pytest.warns(UserWarning, match="the teacher is not shown"):
        play = Playground(points_map(), "one", teacher=tiny_field())
    assert [p.name for p in play.panels(Wish(steps=1, count=2))] == ["1 step"]


@pytest.mark.takes_seconds
def test_a_run_is_opened_with_its_teacher_and_the_names_of_its_classes(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "name: tiny\nteacher: eight-gaussians\ndata: eight-gaussians\nobjective: ITVM\n"
        "student: {network: mlp, options: {width: 8, depth: 2}}\n"
        "training: {steps: 1, batch: 8, chunk: 8, quiet: true}\nevaluation: {count: 0}\n"
    )
    assert main(["distill", str(recipe), "--out", str(tmp_path / "run")]) == 0
    play = Playground.open(str(tmp_path / "run"))
    assert play.name == "run"
    assert [name for name, _, _ in play.plan(Wish(steps=2))] == ["1 step", "2 steps", "teacher, 50 steps"]


# The page.


class Failing(FlowMap):
    """A map that fails once it is told to."""

    fails = False

    def forward(self, *args: Any, **cond: Any) -> Tensor:
        if self.fails:
            raise ValueError("the <b>third</b> wheel\nis missing")
        return super().forward(*args, **cond)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Playground]]:
    student = tiny_student(classes=5)
    student.__class__ = Failing
    play = Playground(student, "tiny & <new>", teacher=tiny_field(classes=5), classes=["shirt", "bag", *"xyz"])
    address, close = playground_page.serve(play, "runs/tiny")
    yield address.rstrip("/"), play
    close()


def api(address: str, *values: Any) -> list[str]:
    """All that the page is sent for these values of its controls."""
    made = requests.post(f"{address}/gradio_api/call/draw", json={"data": values}, timeout=20)
    said = requests.get(f"{address}/gradio_api/call/draw/{made.json()['event_id']}", timeout=20).text
    assert "event: error" not in said, said
    return [json.loads(line[6:])[0] for line in said.splitlines() if line.startswith("data: [")]


def controls(address: str) -> list[str]:
    return [part["props"].get("label") for part in config(address)["components"] if part["props"].get("label")]


def config(address: str) -> dict[str, Any]:
    return requests.get(f"{address}/config", timeout=20).json()


VALUES = (2, 7, 4, 3, 0.0, 1)  # steps, seed, count, the teacher's steps, stochasticity, class


@pytest.mark.takes_seconds
def test_the_page_draws_over_http_what_sample_draws(served: tuple[str, Playground]) -> None:
    address, play = served
    parts = api(address, *VALUES)
    # At the end once more, for those who only want the last.
    assert [part.count("<img") for part in parts] == [0, 1, 2, 3, 3, 3]
    names = re.findall(r"<figcaption>(.*?)</figcaption>", parts[-1])
    assert names == ["1 step", "2 steps", "teacher, 3 steps"]
    assert re.findall(r"(\d+) network calls? each", parts[-1]) == ["1", "2", "3"]

    start, _ = noise(4, 1, 8, 8, seed=7)
    wanted = image_grid(fewstep.sample(play.model, start, 2, class_labels=torch.ones(4, dtype=torch.long)))
    urls = re.findall(r'<img src="(.*?)"', parts[-1])
    assert requests.get(f"{address}/{urls[1]}", timeout=20).content == wanted
    pack = re.findall(r'href="([^"]*zip)"', parts[-1])[0]
    with zipfile.ZipFile(io.BytesIO(requests.get(f"{address}/{pack}", timeout=20).content)) as files:
        assert [Path(name).name for name in files.namelist()] == ["1-step.png", "2-steps.png", "teacher-3-steps.png"]
        assert files.read(files.namelist()[1]) == wanted
    command = "fewstep sample runs/tiny --steps 2 --seed 7 --count 4 --gamma 0 --labels 1"
    assert command in html.unescape(parts[-1])


def test_only_controls_that_apply_are_shown(served: tuple[str, Playground]) -> None:
    tab = ["Draw", "Edit a picture", "It is", "Make it", "By", "Strength", "Steps", "Seed"]
    wanted = ["Steps, up to", "Seed", "Images", "Teacher steps", "Stochasticity", "Class"]
    assert controls(served[0]) == [*tab, *wanted]
    blocks = playground_page.make_page(Playground(tiny_field(), "field"), "field", Path("."))
    labels = [part["props"].get("label") for part in blocks.get_config_file()["components"]]
    assert [label for label in labels if label] == ["Steps, up to", "Seed", "Images", "Steps of the last"]


def test_nothing_is_uploaded_and_messages_are_short(served: tuple[str, Playground]) -> None:
    address, _ = served
    there = set(Path(gradio.utils.get_upload_folder()).rglob("*"))

    def sent(path: str, **what: Any) -> int:
        return requests.post(f"{address}/gradio_api/{path}", timeout=20, **what).status_code

    assert sent("upload", files={"files": b"x"}) == 403
    assert sent("upload/", files={"files": b"x"}) == 403
    assert sent("process_recording", files={"file": b"x"}) == 403
    assert sent("component_server", json={}) == 403
    assert requests.put(f"{address}/gradio_api/upload", data=b"x", timeout=20).status_code == 403
    assert requests.get(f"{address}/gradio_api/deep_link?session_hash=x", timeout=20).status_code == 403
    assert sent("call/draw", data=b" " * (1 << 20) + b"{}") == 413
    assert sent("call/draw", data=iter([b"{}"])) == 411
    assert set(Path(gradio.utils.get_upload_folder()).rglob("*")) == there


def test_only_the_host_that_it_listens_on_is_answered_and_no_other_page(served: tuple[str, Playground]) -> None:
    address, _ = served
    port = address.rpartition(":")[2]

    def said(method: str = "GET", path: str = "config", **headers: str) -> requests.Response:
        return requests.request(method, f"{address}/{path}", headers=headers, timeout=20)

    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "LOCALHOST:9"):  # a tunnel has its own port
        assert said(Host=host).status_code == 200, host
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "",
        "[]:1",
    ):
        found = said(Host=host)
        assert (found.status_code, found.text) == (421, "the page takes no such thing\n"), host
    assert said(Origin=address).status_code == 200
    for origin in ("http://evil.example", "null", "http://localhost:3000", f"https://evil.example:{port}"):
        asked = {"Access-Control-Request-Method": "POST"}
        for found in (
            said(Origin=origin),
            said("POST", "gradio_api/call/draw", Origin=origin),
            said("OPTIONS", "gradio_api/call/draw", Origin=origin, **asked),
            said(Origin=origin, Host="evil.example"),
        ):
            assert found.status_code in (403, 421), origin
    for found in (said(Origin=address), said(Origin="http://evil.example"), said()):
        assert not [name for name in found.headers if name.lower().startswith("access-control")]


def test_a_page_for_others_is_reached_by_address_and_by_the_name_of_the_machine() -> None:
    door = Door(None, "0.0.0.0")  # pyright: ignore[reportArgumentType]
    for host, is_known in (("10.0.0.7:8000", True), (socket.gethostname(), True), ("evil.example:8000", False)):
        scope = {"headers": [(b"host", host.encode())], "server": ("10.0.0.7", 8000)}
        assert (door._stranger(scope) is None) == is_known, host
    assert Door(None, "gpu.lab")._stranger({"headers": [(b"host", b"gpu.lab:80")]}) is None  # pyright: ignore
    assert door._stranger({"headers": [(b"host", b"localhost"), (b"host", b"evil.example")]}) == 421


BAD = (10**12, -1, 0.5, "x", None, [], {}, 1e308, "<b>x</b>", "9" * 100_000, True)


@pytest.mark.takes_seconds
def test_bad_values_are_a_line_on_the_page_and_nothing_in_the_terminal(
    served: tuple[str, Playground], capfd: pytest.CaptureFixture[str]
) -> None:
    address, _ = served
    with pytest.raises(ValueError, match="gamma is 'nan': a number from 0 to 1"):
        playground_page.wish_of({"gamma": float("nan")}, {"gamma": (0, 1)})
    capfd.readouterr()
    for place in range(len(VALUES)):
        for value in BAD:
            values = [value if i == place else good for i, good in enumerate(VALUES)]
            said = api(address, *values)[-1]
            if value == 0.5 or (place == 5 and value in (None, -1)):
                continue  # which may be, at some places
            line = re.findall('<p class="fs-error" role="alert">(.*?)</p>', said)
            assert line, (place, value)
            assert "a number from" in line[0]
            assert len(line[0]) < 400
    for values in ([], [1]):
        made = requests.post(f"{address}/gradio_api/call/draw", json={"data": values}, timeout=20)
        said = requests.get(f"{address}/gradio_api/call/draw/{made.json()['event_id']}", timeout=20).text
        assert "event: error" in said
        assert "needed: 6" in said
    for path, body in (
        ("call/nothing", b'{"data": []}'),
        ("call/draw", b"{"),
        ("queue/join", b'{"data": [], "fn_index": 9}'),
    ):
        found = requests.post(
            f"{address}/gradio_api/{path}", data=body, headers={"Content-Type": "application/json"}, timeout=20
        )
        assert found.status_code >= 400
    assert capfd.readouterr() == ("", "")


def test_the_command_under_the_pictures_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_student()
    student.gamma = 1.0  # as that of a consistency model
    play = Playground(student, "tiny")
    asked = {"steps": 4, "seed": 5, "count": 3, "gamma": 0.0}
    *_, said = playground_page.draw_page(play, "my tiny", tmp_path, asked)
    words = shlex.split(html.unescape(re.findall("<code>(.*)</code>", said)[0]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fewstep.runs.loading.find_model", lambda *_: student)
    assert main([*words[1:], "--out", "x.npy", "--device", "cpu"]) == 0
    *_, shown = play.panels(Wish(steps=4, seed=5, count=3, gamma=0.0))
    assert np.allclose(np.load("x.npy"), shown.samples, atol=1e-5)


def test_prompts_that_begin_with_a_dash_are_in_the_command(tmp_path: Path) -> None:
    play = Playground(tiny_student(), "tiny")
    foot = markup.footer(play, "tiny", Wish(prompts=("a cat", "-hat", "--count 3")), tmp_path)
    words = shlex.split(html.unescape(re.findall("<code>(.*)</code>", foot)[0]))
    parser, _ = make_parser()
    assert parser.parse_args(words[1:]).prompt == ["a cat", "-hat", "--count 3"]


def test_an_error_is_a_sentence_in_the_page(served: tuple[str, Playground], monkeypatch: pytest.MonkeyPatch) -> None:
    address, _ = served
    monkeypatch.setattr(Failing, "fails", True)
    parts = api(address, *VALUES)
    said = parts[-1]
    assert 'role="alert"' in said
    assert "the &lt;b&gt;third&lt;/b&gt; wheel is missing" in said
    assert "Traceback" not in "".join(parts)


def test_files_of_other_folders_are_not_served_and_old_ones_go(
    served: tuple[str, Playground], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, play = served
    (tmp_path / "secret.png").write_bytes(b"secret")
    assert requests.get(f"{address}/gradio_api/file={tmp_path}/secret.png", timeout=20).status_code == 403
    monkeypatch.setattr(playground_page, "_KEPT", 3)
    asked = dict(zip(("steps", "seed", "count", "teacher_steps", "gamma", "label"), VALUES, strict=True))
    kept = tmp_path / "kept"
    kept.mkdir()
    for _ in range(5):
        list(playground_page.draw_page(play, "x", kept, asked))
    assert len(list(kept.iterdir())) == 3


def test_the_page_is_for_this_machine_alone_and_tells_nobody(served: tuple[str, Playground]) -> None:
    address, _ = served
    assert address.startswith("http://127.0.0.1:")
    found = config(address)
    assert found["analytics_enabled"] is False
    assert not [sheet for sheet in found["stylesheets"] or [] if sheet.startswith("http")]
    # No other address of this machine answers.
    port = int(address.rpartition(":")[2])
    with socket.socket() as other, pytest.raises(OSError, match="refused"):
        other.connect(("127.0.0.2", port))


def test_a_text_page_wants_a_prompt(tmp_path: Path) -> None:
    play = Playground(tiny_field(), "text")
    play.has_text = True
    *_, said = playground_page.draw_page(play, "text", tmp_path, {"steps": 1, "seed": 0, "count": 1, "prompts": " \n"})
    assert "write one" in said


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["ui", "checkerboard", "--port", str(port)]) == 2
    assert f"--port {port}: the page cannot be served there" in capsys.readouterr().err
    assert main(["ui", "chekerboard"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["ui", "checkerboard"]) == 2
    assert capsys.readouterr().err == "error: the playground needs the package gradio: pip install 'fewstep[ui]'\n"


@pytest.mark.takes_seconds
@pytest.mark.skipif(EXECUTABLE is None, reason="needs Chromium")
def test_a_browser_shows_the_pictures_and_draws_others(served: tuple[str, Playground], tmp_path: Path) -> None:
    address, _ = served
    done = "document.querySelectorAll('.fs-foot').length == 1"
    with Browser(tmp_path) as page:
        page.open(address)
        page.wait(f"{done} && [...document.images].length == 5 && [...document.images].every(i => i.naturalWidth > 0)")
        text = page.run("document.body.innerText")
        assert "tiny & <new>" in text
        for name in ("1 step", "2 steps", "4 steps", "8 steps", "teacher, 50 steps"):
            assert name in text
        tops = page.run("[...document.querySelectorAll('figure')].map(f => f.getBoundingClientRect().top)")
        assert len(set(tops)) == 1, "one row"
        before = page.run("document.images[0].src")

        page.run("document.querySelector('#other').click()")
        page.wait(f"{done} && document.querySelector('.fs-foot').innerText.includes('--seed 1 ')")
        assert page.run("document.images[0].src") != before
        drawn = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        assert len(drawn.getcolors(1 << 24) or []) > 100
        foreign = [url for url in page.requests if not url.startswith((address, "data:", "blob:", "about:", "chrome"))]
        assert foreign == []
        assert page.problems == []


@pytest.mark.takes_seconds
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_ended(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    answers: list[int] = []

    class Pressed:
        def wait(self) -> None:
            address = capsys.readouterr().out.split()[0]
            answers.append(requests.get(address, timeout=20).status_code)
            assert list(tmp_path.glob("fewstep-ui-*"))
            os.kill(os.getpid(), number)
            time.sleep(20)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("fewstep.commands.ui.Event", Pressed)
    assert main(["ui", "checkerboard"]) == 0
    assert answers == [200]
    assert capsys.readouterr().err == "\nended\n"
    assert not list(tmp_path.glob("fewstep-ui-*")), "the images go with the page"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_page_that_cannot_be_served_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no socket left")

    monkeypatch.setattr(gradio.Blocks, "launch", fail)
    assert main(["ui", "checkerboard"]) == 2
    assert not list(tmp_path.glob("fewstep-ui-*"))
