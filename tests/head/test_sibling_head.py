"""Heads with a network over siblings: what was saved is loaded, and what does not fit is named."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from iou_refiner.checks import DataError
from iou_refiner.detector.fingerprint import fingerprint
from iou_refiner.head.checkpoint import describe_head, load_head, save_head
from iou_refiner.head.config import HeadConfig, HeadMetadata, TrainedCategory
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.head.sibling_head import SiblingHead
from iou_refiner.siblings.config import SiblingConfig
from tests.kit.crowds import SMALL, clusters_of, limits_of, make_crowd, opinionated

METADATA = HeadMetadata(
    detector_name="CenterNet",
    recommended={"siblings": True, "sibling_move": 0.25},
    categories=(TrainedCategory(1, "person", 1),),
    candidates={"score_quantiles": [0.01, 0.1, 0.5], "siblings": 9.5},
)


def sibling_head() -> SiblingHead:
    return opinionated(SiblingHead(SMALL, metadata=METADATA))


def both_head(siblings: SiblingConfig | None = SMALL) -> IoUHead:
    config = HeadConfig(width=4, hidden=(12,), output_size=3)
    return opinionated(IoUHead((3, 5), (8, 16), config, metadata=METADATA, siblings=siblings))


@pytest.mark.parametrize("make", [sibling_head, both_head])
@torch.no_grad()
def test_what_was_saved_is_loaded(tmp_path: Path, make: Any) -> None:
    head, path = make(), tmp_path / "head.safetensors"
    save_head(head, path)
    loaded = load_head(path)
    assert type(loaded) is type(head)
    assert loaded.metadata == METADATA
    assert loaded.architecture == head.architecture
    assert loaded.siblings is not None
    assert loaded.siblings.config == SMALL
    assert fingerprint(loaded) == fingerprint(head)
    assert not loaded.training
    candidates, _ = make_crowd(0)
    clusters = clusters_of(candidates)
    embedding = torch.randn(len(clusters), 12)
    given = candidates.boxes, candidates.scores, limits_of(candidates), clusters, embedding
    assert all(map(torch.equal, loaded.siblings(*given), head.siblings(*given)))
    before = path.read_bytes()
    save_head(loaded, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_head_says_of_which_kind_it_is(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    for head, kind in ((sibling_head(), "siblings"), (both_head(), "iou"), (both_head(None), "iou")):
        save_head(head, path)
        about = describe_head(path)
        assert about["kind"] == kind
        expected = asdict(head.siblings.config) if head.siblings else None
        assert about["architecture"]["siblings"] == expected
    assert about["architecture"]["config"] == {**asdict(head.config), "hidden": [12]}


def test_the_embedding_of_the_network_is_that_of_the_trunk() -> None:
    head = both_head()
    assert head.siblings is not None
    assert head.siblings.embedding is not None
    assert head.siblings.embedding[1].in_features == head.trunk.out_features == 12
    assert sibling_head().siblings.embedding is None
    assert both_head(None).siblings is None


BROKEN: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    ((), {"kind": "unknown"}, "`kind` must be one of 'iou', 'siblings', got 'unknown'"),
    ((), {"kind": "iou"}, "no 'config'"),
    (("architecture",), {"siblings": None}, "needs `siblings` in its architecture"),
    (("architecture",), {"siblings": []}, "object"),
    (("architecture",), {"config": {}}, "and nothing else"),
    (("architecture", "siblings"), {"attention_heads": 3}, "`attention_heads` must divide `width`, got 3 and 16"),
    (("architecture", "siblings"), {"attention_heads": 0}, "`attention_heads`"),
    (("architecture", "siblings"), {"width": 32}, "has shape"),
    (("architecture", "siblings"), {"width": 10**9}, "`width`"),
    (("architecture", "siblings"), {"siblings": 10**9}, "`siblings`"),
    (("architecture", "siblings"), {"layers": 3}, "missing weights"),
    (("architecture", "siblings"), {"layers": "2"}, "layers"),
    (("architecture", "siblings"), {"colour": "red"}, "unknown: colour"),
    (("metadata",), {"candidates": None}, "candidates"),
]


def rewritten(path: Path, about: Any, head: torch.nn.Module) -> None:
    path.write_bytes(safetensors.torch.save(dict(head.state_dict()), {"iou_refiner": json.dumps(about)}))


@pytest.mark.parametrize(("where", "change", "message"), BROKEN)
def test_a_description_that_does_not_fit_is_named(
    tmp_path: Path, where: tuple[str, ...], change: dict[str, Any], message: str
) -> None:
    path, head = tmp_path / "head.safetensors", sibling_head()
    save_head(head, path)
    about = describe_head(path)
    rewritten(path, about, head)
    load_head(path)
    section = about
    for name in where:
        section = section[name]
    section.update(change)
    rewritten(path, about, head)
    with pytest.raises(DataError, match=rf"head\.safetensors: description and weights do not make a head.*{message}"):
        load_head(path)


@pytest.mark.parametrize("part", ["kind", "architecture", "metadata"])
@pytest.mark.parametrize("make", [sibling_head, both_head])
def test_a_description_with_a_part_missing_is_named(tmp_path: Path, make: Any, part: str) -> None:
    path, head = tmp_path / "head.safetensors", make()
    save_head(head, path)
    about = describe_head(path)
    del about[part]
    rewritten(path, about, head)
    with pytest.raises(DataError, match=rf"do not make a head.*no '{part}'"):
        load_head(path)


def test_an_architecture_without_siblings_is_named(tmp_path: Path) -> None:
    for head in (sibling_head(), both_head()):
        path = tmp_path / "head.safetensors"
        save_head(head, path)
        about = describe_head(path)
        del about["architecture"]["siblings"]
        rewritten(path, about, head)
        with pytest.raises(DataError, match=r"do not make a head.*no 'siblings'"):
            load_head(path)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    head, path = sibling_head(), tmp_path / "head.safetensors"
    head.siblings.score_weight.data[3] = torch.nan
    save_head(head, path)
    with pytest.raises(DataError, match=r"siblings\.score_weight holds numbers that are not finite"):
        load_head(path)
