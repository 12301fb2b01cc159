"""`trainer.sweep_kl`: one training for each KL coefficient, the best by validation score kept."""
