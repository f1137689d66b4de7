"""`python -m benchmarks run | aot | tune`."""

import importlib
import sys

COMMANDS = {
    "run": "times of the ops",
    "aot": "registers, spills and access widths of the generated code",
    "tune": "launch settings of attention's kernels, measured on the GPU at hand",
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print("usage: python -m benchmarks COMMAND [options]\n", file=sys.stderr)
        for name, what in COMMANDS.items():
            print(f"  {name:6} {what}", file=sys.stderr)
        raise SystemExit(0 if sys.argv[1:2] in (["-h"], ["--help"]) else 2)
    raise SystemExit(importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:]))
