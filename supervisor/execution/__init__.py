"""How one job runs: the warm interpreter, the runner of a slot, and what happens in the job's own process."""
