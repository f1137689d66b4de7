"""What a run leaves: JSON lines with the machine's description, and a table to read."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.harness import OURS, Row


def machine(device: str) -> dict:
    """What a number depends on beside the code: hardware, versions, commit, date (UTC)."""
    info = {
        "kind": "machine",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "sources": _sources_hash(),
        "device": device,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "sms": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        } | _nvidia_smi()
    return info


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return __import__(package).__version__
    except ImportError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _commit() -> str | None:
    here = str(Path(__file__).parent)
    commit = _output("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    # The report must not pass off changed code as the commit it started from.
    return commit and commit + ("+changes" if _output("git", "-C", here, "status", "--porcelain", "-uno") else "")


def _sources_hash() -> str:
    """Names the measured code where there is no git: a hash of every source file of the imported library."""
    import fastlm
    import fastlm.kernels

    digest = hashlib.sha256()
    for folder in (Path(fastlm.__file__).parent, Path(fastlm.kernels.__path__[0])):
        for path in sorted(folder.rglob("*.py")):
            if folder.name == "kernels" or "kernels" not in path.relative_to(folder).parts:  # a wheel nests the kernels
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _nvidia_smi() -> dict:
    fields = {
        "driver": "driver_version",
        "sm_mhz": "clocks.sm",
        "mem_mhz": "clocks.mem",
        "power_limit_w": "power.limit",
    }
    line = _output("nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits", "-i", "0")
    return dict(zip(fields, (v.strip() for v in line.split(",")))) if line else {}


class Lines:
    """JSON lines appended as the run goes, so that a run that is stopped leaves what it had. path None writes nothing."""

    def __init__(self, path: Path | None, header: dict) -> None:
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.write([header])

    def add(self, rows: Iterable[Row]) -> None:
        self.write({"kind": "time" if r.ms is not None else "no time", **asdict(r)} for r in rows)

    def write(self, entries: Iterable[dict]) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            for entry in entries:
                file.write(json.dumps({k: v for k, v in entry.items() if v is not None}) + "\n")


def table(rows: list[Row]) -> str:
    """The rows of one op as aligned text, a block per (size, dtype, mode), the reasons for missing times at the end."""
    rate = "TFLOP/s" if any(r.tflops is not None for r in rows) else "GB/s"
    lines = [
        f"{'provider':16} {'ms':>10} {'quartiles':>21} {rate:>9} {'of peak':>7} {'x plain':>8}  {'host us':>8} {'peak MiB':>9}"
    ]
    cell = None
    for r in rows:
        if r.ms is None:
            continue
        if cell != (r.size, r.dtype, r.mode):
            cell = (r.size, r.dtype, r.mode)
            lines.append(f"-- {r.op} {size_text(r.size)} {r.dtype} {r.mode}")
        value = r.tflops if rate == "TFLOP/s" else r.gbps
        lines.append(
            f"{r.provider:16} {r.ms:10.4f} {f'{r.q1:.4f} - {r.q3:.4f}':>21} {_number(value, 9)} {_percent(r.share)}"
            f" {_number(r.speedup, 8)}"
            f"  {_number(r.host_us, 8)} {_number(r.peak_mb, 9)}"
        )
    reasons: dict[tuple, list[str]] = {}
    for r in rows:
        if r.ms is None:
            reasons.setdefault((r.provider, r.reason), []).append(f"{size_text(r.size)} {r.dtype}")
    lines += [f"no time for {name} ({_few(where)}): {reason}" for (name, reason), where in reasons.items()]
    return "\n".join(lines)


def size_text(size: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in size.items())


def _few(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{items[0]} and {len(items) - 1} more"


def _number(value: float | None, width: int) -> str:
    if value is None:
        return f"{'-':>{width}}"
    return f"{value:{width}.3f}" if value < 10 else f"{value:{width}.1f}"


def _percent(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{value:7.0%}"


def short_table(path: Path) -> str:
    """One line per cell of a JSON lines file: our fastest provider beside plain torch and torch.compile."""
    cells: dict[tuple, dict[str, float]] = {}
    reasons: dict[tuple, int] = {}
    shares: dict[tuple, float | None] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["kind"] == "time":
            key = (entry["op"], size_text(entry["size"]), entry["dtype"], entry["mode"])
            cells.setdefault(key, {})[entry["provider"]] = entry["ms"]
            shares[(*key, entry["provider"])] = entry.get("share")
        elif entry["kind"] == "no time" and not entry["reason"].startswith("missing"):
            key = (entry["op"], entry["provider"], entry["reason"][:90])
            reasons[key] = reasons.get(key, 0) + 1
    lines = [
        f"{'op and size':52} {'dtype':9} {'mode':8} {'ours ms':>9} {'provider':14} {'of peak':>7} {'x torch':>8} {'x compile':>9}"
    ]
    for (op, size, dtype, mode), times in cells.items():
        if mode == "both" and (op, size, dtype, "backward") in cells:
            continue  # the sum of the two others, but for the host's part
        own = {name: ms for name, ms in times.items() if name.startswith(OURS)}
        if not own:
            continue
        best = min(own, key=own.get)
        ratios = [times[name] / own[best] if name in times else None for name in ("torch", "torch.compile")]
        lines.append(
            f"{f'{op} {size}':52} {dtype:9} {mode:8} {own[best]:9.4f} {best:14} {_percent(shares[op, size, dtype, mode, best])}"
            f" {_number(ratios[0], 8)} {_number(ratios[1], 9)}"
        )
    lines += [f"no time: {' '.join(key)} ({count} times)" for key, count in reasons.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(short_table(Path(sys.argv[1])))
