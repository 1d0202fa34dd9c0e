"""Print judged claims to a terminal or a pipe, with no number ever broken across lines."""

from __future__ import annotations

import textwrap

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from alrc_lab.report import claims_words as words
from alrc_lab.report.claims import VERDICTS, ClaimsStudy
from alrc_lab.report.claims_verdicts import NEITHER, Judgement, judge
from alrc_lab.report.words import plain

_STYLES = {"consistent": "green", "contradicts": "bold red", "inconclusive": "yellow", "outside scope": "cyan"}
_WIDE = 118  # columns from which method and setting have columns of their own
_GAP = 2  # columns between two cells
_CONTROLS = {"": "", "as required": "as it must", "alarm": "ALARM", "not known": "control"}


def render_text(study: ClaimsStudy) -> ClaimsText:
    """Lay a study of claims out for `rich.print`: alarms first, then a table with a section for each experiment.

    Args:
        study: What `load` returned.

    Returns:
        A rich renderable that fits itself to the width it is printed at, from 80 columns up.
    """
    return ClaimsText(study)


class ClaimsText:
    """Lay out one study at whatever width a console has."""

    def __init__(self, study: ClaimsStudy) -> None:
        self.study = study

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        study, width = self.study, options.max_width
        judgements = judge(study)
        alarms = words.alarms(study, judgements)
        yield _lines(words.data_line(study), width, style="bold")
        yield _lines(f"{study.title}, preset {study.preset}: {words.counts_sentence(study, judgements)}", width)
        yield from (_lines(f"ALARM · {alarm}", width, "  ", style="bold red") for alarm in alarms)
        for experiment in study.experiments.values():
            inside = [judged for judged in judgements if judged.claim.experiment == experiment.id]
            if inside:
                yield Text("")
                yield _lines(f"{experiment.id} · {experiment.title}", width, style="bold")
            for claim, members in words.grouped(inside):
                yield Text("")
                yield _lines(claim.sentence, width)
                yield _lines(f"{words.origin(claim)}; statistic: {claim.label}", width, style="dim")
                yield _table(members, judgements, width)
        yield Text("")
        if alarms:
            yield _lines(f"{len(alarms)} alarm{'s' * (len(alarms) != 1)}, told at the top.", width, style="bold red")
        told = (*words.corrections(study, judgements), *words.remarks(study, judgements))
        yield from (_lines(line, width, style="dim") for line in told)
        for heading, sentences in (
            ("Notes:", study.notes),
            ("Not the published protocol:", study.differences),
        ):
            if sentences:
                yield Text("")
                yield _lines(heading, width, style="bold")
                yield from (_lines(f"· {sentence}", width, "  ") for sentence in sentences)
        path = words.report_path(study)
        told = f"\nReport: {path}" if path.is_file() else f"\nNo report yet: alrc report {study.root}"
        yield Text(told, no_wrap=True, overflow="ignore")


def _table(members: list[Judgement], everything: list[Judgement], width: int) -> Table:
    """Lay out claims that share their sentence; all tables share the widths of their columns."""
    numbers = max(len(line) for judged in everything for line in (_number(judged), _sample(judged)))
    verdicts = max(map(len, VERDICTS))
    is_wide = width >= _WIDE
    left = width - numbers - verdicts - (3 if is_wide else 2) * _GAP
    ids = min(left // 2, max(len(judged.claim.id) for judged in everything)) if is_wide else 0
    names = {"id": ids, "claim": left - ids if is_wide else left, "statistic": numbers, "verdict": verdicts}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), show_header=False)
    for name, columns in names.items():
        if columns:
            table.add_column(name, no_wrap=True, width=columns)
    for judged in members:
        verdict = Text(judged.verdict, style=_STYLES[judged.verdict])
        if note := _CONTROLS[judged.control]:
            verdict.append(f"\n{note}", style="bold red" if judged.control == "alarm" else "dim")
        statistic = Text(_number(judged))
        statistic.append(f"\n{_sample(judged)}" * bool(_sample(judged)), style="dim")
        if judged.verdict == "inconclusive" and judged.reason != NEITHER:
            statistic.append(f"\n{_wrap(judged.reason, numbers)}", style="yellow")
        place = Text(_wrap(words.place(judged.claim), names["claim"]), style="" if is_wide else "dim")
        name = Text(_cut(judged.claim.id, names["id"] or left), style="bold")
        table.add_row(*((name, place) if is_wide else (Text("\n").join((name, place)),)), statistic, verdict)
    return table


def _number(judged: Judgement) -> str:
    """Write the value with its interval."""
    return plain(words.statistic(judged))


def _sample(judged: Judgement) -> str:
    """Write n and p."""
    return plain(words.sample(judged))


def _cut(name: str, width: int) -> str:
    """Break a name that is too long for its column; every character stays."""
    return "\n".join(textwrap.wrap(name, width))


def _wrap(text: str, width: int) -> str:
    """Break a text between words."""
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return plain("\n".join(lines))


def _lines(sentence: str, width: int, indent: str = "", *, style: str = "") -> Text:
    """Break a sentence between words only, never within an interval or before a unit."""
    lines = textwrap.wrap(
        sentence, width, initial_indent=indent, subsequent_indent=indent * 2, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return Text(plain("\n".join(lines)), style=style, no_wrap=True, overflow="ignore")
