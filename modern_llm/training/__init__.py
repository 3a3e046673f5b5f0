"""Motion: optimizers and schedules, the one loop, opening and closing a run, the three stages."""
