"""The functions do what the commands do, with whatever form of the data is at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image as PIL

import iou_refiner
from iou_refiner import DataError, HeadConfig, TrainSettings, load_head
from iou_refiner.coco import read_ground_truth, read_results, write_results
from iou_refiner.detector.sources import feature_source
from iou_refiner.evaluation.ap import METRICS, Evaluation
from iou_refiner.evaluation.bootstrap import Comparison, compare
from iou_refiner.rescoring import dump_candidates
from iou_refiner.training.from_candidates import train_from_candidates
from iou_refiner.training.recipe import train as train_on
from iou_refiner.verbs.rescore import Rescored
from iou_refiner.verbs.train import Trained
from tests.kit import fixtures
from tests.kit.crowds import make_saved
from tests.kit.toys import ToyDetector, make_dataset

CONFIG = HeadConfig(width=4, hidden=(16,), output_size=3)
SETTINGS = TrainSettings(epochs=2, batch_size=4, boxes_per_image=24, lr=3e-3, views=1)
OPTIONS = {"config": CONFIG, "settings": SETTINGS, "siblings": False, "progress": False}
run = fixtures.run


class Home(NamedTuple):
    """A data set of rectangles, its detector, its candidates and a head for it."""

    folder: Path
    ann: Path
    detector: ToyDetector
    candidates: Path
    trained: Trained


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("verbs")
    ann, detector = make_dataset(folder / "images", 8)
    trained = iou_refiner.train(
        detector, annotations=str(ann), images=str(folder / "images"), output_dir=str(folder / "run"), **OPTIONS
    )
    truth = read_ground_truth(ann)
    parts = dump_candidates(feature_source(detector, folder / "images"), None, truth)
    write_results(folder / "candidates.json", iou_refiner.coco.Results.concat(parts))
    return Home(folder, ann, detector, folder / "candidates.json", trained)


@pytest.fixture
def home(made: Home) -> Path:
    """For ``run``."""
    return made.folder


class Rectangles(torch.utils.data.Dataset):
    """The same data set as a Dataset of the form that ``form`` says."""

    def __init__(self, made: Home, form: str):
        self.truth, self.folder, self.form = read_ground_truth(made.ann), made.folder / "images", form

    def __len__(self) -> int:
        return len(self.truth.images)

    def __getitem__(self, index: int):
        image = self.truth.images[index]
        rows = self.truth.by_image()[image.id]
        picture = PIL.open(self.folder / image.file_name).convert("RGB")
        if self.form == "coco":
            annotations = [
                {"image_id": image.id, "category_id": int(self.truth.category_id[row]), "iscrowd": 0,
                 "bbox": self.truth.bbox[row].tolist(), "area": float(self.truth.area[row])}
                for row in rows
            ]  # fmt: skip
            return picture, annotations
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        boxes = torch.from_numpy(self.truth.bbox[rows])
        target = {
            "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1), "labels": torch.ones(len(rows)).long(),
            "image_id": torch.tensor([image.id]),
        }  # fmt: skip
        return pixels if self.form == "bytes" else pixels.float() / 255, target


def weights(trained: Trained) -> list[torch.Tensor]:
    return list(trained.load().state_dict().values())


# --- train -----------------------------------------------------------------------------------------------------------


def test_a_head_is_that_of_the_recipe_byte_for_byte(made: Home, tmp_path: Path):
    truth = read_ground_truth(made.ann)
    train_on(
        made.detector, (truth, made.folder / "images"), output_dir=tmp_path, config=CONFIG, settings=SETTINGS,
        siblings=None, note=lambda text: None,
    )  # fmt: skip
    assert (tmp_path / "head.safetensors").read_bytes() == made.trained.head.read_bytes()


@pytest.mark.parametrize("form", ["floats", "bytes", "coco"])
def test_a_dataset_teaches_what_its_files_teach(made: Home, form: str, tmp_path: Path):
    from_dataset = iou_refiner.train(
        made.detector, annotations=Rectangles(made, form), output_dir=tmp_path / "run", **OPTIONS
    )
    assert all(torch.equal(a, b) for a, b in zip(weights(from_dataset), weights(made.trained), strict=True))


def test_a_head_that_is_there_is_not_replaced_unasked(made: Home):
    given = {"annotations": made.ann, "images": made.folder / "images", "output_dir": made.folder / "run", **OPTIONS}
    before = made.trained.head.read_bytes()
    with pytest.raises(FileExistsError, match=r"holds a head already\. Add resume=True or overwrite=True"):
        iou_refiner.train(made.detector, **given)
    iou_refiner.train(made.detector, **given, overwrite=True)
    assert made.trained.head.read_bytes() == before


def test_the_result_prints_shows_and_goes_to_json(made: Home):
    assert made.trained.load().config == load_head(made.trained.head).config == CONFIG
    assert str(made.trained).splitlines()[0] == str(made.trained.head)
    assert any(line.startswith("loss") for line in str(made.trained).splitlines())
    assert made.trained._repr_html_().count("<tr>") == 1 + len(made.trained.history[-1])
    assert json.loads(json.dumps(made.trained.to_dict(), allow_nan=False))["head"] == str(made.trained.head)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({}, "Give a `detector`"),
        ({"detections": "c.json", "images": "images"}, "needs none of `detector`, `images`"),
        ({"detections": "c.json", "val_detections": "v.json"}, "belong together"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(made: Home, tmp_path: Path, wrong: dict, match: str):
    with pytest.raises(ValueError, match=match):
        iou_refiner.train(annotations=made.ann, output_dir=tmp_path, **wrong)
    with pytest.raises(ValueError, match="`images` is needed"):
        iou_refiner.train(made.detector, annotations=made.ann, output_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match="Leave out `images`"):
        iou_refiner.train(
            made.detector, annotations=Rectangles(made, "bytes"), images="images", output_dir=tmp_path, progress=False
        )


# --- rescore ---------------------------------------------------------------------------------------------------------


def test_rescoring_is_that_of_the_command(made: Home, run, monkeypatch):
    (made.folder / "mine.py").write_text(
        f"from tests.verbs.test_verbs import make_dataset\nfrom pathlib import Path\n\n\ndef detector():\n"
        f"    return make_dataset(Path({str(made.folder / 'again')!r}), 8)[1]\n"
    )
    rescored = iou_refiner.rescore(
        made.candidates, head=made.trained, detector=made.detector, annotations=made.ann, images=made.folder / "images",
        progress=False,
    )  # fmt: skip
    status, _, err = run(
        "rescore", "candidates.json", "--head", "run/head.safetensors", "--detector", "mine.py:detector",
        "--ann", "images/annotation.json", "--images", "images", "-o", "by_command.json",
    )  # fmt: skip
    assert status == 0, err
    assert (
        rescored.save(made.folder / "by_function.json").read_bytes() == (made.folder / "by_command.json").read_bytes()
    )
    counts = rescored.to_dict()
    assert counts["candidates"] == len(read_results(made.candidates))
    assert counts["candidates"] == counts["records"] + counts["suppressed"] + sum(counts["dropped"].values())


def test_settings_go_by_name(made: Home):
    given = {"head": made.trained.load(), "detector": made.detector, "annotations": Rectangles(made, "floats")}
    rescored = iou_refiner.rescore(str(made.candidates), **given, max_detections=1, progress=False)
    assert rescored.settings.max_detections == 1
    assert len(rescored.results) == 8
    with pytest.raises(ValueError, match=r"max_detection"):
        iou_refiner.rescore(str(made.candidates), **given, max_detection=1, progress=False)


def test_a_head_with_features_asks_for_them(made: Home):
    with pytest.raises(ValueError, match="reads the features of a detector: `detector`, `annotations` and `images`"):
        iou_refiner.rescore(made.candidates, head=made.trained.head)


def test_without_a_detector_a_head_is_trained_and_used_on_saved_candidates(tmp_path: Path, capsys):
    train, val = make_saved(40, seed=0), make_saved(12, seed=1)
    trained = iou_refiner.train(
        detections=train[0], annotations=train[1], val_detections=val[0], val_annotations=val[1], output_dir=tmp_path
    )
    assert "val AP" in capsys.readouterr().err  # what was chosen is said, as the command does
    train_from_candidates(train, val, output_dir=tmp_path / "again", note=lambda text: None)
    assert (tmp_path / "again" / "head.safetensors").read_bytes() == trained.head.read_bytes()
    candidates, truth = make_saved(12, seed=2)
    before = iou_refiner.rescore(candidates, head=trained, settings=iou_refiner.StageSettings.detector_only())
    after = iou_refiner.rescore(candidates, head=trained, annotations=truth)
    gain = iou_refiner.evaluate(after, truth, baseline=before, bootstrap=0)
    assert isinstance(gain, Comparison)
    assert gain.differences["AP"] > 0.02


# --- evaluate and report ---------------------------------------------------------------------------------------------


def in_every_form(made: Home) -> dict[str, object]:
    """The candidates in each form that is taken."""
    results = read_results(made.candidates)
    rescored = Rescored(results, None, None, ())  # type: ignore[arg-type]
    return {
        "Path": made.candidates, "str": str(made.candidates), "records": json.loads(made.candidates.read_text()),
        "Results": results, "Rescored": rescored, "images": rescored.by_image(),
        "tensors": {i: {k: torch.from_numpy(v) for k, v in image.items()} for i, image in rescored.by_image().items()},
    }  # fmt: skip


@pytest.mark.parametrize("form", ["Path", "str", "records", "Results", "Rescored", "images", "tensors"])
def test_every_form_of_detections_measures_the_same(made: Home, form: str):
    detections = in_every_form(made)[form]
    expected = compare(*[read_results(made.candidates)] * 2, read_ground_truth(made.ann), resamples=20)
    measured = iou_refiner.evaluate(detections, made.ann, baseline=made.candidates, bootstrap=20)
    assert measured.after.metrics == pytest.approx(expected.after.metrics, nan_ok=True)
    assert measured.intervals["AP"] == pytest.approx((0, 0))
    alone = iou_refiner.evaluate(detections, made.ann)
    assert isinstance(alone, Evaluation)
    assert alone.metrics == pytest.approx(expected.after.metrics, nan_ok=True)


@pytest.mark.parametrize("form", ["str", "dict", "GroundTruth", "coco"])
def test_every_form_of_annotations_measures_the_same(made: Home, form: str):
    truth = read_ground_truth(made.ann)
    annotations = {
        "str": str(made.ann), "dict": json.loads(made.ann.read_text()), "GroundTruth": truth,
        "coco": Rectangles(made, "coco"),
    }[form]  # fmt: skip
    measured = iou_refiner.evaluate(made.candidates, annotations)
    assert isinstance(measured, Evaluation)
    expected = iou_refiner.evaluate(made.candidates, made.ann)
    assert measured.to_dict()["metrics"] == expected.to_dict()["metrics"]


def test_an_evaluation_is_a_table(made: Home):
    measured = iou_refiner.evaluate(made.candidates, made.ann)
    lines = str(measured).splitlines()
    assert len(lines) == 1 + len(METRICS)
    assert lines[1].split() == ["AP", f"{100 * measured.metrics['AP']:.1f}"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert "<td" in measured._repr_html_()


def test_what_is_wrong_is_refused_by_name(made: Home):
    records = json.loads(made.candidates.read_text())
    for wrong, match in (
        (3, "`detections` must be a path"),
        ([{**records[0], "category_id": 77}], r"`detections` does not pass.*category_id"),
        ([records[0], {"image_id": 1}], "Record 2 counting from 1"),
        ([records[0], {**records[1], "iou": 0.5}], "Some records have an `iou`"),
    ):
        with pytest.raises((TypeError, DataError), match=f"(?s){match}"):
            iou_refiner.evaluate(wrong, made.ann)
    for wrong_annotation in (7, {"images": [{"id": 1}], "annotations": [], "categories": []}):
        with pytest.raises((TypeError, DataError), match="`annotations`"):
            iou_refiner.evaluate(made.candidates, wrong_annotation)


def test_a_report_is_that_of_the_command(made: Home, run):
    page = iou_refiner.report(
        made.candidates, made.candidates, made.ann, made.folder / "images", output=made.folder / "page.html",
        bootstrap=20, progress=False,
    )  # fmt: skip
    options = ("--ann", made.ann, "--images", "images", "-o", "by_command.html", "--bootstrap", 20)
    status, _, err = run("report", "candidates.json", "candidates.json", *options)
    assert status == 0, err
    assert (made.folder / "page.html").read_text() == page.html == (made.folder / "by_command.html").read_text()
    assert str(page).splitlines()[0].startswith("AP ")
    assert "No difference" in page._repr_html_()


def test_the_command_takes_results_with_other_ids(made: Home, run):
    records = [
        {**record, "category_id": 0, "image_id": f"{record['image_id']}.png"}
        for record in json.loads(made.candidates.read_text())
    ]
    (made.folder / "foreign.json").write_text(json.dumps(records))
    ids = ("--image-ids", "file_name", "--category-ids")
    by_position = run("eval", "foreign.json", "--ann", made.ann, *ids, "from_0", "--json")
    by_pairs = run("eval", "foreign.json", "--ann", made.ann, *ids, "0=1", "--json")
    own = run("eval", "candidates.json", "--ann", made.ann, "--json")
    assert by_position[0] == by_pairs[0] == own[0] == 0, by_position[2]
    assert json.loads(by_position[1]) == json.loads(by_pairs[1]) == json.loads(own[1])
    status, _, err = run("eval", "foreign.json", "--ann", made.ann, *ids, "from_2")
    assert status == 2
    assert "Did you mean 'from_1'?" in err
