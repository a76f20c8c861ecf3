"""The HTTP face of a supervisor: metrics and health."""
