"""The command line: parse, call, print. Nothing heavy is imported before a command is known."""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from fewstep import commands
from fewstep.common.errors import OUT_OF_MEMORY, TrainingError, briefly, is_out_of_memory, shortened, shown, unknown
from fewstep.common.trust import trusting
from fewstep.common.version import __version__
from fewstep.common.write_errors import NEVER_OF_READING, WriteError, write_error

_KEYS = """any key of the recipe is a flag, with its value as YAML:
  --objective.ema 0.99   --training.lr 3e-4   --evaluation.steps "[1, 2]"
`fewstep recipes` lists the recipes that come along, `--dry-run` prints every key with its value."""


# The commands that may run code which a recipe names; the others only look.
_BUILDING = (
    "train", "distill", "plan", "sample", "ui", "evaluate", "compare", "reflow", "encode", "export", "convert",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a training or a disk that failed, 2 for bad input, 130 if
    interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    usual, warnings.formatwarning = warnings.formatwarning, _note
    records = logging.getLogRecordFactory()
    logging.setLogRecordFactory(partial(_short_record, records))
    try:
        if empty := next((word for word in argv if word.startswith("--") and word.endswith("=--")), None):
            raise ValueError(f"{shown(empty)}: -- is no value (a text that begins with a dash is --flag=-text)")
        if odd := next((word for word in argv if "\0" in word), None):  # from Python: no shell has it
            raise ValueError(f"{shown(odd)} has a byte of zero in it")
        rest, overrides = _split(argv)
        args = _parsed(rest)
        args.argv = argv
        with trusting(getattr(args, "trust", False)):
            return args.command(args, overrides)
    except (ValueError, OSError, ImportError, TrainingError) as error:
        if is_debug:
            raise
        if isinstance(error, OSError) and error.errno in NEVER_OF_READING:
            error = write_error(error) or error
        elif isinstance(error, OSError) and error.errno and error.filename:
            error = OSError(f"{shown(error.filename)} cannot be used as a file or folder: {error.strerror}")
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError | WriteError) else 2
    except (MemoryError, RuntimeError) as error:
        if is_debug or not is_out_of_memory(error):
            raise
        print(f"error: {OUT_OF_MEMORY} ({briefly(error)})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = usual
        logging.setLogRecordFactory(records)


def one_line(error: BaseException) -> str:
    """What an error says, in a line that can be read."""
    return shortened(_as_flags(str(error)))


def _as_flags(text: str) -> str:
    """An error in one line; what Python calls resume=False, overwrite=True and trust=True are flags here."""
    text = " ".join(text.split())
    for python, flag in (("resume=False", "--fresh"), ("overwrite=True", "--overwrite")):
        text = text.replace(f"{python} ({flag})", flag).replace(python, flag)
    return text


def _note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> str:
    """A warning as one line, without the place in the code."""
    return f"note: {shortened(str(message))}\n"


def _short_record(make: Callable[..., logging.LogRecord], *args: Any, **more: Any) -> logging.LogRecord:
    """What diffusers and transformers log, in a line that can be read: they repeat whole captions."""
    record = make(*args, **more)
    record.msg, record.args = shortened(record.getMessage()), ()
    return record


def _split(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """For `train`, `distill` and `plan`: what the parser knows, and the flags that are keys of the recipe."""
    if not argv or argv[0] not in (*commands.DEFAULTS, "plan"):
        return argv, {}
    own = {"--gpu", "--utilization"} if argv[0] == "plan" else {"--out"}
    switches = {"--dry-run", "--fresh", "--trust", "--help", "-h"}
    rest, overrides = [argv[0]], {}
    words = iter(argv[1:])
    for word in words:
        flag, has_value, value = word.partition("=")
        if not flag.startswith("--") or flag in switches:
            rest.append(word)
            continue
        value = value if has_value else next(words, None)
        if value is None:
            raise ValueError(f"{flag} needs a value, as in `{flag} 1` (true and false too)")
        if flag in own:
            rest += [flag, value]
        else:
            overrides[flag.removeprefix("--").replace("-", "_")] = value
    return rest, overrides


class _Parser(argparse.ArgumentParser):
    """One whose complaints are errors like all others: a line that says what is meant."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parsed(argv: list[str]) -> argparse.Namespace:
    """The words of the command line as the parser takes them; a slip of a command or an option names what is meant."""
    parser, known = _parser()
    if argv and argv[0] not in known and not argv[0].startswith("-"):
        raise unknown("command", argv[0], known)
    if argv and argv[0] in known:
        argv = [argv[0], *_positionals_first(known[argv[0]], argv[1:])]
    args, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("--"):
            raise unknown(f"option of {args.name}", word.partition("=")[0], known[args.name]._option_string_actions)
    if rest:
        raise ValueError(f"{args.name} does not know what {shown(rest[0])} is for (see fewstep {args.name} --help)")
    return args


def _positionals_first(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """The words with those of options last, as `evaluate --steps 1 2 RUN` is meant: numbers end at what is none."""
    first, options = [], []
    while words:
        word, *words = words
        action = parser._option_string_actions.get(word)
        if action is None:
            (options if word.startswith("-") else first).append(word)
            continue
        count = 0 if action.nargs == 0 else len(words) if action.nargs == "+" else 1
        is_value = partial(_is_value, action)
        taken = list(takewhile(is_value, words[:count]))
        options += [word, *taken]
        words = words[len(taken) :]
    return [*first, *options]


def _is_value(action: argparse.Action, word: str) -> bool:
    """Whether a word is one of an option's values, as far as it can be told."""
    if action.nargs != "+" or action.type is not int:
        return not word.startswith("--")
    return word.lstrip("-").isdigit()


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands by name."""
    parser = _Parser(
        prog="fewstep",
        description="Turn a diffusion or flow model into a generator that needs 1 to 8 network calls.",
        epilog="--debug, anywhere, shows the traceback of an error. Start: fewstep distill checkerboard-itvm",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fewstep {__version__}")
    known = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: Any, text: str, **more: Any) -> argparse.ArgumentParser:
        made = known.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **more,
        )
        made.set_defaults(command=function, name=name)
        if name in _BUILDING:
            made.add_argument("--trust", action="store_true", help="run code that a run of somebody else's names")
        return made

    for name, text in (("train", "train a model from data"), ("distill", "distill a teacher into a few-step model")):
        p = command(name, commands.run_fit, text, epilog=_KEYS)
        p.add_argument("recipe", nargs="?", help="a recipe by path or name, or a run folder to go on with")
        what = "a diffusers folder, a run, an exact field"
        p.add_argument("--teacher", metavar="FOLDER", help=what if name == "distill" else f"what to start from: {what}")
        p.add_argument("--data", metavar="FOLDER", help="a data set by name or path")
        p.add_argument("--steps", metavar="N", help="updates")
        p.add_argument("--seed", metavar="N", help="decides every random number")
        p.add_argument("--out", type=Path, metavar="FOLDER", help="the run folder (default: runs/NAME)")
        p.add_argument("--fresh", action="store_true", help="throw away the run in that folder and start again")
        p.add_argument("--dry-run", action="store_true", help="check everything, print the whole recipe and stop")

    p = command("plan", commands.run_plan, "say what a training will need: memory, time and what fits", epilog=_KEYS)
    p.add_argument("recipe", nargs="?", help="a recipe by path or name, with any of its keys as flags")
    p.add_argument("--teacher", metavar="FOLDER", help="its configurations are enough: no weights are read or fetched")
    p.add_argument("--data", metavar="FOLDER", help="need not be there where the teacher says what its samples are")
    p.add_argument("--gpu", metavar="NAME", help="the one to say times for, such as H100 (default: four of them)")
    share = "share of its peak that a GPU reaches (default: 0.4)"
    p.add_argument("--utilization", type=float, default=0.4, metavar="U", help=share)

    model = "a run, an export, a diffusers folder or hub name, an exact field, or FILE.py:FUNCTION"
    variant = "weights of a diffusers model, such as fp16 (default: the plain ones, or the only ones that there are)"
    p = command("sample", commands.run_sample, "draw samples")
    p.add_argument("model", help=model)
    p.add_argument("--steps", type=int, metavar="N", help="2 for a flow map, 50 for a velocity field")
    p.add_argument("--count", type=int, metavar="N", help="how many (default: 64, or as many as prompts or seeds)")
    p.add_argument("--seed", type=int, metavar="N", help="sample i of a seed is always the same (default: 0)")
    p.add_argument("--first", type=int, default=0, metavar="I", help="go on with sample I of the seed (default: 0)")
    p.add_argument("--seeds", metavar="5,9,17", help="in the place of --seed and --count: sample 0 of each of these")
    p.add_argument("--out", type=Path, metavar="PATH", help="a .png grid, .npy, .npz, or a folder (goes on there)")
    p.add_argument(
        "--labels", metavar="3,cat", help="classes by number or name, given to the samples in turn (default: all)"
    )
    text = p.add_mutually_exclusive_group()
    text.add_argument(
        "--prompt",
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="texts, given to the samples in turn, for a model of text; --prompt=-TEXT for one that begins with a dash",
    )
    text.add_argument(
        "--prompts",
        metavar="FILE",
        help="sample i takes line i: of a text file, or of a .jsonl with text, seed and label (samples.jsonl is one)",
    )
    p.add_argument("--size", metavar="768x1024", help="height and width in pixels, for a model that takes others")
    p.add_argument("--guidance", type=float, metavar="W", help="its strength, for a model of text or one that takes it")
    p.add_argument("--latents", action="store_true", help="write the latents of a latent model, not their images")
    p.add_argument(
        "--gamma", type=float, metavar="G", help="re-noising between steps, 0 to 1 (default: the map's, mostly 0)"
    )
    p.add_argument(
        "--grid",
        default="uniform",
        metavar="NAME",
        help="times of the steps: uniform (default), shifted, quadratic, or native (those of DDIM)",
    )
    p.add_argument("--solver", metavar="NAME", help="for a velocity field: euler (default), midpoint, heun, adaptive")
    p.add_argument("--teacher", action="store_true", help="sample the teacher of the run instead")
    p.add_argument("--batch", type=int, default=256, metavar="N", help="samples drawn at once, at most (default: 256)")
    p.add_argument(
        "--dtype", default="float32", metavar="NAME", help="of the network: float32 (default), bf16, or fp16 on a GPU"
    )
    p.add_argument("--compile", action="store_true", help="compile the network (torch.compile), which takes a while")
    p.add_argument("--variant", metavar="NAME", help=variant)
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)")

    p = command("ui", commands.run_ui, "try a model out on a page: few steps and the teacher side by side")
    p.add_argument("model", help=model)
    p.add_argument("--host", default="127.0.0.1", metavar="NAME", help="where it listens (default: this machine alone)")
    p.add_argument("--port", type=int, metavar="N", help="(default: the first that is free from 7860)")
    p.add_argument("--variant", metavar="NAME", help=variant)
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)")

    p = command("evaluate", commands.run_evaluate, "measure quality against network calls")
    p.add_argument("run", type=Path, help="a run folder")
    p.add_argument("--steps", type=int, nargs="+", metavar="N", help="step counts (default: the recipe's)")
    p.add_argument("--teacher-steps", type=int, nargs="+", metavar="N", help="those of the teacher")
    p.add_argument("--count", type=int, metavar="N", help="samples at each (default: the recipe's)")
    p.add_argument("--seed", type=int, metavar="N", help="of the samples (default: the recipe's)")
    p.add_argument(
        "--teacher", metavar="MODEL", help="where it is now, or for a run without one (default: the recipe's)"
    )
    p.add_argument("--data", metavar="DATA", help="what it is held against (default: the recipe's)")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)")

    p = command("compare", commands.run_compare, "put runs side by side, or train methods and put those side by side")
    p.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="evaluated run folders; with --methods, one recipe"
    )
    p.add_argument("--out", type=Path, default=Path("compare"), metavar="FOLDER", help="(default: compare)")
    p.add_argument(
        "--methods", nargs="+", metavar="NAME", help="train these on the recipe: NAME, or NAME:key=value,key=value"
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="with --methods (default: 0)")
    budget = p.add_mutually_exclusive_group()
    budget.add_argument("--train-steps", type=int, metavar="N", help="updates of each method (default: the recipe's)")
    budget.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="the same time for each: all methods' steps are timed in turn first, and S seconds over that time is how "
        "many updates a method gets; so a run can be repeated and goes on, however busy the machine is",
    )
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="keys of the recipe")

    p = command(
        "reflow", commands.run_reflow, "draw pairs of noise and data from a model, to train a straighter one on"
    )
    p.add_argument("model", help=model)
    p.add_argument("--count", type=int, required=True, metavar="N", help="how many pairs")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to; goes on with what is there")
    p.add_argument("--steps", type=int, metavar="N", help="2 for a flow map, 50 for a velocity field")
    p.add_argument("--solver", metavar="NAME", help="for a velocity field: euler, midpoint, heun (default), adaptive")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="decides the noise (default: 0)")
    p.add_argument("--labels", metavar="3,5", help="classes, given to the pairs in turn (default: all)")
    p.add_argument("--prompts", metavar="FILE", help="texts, given to the pairs in turn, for a model of text")
    p.add_argument("--guidance", type=float, metavar="W", help="its strength, for a model of text or one that takes it")
    p.add_argument("--teacher", action="store_true", help="take the teacher of the run instead")
    p.add_argument("--batch", type=int, default=256, metavar="N", help="pairs drawn at once (default: 256)")
    p.add_argument("--shard", type=int, default=10_000, metavar="N", help="pairs in a file (default: 10000)")
    p.add_argument("--variant", metavar="NAME", help=variant)
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)")

    p = command("encode", commands.run_encode, "encode pictures and captions for a latent model, once")
    p.add_argument("--teacher", required=True, metavar="MODEL", help="what they are for: a diffusers folder or a run")
    p.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="a folder of pictures (captions in its metadata.jsonl), hf:NAME, a folder of save_to_disk, or webdataset "
        "shards: a folder, a .tar or train-{0000..0099}.tar",
    )
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to; goes on with what is there")
    p.add_argument("--size", type=int, metavar="N", help="side of the pictures in pixels (default: the model's)")
    p.add_argument("--dtype", default="float16", metavar="NAME", help="float16 (default), bfloat16 or float32")
    p.add_argument("--batch", type=int, default=16, metavar="N", help="pictures encoded at once (default: 16)")
    p.add_argument("--shard", type=int, metavar="N", help="pictures in a file (default: about 256 MB)")
    p.add_argument("--caption", metavar="COLUMN", help="that of the captions (default: text, caption or prompt)")
    p.add_argument("--image", metavar="COLUMN", help="of a Hugging Face data set, that of the pictures")
    p.add_argument("--label", metavar="COLUMN", help="of a Hugging Face data set, that of the classes")
    p.add_argument("--split", metavar="NAME", help="of a Hugging Face data set (default: train)")
    p.add_argument("--config", metavar="NAME", help="of a Hugging Face data set")
    p.add_argument("--on-error", default="raise", metavar="DO", help="with a bad picture: raise (default) or skip")
    p.add_argument("--variant", metavar="NAME", help=variant)
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)")

    p = command("export", commands.run_export, "write a model that diffusers loads")
    p.add_argument("model", type=Path, help="a run folder")
    p.add_argument("folder", type=Path, nargs="?", help="where to (default: model, in the run folder)")
    p.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    p.add_argument("--adapter", action="store_true", help="of a run with student.lora: the adapter alone")
    p.add_argument(
        "--format",
        choices=("diffusers", "onnx", "torch"),
        default="diffusers",
        help="diffusers (default), or the bare map as a program for other runtimes",
    )

    p = command("push", commands.run_push, "upload an export to the Hugging Face hub")
    p.add_argument("folder", type=Path, help="what `fewstep export` wrote")
    p.add_argument("name", metavar="OWNER/NAME", help="the repository; made where there is none")
    p.add_argument("--private", action="store_true", help="only for you (default: as your account has it)")
    p.add_argument("--message", metavar="TEXT", help="of the commit")

    p = command("convert", commands.run_convert, "write a diffusion model as a flow, and check that both draw the same")
    p.add_argument("model", help="a diffusers folder or hub name, or a run that trained a diffusion model")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to")
    p.add_argument("--steps", type=int, nargs="+", metavar="N", help="steps to compare at (default: 10 50 200)")
    p.add_argument("--count", type=int, default=8, metavar="N", help="samples compared (default: 8)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="decides the noise (default: 0)")
    p.add_argument("--labels", metavar="3,5", help="classes, given to the samples in turn (default: all)")
    text = "texts, given to the samples in turn, for a text model"
    p.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help=text)
    p.add_argument("--no-check", action="store_true", help="write the flow without drawing samples")
    p.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    p.add_argument("--variant", metavar="NAME", help=variant)
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: a GPU if there is one)")

    p = command("cite", commands.run_cite, "print BibTeX for what a run, recipe or method uses")
    p.add_argument("what", nargs="+", metavar="WHAT", help="run folders, recipes, methods by name or FILE.py:CLASS")

    p = command("recipes", commands.run_recipes, "list the recipes that come along")
    p.add_argument("recipe", nargs="?", help="print this one, to start your own from")
    return parser, dict(known.choices)
