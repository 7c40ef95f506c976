"""Every command on a disk that takes no more: one line with the file, the cause and the way out, and nothing left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from toys.places import ROOT
from toys.unet import tiny_unet

from fewstep.runs.recipes import load_recipe
from fewstep.runs.run import run

POINTS = {
    "name": "points",
    "teacher": "eight-gaussians",
    "student": {"network": "mlp", "options": {"width": 8, "depth": 2}},
    "data": "eight-gaussians",
    "objective": "ITVM",
    "training": {"steps": 2, "batch": 16, "quiet": True},
    "evaluation": {"steps": [1], "teacher_steps": [1], "count": 8},
}
# No file may grow beyond these bytes, which the system says as a full disk is said: in the middle of a write.
SCRIPT = """
import json, resource, sys
from fewstep.cli import main
limit, *commands = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
for words in commands:
    print("code", main(words), file=sys.stderr, flush=True)
"""
COMMANDS = {
    60: [
        ["distill", "points.yaml", "--out", "there/run"],
        ["evaluate", "run"],
        ["export", "run", "there/export"],
        ["export", "run", "there/program", "--format", "torch"],
        ["export", "ddpm", "there/stock"],
        ["convert", "ddpm", "--out", "there/flow", "--no-check"],
        ["sample", "run", "--count", "2", "--out", "there/grid.png"],
        ["sample", "run", "--count", "2", "--out", "there/points.npy"],
        ["sample", "ddpm", "--steps", "1", "--count", "2", "--out", "there/pictures"],
        ["reflow", "run", "--count", "2", "--out", "there/pairs"],
        ["compare", "run", "--out", "there/compare"],
        ["compare", "points.yaml", "--methods", "ITVM", "--train-steps", "1", "--out", "there/methods"],
    ],
    # Enough for what is small, not for weights, programs and lines without end.
    4000: [
        ["distill", "points.yaml", "--out", "there/long", "--steps", "500", "--training.log_every", "1"],
        ["export", "ddpm", "there/stock"],
        ["convert", "ddpm", "--out", "there/flow", "--no-check"],
        ["export", "run", "there/program", "--format", "torch"],
    ],
}


@pytest.mark.takes_seconds
@pytest.mark.skipif(os.name != "posix", reason="limits of files are POSIX's")
@pytest.mark.parametrize("limit", COMMANDS)
def test_commands_say_what_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(POINTS)
    Path("points.yaml").write_text(recipe.as_yaml())
    run(recipe, Path("run"))
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained("ddpm")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([limit, *COMMANDS[limit]])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith(("error", "code", "Traceback"))]
    for words, error, code in zip(COMMANDS[limit], said[::2], said[1::2], strict=True):
        place = words[-1] if words[0] == "evaluate" else next(word for word in words if word.startswith("there/"))
        assert code == "code 1", (words, done.stderr)
        assert error.startswith("error: could not write ")
        assert place in error.split(": ")[1]
        assert "no file may be that large there. See ulimit -f, or write to another place" in error
        assert len(error) < 400
    assert all(file.read_bytes() == content for file, content in before.items())
    there = [file.relative_to(tmp_path / "there") for file in Path("there").absolute().rglob("*")]
    assert not [file for file in there if file.parts[0] in ("stock", "flow", "program", "export")]
    assert not [file for file in there if file.name.startswith(".")]
