"""Benchmarks of verglas; see benchmarks/NOTES.md for predictions and outcomes."""
