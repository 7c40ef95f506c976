"""What each command of the command line does: call, and print what to look at and to type next.

Nothing heavy is imported before a command runs.
"""

from fewstep.commands.encoding import run_encode
from fewstep.commands.knowing import run_cite, run_recipes
from fewstep.commands.models import run_convert, run_export, run_push
from fewstep.commands.planning import run_plan
from fewstep.commands.playground import run_ui
from fewstep.commands.sampling import run_reflow, run_sample
from fewstep.commands.training import DEFAULTS, run_compare, run_evaluate, run_fit

__all__ = [
    "DEFAULTS",
    "run_cite",
    "run_compare",
    "run_convert",
    "run_encode",
    "run_evaluate",
    "run_export",
    "run_fit",
    "run_plan",
    "run_push",
    "run_recipes",
    "run_reflow",
    "run_sample",
    "run_ui",
]
