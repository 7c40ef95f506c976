"""From a recipe to its parts, to a run in its folder, and to what it is worth."""
