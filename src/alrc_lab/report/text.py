"""Print a study's tables to a terminal or a pipe, with no number ever broken across lines."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from alrc_lab.report import agreement, tables
from alrc_lab.report.collect import STATUSES, Study
from alrc_lab.report.overview import LEGEND, Overview, overview, reference_lines, reference_title

MARK_REFERENCE = "‡"
_COMPARISON = ("pairs", "difference", "difference_interval", "relative", "p")


def render_text(study: Study) -> StudyText:
    """Lay a study out for `rich.print`: data first, then a table per panel, then what to know about it.

    Where the width does not hold a whole row, the comparison with the baseline becomes a table of its own.

    Args:
        study: What `load` returned.

    Returns:
        A rich renderable that fits itself to the width it is printed at, from 80 columns up.
    """
    return StudyText(study)


class StudyText:
    """Lay out one study at whatever width a console has."""

    def __init__(self, study: Study) -> None:
        self.study = study

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        study = self.study
        yield _paragraph(tables.data_line(study), options, style="bold")
        yield _paragraph(f"{study.title}, preset {study.preset}: {tables.counts_sentence(study)}", options)
        for panel in study.panels:
            yield from self._overview(panel, console, options)
        for metric in study.metrics:
            for panel in study.panels:
                yield from self._block(metric, panel, console, options)
        yield from self._agreement(options)
        yield Text("")
        if title := reference_title(study):
            yield _paragraph(f"{MARK_REFERENCE} {title}", options, style="dim")
        yield from (_paragraph(remark, options, style="dim") for remark in tables.remarks(study))
        if study.differences:
            yield from _heading("Not the paper's protocol:", options)
            yield from (_paragraph(f"· {sentence}", options, "  ") for sentence in study.differences)
        path = tables.report_path(study)
        if path.is_file():
            yield Text(f"\nReport: {path}", no_wrap=True, overflow="ignore")
        else:
            yield Text(f"\nNo report yet: alrc report {study.root}", no_wrap=True, overflow="ignore")

    def _overview(self, panel: str, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay out all metrics of a panel in as few tables as the width allows."""
        found = overview(self.study, panel)
        if found is None:
            return
        yield from _heading(f"{self.study.panels[panel]}, all metrics", options)
        start = 0
        while start < len(found.head):
            end = start + 1
            table = self._overview_part(found, start, end)  # of one metric, however narrow the console is
            while end < len(found.head):
                wider = self._overview_part(found, start, end + 1)
                if Measurement.get(console, options.update(width=10_000), wider).maximum > options.max_width:
                    break
                table, end = wider, end + 1
            if start:
                yield Text("")
            yield table
            start = end
        yield _paragraph(LEGEND, options, style="dim")

    def _overview_part(self, found: Overview, start: int, end: int) -> Table:
        """Lay out some metrics of an overview; their labels are broken between words."""
        table = _bare()
        table.add_column(tables.heading(self.study), no_wrap=True)
        for label in found.head[start:end]:
            table.add_column(Text("\n".join(textwrap.wrap(label, 14))), justify="right", no_wrap=True)
        references = [(name, texts[start:end]) for name, texts in found.references if any(texts[start:end])]
        for i, (name, texts) in enumerate(found.settings, 1):
            ends = i == len(found.settings) and bool(references)
            table.add_row(*(Text(tables.plain(text)) for text in (name, *texts[start:end])), end_section=ends)
        for name, texts in references:
            table.add_row(*(Text(tables.plain(text)) for text in (_marked(name), *texts)))
        return table

    def _block(self, metric: Mapping[str, Any], panel: str, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay out a metric of a panel: its table or tables, and its verdicts."""
        study, title = self.study, self.study.panels[panel]
        rows = tables.tabulate(study, metric)
        inside = [row for row in rows if row.cell.panel == panel]
        if not tables.is_worth_showing(study, inside):
            return
        printed = ("published",) if any(row.published for row in rows) else ()
        is_grid = tables.is_grid(study, panel)
        if is_grid and len(study.metrics) == 1:  # the table of all metrics says the same
            about = f"{title}, {metric['label']}: mean ± standard deviation"
            yield from _heading(about + ", published beneath" * bool(printed), options)
            yield self._grid(inside)
        head = ", ".join(filter(None, (title, "" if is_grid else inside[0].cell.column, metric["label"])))
        first = ("column", "label") if is_grid else ("label",)
        lost = tuple(status for status in STATUSES[1:] if study.counts[status] and metric is study.metric)
        means = (*first, "runs", "mean", "interval", *printed, *lost)
        compared = [row for row in inside if row.baseline]
        paired = [row for row in compared if not is_grid or (row.difference and row.difference.n)]
        several = ("against",) if len(tables.baselines_of(study, panel)) > 1 else ()
        comparison = (*several, *_COMPARISON) if compared or metric["better"] else ()
        yield from _heading(head, options)
        whole = self._table(inside, (*means, *comparison))
        if Measurement.get(console, options.update(width=10_000), whole).maximum <= options.max_width:
            yield whole
        else:
            yield self._table(inside, means)
            if paired:  # of a large table that has just begun, dashes are not worth a line each
                yield Text("")
                yield self._table(paired, (*first, *comparison), with_references=False)
        if not is_grid:  # a grid has too many comparisons to read them as sentences
            verdicts = filter(None, (tables.verdict(study, row) for row in inside))
            yield from (_paragraph(sentence, options, "  ") for sentence in verdicts)

    def _agreement(self, options: ConsoleOptions) -> RenderResult:
        """Lay out how the changes agree with published ones, where there are any."""
        study, found = self.study, agreement.agree(self.study)
        if found is None:
            return
        for panel in study.panels:
            written = [line for line in agreement.lines(found, panel) if line["pairs"] != "0"]  # the page has them all
            if not written:
                continue
            keys = ("column",) * tables.is_grid(study, panel) + ("label", "published", "ours", "pairs", "verdict")
            table = _bare()
            for key in keys:
                header = {"column": "", "label": tables.heading(study)}.get(key, key)
                table.add_column(header, justify="right" if key in ("published", "ours", "pairs") else "left")
            for line, following in zip(written, [*written[1:], None], strict=True):
                ends = "column" in keys and following is not None and following["column"] != line["column"]
                table.add_row(*(Text(tables.plain(line[key]), no_wrap=True) for key in keys), end_section=ends)
            yield from _heading(agreement.title(study, found, panel), options)
            yield table
        yield from _heading("Does it agree with what was published?", options)
        yield from (_paragraph(sentence, options, "  ") for sentence in agreement.sentences(study, found))
        yield from ([_paragraph(agreement.legend(found), options, style="dim")] if found.comparisons else [])

    def _table(self, rows: Sequence[tables.Row], keys: Sequence[str], *, with_references: bool = True) -> Table:
        """Lay out rows of one panel, then the references; a new column label starts a new section."""
        baselines = {row.baseline.row for row in rows if row.baseline}
        headers = {
            "column": "",
            "label": tables.heading(self.study),
            "interval": "95 % interval",
            "difference": f"vs {tables.plain(tables.label(*baselines))}" if len(baselines) == 1 else "difference",
            "difference_interval": "95 % interval",
            "relative": "change",
        }
        table = _bare()
        for key in keys:
            justify = "left" if key in ("column", "label", "against") else "right"
            table.add_column(headers.get(key, key), justify=justify, no_wrap=True)
        places, percent = tables.decimals(rows), tables.percent_decimals(rows)
        references = reference_lines(self.study, rows[0].metric, places) if with_references else []
        for row, following in zip(rows, [*rows[1:], None], strict=True):
            texts = tables.cells(row, places, percent)
            ends = "column" in keys and following is not None and following.cell.column != row.cell.column
            ends |= following is None and bool(references)
            table.add_row(*(Text(tables.plain(texts[key])) for key in keys), end_section=ends)
        for name, value in references:
            texts = {"label": _marked(name), "mean": value, "interval": tables.UNDEFINED}
            table.add_row(*(Text(texts.get(key, "")) for key in keys))
        return table

    def _grid(self, rows: Sequence[tables.Row]) -> Table:
        """Lay out a panel as the paper prints it: ours, and beneath it what was published."""
        columns = list(dict.fromkeys(row.cell.column for row in rows))
        table = _bare()
        table.add_column(tables.heading(self.study), no_wrap=True)
        for column in columns:
            table.add_column(Text(column), justify="right", no_wrap=True)
        places, printed = tables.decimals(rows), any(row.published for row in rows)
        for name in dict.fromkeys(row.cell.row for row in rows):
            line: list[Text] = []
            for column in columns:
                found = [row for row in rows if (row.cell.row, row.cell.column) == (name, column)]
                ours, published = tables.grid_cell(found[0], places) if found else ("", "")
                line.append(
                    Text.assemble(tables.plain(ours), ("\n" + tables.plain(published) if printed else "", "dim"))
                )
            table.add_row(Text(tables.plain(tables.row_label(self.study, name))), *line)
        return table


def _paragraph(sentence: str, options: ConsoleOptions, indent: str = "", *, style: str = "") -> Text:
    """Break a sentence between words only, never within an interval or before a unit."""
    lines = textwrap.wrap(
        sentence,
        options.max_width,
        initial_indent=indent,
        subsequent_indent=indent * 2,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return Text(tables.plain("\n".join(lines)), style=style, no_wrap=True, overflow="ignore")


def _marked(name: str) -> str:
    """Mark a method without training; a long name takes two lines."""
    return "\n".join(textwrap.wrap(f"{name}{tables.NBSP}{MARK_REFERENCE}", 28))


def _heading(title: str, options: ConsoleOptions) -> list[Text]:
    """Head a table after an empty line."""
    return [Text(""), _paragraph(title, options, style="bold")]


def _bare() -> Table:
    """Make a table with a rule below its head and nothing else."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
