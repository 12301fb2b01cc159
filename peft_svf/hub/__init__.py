"""Experts and banks on the Hugging Face Hub: pushed in one commit, pulled from one commit."""
