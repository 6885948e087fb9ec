"""What was measured, as a table: plain text where it is printed, HTML where a notebook shows it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from html import escape


class Table(ABC):
    """A result with rows of text, the first column being names and the others numbers."""

    @property
    @abstractmethod
    def columns(self) -> Sequence[str]:
        """The names of the columns."""

    @abstractmethod
    def rows(self) -> Sequence[Sequence[str]]:
        """The rows, each as long as :attr:`columns`."""

    @property
    def caption(self) -> str:
        """What stands above the table; empty for nothing."""
        return ""

    def __str__(self) -> str:
        lines = [tuple(self.columns), *map(tuple, self.rows())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = (
            [cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(pairs)]
            for pairs in (list(zip(line, widths, strict=True)) for line in lines)
        )
        above = [self.caption] if self.caption else []
        return "\n".join([*above, *("  ".join(cells).rstrip() for cells in padded)])

    def __repr__(self) -> str:
        """At a prompt: a table too, since these results hold millions of numbers."""
        return str(self)

    def _repr_html_(self) -> str:
        """For notebooks. What stands in a cell is text, whatever it says."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.columns)
        body = "".join(
            "<tr>" + "".join(f'<td style="text-align:{"right" if n else "left"}">{escape(c)}</td>' for n, c in cells)
            + "</tr>"
            for cells in (list(enumerate(row)) for row in self.rows())
        )  # fmt: skip
        above = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        return f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
