"""The page of `fewstep ui`."""
