"""docs/gpu.md, made from the stored results of benchmarks/gpu_report.py.

Owns that page's words. Invariant: it says what the stored results say and nothing else; without any
it says that nothing has run.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gpu.report import ROOT, STAGES

PAGE: Final = ROOT / "docs" / "gpu.md"
_HEAD: Final = """# What was seen on a GPU

Made by `make gpu-report` from [benchmarks/results/gpu/](../benchmarks/results/gpu/); edit
`benchmarks/gpu/document.py` instead. Everything else that this project says of GPUs rests on a
simulated driver, which proves nothing about a device.
"""
_MARKS: Final = {True: "holds", False: "**does not hold**"}


def write_document(results: Path, page: Path = PAGE) -> Path:
    """Make the page anew."""
    page.write_text(document(stored(results)))
    return page


def stored(results: Path) -> list[dict[str, Any]]:
    """Newest first; of each device only the newest."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    found.sort(key=lambda one: one["date"], reverse=True)
    newest: dict[str, dict[str, Any]] = {}
    for one in found:
        newest.setdefault(_machine(one).get("model", "?"), one)
    return list(newest.values())


def document(reports: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    if not reports:
        return _HEAD + "\n" + _nothing()
    return _HEAD + "".join(f"\n{_report(one)}" for one in reports)


def _nothing() -> str:
    lines = ["Nothing has run on a GPU yet. These stages are ready:", ""]
    lines += [f"- {one.title}" for one in STAGES]
    return "\n".join(lines) + "\n"


def _report(report: Mapping[str, Any]) -> str:
    machine = _machine(report)
    attributes = machine.get("attributes", {})
    capability = (
        f"{attributes.get('COMPUTE_CAPABILITY_MAJOR')}.{attributes.get('COMPUTE_CAPABILITY_MINOR')}"
    )
    lines = [
        f"## {machine.get('model', 'A device without a name')}",
        "",
        f"{report['date']}, commit {report['commit']}; driver {machine.get('driver')}, CUDA "
        f"{machine.get('cuda_version')}, compute capability {capability}, "
        f"torch {machine.get('packages', {}).get('torch')}.",
        "",
        "| stage | |",
        "|---|---|",
        *(f"| {one['title']} | {_status(one)} |" for one in report["stages"]),
        "",
    ]
    for stage in report["stages"]:
        lines += _stage(stage)
    return "\n".join(lines).rstrip() + "\n"


def _status(stage: Mapping[str, Any]) -> str:
    claims = stage["claims"]
    counted = f", {sum(one['holds'] for one in claims)} of {len(claims)} claims" if claims else ""
    why = f": {stage['why']}" if stage.get("why") else ""
    return f"{stage['status']}{counted}{why}"


def _stage(stage: Mapping[str, Any]) -> Iterable[str]:
    if stage["status"] == "not run":
        return []
    lines = [f"### {stage['title']}", ""]
    for claim in stage["claims"]:
        figures = ", ".join(f"{name} {_value(value)}" for name, value in claim["figures"].items())
        lines.append(
            f"- {_MARKS[claim['holds']]}: {claim['claim']}{f' ({figures})' if figures else ''}"
        )
    for part in stage["parts"]:
        if "failed" in part:
            lines.append(f"- **failed**: {part['part']}: {part['failed']}")
        elif "not_run" in part:
            lines.append(f"- not run: {part['part']}: {part['not_run']}")
    lines.append("")
    if stage["figures"]:
        lines += ["| | |", "|---|---|"]
        lines += [
            f"| {_words(name)} | {_value(value)} |" for name, value in stage["figures"].items()
        ]
        lines.append("")
    return lines


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{_words(str(key))}: {_value(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not told"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _machine(report: Mapping[str, Any]) -> Mapping[str, Any]:
    for stage in report["stages"]:
        if stage["name"] == "machine":
            figures: Mapping[str, Any] = stage["figures"]
            return figures
    return {}
