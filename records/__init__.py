"""What a run writes down: its folder, its checkpoints and where it came from."""
