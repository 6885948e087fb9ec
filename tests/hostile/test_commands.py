"""Commands given what they should not be given: the exit code, what the message names, and that nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iou_refiner import HeadConfig, IoUHead, cli, save_head
from iou_refiner.coco import read_results
from iou_refiner.head.config import HeadMetadata, TrainedCategory
from tests.kit.needs import needs_package
from tests.kit.paths import ROOT
from tests.kit.toys import make_dataset

DATA = ["--detector", "mine.py:detector", "--ann", "ann.json", "--images", "images"]
TRAIN = ["train", *DATA, "-o", "new", "--width", "2", "--hidden", "4", "--epochs", "1", "--views", "1"]
RESCORE = ["rescore", "dets.json", "--head", "head.safetensors", *DATA, "-o", "out.json"]
DUMP = ["dump", *DATA, "-o", "out.json"]

DETECTORS = """
import json, os, sys
from pathlib import Path
from tests.kit.toys import ToyDetector, make_dataset

def detector():
    Path("built").touch()
    return make_dataset(Path({again!r}), 4)[1]

def leaves():
    sys.exit(0)

def prints():
    print("loading weights: 100 %")
    os.write(1, b"from C\\n")
    made = detector()
    prepare = made.prepare
    def loud(rgb):
        print("NaN, {{")
        os.write(1, b"progress 1/4\\n")
        return prepare(rgb)
    made.prepare = loud
    return made

def other():
    made = detector()
    made.weight.data += 1
    return made

class Leaving(ToyDetector):
    def prepare(self, rgb):
        if Path("count").exists():
            exit(0)
        Path("count").touch()
        return super().prepare(rgb)

def leaves_later():
    made = detector()
    made.__class__ = Leaving
    return made

class Slow(ToyDetector):
    def prepare(self, rgb):
        import time
        Path("slow").touch()
        time.sleep(0.5)
        return super().prepare(rgb)

def slow():
    made = detector()
    made.__class__ = Slow
    return made

class Interrupted(ToyDetector):
    def prepare(self, rgb):
        if Path("seen").exists():
            raise KeyboardInterrupt
        Path("seen").touch()
        return super().prepare(rgb)

def interrupted():
    made = detector()
    made.__class__ = Interrupted
    return made

def interrupted_at_once():
    Path("seen").touch()
    return interrupted()

def unknown_ids():
    made = detector()
    made.category_ids = {{0: 71, 1: 72}}
    return made

def nothing():
    return None
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of a data set, a detector named by a file, a head for it, and its candidates."""
    folder = tmp_path_factory.mktemp("commands")
    path, detector = make_dataset(folder, 4)
    truth = json.loads(path.read_text())
    torch.manual_seed(0)
    metadata = HeadMetadata(
        detector_name="ToyDetector", fingerprint=detector.fingerprint(),
        categories=(TrainedCategory(1, "rectangle", 1),),
    )  # fmt: skip
    small = HeadConfig(width=2, hidden=(4,), output_size=2)
    for name, head in {
        "head": IoUHead((4, 4), (1, 2), small, metadata=metadata),
        "foreign": IoUHead((8,), (4,), small),
    }.items():
        save_head(head, folder / f"{name}.safetensors")
    boxes = [
        {"image_id": row["image_id"], "category_id": 1, "bbox": row["bbox"], "score": 0.9 - 0.01 * row["id"]}
        for row in truth["annotations"]
    ]
    files: dict[str, bytes] = {f"images/{file.name}": file.read_bytes() for file in folder.glob("*.png")}
    files |= {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}

    def put(name: str, value: Any) -> None:
        files[name] = value if isinstance(value, bytes) else json.dumps(value).encode()

    put("ann.json", truth)
    put("dets.json", boxes)
    put("none.json", [])
    put("image_info.json", {name: truth[name] for name in ("images", "categories")})
    put("no_objects.json", truth | {"annotations": []})
    put("crowds.json", truth | {"annotations": [row | {"iscrowd": 1} for row in truth["annotations"]]})
    put("no_images.json", {"images": [], "annotations": [], "categories": truth["categories"]})
    put("flat.json", truth | {"annotations": [row | {"bbox": [3, 3, 0, 0]} for row in truth["annotations"]]})
    other = [row | {"category_id": 9} for row in truth["annotations"]]
    put(
        "empty_class.json", truth | {"annotations": other, "categories": [*truth["categories"], {"id": 9, "name": "x"}]}
    )
    put("lost.json", truth | {"images": [row | {"file_name": f"lost{row['id']}.png"} for row in truth["images"]]})
    put("logits.json", [row | {"score": -1.0} for row in boxes])
    put("percent.json", [row | {"score": 90.0} for row in boxes])
    put("negative.json", [row | {"bbox": [5, 5, -3, 4]} for row in boxes])
    put("strange_image.json", [row | {"image_id": 77} for row in boxes])
    put("strange_class.json", [row | {"category_id": 77} for row in boxes])
    put("broken.json", b'[{"image_id": 1')
    put("nan.json", b'[{"image_id": 1, "category_id": 1, "bbox": [NaN, 1, 2, 3], "score": 0.5}]')
    put("unknown.json", {"dumpp": {"top": 3}})
    put("flat_config.json", {"top": 3})
    put("seed_config.json", {"seed": -1})
    put("device_config.json", {"device": 3})
    put("list_config.json", [1])
    put("text_config.json", {"dump": "top"})
    put("typo.toml", b"[dump]\ntopp = 3\n")
    put("broken.toml", b"[dump\n")
    put("broken_config.json", b"{")
    put("tag.yaml", b"dump: !!python/object/apply:os.system ['touch ran']\n")
    put("binary.toml", bytes(range(256)))
    put("some.yaml", b"dump:\n  top: 3\n")
    put("a_file", b"")
    put("damaged/last.pt", b"damaged")
    put("pickled/last.pt", b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    return files


@pytest.fixture
def home(whole, tmp_path, monkeypatch) -> Path:
    """A fresh copy of them, as the working directory."""
    for name, content in whole.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "mine.py").write_text(textwrap.dedent(DETECTORS).format(again=str(tmp_path / "again")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return int(exit_.value.code or 0), out, err


def changed(words: list[str], **options: str) -> list[str]:
    """The words with other values of some options."""
    words = list(words)
    for name, value in options.items():
        words[words.index(f"--{name}" if name != "o" else "-o") + 1] = value
    return words


# Words, exit code, what stderr must name. In all of them the detector is never built.
BEFORE_THE_DETECTOR: list[tuple[list[str], int, str]] = [
    # Settings of the head and of the training.
    (changed(TRAIN, views="0"), 2, "`views`"),
    (changed(TRAIN, views="1000"), 2, "`views` must lie in [0, 64]"),
    ([*TRAIN, "--levels", "99"], 2, "`levels` must lie in [1, 16], got 99"),
    ([*TRAIN, "--levels", "0"], 2, "`levels`"),
    ([*TRAIN, "--lr", "-1"], 2, "`lr`"),
    ([*TRAIN, "--lr", "nan"], 2, "`lr`"),
    ([*TRAIN, "--lr", "1e9"], 2, "`lr` must lie in [0, 10]"),
    (changed(TRAIN, epochs="0"), 2, "`epochs`"),
    (changed(TRAIN, epochs="1000000"), 2, "`epochs` must lie in"),
    (changed(TRAIN, epochs="many"), 2, "--epochs"),
    ([*TRAIN, "--batch-size", "0"], 2, "`batch_size`"),
    ([*TRAIN, "--batch-size", "1000000"], 2, "`batch_size` must lie in"),
    ([*TRAIN, "--boxes-per-image", "0"], 2, "`boxes_per_image`"),
    ([*TRAIN, "--boxes-per-image", "100000000"], 2, "`boxes_per_image` must lie in"),
    ([*TRAIN, "--candidate-share", "2"], 2, "`candidate_share`"),
    ([*TRAIN, "--jitter-min-iou", "0"], 2, "`jitter_min_iou`"),
    ([*TRAIN, "--weight-decay", "-1"], 2, "`weight_decay`"),
    ([*TRAIN, "--weight-decay", "inf"], 2, "`weight_decay`"),
    (changed(TRAIN, width="-1"), 2, "`width`"),
    (changed(TRAIN, width="100000000"), 2, "`width` must lie in"),
    (changed(TRAIN, hidden="0"), 2, "`hidden`"),
    (changed(TRAIN, hidden="1000000000"), 2, "`hidden` must lie in"),
    ([*TRAIN, *["--hidden", "4"] * 20], 2, "`hidden` must have at most 16 layers"),
    ([*TRAIN, "--mix", "1000000000"], 2, "`mix` must lie in"),
    ([*TRAIN, "--output-size", "1000"], 2, "`output_size` must lie in"),
    ([*TRAIN, "--context", "1e9"], 2, "`context` must lie in"),
    ([*TRAIN, "--objective", "l2"], 2, "--objective"),
    # Data that cannot teach.
    (changed(TRAIN, ann="no_objects.json"), 3, "training annotation has no annotated objects"),
    (changed(TRAIN, ann="image_info.json"), 3, "annotations"),
    (changed(TRAIN, ann="crowds.json"), 3, "are crowds"),
    (changed(TRAIN, ann="no_images.json"), 3, "lists no images"),
    (changed(TRAIN, ann="flat.json"), 3, "width and height"),
    (changed(TRAIN, ann="lost.json"), 3, "4 of 4 images are not in images (first: image 1, 'lost1.png')"),
    (changed(TRAIN, ann="absent.json"), 3, "absent.json: no such file"),
    (changed(TRAIN, ann="dets.json"), 3, "dets.json"),
    (changed(TRAIN, ann="broken.json"), 3, "broken.json"),
    (changed(TRAIN, images="absent"), 2, "--images absent: no such folder"),
    (changed(TRAIN, images="a_file"), 2, "--images a_file: no such folder"),
    ([*TRAIN, "--val-ann", "no_objects.json"], 3, "validation annotation has no annotated objects"),
    ([*TRAIN, "--val-ann", "crowds.json"], 3, "validation annotation are crowds"),
    ([*TRAIN, "--val-ann", "no_images.json"], 3, "validation annotation lists no images"),
    ([*TRAIN, "--val-ann", "absent.json"], 3, "absent.json"),
    ([*TRAIN, "--val-ann", "ann.json", "--val-images", "absent"], 2, "absent: no such folder"),
    ([*TRAIN, "--device", "warp"], 2, "--device warp"),
    (changed(TRAIN, o="a_file"), 2, "a_file is a file"),
    (changed(TRAIN, o="a_file/x"), 2, "a_file is a file"),
    # Settings of the stage, the head, the results.
    ([*RESCORE, "--nms-threshold", "2"], 2, "`nms_threshold`"),
    ([*RESCORE, "--ascent-steps", "1000000"], 2, "`ascent_steps` must lie in [0, 1000]"),
    ([*RESCORE, "--regression-steps", "-1"], 2, "`regression_steps`"),
    ([*RESCORE, "--max-candidates", "0"], 2, "`max_candidates`"),
    ([*RESCORE, "--max-detections", "0"], 2, "`max_detections`"),
    ([*RESCORE, "--min-gain", "nan"], 2, "`min_gain`"),
    ([*RESCORE, "--rank-alpha", "-0.1"], 2, "`rank_alpha`"),
    ([*RESCORE, "--ascent-step-size", "inf"], 2, "`ascent_step_size`"),
    (changed(RESCORE, head="absent.safetensors"), 3, "absent.safetensors: no such file"),
    (changed(RESCORE, head="images"), 3, "images"),
    (changed(RESCORE, head="dets.json"), 3, "dets.json: not a readable safetensors file"),
    (["rescore", "logits.json", *RESCORE[2:]], 3, "E303"),
    (["rescore", "percent.json", *RESCORE[2:]], 3, "divide by 100"),
    (["rescore", "negative.json", *RESCORE[2:]], 3, "E205"),
    (["rescore", "strange_image.json", *RESCORE[2:]], 3, "E301"),
    (["rescore", "strange_class.json", *RESCORE[2:]], 3, "E302"),
    (["rescore", "broken.json", *RESCORE[2:]], 3, "broken.json"),
    (["rescore", "nan.json", *RESCORE[2:]], 3, "record 1"),
    (["rescore", "absent.json", *RESCORE[2:]], 3, "absent.json: no such file"),
    (["rescore", "ann.json", *RESCORE[2:]], 3, "ann.json"),
    (changed(RESCORE, ann="lost.json"), 3, "images are not in images"),
    (changed(RESCORE, images="absent"), 2, "--images absent"),
    ([*RESCORE, "--device", "cuda:99"], 2, "--device cuda:99"),
    # Outputs.
    ([*changed(RESCORE, o="dets.json"), "--overwrite"], 2, "dets.json is also an input"),
    ([*changed(RESCORE, o="./ann.json"), "--overwrite"], 2, "ann.json is also an input"),
    ([*changed(RESCORE, o="head.safetensors"), "--overwrite"], 2, "head.safetensors is also an input"),
    ([*changed(RESCORE, o="mine.py"), "--overwrite"], 2, "mine.py is also an input"),
    ([*changed(DUMP, o="mine.py"), "--overwrite"], 2, "mine.py is also an input"),
    ([*changed(DUMP, o="ann.json"), "--overwrite"], 2, "ann.json is also an input"),
    ([*changed(DUMP, o="images/1.png"), "--overwrite"], 2, "must end in .json"),
    (changed(DUMP, o="out.txt"), 2, "must end in .json"),
    (changed(DUMP, o="absent/out.json"), 2, "The folder absent does not exist"),
    (changed(DUMP, o="dets.json"), 2, "Add --overwrite"),
    (changed(DUMP, ann="no_images.json", images="absent"), 2, "absent"),
    ([*DUMP, "--top", "0"], 2, "--top"),
    ([*DUMP, "--top", "-1"], 2, "--top"),
    ([*DUMP, "--seed", "-1"], 2, "--seed"),
    # Config files.
    ([*DUMP, "--config", "unknown.json"], 2, "'dumpp' is no command and no global option"),
    ([*DUMP, "--config", "unknown.json"], 2, "Did you mean 'dump'"),
    ([*DUMP, "--config", "flat_config.json"], 2, "must be a section"),
    ([*DUMP, "--config", "seed_config.json"], 2, "seed must be an integer of 0 or more, got -1"),
    ([*DUMP, "--config", "device_config.json"], 2, "device must be a string"),
    ([*DUMP, "--config", "list_config.json"], 2, "expected a section for each command"),
    ([*DUMP, "--config", "text_config.json"], 2, "dump must be a section"),
    ([*DUMP, "--config", "typo.toml"], 2, "topp"),
    ([*DUMP, "--config", "broken.toml"], 2, "broken.toml cannot be read"),
    ([*DUMP, "--config", "broken_config.json"], 2, "broken_config.json cannot be read"),
    ([*DUMP, "--config", "binary.toml"], 2, "binary.toml cannot be read"),
    ([*DUMP, "--config", "absent.json"], 2, "absent.json: no such file"),
    ([*DUMP, "--config", "images"], 2, "expected a .toml, .yaml or .json file"),
    (["info", "dets.json"], 3, "dets.json: not a readable safetensors file"),
    (["info", "images"], 3, "images"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "status", "message"), BEFORE_THE_DETECTOR,
    ids=[f"{n}-{row[2][:24]}" for n, row in enumerate(BEFORE_THE_DETECTOR)],
)  # fmt: skip
def test_it_is_refused_before_the_detector_is_built(home, capsys, words, status, message):
    files = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    code, out, err = run(capsys, *words)
    assert (code, message in err) == (status, True), err
    assert out == ""
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == files
    code, out, err = run(capsys, *words, "--json")
    assert (code, json.loads(out or "{}").get("exit", status)) == (status, status)


def test_a_tag_in_a_config_runs_nothing(home, capsys):
    needs_package("yaml", install="pip install pyyaml")
    code, out, err = run(capsys, *DUMP, "--config", "tag.yaml")
    assert (code, "tag.yaml cannot be read" in err, out) == (2, True, "")
    assert not (home / "ran").exists()


# The same, where only the detector can say it.
WITH_THE_DETECTOR: list[tuple[list[str], int, str]] = [
    (changed(TRAIN, detector="mine.py:unknown_ids"), 3, "share no category"),
    (changed(TRAIN, ann="empty_class.json", detector="mine.py:detector"), 0, ""),
    (changed(TRAIN, detector="mine.py:nothing"), 3, "No adapter for a detector of type builtins.NoneType"),
    (changed(TRAIN, detector="mine.py:absent"), 3, "has no function 'absent'"),
    (changed(TRAIN, detector="mine.py:leaves"), 1, "exit(0)"),
    (changed(DUMP, detector="mine.py:leaves"), 1, "exit(0)"),
    (changed(DUMP, detector="mine.py:leaves_later"), 1, "exit(0)"),
    (changed(RESCORE, detector="mine.py:leaves_later"), 1, "exit(0)"),
    (changed(RESCORE, detector="mine.py:other"), 3, "trained on the detector ToyDetector"),
    (changed(RESCORE, head="foreign.safetensors"), 3, "made for 1 levels of (8,) channels"),
    (changed(RESCORE, detector="mine.py:unknown_ids"), 3, "share no category"),
    (changed(DUMP, detector="mine.py:unknown_ids"), 3, "share no category"),
    ([*changed(TRAIN, o="damaged"), "--resume"], 3, "last.pt is damaged"),
    ([*changed(TRAIN, o="pickled"), "--resume"], 3, "last.pt is damaged"),
    (changed(DUMP, detector="mine.py:interrupted_at_once"), 130, "out.json was not written, and nothing is kept."),
    (changed(DUMP, detector="mine.py:interrupted"), 130, "1 of 4 images are kept in out.json.partial. The same"),
    ([*changed(DUMP, detector="mine.py:interrupted"), "--cache", "c"], 130, "the images done are kept in c"),
    (changed(RESCORE, detector="mine.py:interrupted"), 130, "1 of 4 images are kept in out.json.partial. The same"),
    (changed(TRAIN, detector="mine.py:interrupted"), 130, "--resume goes on there"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "status", "message"), WITH_THE_DETECTOR,
    ids=[f"{n}-{row[2][:24]}" for n, row in enumerate(WITH_THE_DETECTOR)],
)  # fmt: skip
def test_it_is_refused_with_the_reason(home, capsys, words, status, message):
    code, _, err = run(capsys, *words)
    if words[0] == "train" and "empty_class.json" in words:  # the one category that the toy knows has objects there
        assert (code, "share no category" in err) in ((0, False), (3, False)), err
        return
    assert (code, message in err) == (status, True), err
    later = any(word in ("mine.py:interrupted", "mine.py:leaves_later") for word in words) and words[0] != "train"
    assert [path.name for path in home.glob("out*")] == ["out.json.partial"] * later
    assert ("images are kept in out.json.partial" in err) == later  # as it says
    assert not list(home.glob("*.tmp"))
    assert not (home / "ran").exists()
    if "--cache" in words:
        assert len(list((home / "c").glob("*.safetensors"))) == 1  # as it says


def test_resume_with_another_width_is_refused_by_name(home, capsys):
    assert run(capsys, *TRAIN)[0] == 0
    before = Path("new/last.pt").read_bytes()
    code, _, err = run(capsys, *TRAIN[: TRAIN.index("--width")], *TRAIN[TRAIN.index("--hidden") :], "--resume")
    assert (code, "made with another width" in err) == (3, True), err
    code, _, err = run(capsys, *TRAIN, "--hidden", "5", "--resume")
    assert (code, "made with another hidden" in err) == (3, True), err
    assert Path("new/last.pt").read_bytes() == before


def test_a_disk_that_is_full_or_read_only_is_said_with_the_cure(home, capsys, monkeypatch):
    for number, cure in ((errno.ENOSPC, "The disk is full"), (errno.EROFS, "name an output in another folder")):

        def full(*names: Any, number: int = number) -> None:
            raise OSError(number, os.strerror(number), str(names[-1]))

        monkeypatch.setattr(os, "replace", full)
        for words in (DUMP, RESCORE, TRAIN):
            code, _, err = run(capsys, *words)
            assert (code, cure in err) == (3, True), err
            assert not list(home.rglob("*.tmp"))
        assert [path.name for path in home.glob("out*")] == ["out.json.partial"]
        assert ("4 of 4 images are kept in out.json.partial" in err) == (words is not TRAIN)


def test_a_hard_link_to_an_input_is_an_input(home, capsys):
    for source, link in (("ann.json", "link.json"), ("images/1.png", "picture.json")):
        os.link(source, link)
        code, _, err = run(capsys, *changed(DUMP, o=link), "--overwrite")
        assert (code, "is also an input" in err) == (2, True), err
    os.link("ann.json", "x.json.config.json")  # what would be written beside the output
    assert run(capsys, *changed(DUMP, o="x.json"), "--overwrite")[0] == 2
    Path("new").mkdir()
    os.link("ann.json", "new/metrics.jsonl")
    assert run(capsys, *TRAIN, "--overwrite")[0] == 2


@pytest.mark.parametrize("command", [DUMP, RESCORE, TRAIN], ids=["dump", "rescore", "train"])
def test_json_is_alone_on_stdout_whatever_a_detector_prints(home, command):
    done = subprocess.run(
        [sys.executable, "-m", "iou_refiner", *changed(command, detector="mine.py:prints"), "--json"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))
    assert "output" in value
    for line in ("loading weights", "from C", "progress 1/4"):
        assert line in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_keeps_what_it_says(home, capsys):
    # A run in the background of a shell ignores Ctrl-C, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "iou_refiner", *changed(DUMP, detector="mine.py:slow")],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    until = time.monotonic() + 60
    while not Path("slow").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in err
    said = re.search(r"Interrupted\. out\.json was not written; (\d) of 4 images are kept in out\.json\.partial\.", err)
    if said is None:  # before the first image was through
        assert "Interrupted. out.json was not written, and nothing is kept." in err
        assert not list(home.glob("out*"))
    else:
        code, _, err = run(capsys, *changed(DUMP, detector="mine.py:slow"))
        assert (code, f"resuming after {said[1]} of 4 images" in err) == (0, True), err


def test_nothing_in_gives_nothing_out(home, capsys):
    code, out, _ = run(capsys, "rescore", "none.json", *RESCORE[2:], "--json")
    assert code == 0
    assert json.loads(out)["records"] == 0
    assert json.loads(Path("out.json").read_text()) == []


def test_annotations_are_not_needed_where_they_are_not_used(home, capsys):
    assert run(capsys, *changed(DUMP, ann="image_info.json"))[0] == 0
    assert run(capsys, *changed(RESCORE, ann="image_info.json", o="b.json"))[0] == 0


def test_yaml_without_its_reader_is_5(home, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    code, _, err = run(capsys, *DUMP, "--config", "some.yaml")
    assert (code, "pip install pyyaml" in err) == (5, True)


def test_the_saved_config_keeps_seed_and_device(home, capsys):
    assert run(capsys, *DUMP, "--seed", "7", "--device", "cpu")[0] == 0
    saved = json.loads(Path("out.json.config.json").read_text())
    assert (saved["seed"], saved["device"]) == (7, "cpu")
    assert run(capsys, "dump", "--config", "out.json.config.json", "-o", "b.json")[0] == 0
    assert json.loads(Path("b.json.config.json").read_text())["seed"] == 7
    assert run(capsys, "dump", "--config", "out.json.config.json", "-o", "c.json", "--seed", "8")[0] == 0
    assert json.loads(Path("c.json.config.json").read_text())["seed"] == 8


def test_messages_name_an_install_for_a_checkout_too(home, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    Path("some.onnx").write_bytes(b"")
    code, _, err = run(capsys, *changed(DUMP, detector="onnx:some.onnx"))
    assert code == 5
    assert 'pip install -e ".[onnx]"' in err
    assert 'pip install "iou-refiner[onnx]"' in err


# ---- Every record is accounted for. ----

_number = st.floats(-50, 120) | st.sampled_from([0.0, -0.0, 1e30, 1e300, -1e300, 5e-324])
_record = st.fixed_dictionaries(
    {"image_id": st.integers(1, 4), "category_id": st.just(1), "bbox": st.lists(_number, min_size=4, max_size=4),
     "score": st.floats(0, 1) | st.sampled_from([-1.0, 1e300, 90.0, 0.5])}
)  # fmt: skip


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(_record, max_size=12), preset=st.sampled_from(["recommended", "paper", "detector_only"]))
def test_what_comes_in_goes_out_or_is_counted(home, capsys, records, preset):
    Path("wild.json").write_text(json.dumps(records))
    words = ["rescore", "wild.json", *RESCORE[2:], "--overwrite", "--json", "--preset", preset]
    code, out, err = run(capsys, *words, "--no-check")
    assert code == 0, err
    counts = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    file = read_results("out.json")
    assert counts["candidates"] == len(records)
    assert counts["records"] == counts["detections"] == len(file)
    assert counts["suppressed"] >= 0
    assert counts["candidates"] == counts["detections"] + counts["suppressed"] + sum(counts["dropped"].values())
    wrong = any(not 0 <= row["score"] <= 1 or row["bbox"][2] < 0 or row["bbox"][3] < 0 for row in records)
    if wrong:  # what validate calls an error
        assert run(capsys, *words)[0] == 3


def test_dropped_records_are_named_by_their_reason(home, capsys):
    def record(*box: float, score: float = 0.5) -> dict[str, Any]:
        return {"image_id": 1, "category_id": 1, "bbox": box, "score": score}

    rows = [record(1, 1, 9, 9), record(200, 200, 9, 9), record(5, 5, 0, 3), record(30, 30, 1e300, 4)]
    rows += [record(40 + i, 40, 2, 2, score=0.1 + 0.01 * i) for i in range(6)]
    Path("some.json").write_text(json.dumps(rows))
    words = ["rescore", "some.json", *RESCORE[2:], "--no-check", "--nms", "none", "--final-nms", "none"]
    words += ["--regression-steps", "0", "--ascent-steps", "0", "--overwrite"]
    code, out, _ = run(capsys, *words, "--json")
    counts = json.loads(out)
    assert code == 0
    assert counts["dropped"]["empty"] == 1
    assert counts["dropped"]["outside the image"] == 1
    code, out, _ = run(capsys, *words, "--max-candidates", "7")
    assert "10 candidates in" in out
    assert "3 beyond max_candidates" in out


# ---- Categories that the head was not trained on. ----


def test_records_of_other_categories_keep_the_detectors_own_suppression(home, capsys):
    truth = json.loads(Path("ann.json").read_text())
    truth["categories"].append({"id": 2, "name": "other"})
    Path("two.json").write_text(json.dumps(truth))
    boxes = json.loads(Path("dets.json").read_text())
    others = [
        boxes[0] | {"category_id": 2, "bbox": [10.0 + shift, 10.0, 20.0, 20.0], "score": score}
        for shift, score in ((0, 0.8), (1, 0.7), (25, 0.25))
    ]
    Path("both.json").write_text(json.dumps([*boxes, *others]))
    words = ["rescore", "both.json", *changed(RESCORE, ann="two.json")[2:], "--json", "--overwrite"]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert json.loads(out)["untrained"] == 3
    assert err.count("was not trained on") == 1
    assert "--all-categories" in err
    file = read_results("out.json")
    left = file[file.category_id == 2]
    assert left.bbox.tolist() == [[10, 10, 20, 20], [35, 10, 20, 20]]
    assert left.score.tolist() == [0.8, 0.25]
    assert left.iou is not None
    assert (left.iou == 0).all()
    code, out, err = run(capsys, *words, "--all-categories")
    assert (code, json.loads(out)["untrained"], "not trained" in err) == (0, 0, False)
