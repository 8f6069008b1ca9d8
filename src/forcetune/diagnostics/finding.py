"""What an examination finds, and where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from forcetune.frames.frame import Frame, Origin

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
SHOWN = 5
"""So many frame numbers are named; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found in the data.

    Attributes:
        code: stable name of the kind of finding, such as ``forces-sign``.
        severity: ``error`` where training on these data surely goes wrong, ``warning`` where it should be looked at,
            ``note`` for what is good to know.
        message: what was found and what to do about it, one or two sentences.
        file: the file, or None where it concerns all of them.
        frames: the first few zero-based positions in the file, none where it concerns the whole file.
        n_frames: how many frames are concerned.
    """

    code: str
    severity: Severity
    message: str
    file: str | None = None
    frames: tuple[int, ...] = ()
    n_frames: int = 0

    @property
    def where(self) -> str:
        """File and frames in words, empty for a finding about everything."""
        if not self.frames:
            return self.file or ""
        more = self.n_frames - len(self.frames)
        named = ", ".join(map(str, self.frames)) + (f" and {more} more" if more > 0 else "")
        return f"{self.file}, frame{'' if self.n_frames == 1 else 's'} {named}"

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message

    def to_json(self) -> dict[str, Any]:
        """As ``forcetune doctor --json`` prints it."""
        return {
            "severity": self.severity,
            "code": self.code,
            "file": self.file,
            "frames": list(self.frames),
            "n_frames": self.n_frames,
            "message": self.message,
        }


def in_frames(code: str, severity: Severity, message: str, frames: Iterable[Frame] | Iterable[Origin]) -> list[Finding]:
    """The same finding in several frames, one :class:`Finding` for each file; none without frames."""
    by_file: dict[str, list[int]] = {}
    for item in frames:
        origin = item.origin if isinstance(item, Frame) else item
        by_file.setdefault(origin.file, []).append(origin.index)
    return [
        Finding(code, severity, message, file, tuple(sorted(indices)[:SHOWN]), len(indices))
        for file, indices in by_file.items()
    ]


def in_set(code: str, severity: Severity, message: str, frames: Sequence[Frame]) -> Finding:
    """A finding about all of these frames together."""
    files = list(dict.fromkeys(frame.origin.file for frame in frames))
    named = None if not files else files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    return Finding(code, severity, message, named, (), len(frames))


def sort_findings(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings, then notes; otherwise as they come, and every finding once."""
    return tuple(sorted(dict.fromkeys(findings), key=lambda finding: SEVERITIES.index(finding.severity)))
