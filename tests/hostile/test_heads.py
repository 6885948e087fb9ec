"""Head files that are not what they say: each is refused by name, in no time, and nothing is built from it."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iou_refiner import DataError, HeadConfig, IoUHead, Stage, cli
from iou_refiner.head.checkpoint import describe_head, load_head, save_head
from iou_refiner.head.config import HeadMetadata, TrainedCategory

About, Weights = dict[str, Any], dict[str, torch.Tensor]


def parts() -> tuple[About, Weights]:
    """Description and weights of a right head."""
    torch.manual_seed(0)
    head = IoUHead(
        (4, 4), (1, 2), HeadConfig(width=3, mix=2, hidden=(5,), output_size=2),
        metadata=HeadMetadata(categories=(TrainedCategory(1, "rectangle", 1),)),
    )  # fmt: skip
    data = safetensors.torch.load(written(head))
    return json.loads(safetensors_text(written(head))["iou_refiner"]), data


def written(head: IoUHead) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save_head(head, Path(folder) / "h.safetensors")
        return (Path(folder) / "h.safetensors").read_bytes()


def safetensors_text(data: bytes) -> dict[str, str]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])["__metadata__"]


def put(path: Path, about: Any, weights: Weights) -> Path:
    text = about if isinstance(about, str) else json.dumps(about)
    path.write_bytes(safetensors.torch.save(weights, {"iou_refiner": text}))
    return path


def config(**changes: Any) -> Callable[[About, Weights], None]:
    return lambda about, weights: about["architecture"]["config"].update(changes)


def architecture(**changes: Any) -> Callable[[About, Weights], None]:
    return lambda about, weights: about["architecture"].update(changes)


def metadata(**changes: Any) -> Callable[[About, Weights], None]:
    return lambda about, weights: about["metadata"].update(changes)


def weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[About, Weights], None]:
    def apply(about: About, weights: Weights) -> None:
        weights["iou_output.weight"] = change(weights["iou_output.weight"])

    return apply


def without(*keys: str) -> Callable[[About, Weights], None]:
    def apply(about: About, weights: Weights) -> None:
        section = about
        for key in keys[:-1]:
            section = section[key]
        del section[keys[-1]]

    return apply


# What is changed, and what the message must name; the exit code is 3 for all.
WRONG: list[tuple[str, Callable[[About, Weights], None], str]] = [
    ("a million layers", config(hidden=[1] * 10**6), "`hidden` must have at most 16 layers, got 1,000,000"),
    ("a huge layer", config(hidden=[10**9]), "`hidden` must lie in [1, 16384], got 1000000000"),
    ("another layer", config(hidden=[6]), "has shape"),
    ("no layer", config(hidden=[]), "weights"),
    ("layers of text", config(hidden=["5"]), "int"),
    ("a negative layer", config(hidden=[-5]), "`hidden`"),
    ("a huge width", config(width=10**8), "`width` must lie in [0, 16384]"),
    ("another width", config(width=4), "has shape"),
    ("a negative width", config(width=-1), "`width` must be 0 or more"),
    ("a huge mix", config(mix=10**8), "`mix` must lie in"),
    ("no mix", config(mix=0), "weights"),
    ("huge bins", config(output_size=10**6), "`output_size` must lie in [1, 64]"),
    ("no bins", config(output_size=0), "`output_size`"),
    ("other bins", config(output_size=3), "has shape"),
    ("many levels", config(levels=99), "`levels` must lie in [1, 16], got 99"),
    ("no levels", config(levels=0), "`levels`"),
    ("a huge context", config(context=1e9), "`context` must lie in"),
    ("context of text", config(context="wide"), "float"),
    ("an unknown objective", config(objective="l2"), "l2"),
    ("an unknown field", config(colour="red"), "unknown: colour"),
    ("null deltas", config(deltas=None), "bool"),
    ("outputs too many", config(deltas=False), "weights too many: ['deltas_output"),
    ("no config", without("architecture", "config"), "config"),
    ("no architecture", without("architecture"), "architecture"),
    ("no metadata", without("metadata"), "metadata"),
    ("no channels", without("architecture", "channels"), "channels"),
    ("no strides", without("architecture", "strides"), "strides"),
    ("channels of text", architecture(channels="44"), "`channels` must be a list"),
    ("huge channels", architecture(channels=[4, 10**9]), "`channels` must lie in [1, 65536]"),
    ("many channels", architecture(channels=[4] * 10**5), "`channels` must be a list of 1 to 32"),
    ("channels of no number", architecture(channels=[4, None]), "`channels`"),
    ("no levels at all", architecture(channels=[], strides=[]), "`channels` must be a list"),
    ("a stride of 0", architecture(strides=[0, 2]), "`strides`"),
    ("a stride that is not finite", architecture(strides=[1, float("nan")]), "`strides`"),
    ("fewer strides", architecture(strides=[1.0]), "one entry per level"),
    ("a billion classes", architecture(num_classes=10**9), "`num_classes` must lie in [0, 100000]"),
    ("other classes", architecture(num_classes=7), "has shape"),
    ("classes of text", architecture(num_classes="7"), "`num_classes` must be an integer"),
    ("an unknown architecture", architecture(layers=3), "unknown: layers"),
    ("unknown metadata", metadata(colour="red"), "unknown: colour"),
    ("a name of no text", metadata(detector_name=3), "str"),
    ("trials of no list", metadata(trials=3), "array"),
    ("categories of no list", metadata(categories="all"), "array"),
    ("a category without a label", metadata(categories=[{"id": 1, "name": "x"}]), "label"),
    ("a category of text", metadata(categories=[{"id": "1", "name": "x", "label": 1}]), "int"),
    ("recommended of no object", metadata(recommended=[1]), "object"),
    ("another format", lambda about, weights: about.update(format="iou-refiner head 99"), "not a head of this version"),
    ("no format", without("format"), "not a head of this version"),
    ("another checksum", lambda about, weights: about.update(checksum="0" * 64), "checksum differs"),
    ("a checksum of no text", lambda about, weights: about.update(checksum=7), "checksum differs"),
    ("one weight changed", weight(lambda w: w + 1e-3), "checksum differs"),
    ("a weight of NaN", weight(lambda w: w * float("nan")), "not finite"),
    ("an infinite weight", weight(lambda w: w + float("inf")), "not finite"),
    ("integer weights", weight(lambda w: w.int()), "expected floating point"),
    ("a flat weight", weight(lambda w: w.flatten()), "has shape"),
    ("a weight without rows", weight(lambda w: w[:0]), "has shape"),
    ("a weight missing", lambda about, weights: weights.pop("iou_output.bias"), "missing weights: ['iou_output.bias']"),
    ("a weight too many", lambda about, weights: weights.update(more=torch.zeros(1)), "weights too many: ['more']"),
    ("no weights", lambda about, weights: weights.clear(), "missing weights"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def rescored(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and stderr of `rescore` with this head; the head is read before anything else."""
    words = ("rescore", "d.json", "--head", str(path), "--detector", "no.py:no", "--ann", "a.json", "--images", ".")
    with pytest.raises(SystemExit) as exit_:
        cli.main([*words, "-o", "out.json"])
    return int(exit_.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=[row[0] for row in WRONG])
def test_a_wrong_head_is_refused_by_name_and_at_once(tmp_path, capsys, name, change, message):
    about, weights = parts()
    change(about, weights)
    path, began = put(tmp_path / "head.safetensors", about, weights), time.process_time()
    with pytest.raises(DataError) as error:
        load_head(path)
    assert time.process_time() - began < 2
    assert message in str(error.value)
    status, err = rescored(path, capsys)
    assert status == 3
    assert message in err
    assert "head.safetensors" in err
    assert "Traceback" not in err
    assert not Path("out.json").exists()


BYTES: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("empty", lambda data: b"", "not a readable safetensors file"),
    ("text", lambda data: b"hello", "not a readable safetensors file"),
    ("cut off", lambda data: data[:-9], "not a readable safetensors file"),
    ("longer", lambda data: data + b"x", "not a readable safetensors file"),
    ("a header of 2 GB", lambda data: struct.pack("<Q", 1 << 31) + data[8:], "not a readable safetensors file"),
    ("a pickle", lambda data: b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.", "not a readable safetensors file"),
    ("a zip", lambda data: b"PK\x03\x04" + data, "not a readable safetensors file"),
    ("a flipped weight", lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], "checksum differs"),
]


@pytest.mark.parametrize(("name", "change", "message"), BYTES, ids=[row[0] for row in BYTES])
def test_a_damaged_head_is_refused_by_name(tmp_path, capsys, name, change, message):
    path = put(tmp_path / "head.safetensors", *parts())
    path.write_bytes(change(path.read_bytes()))
    status, err = rescored(path, capsys)
    assert (status, message in err) == (3, True), err
    assert not Path("ran").exists()


TEXTS = ["{", "[]", "null", "3", '"x"', "[" * 5000, '{"format": NaN}', "\x00", '{"format": "iou-refiner head 6"}']


@pytest.mark.parametrize("text", TEXTS, ids=[text[:8] for text in TEXTS])
def test_a_description_that_is_none_is_refused(tmp_path, capsys, text):
    path = put(tmp_path / "head.safetensors", text, {"weight": torch.zeros(2)})
    assert rescored(path, capsys)[0] == 3
    with pytest.raises(SystemExit) as exit_:
        cli.main(["info", str(path)])
    assert exit_.value.code == 3


RECOMMENDED: list[tuple[dict[str, Any], str]] = [
    ({"nms_threshold": "high"}, "`nms_threshold` must be a number"),
    ({"nms_threshold": 2}, "`nms_threshold` must lie in [0, 1]"),
    ({"nms": ["greedy"]}, "`nms` must be one of"),
    ({"nms": "eval"}, "`nms` must be one of"),
    ({"ascent_steps": 10**9}, "`ascent_steps` must lie in [0, 1000]"),
    ({"ascent_steps": 2.5}, "`ascent_steps` must be an integer"),
    ({"ascent_steps": "5"}, "cannot be used"),
    ({"refine_topk": {}}, "cannot be used"),
    ({"regression_steps": True}, "`regression_steps` must be an integer"),
    ({"max_candidates": 10**12}, "`max_candidates` must lie in"),
    ({"all_categories": "yes"}, "`all_categories` must be true or false"),
    ({"__class__": 1}, "`setting` must be one of"),
    ({"colour": 1}, "`setting` must be one of"),
]


@pytest.mark.parametrize(("recommended", "message"), RECOMMENDED, ids=[str(row[0])[:24] for row in RECOMMENDED])
def test_hostile_recommended_settings_are_named_with_the_head(tmp_path, capsys, recommended, message):
    about, weights = parts()
    about["metadata"]["recommended"] = recommended
    path = put(tmp_path / "head.safetensors", about, weights)
    with pytest.raises(DataError):
        Stage(load_head(path))
    status, err = rescored(path, capsys)
    assert status == 3
    assert message in err
    assert "head.safetensors" in err
    assert "--preset" in err


def test_terminal_codes_in_a_head_do_not_reach_the_terminal(tmp_path, capsys):
    about, weights = parts()
    about["metadata"]["detector_name"] = "\x1b[31mred\x1b[0m\x07"
    about["metadata"]["categories"][0]["name"] = "\x1b]0;title\x07"
    about["metadata"]["metrics"] = {"pearson": float("nan")}
    path = put(tmp_path / "head.safetensors", about, weights)
    for words in (["info", str(path)], ["info", str(path), "--json"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(words)
        out = capsys.readouterr().out
        assert exit_.value.code == 0
        assert "\x1b" not in out
        assert "\x07" not in out
    assert json.loads(out, parse_constant=lambda name: pytest.fail(name))["metrics"] == {"pearson": None}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_changed_is_refused_or_changes_nothing_that_counts(tmp_path, data):
    path = put(tmp_path / "head.safetensors", *parts())
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:place] + bytes([data.draw(st.integers(0, 255))]) + whole[place + 1 :])
    try:
        head = load_head(path)
    except DataError:
        return  # anything else would end the test
    before = load_head(put(tmp_path / "right.safetensors", *parts()))
    for name, tensor in before.state_dict().items():
        assert torch.equal(head.state_dict()[name], tensor)
    assert describe_head(path)["format"] == "iou-refiner head 6"
