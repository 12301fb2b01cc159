"""What stops a run or warns before it wastes more time: NaN, rewards without spread, collapse, lost precision."""
