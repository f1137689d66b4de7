# A package, so that `python -m tests.csrc.conformance` finds these tests where another package named tests is installed.
