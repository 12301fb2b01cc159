"""Tasks that experts are trained for and evaluated on: one file a task."""

from __future__ import annotations

from peft_svf.trainers.tasks.playground import PLAYGROUND_TASKS
from peft_svf.trainers.tasks.task import Task


__all__ = ["PLAYGROUND_TASKS", "Task"]
