"""Errors, files, paths and text, which every other package uses; no PyTorch."""
