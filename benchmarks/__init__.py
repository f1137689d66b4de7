"""Measuring: `python -m benchmarks run` (times, behind an accuracy gate), `compare`, `report`, `aot` (generated code), `tune`."""
