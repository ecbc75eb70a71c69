"""Variants and seeds become runs, statistics and a report."""
