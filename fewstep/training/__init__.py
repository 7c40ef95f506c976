"""Training: ``fit`` in ``fit.py`` is the loop; every other file is one of its parts."""
