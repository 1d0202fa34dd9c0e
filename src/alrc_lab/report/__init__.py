"""Report a study from its run folders: text for a terminal, JSON, and a page with figures and tables.

Reads what docs/design/0002-run-folders.md describes and nothing else. Must not import the runner, the experiments, the
data sets or a framework, so that runs of any age can be reported on any machine.
"""

from alrc_lab.report.collect import Cell, Published, Run, Study, StudyError, load
from alrc_lab.report.html import build
from alrc_lab.report.tables import to_json
from alrc_lab.report.text import render_text

__all__ = ["Cell", "Published", "Run", "Study", "StudyError", "build", "load", "render_text", "to_json"]
