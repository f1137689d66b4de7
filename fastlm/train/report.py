"""report.html: one self-contained page about a run, to show to a colleague. No script, no external resource."""

from __future__ import annotations

import base64
import html
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlm.train.metrics import read_metrics
from fastlm.train.plot import draw_losses
from fastlm.train.terminal import duration

Table = Mapping[str, Any] | Sequence[Mapping[str, Any]]

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2126; --soft: #626b76; --ground: #fff; --panel: #f5f6f8; --line: #e2e5e9; --accent: #1f5fbf; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #9aa4b0; --ground: #17191d; --panel: #1f2227; --line: #31363d; --accent: #6ea8fe; }
}
body { max-width: 56rem; margin: 3rem auto; padding: 0 1.25rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
.lead { color: var(--soft); margin: 0 0 1.8rem; max-width: 42rem; }
.figures { display: grid; grid-template-columns: repeat(3, 1fr); gap: .75rem; }
@media (max-width: 36rem) { .figures { grid-template-columns: repeat(2, 1fr); } }
.figures div { background: var(--panel); border-radius: .5rem; padding: .8rem 1rem; }
.figures b { display: block; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures span { color: var(--soft); font-size: .85rem; }
img { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 500; white-space: nowrap; width: 1%; padding-right: 2rem; }
td.number, th.number { text-align: right; padding-right: 0; padding-left: .9rem; }
td { overflow-wrap: anywhere; }
pre { background: var(--panel); border-radius: .5rem; padding: .9rem 1.1rem; overflow-x: auto; white-space: pre-wrap;
  font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre b { color: var(--accent); font-weight: 600; }
"""


def write_report(
    out: str | Path,
    *,
    title: str,
    summary: str = "",
    tables: Mapping[str, Table] | None = None,
    samples: Sequence[tuple[str, str]] = (),
) -> Path:
    """Writes out/report.html: headline figures and loss curve from out/metrics.jsonl, then tables, samples and the environment.

    Args:
        out: the run's folder.
        title: heading of the page.
        summary: a sentence or two under it.
        tables: heading -> one mapping (a row per name) or a list of mappings with the same keys (a row per mapping). Numbers may
            be numbers: they are rounded, and aligned in columns.
        samples: (prompt, continuation) pairs, shown as they are.

    Returns:
        The path of the page.
    """
    out = Path(out)
    records = read_metrics(out / "metrics.jsonl")
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if summary:
        parts.append(f'<p class="lead">{html.escape(summary)}</p>')
    parts += [_figures(records), _curve(records)]
    parts += [f"<h2>{html.escape(name)}</h2>\n{_table(content)}" for name, content in (tables or {}).items()]
    if samples:
        parts.append("<h2>Samples</h2>\n<p>The prompt is in bold, the rest is the model's.</p>")
        parts += [f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>" for prompt, text in samples]
    evaluations = [r for r in records if r.get("kind") == "evaluation"]
    if evaluations:
        parts.append(f"<h2>Evaluations while training</h2>\n{_table(_evaluation_rows(evaluations))}")
    parts.append(f"<h2>Environment</h2>\n{_table(environment())}")
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )
    path, temporary = out / "report.html", out / ".writing-report.html"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def environment() -> dict[str, Any]:
    """Versions and hardware that the numbers depend on."""
    import torch

    from fastlm._version import __version__

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "fastlm": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "CPU": f"{_cpu_name()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads used by torch",
        "GPU": gpu,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _figures(records: list[dict[str, Any]]) -> str:
    """The handful of numbers that a reader wants first."""
    train = [r for r in records if r.get("kind") == "train"]
    evaluations = [r for r in records if r.get("kind") == "evaluation"]
    if not train:
        return ""
    last = train[-1]
    rates = sorted(r["tokens_per_second"] for r in train)
    figures = [
        ("steps", f"{last['step']:,}"),
        ("tokens seen", f"{last['tokens']:,}"),
        ("training time", duration(last["seconds"])),
    ]
    figures.append(("tokens per second (median)", f"{rates[len(rates) // 2]:,.0f}"))
    if evaluations:
        best = min(evaluations, key=lambda r: r["validation_loss"])
        figures.insert(0, (f"best validation loss, step {best['step']}", f"{best['validation_loss']:.4f}"))
        figures.insert(1, ("validation minus training loss, at the end", f"{evaluations[-1]['gap']:+.4f}"))
    cells = "".join(f"<div><b>{value}</b><span>{html.escape(name)}</span></div>" for name, value in figures)
    return f'<div class="figures">{cells}</div>'


def _curve(records: list[dict[str, Any]]) -> str:
    images = []
    with tempfile.TemporaryDirectory() as folder:
        for dark in (False, True):
            path = Path(folder) / "loss.png"
            if not draw_losses(records, path, dark=dark):
                return ""
            images.append("data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii"))
    light, dark_image = images
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark_image}">'
    alt = "Training and validation loss over the steps"
    return f'<h2>Loss</h2>\n<picture>{source}<img src="{light}" alt="{alt}"></picture>'


def _evaluation_rows(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most a dozen evaluations, spread evenly, the last one among them."""
    every = -(-len(evaluations) // 12)
    names = {"step": "step", "training loss": "train_loss", "validation loss": "validation_loss", "gap": "gap"}
    return [{name: r[key] for name, key in names.items()} for r in evaluations[::-1][::every][::-1]]


def _table(content: Table) -> str:
    if isinstance(content, Mapping):
        rows = "".join(
            f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(_text(v))}</td></tr>" for k, v in content.items()
        )
        return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'
    if not content:
        return "<p>None.</p>"
    columns = list(content[0])
    numeric = {c: all(row.get(c) is None or _is_number(row[c]) for row in content) for c in columns}
    css = {c: ' class="number"' if numeric[c] else "" for c in columns}
    head = "".join(f"<th{css[c]}>{html.escape(str(c))}</th>" for c in columns)
    rows = "".join(
        "<tr>" + "".join(f"<td{css[c]}>{html.escape(_cell(row.get(c)))}</td>" for c in columns) + "</tr>"
        for row in content
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(value: Any) -> str:
    """As _text, but with a fixed number of decimals, so that those of a column stand under each other."""
    if isinstance(value, float) and 1e-3 <= abs(value) < 10_000:
        return f"{value:,.4f}"
    return _text(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.5g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(v) for v in value)
    return str(value)
