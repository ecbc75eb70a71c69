"""What a run is asked to do: settings, presets, overrides and the command line, without PyTorch."""
