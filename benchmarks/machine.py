"""What a number depends on beside the code: the machine, its versions, the commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch


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
