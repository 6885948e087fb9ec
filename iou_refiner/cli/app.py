"""The command line: global options, exit codes, and what becomes of errors.

A command is a function in a file of its own in :mod:`iou_refiner.cli.commands`, and is listed here. What it does lives
elsewhere and is imported when it runs: ``--help`` loads no torch. Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number

from iou_refiner import __version__
from iou_refiner.checks import DataError, MissingPackageError
from iou_refiner.cli.commands.demo import demo
from iou_refiner.cli.commands.doctor import doctor
from iou_refiner.cli.commands.dump import dump
from iou_refiner.cli.commands.eval import eval_
from iou_refiner.cli.commands.info import info
from iou_refiner.cli.commands.report import report
from iou_refiner.cli.commands.rescore import rescore
from iou_refiner.cli.commands.train import train
from iou_refiner.cli.commands.validate import validate
from iou_refiner.cli.configuration import read_config, whole_numbers
from iou_refiner.cli.console import Console, UsageError
from iou_refiner.cli.errors import of_the_system
from iou_refiner.cli.exit_codes import INTERRUPTED, INVALID_DATA, MISSING_PACKAGE, OK, UNEXPECTED, USAGE

app = App(
    name="iou-refiner",
    help="Better-placed boxes from the detector you already have.",
    version=__version__,
    result_action="return_value",
)
for _command in (demo, doctor, validate, dump, train, rescore, eval_, report, info):
    app.command(_command, name=_command.__name__.strip("_"))
# Given before or after the command, the same for all of them.
_GLOBAL = "Global options"
app.meta.config = [whole_numbers]


@app.meta.default
def _run(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(group=_GLOBAL, help="Options from a .toml, .yaml or .json file.")] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=(), group=_GLOBAL, help="Machine-readable.")] = False,
    device: Annotated[
        str | None, Parameter(group=_GLOBAL, help="auto, cpu, cuda, cuda:1, mps. [default: auto]")
    ] = None,
    seed: Annotated[
        int | None,
        Parameter(group=_GLOBAL, validator=Number(gte=0), help="Same seed, same bytes on CPU. [default: 0]"),
    ] = None,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative=(), group=_GLOBAL, help="Results only.")] = False,
    verbose: Annotated[
        bool, Parameter(name=["--verbose", "-v"], negative=(), group=_GLOBAL, help="Tracebacks.")
    ] = False,
) -> int:
    console = Console(as_json=as_json, device=device or "auto", seed=seed or 0, quiet=quiet, verbose=verbose)
    try:
        options, sources = read_config(config, [name for name in app if not name.startswith("-")])
        console.device = device or options.get("device", "auto")
        console.seed = options.get("seed", 0) if seed is None else seed
        app.config = sources
        with console.usage():  # settings check themselves
            command, bound, ignored = app.parse_args(tokens, exit_on_error=False, print_error=False)
        if "console" not in ignored:  # --help and --version
            command(*bound.args, **bound.kwargs)
            return OK
        console.remember(command.__name__.strip("_"), bound)
        with console.alone_on_stdout():
            status: int = command(*bound.args, **bound.kwargs, console=console)
        return status
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if verbose:
            traceback.print_exc()
        return console.fail(*_in_words(error, console))


def _in_words(error: BaseException, console: Console) -> tuple[int, str]:
    """The exit code of an error, and what to say."""
    if isinstance(error, (CycloptsError, UsageError)):
        return USAGE, str(error)
    if isinstance(error, DataError):
        return INVALID_DATA, str(error)
    if isinstance(error, MissingPackageError):
        return MISSING_PACKAGE, str(error)
    if isinstance(error, OSError):
        return INVALID_DATA, of_the_system(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"Interrupted. {console.after_interrupt}"
    if isinstance(error, SystemExit):
        return UNEXPECTED, (
            f"The detector, or a package that it uses, ended the program by exit({error.code!r}) before the command "
            f"was through. {console.after_interrupt} Remove that call from its code."
        )
    hint = "" if console.verbose else " Run again with -v for the traceback."
    return UNEXPECTED, f"{type(error).__name__}: {error}{hint}"


def main(tokens: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(app.meta(tokens) or OK)  # None: meta itself has printed the help
