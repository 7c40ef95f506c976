"""Images while a run trains: when they are drawn."""

from types import SimpleNamespace

import pytest

from fewstep.data import load_data
from fewstep.runs import previews as watch
from fewstep.runs.recipes import load_recipe


@pytest.fixture
def watcher(monkeypatch, tmp_path):
    """Draws for four seconds, at the clock of ``now``, and notes the steps; with more keys of the recipe."""
    now = [0.0]
    monkeypatch.setattr(watch.time, "perf_counter", lambda: now[0])

    def make(**keys):
        recipe = load_recipe("checkerboard-itvm", {"steps": "80", **keys})
        made = watch.Watch(recipe, load_data("checkerboard"), None, tmp_path)
        drawn = []

        def draw(model, step):
            drawn.append(step)
            now[0] += 4.0
            return {}

        made.draw = draw
        return made, drawn

    return make


def train(made, seconds_a_step: float) -> None:
    for step in range(1, 81):
        seconds = seconds_a_step * step
        made(
            SimpleNamespace(step=step, progress=(step - 1) / 80, seconds=seconds, ema=None, log=dict, is_sharded=False)
        )


def test_a_picture_each_eighth_of_a_long_training_and_none_in_a_short_one(watcher):
    made, drawn = watcher()
    train(made, 10.0)
    assert drawn == [11, 21, 31, 41, 51, 61, 71]
    made, drawn = watcher()
    train(made, 0.06)
    assert drawn == []


def test_pictures_take_a_small_share_of_the_time(watcher):
    made, drawn = watcher()
    train(made, 3.0)  # 240 seconds, of which a twentieth is three images
    assert drawn == [11, 61]  # the second at 183 s, when two of four seconds are less than a twentieth
    made, drawn = watcher(**{"evaluation.every": "20"})
    train(made, 0.01)
    assert drawn == [20, 40, 60, 80]  # as it was asked for, whatever it takes
