"""metrics.jsonl: one JSON object a line, for every logged training step and every evaluation.

{"kind": "train", "step": 120, "loss": 2.31, "lr": 0.001, "grad_norm": 0.8, "tokens": 245760, "tokens_per_second": 5213.0, ...}
{"kind": "evaluation", "step": 200, "train_loss": 2.1, "validation_loss": 2.2, "gap": 0.1, "best": true, ...}
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends records to a metrics file, line by line, so that a kill loses at most half a line.

    Args:
        path: the file; made if missing.
        resume_step: drop every record after this step first. A run that was killed after its last checkpoint makes those steps
            again, and they must not stand there twice.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        path = Path(path)
        if resume_step is not None:
            kept = [record for record in read_metrics(path) if record["step"] <= resume_step]
            temporary = path.with_suffix(".writing")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            os.replace(temporary, path)
        self._file = open(path, "a" if resume_step is not None else "w", encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record. Floats keep every bit (JSON holds their shortest exact form)."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def flush_to_disk(self) -> None:
        """Called before a checkpoint: after a power cut no checkpoint may be ahead of its metrics."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file. Every whole line was written when it came; on a full disk the rest of a line is let go."""
        with contextlib.suppress(OSError):
            self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file in order; a half-written line (from a kill or a full disk) is left out. [] if no file."""
    path = Path(path)
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
