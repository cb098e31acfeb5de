"""Iterations that are shorter than writing their files take: which of them have a checkpoint."""

from __future__ import annotations

from made_up_engine import LAST
from test_cli_refine import data, engine, no_report, refine  # noqa: F401
from verglas.cli import run_loop
from verglas.cli.behind import Behind
from verglas.cli.main import main
from verglas.refinement import checkpoint


def test_short_iterations_have_a_checkpoint_now_and_then(engine, no_report, data, tmp_path, monkeypatch):  # noqa: F811
    """Where the next one waits for its files; they go on from it and end the same."""
    saved, plain = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, *rest, **more: (saved.append(path.name), plain(path, *rest, **more)))
    assert refine(data, tmp_path / "whole") == 0
    every = [checkpoint.path_of(tmp_path, number).name for number in range(1, LAST)]
    assert saved == every
    monkeypatch.setattr(Behind, "waiting", 1)
    saved.clear()
    assert refine(data, tmp_path / "short") == 0 and saved == every[:1]
    monkeypatch.setattr(run_loop, "CHECKPOINT_EVERY", 0.0)
    saved.clear()
    engine.stop = 3
    assert refine(data, tmp_path / "stopped") == 130
    (tmp_path / "stopped" / saved[-1]).unlink()
    engine.stop = None
    assert main(["refine", "--continue", str(tmp_path / "stopped"), "--device", "cpu"]) == 0
    names = {path.name for path in (tmp_path / "whole").glob("run*.mrc")}
    for out in (tmp_path / "short", tmp_path / "stopped"):
        assert {path.name for path in out.glob("run*.mrc")} == names
        for name in names:  # the header of a map holds the date
            assert (out / name).read_bytes()[1024:] == (tmp_path / "whole" / name).read_bytes()[1024:]
