"""What every other package builds on: errors, files, paths and text, without PyTorch."""
