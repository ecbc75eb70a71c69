"""Parallelism strategies: one engine interface for the training loop, one engine per strategy."""
