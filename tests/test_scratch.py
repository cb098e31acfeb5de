"""Images copied to a disk of the host, and what is left of that; who opens which files."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.test_ranks import command, simulated, together  # noqa: F401  simulated: a fixture
from tests.test_streaming import shuffled

from verglas.cli.job import job_of_run
from verglas.cli.refine_run import RefineJob
from verglas.distributed.ranks import Ranks
from verglas.distributed.scratch import Scratch, check_space, remove_left_behind
from verglas.errors import InputError
from verglas.refinement.config import RefineConfig
from verglas.refinement.dataset import Dataset
from verglas.refinement.residency import Residency

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int16, np.uint16])
def test_images_are_read_from_their_copies(tmp_path: Path, dtype: type) -> None:
    table, expected = shuffled(tmp_path, dtype)
    data = Dataset.read(table, "cpu", Residency("disk", None, 2560).copied_to(tmp_path / "scratch"))
    copies = list((tmp_path / "scratch").glob("*/*.images"))
    assert len(copies) == 1
    for path in tmp_path.glob("*.mrcs"):
        path.unlink()  # whatever is read now is a copy
    rows = torch.from_numpy(np.random.default_rng(3).permutation(len(table)))
    for part in rows.split(7):
        assert np.array_equal(data.images_of(part, 0).float().numpy(), expected[part.numpy()].astype(np.float32))
    del data
    gc.collect()
    assert not list((tmp_path / "scratch").iterdir()), "the copies are gone with what was read from them"


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_needs_stays(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path; from verglas.distributed.scratch import Scratch; "
        f"s = Scratch(Path({str(tmp_path)!r})); (s.path / 'x').write_text('x'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert len(list(tmp_path.glob("*/x"))) == 1
    mine = Scratch(tmp_path)
    assert list(tmp_path.iterdir()) == [mine.path]
    remove_left_behind(tmp_path)
    assert mine.path.exists()
    mine.remove()
    assert not list(tmp_path.iterdir())


END = """
import sys
from pathlib import Path
from verglas.cli import main as cli
from verglas.distributed.scratch import Scratch
from verglas.errors import InputError
def run(arguments):
    scratch = Scratch(Path(arguments[0]))
    (scratch.path / "group1.images").write_text("x")
    kept.append(scratch)
    raise InputError("a file", "wrong")
kept, cli._dispatch = [], run
cli.sys.modules["verglas.distributed.meeting"] = type("Met", (), {"part": staticmethod(lambda code: True)})
sys.exit(cli.process())
"""


def test_a_rank_that_ends_with_an_error_leaves_no_copies(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", END, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "a file: wrong" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_refused_for_all_ranks_of_a_host_together(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 3_000_000_000))
    check_space(tmp_path, 2_500_000_000, Ranks())
    monkeypatch.setattr(Ranks, "everyones", lambda self, value, name: [value, value, ("elsewhere", 10**12)])
    with pytest.raises(InputError, match=r"3 GB free in .* expected 5.1 GB for the images of its 2 ranks"):
        check_space(tmp_path, 2_500_000_000, Ranks())


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--scratch"):
        Scratch(tmp_path / "file" / "folder")


def test_a_run_from_before_there_was_scratch_goes_on(tmp_path: Path) -> None:
    job = RefineJob(particles=tmp_path / "a.star", reference=tmp_path / "a.mrc", config=RefineConfig(diameter=100), out=tmp_path)
    options = json.loads(json.dumps(asdict(job), default=str))
    del options["scratch"]
    (tmp_path / "config.json").write_text(json.dumps({"command": "refine", "options": options}))
    assert job_of_run(RefineJob, tmp_path, "auto", None) == job
    del options["reference"]
    (tmp_path / "config.json").write_text(json.dumps({"command": "refine", "options": options}))
    with pytest.raises(InputError, match="cannot be understood"):
        job_of_run(RefineJob, tmp_path, "auto", None)


SPY = """
import json, os, sys
opened, folder = set(), sys.argv[1]
sys.addaudithook(lambda event, words: opened.add(str(words[0])) if event == "open" and str(words[0]).startswith(folder) else None)
from verglas.cli.main import main
from verglas.refinement.dataset import Dataset
read, counted = Dataset.read.__func__, {"bytes": 0}
plain = os.preadv
def preadv(file, views, offset):
    count = plain(file, views, offset)
    counted["bytes"] += count
    return count
def spied(cls, *words, **named):
    before = counted["bytes"]
    data = read(cls, *words, **named)
    out = {"opened": sorted(opened), "bytes": counted["bytes"] - before}
    with open(os.path.join(sys.argv[2], os.environ["RANK"] + ".json"), "w") as file:
        json.dump(out, file)
    return data
os.preadv, Dataset.read = preadv, classmethod(spied)
sys.exit(main(sys.argv[3:]))
"""


def test_each_rank_opens_and_reads_its_share_alone(simulated: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two ranks, images copied to scratch: the lead alone reads STAR file, reference and headers; each reads half of the images
    twice, from their stack and from its copy."""
    (tmp_path / "spy.py").write_text(SPY)
    words = [*command("refine", simulated, tmp_path / "out"), "--scratch", str(tmp_path / "scratch")]
    words[words.index("--max-iterations") + 1] = "1"
    done = together([str(simulated), str(tmp_path), *words], start=[str(tmp_path / "spy.py")])
    assert done.returncode == 0, done.stderr[-6000:]
    lead, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert {"particles.star", "start.mrc"} <= {Path(path).name for path in lead["opened"]}
    assert {Path(path).suffix for path in other["opened"]} == {".mrcs"}
    half = sum(path.stat().st_size - 1024 for path in simulated.glob("**/*.mrcs")) // 2
    assert other["bytes"] == 2 * half
    assert not list((tmp_path / "scratch").iterdir())
