"""Images and the report: what they show, not how they look."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.evaluation import style
from fewstep.evaluation.diagnostics import Diagnosis
from fewstep.evaluation.grids import image_grid
from fewstep.evaluation.plots import diagnostics_figure, loss_figure, points_figure, quality_figure, trajectory_figure
from fewstep.evaluation.report import write_report
from fewstep.evaluation.style import png


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


# Grids of images


def test_grid_places_and_enlarges_every_pixel(tmp_path: Path):
    images = torch.tensor([-1.0, 0.0, 1.0, 3.0, -9.0]).view(5, 1, 1, 1).repeat(1, 1, 8, 8)
    images[0, 0, 0, 7] = 1.0
    content = image_grid(images, tmp_path / "deep" / "grid.png", columns=3)
    assert (tmp_path / "deep" / "grid.png").read_bytes() == content
    grid = pixels(content)
    # 8 pixels become 64; 2 between and around; two rows of three, the sixth place is white.
    assert grid.shape == (2 * 66 + 2, 3 * 66 + 2)
    assert [grid[40, 10], grid[40, 80], grid[40, 150]] == [0, 128, 255]
    assert [grid[100, 10], grid[100, 80], grid[100, 150]] == [255, 0, 255]
    corner = grid[2:66, 2:66]
    assert (corner[:8, 56:] == 255).all()
    assert corner.sum() == 64 * 255


def test_grid_says_what_its_rows_are():
    images = torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 3, 64, 64)
    plain = pixels(image_grid(images, columns=2))
    labelled = pixels(image_grid(images, columns=2, labels=["1 step", "8"]))
    margin = labelled.shape[1] - plain.shape[1]
    assert margin > 30
    assert (labelled[:, margin:] == plain).all()
    dark = labelled[:, :margin].min(axis=(1, 2)) < 128
    # Each label stands beside its row, at its middle.
    assert [int(np.flatnonzero(dark[top : top + 66]).mean()) for top in (0, 66)] == pytest.approx([33, 33], abs=4)


def test_grid_keeps_colours_and_large_images_as_they_are():
    images = torch.full((2, 3, 70, 50), -1.0)
    images[1, 2] = 1.0
    grid = pixels(image_grid(images))
    assert grid.shape == (74, 2 * 52 + 2, 3)
    assert grid[30, 10].tolist() == [0, 0, 0]
    assert grid[30, 80].tolist() == [0, 0, 255]


@pytest.mark.parametrize("shape", [(4, 2, 8, 8), (8, 8), (0, 1, 8, 8)])
def test_grid_refuses_what_is_no_image(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=re.escape(f"not {shape}")):
        image_grid(torch.zeros(shape))


# Figures


def test_points_share_the_extent_and_shade_of_the_last():
    truth = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    figure = points_figure({"1 step": truth * 5, "2 steps": truth, "teacher": truth})
    assert [ax.get_title() for ax in figure.axes] == ["1 step", "2 steps", "teacher"]
    first, second, last = (ax.images[0] for ax in figure.axes)
    assert first.get_extent() == last.get_extent()
    assert first.get_clim() == last.get_clim()
    assert last.get_extent()[1] == pytest.approx(1.16, abs=0.03)
    shares = [float(np.asarray(image.get_array()).sum()) for image in (first, second, last)]
    assert shares[1] == pytest.approx(shares[2])
    assert shares[0] < 0.1  # most of what is five times too wide lies outside


def test_points_have_x_across_and_y_up():
    corner = torch.tensor([0.5, -1.0]) + 0.01 * torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    image = points_figure({"one corner": corner, "teacher": torch.rand(2000, 2) * 4 - 2}).axes[0].images[0]
    shares = np.asarray(image.get_array())
    row, column = (int(i) for i in np.unravel_index(shares.argmax(), shares.shape))
    left, right, bottom, top = image.get_extent()
    assert left + (column + 0.5) / shares.shape[1] * (right - left) == pytest.approx(0.5, abs=0.1)
    assert bottom + (row + 0.5) / shares.shape[0] * (top - bottom) == pytest.approx(-1.0, abs=0.1)
    assert image.origin == "lower"


def test_quality_lines_run_through_the_mean_of_seeds():
    rows = [{"model": "ITVM", "nfe": n, "seed": s, "fd": 4.0 / n + s} for s in (0, 2) for n in (8, 1, 2)]
    rows += [{"model": "teacher, Heun", "nfe": n, "fd": 100.0 / n} for n in (2, 100)]
    rows += [{"model": "ITVM", "nfe": 4, "kid": 0.1}]
    (ax,) = quality_figure(rows, "fd", "Frechet distance").axes
    student, teacher = ax.get_lines()
    assert list(student.get_xdata()) == [1, 2, 8]
    assert list(student.get_ydata()) == [5.0, 3.0, 1.5]
    assert (student.get_linestyle(), teacher.get_linestyle()) == ("-", "--")
    (band,) = ax.collections  # only the student has seeds
    assert band.get_paths()[0].get_extents().y1 == 6.0
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "8", "100"]
    assert ax.get_ylabel() == "Frechet distance"
    with pytest.raises(ValueError, match="no row has the metric 'fid', the rows have: model, nfe, seed, fd, kid"):
        quality_figure(rows, "fid")


def test_quality_below_zero_is_not_lost_on_a_logarithmic_axis():
    (ax,) = quality_figure([{"model": "a", "nfe": n, "kid": v} for n, v in ((1, 0.2), (2, -0.01))], "kid").axes
    assert ax.get_yscale() == "linear"


def test_loss_curves_by_term():
    rows = [{"step": i, "loss": 2.0, "loss/initial": 1.0 + (-1) ** i * 0.5, "lr": 1e-3} for i in range(0, 400)]
    rows.append({"step": 400, "fd": 3.0})
    (ax,) = loss_figure(rows).axes
    labels = [line.get_label() for line in ax.get_lines()]
    assert [label for label in labels if not str(label).startswith("_")] == ["loss", "initial"]
    total, raw, smooth = ax.get_lines()[1:]
    assert np.allclose(total.get_ydata(), 2.0)  # its ends too
    assert np.ptp(raw.get_ydata()) == 1.0
    assert abs(np.asarray(smooth.get_ydata())[20:-20] - 1).max() < 0.06
    assert len(np.asarray(smooth.get_ydata())) == 400
    assert ax.get_yscale() == "log"
    (ax,) = loss_figure([{"step": 1, "loss": -1.0}]).axes
    assert ax.get_yscale() == "linear"
    with pytest.raises(ValueError, match="no row has a loss"):
        loss_figure([{"step": 1, "fd": 2.0}])


def test_trajectories_begin_at_noise_and_end_at_data():
    path = torch.randn(4, 30, 2, generator=torch.Generator().manual_seed(0)).cumsum(0)
    figure = trajectory_figure({"student": path, "teacher": path[[0, 3]]}, lines=20)
    left = figure.axes[0]
    segments = left.collections[0].get_segments()
    assert len(segments) == 20
    assert np.allclose(segments[5], path[:, 5].numpy())
    starts, ends = left.collections[-2:]
    assert np.allclose(starts.get_offsets(), path[0, :20].numpy())
    assert np.allclose(ends.get_offsets(), path[-1, :20].numpy())


@pytest.mark.takes_seconds
def test_heat_maps_have_s_across_and_t_up():
    times = torch.tensor([0.0, 0.5, 1.0])
    values = torch.full((3, 3), float("nan")).double()
    values[0] = torch.tensor([0.0, 0.02, 0.5])
    names = ("tangent", "lagrangian", "eulerian", "composition", "inverse")
    diagnosis = Diagnosis(times, dict.fromkeys(names, values), speed=2.0, spread=1.0)
    figure = diagnostics_figure(diagnosis)
    titled = {ax.get_title(): ax for ax in figure.axes if ax.get_title()}
    assert tuple(titled) == tuple(name.capitalize() for name in names)
    drawn = np.ma.asarray(titled["Lagrangian"].collections[0].get_array())
    assert drawn[2, 0] == pytest.approx(0.25)  # row t = 1, column s = 0; over the speed
    assert drawn.mask[0, 2]
    assert png(figure).startswith(b"\x89PNG")


def test_figures_touch_no_global_state():
    import matplotlib
    from matplotlib import pyplot

    png(points_figure({"a": torch.randn(50, 2)}))
    for name in style._STYLE:
        assert matplotlib.rcParams[name] == matplotlib.rcParamsDefault[name], name
    assert pyplot.get_fignums() == []


def test_figures_break_into_rows_of_five():
    figure = points_figure({str(i): torch.randn(50, 2) for i in range(7)})
    assert len(figure.axes) == 7
    assert figure.get_size_inches()[0] == pytest.approx(5 * figure.get_size_inches()[1] / 2, rel=0.2)


# The report


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def report(path: Path) -> str:
    grid = image_grid(torch.zeros(4, 1, 8, 8))
    loss = loss_figure([{"step": i, "loss": 1.0 / (i + 1)} for i in range(10)])
    write_report(
        path,
        title='run <1> & "2"',
        recipe_text="data: <script>alert('x')</script> {braces}",
        figures=[("Samples at 1 step, <b>", grid), ("Loss", loss)],
        tables=[
            ("Quality", ["model", "nfe", "rmse"], [["a & b", 1, 0.0123456], ["c", 100, None], ["d", 2, 60000.0]]),
            ("Mixed", ["what", "value"], [["device", "cpu"], ["seed", 0]]),
            ("Written out", ["steps", "runs", "1"], [[72, "1", "0.32 ± 0.011"], [90, "2", "1.5e-05"]]),
            ("Empty", ["a"], []),
        ],
        next_commands=["fewstep sample runs/a --steps 2 > /dev/null", "fewstep export runs/a ./b"],
    )
    return path.read_text(encoding="utf-8")


def test_report_holds_all_it_needs(tmp_path: Path):
    text = report(tmp_path / "new" / "report.html")
    page = Page(text)
    assert page.open == []
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2
    for attributes in images:
        content = base64.b64decode(str(attributes["src"]).removeprefix("data:image/png;base64,"), validate=True)
        assert pixels(content).size
    # The grid in its own pixels; a figure of 4.9 inches at 96 pixels an inch, whatever its resolution.
    assert [attributes["width"] for attributes in images] == ["134", "470"]
    assert not {"script", "link", "iframe", "object", "style src"} & {tag for tag, _ in page.tags}
    addresses = [value for _, a in page.tags for key, value in a.items() if key in ("src", "href", "srcset", "action")]
    assert all(str(value).startswith("data:image/png;base64,") for value in addresses)
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_report_escapes_what_it_is_given(tmp_path: Path):
    text = report(tmp_path / "report.html")
    assert "<script>" not in text
    shown = "".join(Page(text).text)
    for piece in (
        'run <1> & "2"',
        "data: <script>alert('x')</script> {braces}",
        "a & b",
        "Samples at 1 step, <b>",
        "fewstep sample runs/a --steps 2 > /dev/null\nfewstep export runs/a ./b",
    ):
        assert piece in shown


def test_report_numbers(tmp_path: Path):
    text = report(tmp_path / "report.html")
    assert '<td class="number">0.01235</td>' in text
    assert '<td class="number">100</td>' in text
    assert '<td class="number">60,000</td>' in text
    assert '<td class="number">\N{EN DASH}</td>' in text
    # Numbers that are written out, with their deviation, are numbers too: a column is not against the next one.
    assert '<td class="number">1</td><td class="number">0.32 ± 0.011</td>' in text
    assert "<td>cpu</td>" in text
    assert "<td>0</td>" in text  # a column of words and numbers reads as words


def test_report_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = report(tmp_path / "report.html")

    def interrupted(figure: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(style, "png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_report_of_nothing_yet(tmp_path: Path):
    page = Page(write_report(tmp_path / "r.html", title="new", recipe_text="").read_text())
    assert page.open == []
    assert not any(tag in ("figure", "table") for tag, _ in page.tags)


def test_a_teacher_whose_one_step_leads_to_a_point_hides_no_student(recwarn: pytest.WarningsRecorder) -> None:
    spread, point = torch.rand(2000, 2) * 4 - 2, torch.zeros(2000, 2)
    left, right, *_ = points_figure({"student": spread, "teacher": point}).axes[0].images[0].get_extent()
    assert left < -1.9 < 1.9 < right
    png(points_figure({"student": point, "teacher": point}))
    assert not recwarn.list
