"""A place where fewstep is not: a venv with every package of this one but it."""

import os
import subprocess
import sysconfig
import textwrap
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

WITHOUT = """
try:
    import fewstep  # noqa: F401
    raise SystemExit("fewstep is here")
except ModuleNotFoundError:
    pass
"""


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs Python code in a venv that has every package of this one but fewstep; returns what it prints."""
    home = tmp_path_factory.mktemp("elsewhere")
    venv.create(home / "venv", with_pip=False, symlinks=True)
    python = home / "venv" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    for folder in {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}:
        for entry in Path(folder).iterdir():
            # A .pth file may lead to the sources of fewstep.
            if "fewstep" not in entry.name and entry.suffix != ".pth":
                (packages / entry.name).symlink_to(entry)

    def run(code: str, *arguments: object) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
            "HF_HOME": str(home / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        command = [python, "-c", WITHOUT + textwrap.dedent(code), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
