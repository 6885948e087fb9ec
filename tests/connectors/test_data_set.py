"""Data sets in other people's forms, and with other people's ids."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from iou_refiner import DataError, evaluate
from iou_refiner.coco import Results, read_results, write_results
from iou_refiner.connectors.data_set import (
    columns_of_results,
    images_of_results,
    results_of_images,
    results_of_records,
)
from iou_refiner.connectors.ids import read_foreign_results
from tests.kit.coco_files import SETTINGS, assert_same, some_results
from tests.kit.needs import needs_package
from tests.kit.scenes import make_results, make_truth


@SETTINGS
@given(results=some_results())
def test_records_are_read_as_the_file_is(results: Results, tmp_path: Path):
    write_results(tmp_path / "r.json", results)
    assert_same(results_of_records(json.loads((tmp_path / "r.json").read_text())), read_results(tmp_path / "r.json"))


@SETTINGS
@given(results=some_results())
def test_by_image_and_back_are_the_same_boxes(results: Results):
    again = results_of_images(images_of_results(results))
    order = np.argsort(results.image_id, kind="stable")
    assert np.array_equal(np.sort(again.image_id), np.sort(results.image_id))
    rows = again.by_image()
    for image, mine in results[order].by_image().items():
        theirs = again[rows[image]]
        np.testing.assert_allclose(theirs.bbox, results[order][mine].bbox, rtol=1e-9, atol=1e-6)
        np.testing.assert_array_equal(theirs.category_id, results[order][mine].category_id)


def test_pandas_takes_the_columns():
    pandas = needs_package("pandas", install="pip install -e '.[notebook]'")
    results = make_results([(3, 1, (1, 2, 30, 40), 0.5), (4, 2, (5, 6, 7, 8), 0.25)])
    table = pandas.DataFrame(columns_of_results(results))
    assert table.to_dict("list") == {
        "image_id": [3, 4], "category_id": [1, 2], "x": [1, 5], "y": [2, 6], "width": [30, 7], "height": [40, 8],
        "score": [0.5, 0.25],
    }  # fmt: skip
    assert table.groupby("image_id").score.max().tolist() == [0.5, 0.25]


# --- ids of others ---------------------------------------------------------------------------------------------------

BOX = (10, 10, 50, 60)
TRUTH = make_truth([139, 7], [3, 1, 90], [(139, 3, BOX, False), (7, 90, BOX, False)])  # images 139.jpg and 7.jpg


def saved(tmp_path: Path, *records: tuple, name: str = "r.json") -> Path:
    rows = [{"image_id": i, "category_id": c, "bbox": list(BOX), "score": 0.5, "mine": "stays"} for i, c in records]
    path = tmp_path / name
    data = json.dumps(rows).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("ids", [(139, 7), ("139", "7"), ("000139", "7.jpg"), ("139.jpg", 7)])
def test_images_are_known_by_their_files(tmp_path: Path, ids: tuple):
    if ids == ("000139", "7.jpg"):
        with pytest.raises(DataError, match=r"record 1 .* '000139' is the name of no image"):
            read_foreign_results(saved(tmp_path, (ids[0], 3)), TRUTH, image_ids="file_name")
        return
    path = saved(tmp_path, (ids[0], 3), (ids[1], 90), name="r.json.gz")
    results = read_foreign_results(path, TRUTH, image_ids="file_name")
    assert results.image_id.tolist() == [139, 7]
    assert results.extra == ({"mine": "stays"},) * 2
    assert evaluate(path, TRUTH, image_ids="file_name").metrics["AP"] == pytest.approx(1)


def test_a_name_of_two_images_is_refused(tmp_path: Path):
    truth = make_truth([1, 2], [1])
    images = tuple(type(i)(i.id, f"{folder}/5.jpg", 9, 9) for i, folder in zip(truth.images, "ab", strict=True))
    truth = type(truth)(images, *(getattr(truth, name) for name in (
        "categories", "id", "image_id", "category_id", "bbox", "area", "iscrowd")))  # fmt: skip
    with pytest.raises(DataError, match="'5' is the name of 2 images"):
        read_foreign_results(saved(tmp_path, (5, 1)), truth, image_ids="file_name")
    assert read_foreign_results(saved(tmp_path, ("b/5.jpg", 1)), truth, image_ids="file_name").image_id == [2]


@pytest.mark.parametrize(
    ("category_ids", "numbers"),
    [("annotation", (1, 3, 90)), ("from_0", (0, 1, 2)), ("from_1", (1, 2, 3)), ({5: 1, 6: 3, 8: 90}, (5, 6, 8))],
)
def test_categories_are_counted_by_ascending_id(tmp_path: Path, category_ids, numbers: tuple):
    path = saved(tmp_path, *((139, number) for number in numbers))
    assert read_foreign_results(path, TRUTH, category_ids=category_ids).category_id.tolist() == [1, 3, 90]


def test_a_number_without_a_category_is_refused(tmp_path: Path):
    path = saved(tmp_path, (139, 3), (139, 0))
    with pytest.raises(DataError, match="no category stands for category_id 3"):
        read_foreign_results(path, TRUTH, category_ids="from_0")
    with pytest.raises(ValueError, match="`category_ids` must be one of"):
        read_foreign_results(path, TRUTH, category_ids="from-0")
    with pytest.raises(ValueError, match="Leave them out"):
        evaluate(make_results(), TRUTH, category_ids="from_0")
    (tmp_path / "broken.json").write_text('[{"image_id": 1')
    with pytest.raises(DataError, match="is not whole JSON"):
        read_foreign_results(tmp_path / "broken.json", TRUTH, image_ids="file_name")
