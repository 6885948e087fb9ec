"""The command line as a user meets it: real commands on real files, their output, exit codes and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from iou_refiner import HeadConfig, TrainSettings, __version__
from iou_refiner.coco import Results, read_results, write_results, xywh_to_xyxy
from iou_refiner.pooling import portable
from iou_refiner.stage.nms import nms
from iou_refiner.validation.nms_trace import suppressed_at
from tests.kit import fixtures
from tests.kit.paths import ROOT
from tests.kit.toys import make_dataset

DATA = ("--detector", "mine.py:detector", "--ann", "images/annotation.json", "--images", "images")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A data set, a detector named by a file, and a trained head: what a user has after `train`."""
    folder = tmp_path_factory.mktemp("cli")
    make_dataset(folder / "images", 8)
    (folder / "mine.py").write_text(
        textwrap.dedent(f"""
        from tests.kit.toys import make_dataset

        def detector():
            return make_dataset(__import__("pathlib").Path({str(folder / "again")!r}), 8)[1]
        """)
    )
    return folder


run = fixtures.run


@pytest.fixture(scope="module")
def trained(home) -> Path:
    settings = ("--epochs", "8", "--lr", "3e-3", "--width", "4", "--hidden", "16", "--boxes-per-image", "24")
    subprocess.run(
        [sys.executable, "-m", "iou_refiner", "train", *DATA, "-o", "run", *settings, "--val-ann", DATA[3]],
        cwd=home, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return home / "run" / "head.safetensors"


class TestSurface:
    def test_help_is_fast_and_names_every_command(self, run):
        status, out, _ = run("--help")
        assert status == 0
        for command in ("demo", "doctor", "validate", "dump", "train", "rescore", "eval", "info"):
            assert f" {command} " in out
        for command in ("dump", "train", "rescore", "eval"):
            assert run(command, "--help")[0] == 0

    def test_version(self, run):
        assert run("--version")[1].strip() == __version__

    def test_the_module_runs_too(self, home):
        done = subprocess.run(
            [sys.executable, "-m", "iou_refiner", "--version"], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == __version__

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("trian",), 'Did you mean "train"'),
            (("dump", *DATA, "-o", "x.json", "--topp", "3"), "--topp"),
            (("dump",), "--detector"),
            (("rescore",), "DETECTIONS"),
        ],
    )
    def test_wrong_words_are_usage_errors(self, run, words, message):
        status, out, err = run(*words)
        assert status == 2
        assert message.lower() in err.lower()
        assert out == ""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("train", "--levels", "0"), "`levels` must be a finite number above 0, got 0"),
            (("train", "--levels", "many"), "--levels"),
            (("train", "--hidden", "0"), "`hidden` must be"),
            (("train", "--objective", "l2"), "--objective"),
            (("train", "--epochs", "0"), "`epochs` must be"),
            (("train", "--lr", "-1"), "`lr` must be"),
            (("train", "--jitter-min-iou", "2"), "`jitter_min_iou` must lie in [0.02, 1], got 2.0"),
            (("train", "--candidate-share", "1.5"), "`candidate_share` must lie in [0, 1], got 1.5"),
            (("rescore", "--nms-threshold", "2"), "`nms_threshold` must lie in [0, 1], got 2.0"),
            (("rescore", "--nms", "gready"), 'Did you mean "greedy"'),
            (("rescore", "--preset", "papers"), 'Did you mean "paper"'),
            (("rescore", "--ascent-steps", "-1"), "`ascent_steps` must be 0 or more, got -1"),
            (("rescore", "--max-detections", "0"), "`max_detections` must be"),
            (("dump", "--top", "0"), "--top"),
            (("eval", "--max-dets", "0"), "--max-dets"),
            (("eval", "--bootstrap", "-1"), "--bootstrap"),
            (("validate", "--max-examples", "-1"), "--max-examples"),
            (("doctor", "--seed", "-1"), "--seed"),
            (("train", "--epochs", "1.5"), "--epochs: expected a whole number, got 1.5"),
            (("train", "--hidden", "16", "--hidden", "8.0"), "--hidden: expected a whole number, got 8.0"),
            (("rescore", "--ascent-steps", "2.5"), "--ascent-steps: expected a whole number, got 2.5"),
            (("dump", "--top", "3.0"), "--top: expected a whole number, got 3.0"),
            (("eval", "--bootstrap", "1.5"), "--bootstrap: expected a whole number, got 1.5"),
            (("eval", "--max-dets", "1e2"), "--max-dets"),
            (("validate", "--max-examples", ".5"), "--max-examples: expected a whole number, got .5"),
        ],
    )
    def test_wrong_values_are_usage_errors_that_name_the_option_or_the_setting(self, run, trained, words, message):
        command, *option = words
        rest = {
            "train": [*DATA, "-o", "wrong"],
            "rescore": ["dets.json", "--head", trained, *DATA, "-o", "wrong.json"],
            "dump": [*DATA, "-o", "wrong.json"],
            "eval": ["dets.json", "--ann", DATA[3]],
            "validate": ["dets.json"],
            "doctor": [],
        }[command]
        status, out, err = run(command, *rest, *option)
        assert status == 2
        assert message in err
        assert out == ""
        assert not list(Path().glob("wrong*"))

    def test_errors_are_json_too_if_asked(self, run):
        status, out, _ = run("info", "nothing.safetensors", "--json")
        assert status == 3
        assert json.loads(out)["exit"] == 3

    def test_what_nobody_expected_ends_with_1_and_a_traceback_only_if_asked(self, run, monkeypatch):
        monkeypatch.setattr("iou_refiner.cli.doctor.examine", lambda: 1 / 0)
        status, _, err = run("doctor")
        assert status == 1
        assert "ZeroDivisionError" in err
        assert "Traceback" not in err
        assert "Traceback" in run("doctor", "-v")[2]

    def test_interrupted_is_130(self, run, monkeypatch):
        def interrupt() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("iou_refiner.cli.doctor.examine", interrupt)
        assert run("doctor")[0] == 130

    def test_a_missing_package_is_5_with_the_pip_line(self, run, monkeypatch, home):
        monkeypatch.chdir(home)
        (home / "some.onnx").write_bytes(b"")
        monkeypatch.setitem(sys.modules, "onnx", None)
        status, _, err = run("dump", "--detector", "onnx:some.onnx", *DATA[2:], "-o", "x.json")
        assert status == 5
        assert 'pip install "iou-refiner[onnx]"' in err


class TestDoctor:
    def test_it_finds_this_machine_well(self, run):
        status, out, _ = run("doctor", "--json")
        found = json.loads(out)
        assert status == 0
        assert found["ok"]
        assert found["pooling"]["cpu"] == "portable: right"
        assert found["versions"]["iou-refiner"] == __version__

    def test_it_notices_wrong_pooling(self, run, monkeypatch):
        right = portable.forward_saving
        monkeypatch.setattr(portable, "forward_saving", lambda *a: (right(*a)[0] + 0.01, right(*a)[1]))
        status, out, _ = run("doctor")
        assert status == 1
        assert "wrong by 0.01" in out


class TestThreeJobs:
    def test_dump_train_rescore_eval(self, run, home, trained):
        status, out, _ = run("dump", *DATA, "-o", "dets.json", "--json")
        assert status == 0
        assert json.loads(out)["records"] == len(read_results("dets.json"))
        status, out, err = run("rescore", "dets.json", "--head", trained, *DATA, "-o", "better.json")
        assert status == 0
        assert "8 images" in out
        assert err == ""
        better = read_results("better.json")
        assert better.iou is not None
        words = ("--ann", "images/annotation.json", "--baseline", "dets.json", "--json", "--bootstrap", "50")
        status, out, _ = run("eval", "better.json", *words)
        comparison = json.loads(out)
        assert status == 0
        assert comparison["after"]["metrics"]["AP"] > comparison["before"]["metrics"]["AP"]
        status, out, _ = run("eval", "better.json", "--ann", "images/annotation.json")
        assert status == 0
        assert "AP50" in out

    def test_presets_are_settings_of_the_stage(self, run, home, trained):
        run("dump", *DATA, "-o", "preset.json", "--overwrite")
        refined = {}
        for name in ("paper", "detector_only"):
            words = ("--head", trained, *DATA, "-o", f"{name}.json", "--preset", name, "--json")
            status, out, err = run("rescore", "preset.json", *words)
            assert status == 0, err
            refined[name] = json.loads(out)["refined"]
        assert refined["paper"] > 0 == refined["detector_only"]
        assert Path("paper.json").read_bytes() != Path("detector_only.json").read_bytes()
        # The detector alone is greedy NMS, image by image and class by class.
        candidates, alone = read_results("preset.json"), read_results("detector_only.json")
        for image, rows in candidates.by_image().items():
            boxes = torch.from_numpy(xywh_to_xyxy(candidates.bbox[rows])).float()
            keep = nms(boxes, torch.from_numpy(candidates.score[rows]).float(), torch.ones(len(rows)), threshold=0.5)
            expected, ours = candidates[rows[keep.numpy()]], alone[alone.by_image()[image]]
            np.testing.assert_allclose(ours.bbox, expected.bbox, rtol=0, atol=0.0101)
            np.testing.assert_allclose(ours.score, expected.score, rtol=0, atol=2e-6)
        # Options exchange single settings of a preset.
        words = ("--head", trained, *DATA, "-o", "changed.json", "--preset", "paper", "--ascent-steps", "0")
        assert "refined" not in run("rescore", "preset.json", *words)[1]

    def test_the_saved_config_gives_the_same_bytes_again(self, run, trained, home):
        run("dump", *DATA, "-o", "a.json", "--overwrite")
        changes = ("--preset", "paper", "--ascent-steps", "3", "--nms", "greedy", "--score-alpha", "0.25")
        run("rescore", "a.json", "--head", trained, *DATA, "-o", "b.json", *changes)
        first, saved = Path("b.json").read_bytes(), Path("b.json.config.json").read_bytes()
        config = json.loads(saved)["rescore"]
        options = {"preset": "paper", "ascent-steps": 3, "nms": "greedy", "score-alpha": 0.25}
        assert {name: config[name] for name in options} == options
        assert not {"rank-by", "nms-threshold", "min-gain"} & config.keys()  # what was not given is left to the preset
        status, _, err = run("rescore", "--config", "b.json.config.json", "--overwrite")
        assert status == 0, err
        assert Path("b.json").read_bytes() == first
        saved_again = json.loads(Path("b.json.config.json").read_bytes())["rescore"]
        assert saved_again == config | {"overwrite": True}

    def test_the_saved_config_trains_the_same_bytes_again(self, run, home):
        changes = ("--epochs", "1", "--views", "1", "--width", "2", "--hidden", "8", "--hidden", "6", "--no-ranking")
        status, _, err = run(
            "train", *DATA, "-o", "first", *changes, "--jitter-min-iou", "0.3", "--objective", "smooth_l1"
        )
        assert status == 0, err
        config = json.loads(Path("first/head.safetensors.config.json").read_text())
        options = {"hidden": [8, 6], "ranking": False, "deltas": True, "jitter-min-iou": 0.3, "objective": "smooth_l1"}
        assert {name: config["train"][name] for name in options} == options
        # All settings are there, side by side, as options are.
        assert {name.replace("_", "-") for name in [*asdict(HeadConfig()), *asdict(TrainSettings())]} <= config[
            "train"
        ].keys()
        status, _, err = run("train", "--config", "first/head.safetensors.config.json", "-o", "second")
        assert status == 0, err
        first, second = (Path(name, "head.safetensors").read_bytes() for name in ("first", "second"))
        assert first == second
        again = json.loads(Path("second/head.safetensors.config.json").read_text())
        assert again["train"] == config["train"] | {"output-dir": "second"}

    def test_a_typo_in_a_config_is_named(self, run, home):
        Path("typo.toml").write_text("[dump]\ntopp = 3\n")
        status, _, err = run("dump", *DATA, "-o", "never.json", "--config", "typo.toml")
        assert status == 2
        assert "topp" in err
        assert not Path("never.json").exists()

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("absent.toml", None, "--config absent.toml: no such file"),
            ("config.ini", "", "--config config.ini: expected a .toml, .yaml or .json file"),
            ("wrong.json", '{"train": {"levels": 0}}', "`levels` must be a finite number above 0, got 0"),
            ("wrong.toml", "[train]\nepochs = 'many'\n", "epochs"),
            ("half.toml", "[train]\nepochs = 1.5\n", "epochs]: expected a whole number, got 1.5"),
            ("half.json", '{"train": {"hidden": [8, 4.5]}}', "hidden]: expected a whole number, got 4.5"),
        ],
    )
    def test_a_config_that_cannot_be_used_is_a_usage_error(self, run, home, name, content, message):
        if content is not None:
            Path(name).write_text(content)
        status, _, err = run("train", *DATA, "-o", "never", "--config", name)
        assert status == 2
        assert message in err
        assert not Path("never").exists()

    def test_environment_variables_set_options(self, run, home, monkeypatch):
        monkeypatch.setenv("IOU_REFINER_DUMP_TOP", "2")
        run("dump", *DATA, "-o", "two.json")
        assert len(read_results("two.json")) == 16
        monkeypatch.setenv("IOU_REFINER_DUMP_TOP", "2.5")
        status, _, err = run("dump", *DATA, "-o", "half.json")
        assert (status, "IOU_REFINER_DUMP_TOP: expected a whole number, got 2.5" in err) == (2, True)
        assert run("dump", *DATA, "-o", "three.json", "--top", "3")[0] == 0  # the command line comes first

    def test_the_head_describes_itself(self, run, trained):
        status, out, _ = run("info", trained, "--json")
        about = json.loads(out)
        assert status == 0
        assert about.keys() == {
            "architecture", "siblings", "detector", "training", "metrics", "recommended", "categories", "trials",
        }  # fmt: skip
        assert about["architecture"]["width"] == 4
        assert about["architecture"]["channels"] == [4, 4]
        assert about["siblings"]["attention_heads"] == 4
        assert about["detector"]["name"] == "ToyDetector"
        assert about["training"]["epochs"] == 8
        assert "pearson" in about["metrics"]
        assert {frozenset(trial) for trial in about["trials"]} == {frozenset([*about["recommended"], "AP", "AP50"])}
        assert about["categories"] == [{"id": 1, "name": "rectangle", "label": 1}]
        text = run("info", trained)[1]
        for line in ("width: 4", "1: rectangle (label 1)", "trials on val, AP and AP50", "sibling_move 0.75"):
            assert line in text

    def test_a_file_already_suppressed_is_pointed_out(self, run, trained, home):
        # Pairs of boxes whose overlaps pile up below .5, with none above: what NMS at .5 leaves.
        image = np.repeat(np.arange(1, 9), 8)
        pair = np.tile(np.repeat(np.arange(4), 2), 8)
        shift = np.tile([0.0, 1.0], 32) * np.repeat(np.linspace(8.1, 9.5, 32), 2)
        bbox = np.stack([2 + shift, 2.0 + 15 * pair, np.full(64, 24.0), np.full(64, 14.0)], 1)
        results = Results(image, np.ones(64, np.int64), bbox, np.linspace(0.01, 0.9, 64))
        assert suppressed_at(results) == pytest.approx(0.495, abs=0.01)
        write_results("nmsed.json", results)
        status, _, err = run("rescore", "nmsed.json", "--head", trained, *DATA, "-o", "n.json", "--nms", "iou_guided")
        assert status == 0
        assert "already NMS-ed at about 0.5" in err
        assert "iou-refiner dump" in err


class TestNothingIsLost:
    def test_an_input_is_never_the_output(self, run, trained, home):
        run("dump", *DATA, "-o", "keep.json", "--overwrite")
        before = Path("keep.json").read_bytes()
        status, _, err = run("rescore", "keep.json", "--head", trained, *DATA, "-o", "./keep.json", "--overwrite")
        assert status == 2
        assert "is also an input" in err
        assert Path("keep.json").read_bytes() == before

    def test_an_output_that_exists_is_kept_unless_told(self, run, home):
        Path("there.json").write_text("precious")
        status, _, err = run("dump", *DATA, "-o", "there.json")
        assert status == 2
        assert "--overwrite" in err
        assert Path("there.json").read_text() == "precious"
        assert run("dump", *DATA, "-o", "there.json", "--overwrite")[0] == 0

    def test_a_trained_head_is_kept_unless_told(self, run, trained):
        status, _, err = run("train", *DATA, "-o", "run")
        assert status == 2
        assert "holds a head already" in err

    def test_a_failing_command_leaves_no_output(self, run, trained, home):
        Path("bad.json").write_text('[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": "0.9"}]')
        status, _, err = run("rescore", "bad.json", "--head", trained, *DATA, "-o", "none.json")
        assert status == 3
        assert "record 1" in err
        assert not list(Path().glob("none.json*"))


class TestGates:
    def test_a_missed_gate_is_4(self, run, home):
        run("dump", *DATA, "-o", "gate.json", "--overwrite")
        words = ("eval", "gate.json", "--ann", "images/annotation.json", "--fail-under")
        assert run(*words, "AP=0.0")[0] == 0
        status, _, err = run(*words, "AP=0.99")
        assert status == 4
        assert "Gate missed: AP is" in err
        assert run(*words, "AQ=0.5")[0] == 2
        assert run(*words, "+AP=0")[0] == 2
        assert run(*words, "AP")[0] == 2

    def test_validate_by_exit_code(self, run, home):
        run("dump", *DATA, "-o", "valid.json", "--overwrite")
        assert run("validate", "valid.json", "--ann", "images/annotation.json")[0] == 0
        Path("nan.json").write_text('[{"image_id": 1, "category_id": 1, "bbox": [NaN, 2, 3, 4], "score": 0.9}]')
        status, out, _ = run("validate", "nan.json")
        assert status == 3
        assert "E103" in out
        assert run("eval", "nan.json", "--ann", "images/annotation.json")[0] == 3


def test_validate_and_help_never_wait_for_torch(home):
    (home / "few.json").write_text("[]")
    for words in (["--help"], ["validate", "few.json"], ["rescore", "--help"]):
        code = (
            f"import sys\nfrom iou_refiner.cli import main\ntry:\n    main({words!r})\n"
            "finally:\n    assert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
