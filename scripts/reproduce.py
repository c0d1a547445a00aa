"""Tables of the papers beside what you have run, and the commands behind each row.

    python scripts/reproduce.py --list
    python scripts/reproduce.py --table fasp-2
    python scripts/reproduce.py --table fasp-2 --model embedded:smollm2-135m-instruct --run

Our figures come only from OUT/TABLE/ROW-MODEL/evaluation.json, which `lit-prune evaluate` writes;
what was not run is shown as not run. `--run` runs what is missing; a second one goes on where the
first was stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from paper_jobs import Asked, Job, commands, jobs, write
from paper_runs import Runner, measured, misplaced, run, state
from paper_tables import Row, Table, load, names
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from lit_prune.errors import UserError

_WIDTH = 180  # of a table where there is no terminal
_NOT_RUN, _NONE = "not run", "-"


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def main(argv: Sequence[str] | None = None, runner: Runner | None = None) -> int:
    """Show a table, and run what is missing of it if asked.

    Args:
        argv: The arguments; the process's own by default.
        runner: Runs `lit-prune` with arguments, see `paper_runs.Runner`.

    Returns:
        0, 2 for a mistake in what was asked, 1 where a row failed, 130 when interrupted.
    """
    try:
        options = _options(argv)
        return _show(options, runner)
    except UserError as error:
        sys.stderr.write(f"reproduce: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("reproduce: interrupted; the same command goes on\n")
        return 130


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="reproduce", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--list", action="store_true", help="list the tables")
    parser.add_argument("--table", metavar="NAME", help="such as fasp-2")
    parser.add_argument("--model", metavar="MODEL", help="hub id, folder or embedded name")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/papers"),
        help="folder of the runs and of the configurations that the commands name; %(default)s",
    )
    parser.add_argument("--row", action="append", default=[], help="only this row; may be repeated")
    parser.add_argument("--data", metavar="TEXT", help="calibrate on this, as data.train of fit")
    parser.add_argument("--recovery_data", metavar="TEXT", help="recover on this where a row does")
    parser.add_argument("--samples", type=int, metavar="N", help="calibration windows")
    parser.add_argument("--text", metavar="TEXT", help="measure perplexity on this")
    parser.add_argument("--tokens", type=int, metavar="N", help="measure it on so many tokens only")
    parser.add_argument("--task_data", metavar="DIR", help="folder of the tasks' .jsonl files")
    parser.add_argument("--run", action="store_true", help="run what is missing")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    options = parser.parse_args(argv)
    if not options.list and options.table not in names():
        raise UserError(f"expected --table with one of {', '.join(names())}, got {options.table}")
    for name in ("samples", "tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"expected --{name} of at least 1, got {value}")
    if options.task_data is not None and not Path(options.task_data).is_dir():
        raise UserError(f"expected a folder as --task_data, got {options.task_data}")
    return options


def _show(options: argparse.Namespace, runner: Runner | None) -> int:
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    if options.list:
        _list(console)
        return 0
    table = load(options.table)
    unknown = [name for name in options.row if name not in {row.name for row in table.rows}]
    if unknown:
        known = ", ".join(row.name for row in table.rows)
        raise UserError(f"expected a row of {table.name} ({known}), got {unknown[0]}")
    asked = Asked(
        out=options.out,
        model=options.model,
        data=options.data,
        recovery_data=options.recovery_data,
        text=options.text,
        samples=options.samples,
        tokens=options.tokens,
        task_data=options.task_data,
    )
    planned = jobs(table, asked, options.row)
    failed = run(planned, runner) if options.run else {}
    lines, notes = _lines(table, planned, options.row, failed)
    heads = ["method", "sparsity", "model", "figures", *(c["title"] for c in table.columns)]
    show = _markdown if options.markdown else _rich
    show(console, table, heads, lines)
    _below(console, table, notes)
    for row in (table.row(name) for name in options.row):
        if row.setup is None:
            _print(
                console, f"\n# {row.name}: lit-prune can't run it, only the paper's figures stand"
            )
    _commands(console, planned)
    return 1 if failed else 0


def _list(console: Console) -> None:
    tables = [load(name) for name in names()]
    for paper in dict.fromkeys(table.paper for table in tables):
        shown = RichTable(title=escape(paper), title_justify="left")
        for head in ("table", "what", "models"):
            shown.add_column(head)
        for table in tables:
            if table.paper == paper:
                shown.add_row(table.name, escape(table.caption), ", ".join(table.models))
        console.print(shown)


def _lines(
    table: Table, planned: Sequence[Job], rows: Sequence[str], failed: dict[Path, str]
) -> tuple[list[list[str]], list[str]]:
    """The table's lines, each either the paper's or ours, and what the letters beside ours mean."""
    lines: list[list[str]] = []
    notes: list[str] = []
    shown = {*rows, *(job.row.name for job in planned)} if rows else {r.name for r in table.rows}
    for row in table.rows:
        if row.name not in shown:
            continue
        ours = [job for job in planned if job.row.name == row.name]
        for label, figures in row.figures.items():
            who = "paper, unsure" if row.unsure else "paper"
            lines.append([*_start(row, label), who, *map(_figure, figures)])
            lines += [_our_line(job, notes, failed) for job in ours if job.label == label]
        lines += [_our_line(job, notes, failed) for job in ours if job.label not in row.figures]
    return lines, notes


def _start(row: Row, label: str) -> list[str]:
    return [row.method, f"{row.sparsity:.0%}", label]


def _our_line(job: Job, notes: list[str], failed: dict[Path, str]) -> list[str]:
    who, values, remark = "ours", [_NOT_RUN for _ in job.table.columns], ""
    ours = measured(job)
    if job.folder in failed:
        remark = f"failed: {failed[job.folder]}"
    elif ours is not None:
        values = [_NOT_RUN if value is None else _figure(value) for value in ours.values]
        remark = "; ".join(ours.differs)
    elif (wrong := misplaced(job)) is not None:
        remark = f"not shown: {wrong}"
    if remark:
        if remark not in notes:
            notes.append(remark)
        who += f" [{notes.index(remark) + 1}]"
    shown = [
        _NONE if column.get("paper_only") else value
        for column, value in zip(job.table.columns, values, strict=True)
    ]
    return [*_start(job.row, job.label), who, *shown]


def _figure(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.2f}"


def _rich(console: Console, table: Table, heads: list[str], lines: list[list[str]]) -> None:
    shown = RichTable(title=escape(f"{table.title}\n{table.caption}"))
    for number, head in enumerate(heads):
        side = "left" if number in (0, 2, 3) else "right"
        shown.add_column(head, justify=side, overflow="fold")
    for line in lines:
        shown.add_row(*map(escape, line), style="bold" if line[3].startswith("ours") else None)
    console.print(shown)


def _markdown(console: Console, table: Table, heads: list[str], lines: list[list[str]]) -> None:
    rule = ["---" if number in (0, 2, 3) else "---:" for number in range(len(heads))]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *lines))
    _print(console, f"{table.title}: {table.caption}\n\n{rows}\n")


def _below(console: Console, table: Table, notes: list[str]) -> None:
    for number, note in enumerate(notes, 1):
        _print(console, f"[{number}] ours: {note}")
    protocol = table.protocol
    for part in ("calibration", "recovery", "evaluation", "axes"):
        _print(console, f"{part}: {protocol[part]}")
    for note in protocol["notes"]:
        _print(console, f"- {note}")


def _commands(console: Console, planned: Sequence[Job]) -> None:
    """Print the commands and write the configurations that they name."""
    for job in planned:
        _print(console, f"\n# {job.row.name}, {job.label}: {state(job)}")
        try:
            write(job)
        except UserError as error:
            _print(console, f"# {error}")
            continue
        for command in commands(job):
            _print(console, shlex.join(["lit-prune", *command]))


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
