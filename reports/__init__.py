"""Figures and pages of runs. Each figure is a function from numbers to a matplotlib Figure; `style.save` writes it."""
