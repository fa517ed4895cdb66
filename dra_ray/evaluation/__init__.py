"""Verdicts on images, and the statistics of them. No Ray."""
