"""Commands of the command line, killed at random moments and run again: nothing may be lost, and no byte differ.

    python -m scripts.soak --minutes 10 [--seed 0]

Every command is run once undisturbed, on toys of the tests. Then commands drawn from the seed are killed, some with a
second process on the same feature cache, and run again to the end. What they leave must be whole after every kill, and
at the end equal to what the undisturbed run left, with nothing beside it; an interrupted run must have said how many
images it keeps, and the next one must go on from there. Exit code 1 where it is not so; the files stay then.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from scripts.paths import ROOT

IMAGES, SECONDS, SIGNALS = 16, 0.2, (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# As slow as a real detector, so that kills fall between images, not only into the start of Python.
DETECTOR = f"""
import os, tempfile, time
from pathlib import Path
from tests.kit.toys import ToyDetector, make_dataset

def detector():
    with tempfile.TemporaryDirectory() as folder:
        made = make_dataset(Path(folder), {IMAGES})[1]
    forward = ToyDetector.forward
    def slow(self, images):
        Path(os.environ["BEGAN"]).touch()
        time.sleep({SECONDS} * len(images))
        return forward(self, images)
    ToyDetector.forward = slow
    return made
"""
DATA = ["--detector", "mine.py:detector", "--ann", "images/annotation.json", "--images", "images"]
TRAIN = ["--epochs", "4", "--views", "2", "--width", "4", "--hidden", "16", "--boxes-per-image", "24"]
RESCORE = ["rescore", "reference/dump/out.json", "--head", "reference/train/out/head.safetensors", *DATA]


class Kind(NamedTuple):
    """A command: its words, with folders OUT and CACHE, how often it is drawn, and the file that is compared."""

    words: list[str]
    weight: int
    again: tuple[str, ...] = ("--overwrite",)
    file: str = "stdout"


# In an order in which the undisturbed runs can use each other's files.
KINDS = {
    "dump": Kind(["dump", *DATA, "-o", "OUT/out.json"], 2, file="out.json"),
    "dump, cached": Kind(["dump", *DATA, "-o", "OUT/out.json", "--cache", "CACHE"], 4, file="out.json"),
    "train": Kind(["train", *DATA, *TRAIN, "-o", "OUT/out"], 4, ("--resume",), "out/head.safetensors"),
    "rescore": Kind([*RESCORE, "-o", "OUT/out.json"], 2, file="out.json"),
    "rescore, cached": Kind([*RESCORE, "-o", "OUT/out.json.gz", "--cache", "CACHE"], 4, file="out.json.gz"),
    "eval": Kind(["eval", "reference/dump/out.json", "--ann", "images/annotation.json", "--json"], 1, ()),
    "validate": Kind(["validate", "reference/dump/out.json", "--ann", "images/annotation.json", "--json"], 1, ()),
}


class Job(NamedTuple):
    """What the seed decides of one command: by what it is killed, and when.

    A kill falls into the images, at a share of the time that they take, or before them, at a share of the whole time.
    """

    number: int
    kind: str
    kills: tuple[tuple[bool, float, signal.Signals], ...]
    beside: bool
    fresh_cache: bool


def plan(seed: int) -> Iterator[Job]:
    """Jobs without end; the same seed gives the same."""
    rng, names = random.Random(seed), list(KINDS)
    for number in range(10**9):
        kind = rng.choices(names, [KINDS[name].weight for name in names])[0]
        count = rng.choice((1, 1, 2, 3))
        kills = tuple((rng.random() < 0.8, rng.uniform(0.1, 1.0), rng.choice(SIGNALS)) for _ in range(count))
        beside = "cached" in kind and rng.random() < 0.5
        yield Job(number, kind, kills, beside, rng.random() < 0.5)


class Soak:
    """A folder with images, what the undisturbed runs left in it, and what was counted."""

    def __init__(self, folder: Path):
        self.folder, self.seconds = folder, dict.fromkeys(KINDS, 0.0)
        self.reference: dict[str, bytes] = {}
        self.counts = {what: Counter[str]() for what in ("commands", "kills", "resumed", "differing bytes")}
        self.faults: list[str] = []
        from tests.kit.toys import make_dataset

        make_dataset(folder / "images", IMAGES)
        (folder / "mine.py").write_text(DETECTOR)

    def start(self, kind: str, out: str, cache: str = "cache", again: bool = False) -> subprocess.Popen[bytes]:
        (self.folder / out).mkdir(parents=True, exist_ok=True)
        words = [word.replace("OUT", out).replace("CACHE", cache) for word in KINDS[kind].words]
        words += KINDS[kind].again if again else ()
        began = self.folder / out / "began"
        began.unlink(missing_ok=True)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "BEGAN": str(began)}
        self.counts["commands"][kind] += 1
        with (self.folder / out / "stdout").open("wb") as stdout, (self.folder / out / "stderr").open("wb") as stderr:
            command = [sys.executable, "-m", "iou_refiner", *words]
            return subprocess.Popen(command, cwd=self.folder, env=env, stdout=stdout, stderr=stderr)

    def finish(self, process: subprocess.Popen[bytes], kind: str, out: str) -> None:
        if process.wait() != 0:
            said = (self.folder / out / "stderr").read_text()[-600:]
            self.faults.append(f"{kind} in {out} ended with {process.returncode}: {said}")

    def undisturbed(self, kind: str) -> None:
        """Run a command once and check what it left; the time it takes is the length of the disturbed runs."""
        began, out = time.perf_counter(), f"reference/{kind.replace(', ', '-')}"
        self.finish(self.start(kind, out, cache=f"{out}/cache"), kind, out)
        self.seconds[kind] = time.perf_counter() - began
        if self.faults:
            raise SystemExit("\n".join(self.faults))
        self.check_whole(kind, out)
        self.reference[kind] = (self.folder / out / KINDS[kind].file).read_bytes()

    def check_whole(self, kind: str, out: str) -> None:
        """Whatever lies at its place must be whole, also after a kill."""
        from iou_refiner.head.checkpoint import load_head
        from iou_refiner.validation.validate import validate

        for path in [*self.folder.glob(f"{out}/*.*"), *self.folder.glob(f"{out}/out/*.*")]:
            try:
                if path.suffix == ".safetensors":
                    load_head(path)
                elif path.name.endswith((".jsonl", ".config.json")):
                    text = path.read_text()
                    _ = [json.loads(part) for part in (text.splitlines() if path.suffix == ".jsonl" else [text])]
                elif path.name.startswith("out.json") and path.suffix not in (".tmp", ".partial"):
                    assert validate(path, self.folder / "images" / "annotation.json").ok, "validate finds errors"
            except Exception as error:
                self.faults.append(f"{kind}: {path} is not whole ({error})")

    def run(self, job: Job) -> None:
        """A command, killed as the job says and run to the end, if need be beside another on the same cache."""
        kind, out, others = job.kind, f"run/{job.number}", [f"run/{job.number}-beside"] * job.beside
        if job.fresh_cache:
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
        beside = [self.start(kind, other) for other in others]
        for index, kill in enumerate(job.kills):
            self.counts["kills"][kind] += self.killed(kind, out, *kill, again=index > 0)
        promised, went_on = self.said(out, r"(\d+) of \d+ images are kept"), r"resuming after (\d+) of"
        epochs = (self.folder / out / "out" / "last.pt").exists()
        for process, each in zip([self.start(kind, out, again=True), *beside], [out, *others], strict=True):
            self.finish(process, kind, each)
            if each == out:
                images = self.said(out, went_on)
                self.counts["resumed"][kind] += images > 0 or epochs
                if promised and images != promised:
                    self.faults.append(f"{kind}: {promised} images were to be kept in {out}, and {images} were there")
            self.compare(kind, each)

    def said(self, out: str, pattern: str) -> int:
        """The number that the last command in a folder named on stderr; 0 for none."""
        match = re.search(pattern, (self.folder / out / "stderr").read_text())
        return int(match[1]) if match else 0

    def killed(self, kind: str, out: str, late: bool, share: float, number: signal.Signals, *, again: bool) -> bool:
        """Start a command and kill it; False where it was through before."""
        process = self.start(kind, out, again=again)
        late = late and kind not in ("eval", "validate")  # which have no images
        while late and process.poll() is None and not (self.folder / out / "began").exists():
            time.sleep(0.01)
        try:
            process.wait(timeout=share * (IMAGES * SECONDS if late else self.seconds[kind]))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        ended = process.wait()
        if ended not in (0, -number, 130, 143):
            self.faults.append(f"{kind} in {out} ended with {ended} by {number.name}")
        self.check_whole(kind, out)
        return ended != 0

    def compare(self, kind: str, out: str) -> None:
        path, expected = self.folder / out / KINDS[kind].file, self.reference[kind]
        ours = path.read_bytes() if path.exists() else b""
        differing = sum(a != b for a, b in zip(ours, expected, strict=False)) + abs(len(ours) - len(expected))
        if differing:
            self.counts["differing bytes"][kind] += differing
            self.faults.append(f"{kind}: {differing} bytes of {path} differ")
        if stale := [path.name for path in path.parent.glob("*.partial")]:
            self.faults.append(f"{kind}: {', '.join(stale)} in {out} is left")
        if not self.faults:
            shutil.rmtree(self.folder / out)

    def report(self) -> None:
        print(f"{'':18}" + "".join(f"{what:>17}" for what in self.counts))
        for kind in (*KINDS, "all"):
            counts = [counter.total() if kind == "all" else counter[kind] for counter in self.counts.values()]
            print(f"{kind:18}" + "".join(f"{count:17,}" for count in counts))
        print(
            *self.faults,
            f"The files are in {self.folder}" if self.faults else "Nothing is lost, no byte differs.",
            sep="\n",
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    soak = Soak(folder)
    for kind in KINDS:
        soak.undisturbed(kind)
        print(f"{kind}: {soak.seconds[kind]:.1f} s undisturbed", flush=True)
    said = time.monotonic()
    end = said + 60 * options.minutes
    for job in plan(options.seed):
        soak.run(job)
        if time.monotonic() > end:
            break
        if time.monotonic() - said > 30:
            said = time.monotonic()
            counted = ", ".join(f"{counter.total():,} {what}" for what, counter in soak.counts.items())
            print(f"{end - said:5.0f} s left: {counted}, {len(soak.faults)} faults", flush=True)
    soak.report()
    if not soak.faults:
        shutil.rmtree(folder)
    return bool(soak.faults)


if __name__ == "__main__":
    sys.exit(main())
