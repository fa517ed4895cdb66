"""Statistics and representation metrics, as pure functions of arrays."""
