"""What the commands of the command line share: where output goes, progress, devices, the saved config."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from iou_refiner.checks import DataError, did_you_mean
from iou_refiner.cli.apart import stdout_apart
from iou_refiner.files import to_json, write_whole
from iou_refiner.progress import Progress, progress_bars

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


# What would move a terminal's cursor, recolour it, or hide text: all but tabs and ends of lines.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text from files and names, with control characters as escapes, and what no encoding can write too."""
    escaped = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return escaped.encode("utf-8", "backslashreplace").decode()


class UsageError(Exception):
    """The command line asks for something that cannot be. Exit code 2."""


def new_file(path: Path, overwrite: bool, *, inputs: Iterable[Path]) -> Path:
    """The path of an output, once it is sure that nothing is lost by writing it."""
    for source in inputs:
        if path.exists() and source.exists() and path.samefile(source):
            raise UsageError(f"The output {path} is also an input. Inputs are never overwritten; name another file.")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists. Add --overwrite to replace it, or name another file.")
    if not path.parent.is_dir():
        raise UsageError(f"The folder {path.parent} does not exist. Make it first.")
    return path


@dataclass
class Console:
    """The global options, and everything a command says."""

    as_json: bool
    device: str
    seed: int
    quiet: bool
    verbose: bool
    after_interrupt: str = "Nothing was written."  # after an interrupt, in words
    _config: dict[str, Any] = field(default_factory=dict)
    _stdout: TextIO | None = None

    @contextmanager
    def alone_on_stdout(self) -> Iterator[None]:
        """In here only results reach stdout; what a detector or a library prints goes to stderr."""
        with stdout_apart() as stream:
            self._stdout = stream
            try:
                yield
            finally:
                self._stdout = None

    def data(self, machine: dict[str, Any], text: str) -> None:
        """The result of a command, on stdout."""
        self.print(to_json(machine, default=str) if self.as_json else text)

    def print(self, text: str) -> None:
        """Text on stdout."""
        print(printable(text), file=self._stdout or sys.stdout, flush=True)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], machine: dict[str, Any]) -> None:
        """A result that is a table, on stdout."""
        if self.as_json:
            return self.data(machine, "")
        from rich.console import Console as Rich
        from rich.table import Table

        table = Table(*head)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        Rich(file=self._stdout or sys.stdout).print(table)
        return None

    def note(self, text: str) -> None:
        """Something worth knowing, on stderr."""
        if not self.quiet:
            print(printable(text), file=sys.stderr)

    def fail(self, status: int, message: str) -> int:
        """An error, on stderr (and with --json on stdout as well); returns the exit status."""
        print(printable(f"iou-refiner: {message}"), file=sys.stderr)
        if self.as_json:
            self.print(to_json({"error": message, "exit": status}))
        return status

    @contextmanager
    def usage(self) -> Iterator[None]:
        """A ValueError in here is a wrong option, unless it is of data."""
        try:
            yield
        except DataError:
            raise
        except ValueError as error:
            raise UsageError(str(error)) from error

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Bars on stderr, one for each phase; none where nobody watches."""
        with progress_bars(enabled=not self.quiet) as show:
            yield show

    def track(self, items: Iterable[T], total: int, phase: str) -> Iterator[T]:
        """The items, with a progress bar."""
        with self.progress() as show:
            show(phase, 0, total)
            for done, item in enumerate(items, 1):
                show(phase, done, total)
                yield item

    def torch_device(self) -> torch.device:
        """The device asked for, once it is sure to exist."""
        import torch

        torch.manual_seed(self.seed)
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            known = ["auto", "cpu", "cuda", "mps"]
            reason, hint = str(error).splitlines()[0], did_you_mean(self.device, known)
            raise UsageError(f"--device {self.device} cannot be used here ({reason}).{hint}") from None
        return device

    def remember(self, command: str, bound: Any) -> None:
        """Keep the resolved options of the command for :meth:`save_config`."""
        bound.apply_defaults()
        options: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            options |= asdict(value) if is_dataclass(value) and not isinstance(value, type) else {name: value}
        resolved = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
        self._config = {"seed": self.seed, "device": self.device, command: resolved}

    def save_config(self, output: Path) -> None:
        """Write the resolved options beside an output; ``--config`` reads them back."""
        write_whole(
            output.with_name(output.name + ".config.json"),
            (to_json(self._config, default=str, indent=2) + "\n").encode(),
        )
