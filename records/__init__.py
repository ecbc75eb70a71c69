"""The files of a run: run folder, checkpoints and provenance."""
