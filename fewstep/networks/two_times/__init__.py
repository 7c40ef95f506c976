"""Models of diffusers with a second time, which an export carries the code of.

One file a family: ``call``, how the pipelines of diffusers call the model, and the model with a second time; ``base``
says how that goes in. An export carries the file of its family, with what that imports from beside it put in
(``fewstep.pipelines.source.whole``), as ``two_times.py`` beside the weights. So nothing here imports fewstep but by
relative imports. The files of families import diffusers, which takes seconds: each is imported where a model of its
family is.
"""

from importlib import import_module
from types import ModuleType


def code_of(family: str) -> ModuleType:
    """The file of a family, by its name here: its ``call``, and its ``TwoTime...`` model."""
    return import_module(f"{__name__}.{family}")
