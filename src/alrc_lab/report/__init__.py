"""Report a study from its run folders: text for a terminal, JSON, and a page with figures and tables.

Reads what docs/design/0002-run-folders.md describes and nothing else. Must not import the runner, the experiments, the
data sets or a framework, so that runs of any age can be reported on any machine. A study whose `kind` is "claims" has
sentences on trial in place of cells to compare (docs/design/0010-claims.md); the functions here are the same for both.
"""

from pathlib import Path
from typing import Any

from alrc_lab.report import agreement, claims, claims_page, claims_text, claims_words, collect, html, tables, text
from alrc_lab.report.claims import Claim, ClaimsStudy
from alrc_lab.report.collect import Cell, Published, Study
from alrc_lab.report.runs import Run, StudyError

__all__ = [
    "Cell",
    "Claim",
    "ClaimsStudy",
    "Published",
    "Run",
    "Study",
    "StudyError",
    "build",
    "load",
    "render_text",
    "to_json",
]


def load(root: Path) -> Study | ClaimsStudy:
    """Read the study in a folder; what is returned depends on its kind. See `collect.load` and `claims.load`."""
    return claims.load(root) if claims.is_claims(root) else collect.load(root)


def build(root: Path) -> Path:
    """Write root/report from the run folders of a study and return the page's path."""
    return claims_page.build(root) if claims.is_claims(root) else html.build(root)


def render_text(study: Study | ClaimsStudy) -> text.StudyText | claims_text.ClaimsText:
    """Lay a study out for `rich.print`."""
    return claims_text.render_text(study) if isinstance(study, ClaimsStudy) else text.render_text(study)


def to_json(study: Study | ClaimsStudy) -> dict[str, Any]:
    """Give everything the report of a study says as plain JSON values."""
    if isinstance(study, ClaimsStudy):
        return claims_words.to_json(study)
    return tables.to_json(study) | agreement.to_json(study)
