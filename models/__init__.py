"""Networks as lists of layers, and the tables of their parts."""
