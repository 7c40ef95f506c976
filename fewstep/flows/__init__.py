"""The mathematics: paths, schedules, times, solvers, fields, maps, and what samples them."""
