"""What a finished run is good for: evaluation, predictions, export."""
