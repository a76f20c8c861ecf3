"""Memory: what a job uses, whether that is too much, and how many jobs fit on the host."""
