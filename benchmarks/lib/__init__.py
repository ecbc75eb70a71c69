"""Modules that the programs in benchmarks/ share."""
