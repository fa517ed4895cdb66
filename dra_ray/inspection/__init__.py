"""Looking at teachers, students and synthetic sets. No Ray."""
