"""Measures what the README promises, beside others doing the same work; see `__main__` for the command."""
