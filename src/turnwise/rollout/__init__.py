"""Episodes, groups and the scheduler: from tasks to scored trajectories."""
