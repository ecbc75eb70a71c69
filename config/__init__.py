"""Configuration of a run: settings, presets, overrides and the command line; no PyTorch."""
