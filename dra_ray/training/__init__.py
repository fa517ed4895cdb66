"""The training step and its parts: losses, optimisers, schedules, averages. No Ray."""
