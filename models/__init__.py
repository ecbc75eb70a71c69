"""Networks as lists of layers, and the component registries."""
