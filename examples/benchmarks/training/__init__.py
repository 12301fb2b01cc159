"""The parts of the trainer's benchmark: what a step costs, and a task for a story model."""
