"""Where what is made once is kept: decoded pictures, encoded data, hashes, classifiers."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$FEWSTEP_CACHE, else ~/.cache/fewstep."""
    return Path(os.environ.get("FEWSTEP_CACHE") or "~/.cache/fewstep").expanduser()
