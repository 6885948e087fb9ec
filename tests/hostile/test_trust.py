"""Nothing that a user names as data runs code; what could execute data is listed in docs/trust.md, and only that."""

from __future__ import annotations

import ast
import logging
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from iou_refiner import DataError, cli
from iou_refiner.adapters.weights import TRUST, read_arrays, tensors_only
from iou_refiner.cli.app import app
from tests.hostile.attacks import ATTACKS, Attack, Place, make_place, payloads, tags
from tests.kit.needs import needs_package
from tests.kit.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")  # of frameworks, which warn of much that is not the matter here


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The working directory; what a command in this process sets for all is set back."""
    monkeypatch.setattr(logging, "raiseExceptions", False)  # frameworks log to streams of tests before
    monkeypatch.setattr(app, "config", app.config)
    made = make_place(tmp_path / "place")
    monkeypatch.chdir(made.folder)
    monkeypatch.delenv(TRUST, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return made


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_nothing_in_a_file_runs(
    attack: Attack, place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    for name, value in attack.env.items():
        monkeypatch.setenv(name, value)
    words = attack.make(place)
    capfd.readouterr()
    with pytest.raises(SystemExit) as done:
        cli.main(words)
    said = "".join(capfd.readouterr())
    assert not place.marker.exists()
    assert done.value.code in (attack.code if isinstance(attack.code, tuple) else (attack.code,)), said
    assert "Traceback" not in said
    assert [word for word in attack.says if word not in said] == [], said


def test_there_are_many_attacks():
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 40


@pytest.mark.parametrize("kind", payloads(Path("x")))
def test_a_payload_works_where_it_is_run(kind: str, place: Place):
    pickle.loads(pickle.dumps(payloads(place.marker)[kind]))
    assert place.marker.exists()


@pytest.mark.parametrize("kind", tags(Path("x")))
def test_a_tag_works_where_it_is_run(kind: str, place: Place):
    needs_package("yaml").unsafe_load(tags(place.marker)[kind])
    assert place.marker.exists()


# --- the flag --------------------------------------------------------------------------------------------------------


def test_the_flag_runs_what_it_says(place: Place, monkeypatch: pytest.MonkeyPatch):
    torch.save(payloads(place.marker)["os.system"], "w.pth")
    with pytest.raises(DataError, match=r"'w\.pth' hold more than tensors: posix\.system\."), tensors_only("w.pth"):
        torch.load("w.pth")
    assert not place.marker.exists()
    monkeypatch.setenv(TRUST, "1")
    with tensors_only("w.pth"):
        torch.load("w.pth")
    assert place.marker.exists()


@pytest.mark.parametrize("value", ["0", "", "no", "false", "anything"])
def test_only_a_plain_yes_sets_the_flag(value: str, place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(TRUST, value)
    torch.save(payloads(place.marker)["os.system"], "w.pth")
    with pytest.raises(DataError), tensors_only("w.pth"):
        torch.load("w.pth", weights_only=False)  # as some frameworks ask
    assert not place.marker.exists()


def test_torchs_own_variables_are_left_as_they_were(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(payloads(place.marker)["os.system"], "w.pth")
    with pytest.raises(DataError), tensors_only("w.pth"):
        torch.load("w.pth")
    assert not place.marker.exists()
    torch.load("w.pth")
    assert place.marker.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_arrays_are_read_whole(protocol: int, tmp_path: Path):
    shared = np.arange(6, dtype=">f4").reshape(2, 3)
    saved = {
        "model": {
            "a": shared, "b": shared, "columns": np.asfortranarray(np.ones((3, 2), np.float16)),
            "text": np.array(["x"]), "one": np.float64(0.25), "none": np.zeros((0, 4)),
        },
        "__author__": "me", "list": [1, (2.5, None)], "bytes": b"\xff\x00",
    }  # fmt: skip
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps(saved, protocol=protocol))
    read = read_arrays(str(path), "w.pkl")
    assert {name: value for name, value in read.items() if name != "model"} == {
        name: value for name, value in saved.items() if name != "model"
    }
    for name, value in saved["model"].items():
        np.testing.assert_array_equal(read["model"][name], value)
        assert read["model"][name].dtype == value.dtype
        assert read["model"][name].shape == value.shape


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        b"\x80\x04r\xff\xff\xff\x7fN.",
        b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
        b"\x80\x09N.",
    ],
)
def test_a_damaged_pickle_is_refused_in_words(content: bytes, tmp_path: Path):
    (tmp_path / "w.pkl").write_bytes(content)
    with pytest.raises(DataError, match=r"'w\.pkl' cannot be read"):
        read_arrays(str(tmp_path / "w.pkl"), "w.pkl")


# --- what could execute data, and that it is all listed ---------------------------------------------------------------

# Calls by the name at their end, and modules by their name.
CALLS = {
    "eval", "exec", "compile", "__import__", "import_module", "spec_from_file_location", "exec_module", "entry_points",
    "system", "popen", "Popen", "check_call", "check_output", "run_path", "run_module", "dlopen", "CDLL", "fromfile",
    "merge_from_file", "load_yaml_with_base", "from_pretrained", "get_model", "load_state_dict_from_url", "compose",
    "InferenceSession", "load_model_from_string", "load_external_data_for_model", "init_detector", "load_checkpoint",
    "unsafe_load", "full_load", "RawModule", "RawKernel", "load_module", "build_model", "register_custom_ops_library",
}  # fmt: skip
OF_A_MODULE = {"torch.load", "pickle.load", "pickle.loads", "re.compile", "yaml.load", "np.load", "numpy.load"}
MODULES = {"pickle", "yaml", "subprocess", "runpy", "marshal", "shelve", "ctypes", "importlib", "joblib", "dill", "imp"}
HARMLESS = {"re.compile", "torch.compile"}


def name_of(node: ast.expr) -> str:
    """``a.b.c`` of an expression, also with calls in between."""
    if isinstance(node, ast.Call):
        return name_of(node.func)
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def places(tree: ast.AST) -> set[str]:
    """What of a file could run, import or look up what a string says."""
    result: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            result |= {f"import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in MODULES:
            result |= {f"import {node.module}"}
        elif isinstance(node, ast.ClassDef):
            result |= {name_of(base) for base in node.bases if name_of(base).startswith("pickle.")}
        elif isinstance(node, ast.Call):
            name = name_of(node.func)
            last = name.split(".")[-1]
            if name in HARMLESS or (last == "eval" and "." in name):  # a module's inference mode
                continue
            if name in OF_A_MODULE or last in CALLS:
                result.add(name if name in OF_A_MODULE else last)
            elif last == "load" and not node.args and not node.keywords:  # of an entry point
                result.add("load")
            elif last in ("getattr", "setattr", "__setattr__") and not isinstance(node.args[1], ast.Constant):
                result.add(last)
    return result


def listed() -> set[tuple[str, str]]:
    """The rows of the table of docs/trust.md: a file, and what it does."""
    text = (ROOT / "docs" / "trust.md").read_text()
    rows = re.findall(r"^\| `([\w/.]+\.py)` \| ((?:`[^`]+`(?:, )?)+) \| \S.* \|$", text, re.MULTILINE)
    return {(file, what) for file, names in rows for what in re.findall(r"`([^`]+)`", names)}


def test_the_table_of_the_document_is_all_there_is():
    files = [path for folder in ("iou_refiner", "adapters") for path in sorted((ROOT / folder).rglob("*.py"))]
    scanned = {(str(path.relative_to(ROOT)), what) for path in files for what in places(ast.parse(path.read_text()))}
    assert scanned - listed() == set(), "not in docs/trust.md"
    assert listed() - scanned == set(), "in docs/trust.md, and no longer in the code"


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("eval(x)", "eval"),
        ("import pickle", "import pickle"),
        ("from pickle import load", "import pickle"),
        ("import torch\ntorch.load(x)", "torch.load"),
        ("import os\nos.system(x)", "system"),
        ("getattr(a, name)", "getattr"),
        ("point.load()", "load"),
        ("library('a').Config.fromfile(x)", "fromfile"),
        ("class A(pickle.Unpickler): pass", "pickle.Unpickler"),
    ],
)
def test_the_scan_can_fail(code: str, what: str):
    assert what in places(ast.parse(code))


def test_the_scan_passes_over_what_is_harmless():
    assert places(ast.parse("re.compile('x')\nmodel.eval()\ngetattr(a, 'b')\nstore.load(3)")) == set()


def test_remote_code_is_never_trusted():
    for path in (ROOT / "adapters").rglob("*.py"):
        assert not re.search(r"trust_remote_code\W{1,4}True|register_custom_ops_library", path.read_text())
