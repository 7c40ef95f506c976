"""What every part stands on: errors, the terminal, random numbers, files that are whole or absent, processes."""
