"""Commands with damaged, odd and hostile input: each is to end in one line, in bounds of time and memory.

``python -m fuzz --count 5000 --seed 7`` (in ``tests/``) runs 5,000 cases and prints what went wrong, kind by kind;
``--only 1234`` runs one of them again and shows all that it said.
"""
