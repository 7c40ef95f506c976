"""Where the tests and the sources are."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
