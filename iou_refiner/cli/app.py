"""The command line: global options, exit codes, and what becomes of errors.

A command is a function in a file of its own in :mod:`iou_refiner.cli.commands`, and is listed here. What it does lives
elsewhere and is imported when it runs: ``--help`` loads no torch. Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Env, Json, Toml, Yaml
from cyclopts.validators import Number

from iou_refiner import __version__
from iou_refiner.checks import DataError, MissingPackageError
from iou_refiner.cli.commands.demo import demo
from iou_refiner.cli.commands.doctor import doctor
from iou_refiner.cli.commands.dump import dump
from iou_refiner.cli.commands.eval import eval_
from iou_refiner.cli.commands.info import info
from iou_refiner.cli.commands.rescore import rescore
from iou_refiner.cli.commands.train import train
from iou_refiner.cli.commands.validate import validate
from iou_refiner.cli.console import Console, UsageError
from iou_refiner.cli.exit_codes import INTERRUPTED, INVALID_DATA, MISSING_PACKAGE, OK, UNEXPECTED, USAGE

app = App(
    name="iou-refiner",
    help="Better-placed boxes from the detector you already have.",
    version=__version__,
    result_action="return_value",
)
for _command in (demo, doctor, validate, dump, train, rescore, eval_, info):
    app.command(_command, name=_command.__name__.strip("_"))
# Given before or after the command, the same for all of them.
_GLOBAL = "Global options"


@app.meta.default
def _run(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(group=_GLOBAL, help="Options from a .toml, .yaml or .json file.")] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=(), group=_GLOBAL, help="Machine-readable.")] = False,
    device: Annotated[str, Parameter(group=_GLOBAL, help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    seed: Annotated[int, Parameter(group=_GLOBAL, validator=Number(gte=0), help="Same seed, same bytes on CPU.")] = 0,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative=(), group=_GLOBAL, help="Results only.")] = False,
    verbose: Annotated[
        bool, Parameter(name=["--verbose", "-v"], negative=(), group=_GLOBAL, help="Tracebacks.")
    ] = False,
) -> int:
    console = Console(as_json=as_json, device=device, seed=seed, quiet=quiet, verbose=verbose)
    try:
        app.config = [*_config_file(config), Env("IOU_REFINER_")]
        with console.usage():  # settings check themselves
            command, bound, ignored = app.parse_args(tokens, exit_on_error=False, print_error=False)
        if "console" not in ignored:  # --help and --version
            command(*bound.args, **bound.kwargs)
            return OK
        console.remember(command.__name__.strip("_"), bound)
        status: int = command(*bound.args, **bound.kwargs, console=console)
        return status
    except (CycloptsError, UsageError) as error:
        return console.fail(USAGE, str(error))
    except DataError as error:
        return console.fail(INVALID_DATA, str(error))
    except MissingPackageError as error:
        return console.fail(MISSING_PACKAGE, str(error))
    except KeyboardInterrupt:
        return console.fail(INTERRUPTED, "Interrupted. Finished parts are kept.")
    except Exception as error:
        if verbose:
            traceback.print_exc()
        hint = "" if verbose else " Run again with -v for the traceback."
        return console.fail(UNEXPECTED, f"{type(error).__name__}: {error}{hint}")


def _config_file(path: Path | None) -> list[Any]:
    if path is None:
        return []
    kinds: dict[str, Any] = {".toml": Toml, ".yaml": Yaml, ".yml": Yaml, ".json": Json}
    if path.suffix not in kinds:
        raise UsageError(f"--config {path}: expected a .toml, .yaml or .json file.")
    if not path.is_file():
        raise UsageError(f"--config {path}: no such file.")
    return [kinds[path.suffix](path, must_exist=True)]


def main(tokens: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(app.meta(tokens) or OK)  # None: meta itself has printed the help
