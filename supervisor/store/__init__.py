"""MongoDB: all that this package knows about it, and the embedded server."""
