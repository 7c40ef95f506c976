"""Models as folders, in and out: loaded, converted, exported, on the hub."""
