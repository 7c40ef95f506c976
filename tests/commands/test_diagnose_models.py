"""`fewstep diagnose` of models of all kinds: text, latents, classes, exact fields."""

from pathlib import Path

import pytest

from fewstep.cli import main


@pytest.mark.takes_seconds
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sd", ["--prompt", "a cat", "dog", "--guidance-scale", "3"]),
        ("dit", ["--solver", "heun"]),
        ("classes", []),
        ("eight-gaussians", []),
    ],
)
def test_models_of_all_kinds(
    models: Path, tmp_path: Path, name: str, words: list[str], capsys: pytest.CaptureFixture[str]
):
    model = str(models / name) if (models / name).exists() else name
    out = tmp_path / "figure.png"
    assert main(["diagnose", model, "--count", "2", "--device", "cpu", "--out", str(out), *words]) == 0
    said = capsys.readouterr()
    assert "2 trajectories, " in said.out
    assert out.read_bytes()[:4] == b"\x89PNG"
