"""Carries edits out on a model: slices, ties, layers and values; undoes them; and rewrites histories."""
