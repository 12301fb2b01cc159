"""Transformer² (arXiv 2501.06252) for the Hugging Face ecosystem."""
