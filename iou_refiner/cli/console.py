"""What the commands of the command line share: where output goes, progress, devices, the saved config."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from iou_refiner.checks import did_you_mean
from iou_refiner.files import write_whole
from iou_refiner.progress import Progress

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


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
    _config: dict[str, Any] = field(default_factory=dict)

    def data(self, machine: dict[str, Any], text: str) -> None:
        """The result of a command, on stdout."""
        print(json.dumps(machine, default=str) if self.as_json else text)

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
        Rich().print(table)
        return None

    def note(self, text: str) -> None:
        """Something worth knowing, on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def fail(self, status: int, message: str) -> int:
        """An error, on stderr (and with --json on stdout as well); returns the exit status."""
        print(f"iou-refiner: {message}", file=sys.stderr)
        if self.as_json:
            print(json.dumps({"error": message, "exit": status}))
        return status

    @contextmanager
    def usage(self) -> Iterator[None]:
        """A ValueError in here is a wrong option."""
        try:
            yield
        except ValueError as error:
            raise UsageError(str(error)) from error

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Bars on stderr, one for each phase; none where nobody watches."""
        from rich.console import Console as Rich
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        rich = Rich(stderr=True)
        with Bars(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=rich,
            disable=self.quiet or not rich.is_terminal,
        ) as bars:
            tasks: dict[str, Any] = {}

            def show(phase: str, done: int, total: int) -> None:
                if phase not in tasks:
                    tasks[phase] = bars.add_task(phase, total=total)
                bars.update(tasks[phase], completed=done, total=total)

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
        except (RuntimeError, AssertionError) as error:
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
        self._config = {command: {k.replace("_", "-"): v for k, v in options.items() if v is not None}}

    def save_config(self, output: Path) -> None:
        """Write the resolved options beside an output; ``--config`` reads them back."""
        write_whole(
            output.with_name(output.name + ".config.json"),
            (json.dumps(self._config, default=str, indent=2) + "\n").encode(),
        )
