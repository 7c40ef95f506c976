"""Runs on images of many shapes: every family that takes them, stopped anywhere, on one process and on two; and those
that take one shape, which say so before anything is computed."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from toys.captions import pipeline_folder
from toys.processes import torchrun

import fewstep
from fewstep.data.buckets import buckets_of, of_one_shape
from fewstep.data.couplings import uncoupled
from fewstep.evaluation import evaluate as evaluation
from fewstep.runs import judge
from fewstep.runs import previews as watch
from fewstep.runs.build import build
from fewstep.runs.encode import encode
from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run
from fewstep.training.fit import fit

# Width and height: nine images of three shapes, unevenly.
SIZES = [(64, 64), (128, 64), (66, 64), (64, 128), (132, 64), (64, 66), (70, 70), (70, 68), (68, 70)]


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(watch, "teacher_states", partial(watch.teacher_states, steps=2))
    monkeypatch.setattr(watch, "_COLUMNS", 2)
    monkeypatch.setattr(judge, "_DECODED", 2)
    monkeypatch.setattr(evaluation, "_SOLVE", 2)


def photos(root: Path, captions: bool = True) -> Path:
    root.mkdir(parents=True)
    for i, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        if captions:
            (root / f"{i}.txt").write_text("a cat" if i % 2 else "a dog")
    return root


def recipe_of(teacher: Path, data: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {
        "name": "fast", "teacher": str(teacher), "data": data, "objective": "ITVM",
        "training": {"steps": 6, "batch": 4, "chunk": 2, "quiet": True, "lr": 0.01, **training},
        "evaluation": {"count": 4, "steps": [1], "teacher_steps": [1]},
    }  # fmt: skip


FAMILIES = ("sd", "sdxl", "pixart", "sd3", "flux", "flux2", "qwenimage", "z-image", "sana", "lumina2", "chroma")


@pytest.mark.takes_seconds
@pytest.mark.filterwarnings("ignore:.*images are smaller")
@pytest.mark.parametrize("name", [*FAMILIES, "hunyuanimage"])
def test_a_student_of_each_family_trains_on_all_shapes(tmp_path: Path, name: str) -> None:
    teacher = pipeline_folder(tmp_path / name, name)
    data = {"name": str(photos(tmp_path / "photos")), "size": 16, "buckets": True, "bucket_step": 4}
    built = build(load_recipe(recipe_of(teacher, data)))
    shapes = [bucket.shape[1:] for bucket in buckets_of(built.data)]
    assert shapes == [(6, 10), (8, 8), (10, 6)]
    seen: set[tuple[int, ...]] = set()
    before = [weight.clone() for weight in built.student.parameters()]
    forward = built.objective.forward

    def watched(student: Any, batch: Any, **options: Any) -> Any:
        seen.add(tuple(batch.data.shape[2:]))
        return forward(student, batch, **options)

    built.objective.forward = watched  # type: ignore[method-assign]
    result = fit(built.student, built.objective, built.data, 8, batch=4, chunk=2, lr=0.01, quiet=True, device="cpu")
    assert seen == set(shapes)
    assert all(np.isfinite(value) for value in result.losses.values())
    assert any(not torch.equal(old, new) for old, new in zip(before, built.student.parameters(), strict=True))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").iterdir())
    return {
        f"{file.name} {key}": value for file in newest.glob("*.safetensors") for key, value in load_file(file).items()
    }


@pytest.mark.takes_seconds
def test_a_run_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    teacher, data = pipeline_folder(tmp_path / "sdxl", "sdxl"), photos(tmp_path / "photos")
    encode(str(teacher), data, tmp_path / "encoded", size=32, buckets=True, bucket_step=4, device="cpu")
    tree = recipe_of(teacher, {"name": str(tmp_path / "encoded"), "buckets": True})
    whole = run(load_recipe(tree), tmp_path / "whole")
    run(load_recipe(tree, {"training.steps": "2", "training.schedule": "constant"}), tmp_path / "other")
    constant = load_recipe(tree, {"training.schedule": "constant"})
    run(constant, tmp_path / "constant")
    done = run(constant, tmp_path / "other")  # nine rows are two batches and a quarter: within the second epoch
    assert done.result.step == 6
    ours, theirs = weights(tmp_path / "constant"), weights(tmp_path / "other")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    # Judged at the shape of the most rows; samples of the run have it too.
    found = json.loads((tmp_path / "whole" / "quality.json").read_text())
    assert found["facts"]["shape"] == [4, 16, 16]
    assert whole.evaluation is not None
    drawn: Any = fewstep.load(tmp_path / "whole")
    assert fewstep.sample(drawn, torch.randn(1, 4, 10, 24), 1, **rows_of(tmp_path / "encoded")).shape == (1, 4, 10, 24)
    # Of other images it is another run.
    Image.new("RGB", (64, 64)).save(data / "9.png")
    (data / "9.txt").write_text("a cat")
    encode(str(teacher), data, tmp_path / "more", size=32, buckets=True, bucket_step=4, device="cpu")
    tree["data"] = {"name": str(tmp_path / "more")}
    with pytest.raises(ValueError, match="belongs to another recipe"):
        run(load_recipe(tree), tmp_path / "whole")


def rows_of(encoded: Path) -> dict[str, torch.Tensor]:
    data: Any = fewstep.load_data(encoded)
    return data.rows(torch.tensor([0]), torch.Generator()).cond


SCRIPT = """
import sys
from pathlib import Path
import torch
from torch import nn
from fewstep import FlowMap, PSD, fit
from fewstep.common.randomness import generator
from fewstep.data import ArrayData, Buckets

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, s, t):
        return self.last(torch.tanh(self.first(x) + (s + 2 * t)[:, None, None, None]))

torch.manual_seed(0)
shapes, draw = {(3, 4, 16): 5, (3, 8, 8): 30, (3, 16, 4): 9}, generator(0)
data = Buckets([ArrayData(torch.randn(count, *shape, generator=draw)) for shape, count in shapes.items()])
fit(FlowMap(Net()), PSD(), data, 12, out=Path(sys.argv[1]), batch=16, chunk=4, log_every=2, quiet=True, device="cpu")
"""


@pytest.mark.takes_seconds
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    for processes in (1, 2):
        torchrun(tmp_path / "train.py", tmp_path / f"{processes}", processes=processes, timeout=200)
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["dit", "auraflow"])  # whose twin has a position table of 4 x 4 places
def test_a_network_of_one_shape_is_refused_before_images_are_encoded(tmp_path: Path, name: str) -> None:
    teacher = pipeline_folder(tmp_path / name, name)
    data = {"name": str(photos(tmp_path / "photos")), "size": 16, "buckets": True, "bucket_step": 4}
    with pytest.raises(ValueError, match=r"takes images of one shape .*leave buckets out"):
        build(load_recipe(recipe_of(teacher, data)))
    assert not (tmp_path / "cache" / "encoded").exists()


@pytest.mark.takes_seconds
def test_pixels_in_buckets_by_class(tmp_path: Path) -> None:
    """A U-Net of pixels that is trained from its own folder, and judged at the shape of the most rows."""
    import diffusers

    model = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet=model, scheduler=diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    folder = photos(tmp_path / "photos", captions=False)
    tree = recipe_of(tmp_path / "ddpm", {"name": str(folder), "buckets": True})
    with pytest.warns(UserWarning, match="are cut to buckets of about 32 x 32 pixels, the teacher's size"):
        run(load_recipe(tree), tmp_path / "run")
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml", look=True)
    assert recipe.data.options == {"size": 32, "labels": False, "buckets": True, "bucket_step": 2}
    found = json.loads((tmp_path / "run" / "quality.json").read_text())
    assert found["facts"]["shape"] == [3, 32, 32]
    tree["data"] |= {"size": 30, "bucket_step": 7}
    with pytest.raises(ValueError, match="bucket_step: 7: a multiple of 2 up to the size, 30"):
        build(load_recipe(tree))


def test_a_network_of_ones_own_of_one_size_is_refused(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", captions=False)
    code = tmp_path / "own.py"
    code.write_text(
        "import torch\n\nclass OneSize(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.table = torch.nn.Parameter(torch.zeros(3, 32, 32))\n"
        "    def forward(self, x, s, t):\n        return x + self.table\n"
    )
    tree = {
        "name": "own", "student": {"network": f"{code}:OneSize"}, "objective": "PSD",
        "data": {"name": str(folder), "size": 32, "buckets": True}, "training": {"steps": 1, "batch": 4, "quiet": True},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"does not take the data .*leave buckets out for one of a fixed size"):
        build(load_recipe(tree))


def test_what_pairs_two_data_sets_takes_one_shape(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", captions=False)
    data = fewstep.load_data(folder, size=32, buckets=True)
    with pytest.raises(ValueError, match="rows of one shape: leave buckets out"):
        fewstep.Between(data, data)
    assert uncoupled(data).shape == (3, 32, 32)


def test_a_bucket_of_one_image_with_a_class(tmp_path: Path) -> None:
    for kind, sides in (("cat", [(64, 64), (64, 64)]), ("dog", [(64, 64), (128, 64)])):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i, size in enumerate(sides):
            Image.new("RGB", size).save(tmp_path / "photos" / kind / f"{i}.png")
    blocks = {"down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}
    options = {**blocks, "block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1}
    student = {"network": "unet", "options": {**options, "num_class_embeds": 2}}
    tree = {
        "name": "own", "student": student, "objective": "PSD",
        "data": {"name": str(tmp_path / "photos"), "size": 32, "buckets": True},
        "training": {"steps": 1, "batch": 4, "quiet": True},
    }  # fmt: skip
    built = build(load_recipe(tree))
    assert [bucket.count for bucket in buckets_of(built.data)] == [1, 3]


def test_a_bucket_that_is_too_small_to_judge_by_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate([(16, 16), (16, 16), (32, 16), (16, 32)]):  # width and height
        Image.new("RGB", size, (40 * i, 90, 30)).save(folder / f"{i}.png")
    data = fewstep.load_data(folder, size=16, buckets=True, bucket_step=4)
    tree = {"data": {"name": str(folder)}, "objective": "FlowMatching", "student": "unet", "training": {"steps": 1}}
    with pytest.raises(ValueError, match=r"2 rows of data in \(3, 16, 16\), the bucket with the most, are too few"):
        judge.prepare(load_recipe({**tree, "name": "few"}), of_one_shape(data), None)  # pyright: ignore[reportArgumentType]
