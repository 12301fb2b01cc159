"""The loss of a batch of answers: advantages, hidden states, log-probabilities, entropy and KL of their tokens."""
