"""How a test says what it found: complaints, notes, or that the question does not apply."""

from __future__ import annotations

__all__ = ["Findings", "NotApplicableError"]


class NotApplicableError(Exception):
    """Say why a question does not apply."""


class Findings:
    """Collect what is wrong, and what a pass leaves open."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.notes: list[str] = []

    def add(self, complaint: str) -> None:
        """Complain."""
        self.complaints.append(complaint)

    def expect(self, is_right: bool, complaint: str) -> bool:
        """Complain unless it is right; return whether it is."""
        if not is_right:
            self.add(complaint)
        return bool(is_right)

    def note(self, note: str) -> None:
        """Say what a pass leaves open, once."""
        if note not in self.notes:
            self.notes.append(note)

    def summary(self, most: int = 2) -> str:
        """Join the first complaints and count the rest."""
        rest = len(self.complaints) - most
        return "; ".join(self.complaints[:most]) + (f" (and {rest} more)" if rest > 0 else "")
