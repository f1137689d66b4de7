"""`python -m benchmarks run | compare | report | aot | tune`."""

import importlib
import sys

COMMANDS = {
    "run": "times of the ops",
    "compare": "what one run is slower in than another",
    "report": "results as a page with tables and pictures",
    "aot": "registers, spills and access widths of the generated code",
    "tune": "launch settings of attention's kernels, measured on the GPU at hand",
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print("usage: python -m benchmarks COMMAND [options]\n", file=sys.stderr)
        for name, what in COMMANDS.items():
            print(f"  {name:8} {what}", file=sys.stderr)
        raise SystemExit(0 if sys.argv[1:2] in (["-h"], ["--help"]) else 2)
    raise SystemExit(importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:]))
