"""The version, in one place: packages, checkpoints, exports and the command line read it here."""

__version__ = "0.1.0"
