"""The two folders that fewstep keeps for a user: the cache, which may be removed, and the state, which remembers."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where what is made once is kept (decoded images, encoded data, hashes, classifiers): $FEWSTEP_CACHE, else
    ~/.cache/fewstep."""
    return Path(os.environ.get("FEWSTEP_CACHE") or "~/.cache/fewstep").expanduser()


def state_folder() -> Path:
    """Where it is written down which runs are this user's own: $XDG_STATE_HOME/fewstep, else ~/.local/state/fewstep."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "fewstep"
