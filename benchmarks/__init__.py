"""Measuring: `python -m benchmarks run` (times, behind an accuracy gate) and `python -m benchmarks aot` (generated code)."""
