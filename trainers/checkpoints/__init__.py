"""Checkpoints that are whole or not there, and resuming to the numbers of an uninterrupted run."""
