"""The command line. What a command does lives elsewhere and is imported when it runs: ``--help`` loads no torch.

Data goes to stdout, everything else to stderr. Exit codes: 0 ok, 1 unexpected, 2 usage, 3 invalid data, 4 gate missed,
5 missing optional package, 130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Env, Json, Toml, Yaml

from iou_refiner import __version__
from iou_refiner.checks import DataError, MissingPackageError
from iou_refiner.cli.console import Console, UsageError, new_file

OK, UNEXPECTED, USAGE, INVALID_DATA, GATE_MISSED, MISSING_PACKAGE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

app = App(
    name="iou-refiner",
    help="Better-placed boxes from the detector you already have.",
    version=__version__,
    result_action="return_value",
)
# Given before or after the command, the same for all of them.
_GLOBAL = "Global options"

Detector = Annotated[
    str,
    Parameter(
        help="adapter:name, package.module:function or file.py:function[:argument], for example onnx:yolox.onnx."
    ),
]
Annotation = Annotated[Path, Parameter(name=["--ann"], help="COCO annotation of the images.")]
Images = Annotated[Path, Parameter(help="Folder of the images.")]
Cache = Annotated[
    Path | None, Parameter(help="Keep and reuse what the detector saw in this folder (features in float16).")
]
Overwrite = Annotated[bool, Parameter(negative=(), help="Replace an output that exists.")]
Quiet = Annotated[Console, Parameter(parse=False)]


@app.command
def demo(*, output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("demo"), console: Quiet) -> int:
    """Train a small detector and its IoU head on made images, here and now, and show before and after.

    Parameters
    ----------
    output
        Folder for images, weights, results and the picture.
    """
    from iou_refiner.demo.run import run_demo

    with console.progress() as progress:
        result = run_demo(output, seed=console.seed, progress=progress)
    console.demo(result, output)
    return OK


@app.command
def doctor(*, console: Quiet) -> int:
    """Say what works here: versions, devices, the pooling kernels, the adapters."""
    from iou_refiner.cli.doctor import examine

    report = examine()
    console.data(report.to_dict(), report.text())
    return OK if report.ok else UNEXPECTED


@app.command
def validate(
    detections: Path,
    *,
    ann: Annotated[Path | None, Parameter(name=["--ann"], help="COCO annotation the results belong to.")] = None,
    max_examples: int = 5,
    console: Quiet,
) -> int:
    """Check a COCO results file: every fault with its record, its cause and the cure.

    Parameters
    ----------
    detections
        COCO results, .json or .json.gz.
    max_examples
        Examples shown of each fault.
    """
    from iou_refiner.validation.validate import format_report
    from iou_refiner.validation.validate import validate as check

    report = check(detections, ann, max_examples=max_examples)
    console.data(report.to_dict(), format_report(report))
    return OK if report.ok else INVALID_DATA


@app.command
def dump(
    *,
    detector: Detector,
    ann: Annotation,
    images: Images,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="COCO results to write, .json or .json.gz.")],
    top: int = 1000,
    cache: Cache = None,
    overwrite: Overwrite = False,
    console: Quiet,
) -> int:
    """Save a detector's candidates before suppression, which is what IoU-guided NMS needs.

    Parameters
    ----------
    top
        Candidates kept per image, best scores first.
    """
    output = new_file(output, overwrite, inputs=[ann])
    from iou_refiner.coco import Results, read_ground_truth, write_results
    from iou_refiner.detector.registry import detector_from_spec
    from iou_refiner.rescoring import dump_candidates

    ground_truth = read_ground_truth(ann)
    adapter = detector_from_spec(detector).to(console.torch_device())
    look = console.look(adapter, images, cache)
    parts = dump_candidates(look, adapter.category_ids, ground_truth, top=top)
    results = Results.concat(console.track(parts, len(ground_truth.images), "detecting"))
    write_results(output, results, image_order=[image.id for image in ground_truth.images])
    console.save_config(output)
    console.data({"records": len(results), "output": str(output)}, f"{len(results):,} candidates in {output}")
    return OK


@app.command
def train(
    *,
    detector: Detector,
    ann: Annotation,
    images: Images,
    output_dir: Annotated[Path, Parameter(name=["--output-dir", "-o"], help="Folder for head, metrics and config.")],
    val_ann: Annotated[Path | None, Parameter(help="COCO annotation to measure on after each epoch.")] = None,
    val_images: Annotated[Path | None, Parameter(help="Folder of its images; default: --images.")] = None,
    cache: Cache = None,
    views: int = 4,
    epochs: Annotated[int, Parameter(name=["--epochs", "-e"])] = 2,
    batch_size: Annotated[int, Parameter(name=["--batch-size", "-b"])] = 8,
    lr: float = 1e-3,
    objective: Literal["bce", "smooth_l1"] = "bce",
    levels: int = 3,
    context: float = 1.5,
    width: int = 48,
    mix: int = 32,
    hidden: tuple[int, ...] = (320, 256),
    class_aware: Annotated[bool, Parameter(negative=())] = False,
    boxes_per_image: int = 96,
    candidate_share: float = 0.5,
    resume: Annotated[bool, Parameter(negative=())] = False,
    overwrite: Overwrite = False,
    console: Quiet,
) -> int:
    """Train an IoU head on a frozen detector's features. The detector's weights never change, which is checked.

    Parameters
    ----------
    views
        Views of every image to train on: itself, its mirror image, then random windows. Few images want many.
    lr
        Peak learning rate.
    objective
        What the head learns: IoU as a probability, or the paper's smooth-L1 on 2 IoU - 1.
    levels
        Feature levels each box is read from: the one FPN assigns (1, the paper's) and the next coarser ones.
    context
        Side of the region the head sees over that of the box.
    width
        Channels after narrowing the feature maps.
    mix
        Channels of each pooled bin after its levels and channels are mixed; 0 mixes nothing.
    hidden
        Sizes of the fully connected layers.
    class_aware
        One IoU per class instead of one for all.
    boxes_per_image
        Training boxes drawn from each image.
    candidate_share
        Share of them that are the detector's own candidates.
    resume
        Go on where a stopped run in the same folder ended.
    """
    from iou_refiner.coco import read_ground_truth
    from iou_refiner.detector.registry import detector_from_spec
    from iou_refiner.training.recipe import train_head

    if (output_dir / "head.safetensors").exists() and not (overwrite or resume):
        raise UsageError(f"{output_dir} holds a head already. Add --resume or --overwrite, or name another folder.")
    adapter = detector_from_spec(detector).to(console.torch_device())
    output_dir.mkdir(parents=True, exist_ok=True)
    console.save_config(output_dir / "head.safetensors")
    data = [(read_ground_truth(ann), images)]
    if val_ann is not None:
        data.append((read_ground_truth(val_ann), val_images or images))
    with console.progress() as progress:
        history = train_head(
            adapter, *data, output_dir=output_dir, cache=cache, views=views, seed=console.seed, resume=resume,
            head={
                "objective": objective, "levels": levels, "context": context,
                "width": width, "mix": mix, "hidden": hidden,
            },
            class_aware=class_aware, device=console.torch_device(), progress=progress, note=console.note,
            epochs=epochs, batch_size=batch_size, lr=lr,
            boxes_per_image=boxes_per_image, candidate_share=candidate_share,
        )  # fmt: skip
    last = history[-1]
    shown = ", ".join(f"{name} {value:.4g}" for name, value in last.items())
    console.data(last | {"output": str(output_dir)}, f"{output_dir / 'head.safetensors'}: {shown}")
    return OK


@app.command
def rescore(
    detections: Path,
    *,
    head: Annotated[Path, Parameter(help="Head made by `train`.")],
    detector: Detector,
    ann: Annotation,
    images: Images,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="COCO results to write, .json or .json.gz.")],
    nms: Literal["iou", "greedy", "soft", "none"] | None = None,
    nms_threshold: float | None = None,
    rank_alpha: float | None = None,
    moves: int | None = None,
    steps: int | None = None,
    step_size: float | None = None,
    margin: float | None = None,
    refine_top: int | None = None,
    score_alpha: float | None = None,
    max_dets: int | None = None,
    cache: Cache = None,
    overwrite: Overwrite = False,
    console: Quiet,
) -> int:
    """Rescore, suppress and refine saved COCO results with the detector's features and a trained head.

    Settings not given are those that measured best when the head was trained with --val-ann (see `info`).

    Parameters
    ----------
    detections
        COCO results, best before suppression (see `dump`).
    nms
        Suppress by how well boxes fit, by class score, by fit and then softly, or not at all.
    nms_threshold
        Overlap above which boxes of a class are one cluster.
    rank_alpha
        IoU-guided NMS ranks by score^(1 - a) * fit^a; 1 is the paper's.
    score_alpha
        Detections are scored score^(1 - a) * iou^a; 0 leaves the class score.
    moves
        Steps of regression.
    steps
        Steps of the ascent, after them.
    step_size
        First step, relative to the box, per unit of gradient.
    margin
        Predicted gain a box must exceed to be moved.
    refine_top
        Boxes refined per image.
    max_dets
        Detections kept per image, over all classes.
    """
    output = new_file(output, overwrite, inputs=[detections, ann, head])
    from iou_refiner.coco import Results, read_ground_truth, read_results, write_results
    from iou_refiner.detector.registry import detector_from_spec
    from iou_refiner.head.iou_head import IoUPredictor
    from iou_refiner.refiner import check_head
    from iou_refiner.rescoring import rescore as rescored
    from iou_refiner.stage.stage import Stage
    from iou_refiner.validation.nms_trace import suppressed_at

    predictor = IoUPredictor.load(head)
    with console.usage():
        stage = Stage(
            predictor, nms=nms, nms_threshold=nms_threshold, rank_alpha=rank_alpha, score_alpha=score_alpha,
            moves=moves, steps=steps, step_size=step_size, margin=margin, refine_top=refine_top,
            max_detections=max_dets,
        )  # fmt: skip
    results, ground_truth = read_results(detections), read_ground_truth(ann)
    already = suppressed_at(results)
    if stage.settings.nms == "iou" and already is not None:
        console.note(
            f"{detections} looks already NMS-ed at about {already:.2f}: IoU-guided NMS can remove little more, only "
            "rescoring and refinement will act. To save boxes before NMS: iou-refiner dump"
        )
    adapter = detector_from_spec(detector).to(console.torch_device())
    check_head(predictor, adapter)
    predictor.to(adapter.device)
    look = console.look(adapter, images, cache)
    parts = rescored(look, adapter.category_ids, stage, results, ground_truth)
    better = Results.concat(console.track(parts, len(results.by_image()), "rescoring"))
    write_results(output, better, image_order=[image.id for image in ground_truth.images])
    console.save_config(output)
    console.data(vars(stage.summary) | {"output": str(output)}, f"{output}: {stage.summary}")
    return OK


@app.command(name="eval")
def eval_(
    detections: Path,
    *,
    ann: Annotation,
    baseline: Annotated[
        Path | None, Parameter(help="COCO results before; adds the difference and its interval.")
    ] = None,
    bootstrap: int = 1000,
    max_dets: int = 100,
    fail_under: Annotated[tuple[str, ...], Parameter(help="A gate such as AP=0.38, or with --baseline +AP=0.")] = (),
    console: Quiet,
) -> int:
    """COCO AP of a results file, at each threshold; with --baseline before, after, difference and 95 % interval.

    Parameters
    ----------
    detections
        COCO results, .json or .json.gz.
    bootstrap
        Resamples of the images for the interval.
    max_dets
        Detections judged per image and category, as pycocotools counts.
    """
    from iou_refiner.coco import read_ground_truth, read_results

    with console.usage():
        gates = [_gate(text, baseline is not None) for text in fail_under]
    results, ground_truth = read_results(detections), read_ground_truth(ann)
    if baseline is None:
        from iou_refiner.evaluation.ap import evaluate

        evaluation = evaluate(results, ground_truth, max_dets=max_dets)
        console.table(["", "AP points"], evaluation.rows(), evaluation.to_dict())
        measured = evaluation.metrics
    else:
        from iou_refiner.evaluation.bootstrap import compare

        comparison = compare(
            read_results(baseline), results, ground_truth,
            resamples=bootstrap, seed=console.seed, max_dets=max_dets,
        )  # fmt: skip
        console.table(["", "before", "after", "difference", "95 % interval"], comparison.rows(), comparison.to_dict())
        measured = {**comparison.after.metrics, **{f"+{k}": v for k, v in comparison.differences.items()}}
    with console.usage():
        missed = [
            f"{name} is {_of(measured, name):.4f}, below {bar}" for name, bar in gates if _of(measured, name) < bar
        ]
    for line in missed:
        console.note(f"Gate missed: {line}.")
    return GATE_MISSED if missed else OK


@app.command
def info(head: Path, *, console: Quiet) -> int:
    """What a head file says about itself: its shape, its detector, its training.

    Parameters
    ----------
    head
        Head made by `train`.
    """
    from iou_refiner.head.checkpoint import read_metadata

    about = {name: part for name, part in read_metadata(head).items() if isinstance(part, dict)}
    lines = [f"{part}\n" + "\n".join(f"  {k}: {v}" for k, v in values.items()) for part, values in about.items()]
    console.data(about, "\n".join(lines))
    return OK


def _gate(text: str, has_baseline: bool) -> tuple[str, float]:
    name, _, bar = text.partition("=")
    if name.startswith("+") and not has_baseline:
        raise ValueError(f"--fail-under {text}: a difference needs --baseline.")
    try:
        return name, float(bar)
    except ValueError:
        raise ValueError(f"--fail-under {text!r} is not of the form NAME=NUMBER, for example AP=0.38.") from None


def _of(measured: Mapping[str, float], name: str) -> float:
    if name not in measured:
        raise ValueError(f"--fail-under {name}: no such metric; there are {', '.join(measured)}.")
    return measured[name]


@app.meta.default
def _run(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(group=_GLOBAL, help="Options from a .toml, .yaml or .json file.")] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=(), group=_GLOBAL, help="Machine-readable.")] = False,
    device: Annotated[str, Parameter(group=_GLOBAL, help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    seed: Annotated[int, Parameter(group=_GLOBAL, help="Same seed, same bytes on CPU.")] = 0,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative=(), group=_GLOBAL, help="Results only.")] = False,
    verbose: Annotated[
        bool, Parameter(name=["--verbose", "-v"], negative=(), group=_GLOBAL, help="Tracebacks.")
    ] = False,
) -> int:
    console = Console(as_json=as_json, device=device, seed=seed, quiet=quiet, verbose=verbose)
    app.config = [*_config_file(config), Env("IOU_REFINER_")]
    try:
        command, bound, ignored = app.parse_args(tokens, exit_on_error=False, print_error=False)
        if "console" not in ignored:  # --help and --version
            command(*bound.args, **bound.kwargs)
            return OK
        console.remember(tokens, command.__name__.strip("_"), bound)
        status: int = command(*bound.args, **bound.kwargs, console=console)
        return status
    except CycloptsError as error:
        return console.fail(USAGE, str(error))
    except UsageError as error:
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
    return [kinds[path.suffix](path, must_exist=True)]


def main(tokens: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(app.meta(tokens) or OK)  # None: meta itself has printed the help
