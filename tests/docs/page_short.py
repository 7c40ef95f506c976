"""The one thing that makes long commands short, for all pages at once: numbers are cut down, and flags are added.

The pages say what a reader wants, such as 20,000 steps. The tests run the same words with

* every number behind one of the names in ``AT_MOST`` cut down to what stands there: ``--training.batch 64`` in a shell,
  ``batch=64`` in a call of Python, ``batch: 64`` in YAML;
* the flags in ``FLAGS`` at the end of the command, and the arguments in ``ARGUMENTS`` in the call;
* a training is measured only on pages that compare their runs (``MEASURED``);
* loops over ``range(1000)`` and more of Python ended after ``LOOPS`` rounds.
"""

import ast
import re
from collections.abc import Sequence
from typing import Any

AT_MOST: dict[str, float] = {
    "steps": 2, "num_inference_steps": 2, "count": 8, "batch": 8, "chunk": 4, "accumulate": 1, "size": 16, "rank": 2,
    "seconds": 0.02, "train_steps": 2, "nproc_per_node": 2, "states": 1, "samples": 8,
}  # fmt: skip
_TRAINING = (
    "--steps", "2", "--training.batch", "8", "--training.chunk", "4", "--training.accumulate", "1",
    "--training.quiet", "true", "--evaluation.count", "0",
)  # fmt: skip
MEASURED = (
    "--evaluation.count", "8", "--evaluation.batch", "8", "--evaluation.steps", "[1, 2]",
    "--evaluation.teacher_steps", "[2]", "--evaluation.extractor", "none",
)  # fmt: skip
FLAGS: dict[str, tuple[str, ...]] = {
    "train": _TRAINING,
    "distill": _TRAINING,
    "sample": ("--count", "8"),
    "evaluate": ("--count", "8"),
    "diagnose": ("--count", "2"),
    "encode": ("--size", "16"),
    "compare": (
        "--set",
        "training.batch=8",
        "training.chunk=4",
        "training.accumulate=1",
        "training.quiet=true",
        "evaluation.count=8",
        "evaluation.batch=8",
        "evaluation.steps=[1, 2]",
        "evaluation.teacher_steps=[2]",
    ),
    "convert": ("--steps", "2", "4", "--count", "2"),
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "fit": {"steps": 2, "batch": 8, "quiet": True, "device": "cpu"},
    "make_pairs": {"steps": 2},
}
LOOPS = 3
CUT = {*FLAGS, "reflow"}  # the others take no time, whatever their numbers are


def shortened_command(words: Sequence[str], measured: bool = False) -> list[str]:
    """The words of a command line behind `fewstep`, such as ``["sample", "runs/fast", "--steps", "50"]``."""
    if not words or words[0] not in CUT:
        return list(words)
    short: list[str] = []
    for word in words:
        flag = short[-1] if short and short[-1].startswith("--") else ""
        name = flag.removeprefix("--").rpartition(".")[2].replace("-", "_")
        short.append(_at_most(name, word) if word.isdigit() else shortened_yaml(word))
    said = {word.partition("=")[0] for word in words if word.startswith("--")}
    is_measured = measured and short[:1] in (["train"], ["distill"])
    return short + _added(short, said) + list(MEASURED if is_measured else ())


def _added(words: Sequence[str], said: set[str]) -> list[str]:
    """The flags at the end, but where they would say something else than the page."""
    name = words[0] if words else ""
    if (name == "sample" and "--seeds" in said) or (name == "compare" and "--methods" not in said):
        return []
    budget = [] if name != "compare" or {"--seconds", "--train-steps"} & said else ["--train-steps", "2"]
    return [*budget, *FLAGS.get(name, ())]


def shortened_yaml(text: str) -> str:
    """A recipe, or a piece of one in braces."""
    return re.sub(r"\b(\w+): (\d+)\b", lambda m: f"{m[1]}: {_at_most(m[1], m[2])}", text)


def _at_most(name: str, number: str) -> str:
    return str(min(int(number), AT_MOST.get(name, int(number))))


class _Shorter(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        for keyword in node.keywords:
            if keyword.arg in AT_MOST and isinstance(keyword.value, ast.Constant) and type(keyword.value.value) is int:
                keyword.value.value = min(keyword.value.value, AT_MOST[keyword.arg])
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for name, value in ARGUMENTS.get(called, {}).items():
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != name]
            node.keywords.append(ast.keyword(name, ast.copy_location(ast.Constant(value), node)))
        return node

    def visit_For(self, node: ast.For) -> ast.For:
        self.generic_visit(node)
        match node.iter:
            case ast.Call(func=ast.Name(id="range"), args=[ast.Constant(value=int(rounds))]) if rounds >= 100:
                node.iter.args = [ast.copy_location(ast.Constant(LOOPS), node.iter)]
        return node


def shortened_python(text: str, filename: str = "<block>") -> ast.Module:
    """The tree of a block of Python."""
    return ast.fix_missing_locations(_Shorter().visit(ast.parse(text, filename)))
