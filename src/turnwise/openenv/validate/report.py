"""What was found out about a server or a package."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Topic = Literal["package", "conformance", "seeds", "concurrency", "leaks"]
Outcome = Literal["ok", "warning", "error", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Finding(id="seed_repeats", topic="seeds", outcome="error", found="seed 3 gave two different observations",
            advice="seed every generator in reset()")
    """

    id: str
    """Stable, for programs."""
    topic: Topic
    """What it is about."""
    outcome: Outcome
    """An error spoils training or keeps other clients out; a warning may."""
    found: str
    """What was seen, in numbers where there are some."""
    advice: str = ""
    """What to do about it."""


@dataclass(slots=True, kw_only=True)
class Report:
    """All findings about one target."""

    target: str
    """A URL, or a folder."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not any(finding.outcome == "error" for finding in self.findings)

    def add(self, id: str, topic: Topic, outcome: Outcome, found: str, advice: str = "") -> None:
        """Add a finding; advice is kept where something is to be done."""
        told = advice if outcome in ("warning", "error") else ""
        self.findings.append(Finding(id=id, topic=topic, outcome=outcome, found=found, advice=told))

    def as_json(self) -> dict[str, Any]:
        """``{"target", "ok", "errors", "warnings", "findings"}``."""
        outcomes = [finding.outcome for finding in self.findings]
        return {
            "target": self.target,
            "ok": self.ok,
            "errors": outcomes.count("error"),
            "warnings": outcomes.count("warning"),
            "findings": [asdict(finding) for finding in self.findings],
        }
