"""A small training run, killed with SIGKILL at random moments and resumed: `make test-faults`."""
