"""The words of a command line, as its command takes them."""

import shlex
from pathlib import Path

import pytest

from fewstep.cli import main, make_parser, parsed
from fewstep.commands.train import DEFAULTS
from fewstep.runs.recipes import load_recipe


def test_a_slip_of_a_command_or_an_option_names_what_is_meant(capsys: pytest.CaptureFixture[str]) -> None:
    for line, meant in (
        ("distil checkerboard-itvm", "unknown command 'distil': did you mean 'distill'?"),
        ("sample x --step 2", "unknown option of sample '--step': did you mean '--steps'?"),
        (
            "evaluate x --teacher_steps 2",
            "unknown option of evaluate '--teacher_steps': did you mean '--teacher-steps'?",
        ),
        ("push x me/y --privat", "unknown option of push '--privat': did you mean '--private'?"),
        ("sample", "the following arguments are required: model (see fewstep sample --help)"),
        ("evaluate x --steps two", "argument --steps: expected at least one argument (see fewstep evaluate --help)"),
    ):
        assert main(line.split()) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert meant in said
        assert len(said) < 600


def test_what_is_no_option_may_come_last() -> None:
    assert parsed(["evaluate", "--steps", "1", "2", "4", "runs/x"]).run == Path("runs/x")
    assert parsed(["evaluate", "--steps", "1", "2", "4", "runs/x"]).steps == [1, 2, 4]
    assert parsed(["compare", "--seeds", "0", "1", "--out", "c", "runs/x", "runs/y"]).runs == [
        Path("runs/x"),
        Path("runs/y"),
    ]
    assert parsed(["sample", "--prompt", "a cat", "a dog", "--seed", "-1", "--out", "x.png", "m"]).model == "m"
    assert parsed(["sample", "m", "--prompt", "a cat", "a dog"]).prompt == ["a cat", "a dog"]


def test_keys_of_a_recipe_are_flags_wherever_they_stand() -> None:
    line = (
        'distill --objective.ema 0.5 --dry-run mine --training.lr=-1e-3 --data.mean -1e-3 --x "- 1" --teacher-steps 3'
    )
    args = parsed(shlex.split(line))
    assert (args.recipe, args.dry_run, args.out) == ("mine", True, None)
    assert args.overrides == {
        "objective.ema": "0.5", "training.lr": "-1e-3", "data.mean": "-1e-3", "x": "- 1", "teacher_steps": "3",
    }  # fmt: skip
    assert parsed(["train", "mine"]).overrides == {}
    assert parsed(["plan", "--gpu", "H100", "--steps", "1", "--steps", "2", "mine"]).overrides == {"steps": "2"}
    for words in (["--steps"], ["--steps", "--dry-run"], ["--objective.ema", "--out", "x"]):
        with pytest.raises(ValueError, match=f"^{words[0]} needs a value, as in"):
            parsed(["distill", "mine", *words])


@pytest.mark.parametrize("name", list(make_parser()[1]))
def test_the_examples_of_a_command_are_its_own_and_parse(name: str) -> None:
    examples = make_parser()[1][name].examples
    assert examples
    for line in examples:
        words = shlex.split(line.partition(" > ")[0])
        assert words[:2] == ["fewstep", name]
        args = parsed(words[1:])
        if getattr(args, "overrides", None):  # as `sample` has none
            usual = args.recipe or DEFAULTS["distill" if name == "plan" else name][1]
            load_recipe(usual, {"name": "x", **args.overrides})


def test_an_old_spelling_works_with_a_note_and_is_not_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["sample", "x"], ["reflow", "x", "--count", "1", "--out", "y"]):
        assert parsed([*command, "--guidance-scale", "2"]).guidance_scale == 2.0
        assert capsys.readouterr().err == ""
        assert parsed([*command, "--guidance", "3"]).guidance_scale == 3.0
        assert capsys.readouterr().err == "note: --guidance is called --guidance-scale now; the old name still works\n"
        assert parsed(command).guidance_scale is None
        assert "--guidance " not in make_parser()[1][command[0]].format_help()


def test_the_help_of_labels_and_source_says_what_each_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--labels 3,cat classes by number or name" in text
    assert "--source DATA the data set that samples start from" in text
