"""Samples on disk: what is asked for, drawn and written; encodings, pairs, and samples of a teacher as data."""
