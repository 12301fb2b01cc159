"""What watches a training run from outside: progress, guards, learning curve, statistics of the offsets."""
