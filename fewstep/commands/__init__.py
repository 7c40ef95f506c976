"""One file a command: its flags, and what it does, which is to call and to print what to look at and to type next.

Each has ``add``, which tells the parser of the command, and ``run(args)``, which returns the exit code. Nothing heavy
is imported before a command runs. ``fewstep/cli.py`` lists them.
"""
