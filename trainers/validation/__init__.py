"""What an evaluation says: exact metrics with intervals, and the best checkpoint with the base as a candidate."""
