"""Comparison of variants: runs with several seeds, statistics, and a report."""
