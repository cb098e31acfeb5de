"""The model that chooses the form of a shared transform: fitted, kept, asked; what it counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from verglas.core.rows import packed_sphere
from verglas.distributed.ranks import ALONE, Ranks
from verglas.distributed.ways import FORMS, Ways
from verglas.errors import InputError
from verglas.maximization import transform_probes
from verglas.maximization.slabs import Slabs
from verglas.maximization.transform_costs import WAYS, Costs, Shape, features, fitted
from verglas.maximization.transform_probes import cache_file, costs_here, form_for, read, write

SHAPES = [Shape(box, 2 * box, radius, box, 4, 2 * radius**3) for box, radius in ((32, 32), (64, 40), (64, 64), (128, 128))]
CPU = torch.device("cpu")


def costs(link: float, latency: float = 1e-4, rate: float = 1e9) -> Costs:
    """A machine whose link sends so many bytes a second."""
    return Costs({way: {form: [latency, 1 / rate, 1 / link] for form in FORMS} for way in WAYS})


def test_the_fit_finds_a_machine_that_is_like_the_model() -> None:
    truth = costs(1e9)
    found = fitted([(s, way, form, truth.seconds(s, way, form)) for s in SHAPES for way in WAYS for form in FORMS])
    unseen = Shape(90, 180, 77, 90, 4, 2 * 77**3)
    for way in WAYS:
        assert found.choice(unseen, way) == truth.choice(unseen, way)
        for form in FORMS:
            assert found.seconds(unseen, way, form) == pytest.approx(truth.seconds(unseen, way, form), rel=1e-6)
            assert min(found.coefficients[way][form]) >= 0


def test_a_slow_link_asks_for_what_sends_least_and_a_quick_one_for_what_does_least() -> None:
    two = Shape(256, 512, 256, 256, 2, int(2.1 * 256**3))
    assert costs(1e15).choice(two) == "transposed" == costs(1e15).choice(replace(two, ranks=8))
    assert costs(1e6).choice(two) == "stride"  # two ranks send less of a real map than of complex lines
    assert costs(1e6).choice(replace(two, ranks=8)) == "transposed"
    assert costs(1e15).choice(two, "from map") == "transposed" and costs(1e6).choice(two, "from map") == "replicated"
    least = min(two.workspace(form, 4) for form in FORMS)
    assert costs(1e6).choice(two, room=least) == "transposed" == costs(1e6).choice(two, room=0)


def test_a_rank_alone_sends_nothing_and_ranks_divide_the_work() -> None:
    one, four = (Shape(64, 128, 64, 64, ranks, 2 * 64**3) for ranks in (1, 4))
    for form in FORMS:
        assert set(one.sent_bytes(form, 4).values()) == {0.0} and one.collected_bytes(form) == 0
        assert features(one, "to map", form, 4)[1] == pytest.approx(one.work("transposed", "to map"))
    assert four.work("transposed", "to map") == pytest.approx(one.work("transposed", "to map") / 4)
    assert four.work("transposed", "to map") < four.work("stride", "to map") < four.work("replicated", "to map")
    assert four.workspace("transposed", 4) == pytest.approx(one.workspace("transposed", 4) / 4)


def test_lines_are_those_that_hold_voxels() -> None:
    shape = Shape(20, 30, 11, 20, 2, 0)
    axis = torch.arange(-11, 12)
    r2 = axis[:, None] ** 2 + torch.arange(12) ** 2
    assert shape.lines(False) == int((r2 < 121).sum()) and shape.lines(True) == int((r2 <= 121).sum())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(transform_probes, "_known", {})
    return tmp_path


def test_figures_are_kept_and_asked_for_by_machine(cache: Path) -> None:
    assert read("one") is None
    write("one", costs(1e9))
    write("two", costs(1e6))
    assert read("one") == costs(1e9) and read("two") == costs(1e6) and read("three") is None
    cache_file().write_text(json.dumps({"format": 0, "one": {}}))
    assert read("one") is None
    cache_file().write_text("not JSON")
    write("one", costs(1e9))
    assert read("one") == costs(1e9)
    cache_file().unlink()
    cache_file().mkdir()
    write("one", costs(1e9))  # cannot be kept: done without
    assert read("one") is None


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    write("one", costs(1e9))
    assert read("one") is None


def test_a_machine_is_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(ranks: Ranks, device: torch.device) -> list[object]:
        asked.append(1)
        truth = costs(1e6)
        return [(s, way, form, truth.seconds(s, way, form)) for s in SHAPES for way in WAYS for form in FORMS]

    monkeypatch.setattr(transform_probes, "measured", measured)
    first = costs_here(ALONE, CPU)
    monkeypatch.setattr(transform_probes, "_known", {})  # another process
    assert costs_here(ALONE, CPU) == first and len(asked) == 1


def test_small_boxes_are_not_worth_a_probe_and_the_environment_decides(cache: Path) -> None:
    slabs = Slabs.of(packed_sphere(20.0), 2.0, 20, ALONE)
    assert slabs is not None and form_for(slabs, 20, 40, 20) == "transposed" and not cache_file().exists()
    told = Slabs.of(packed_sphere(20.0), 2.0, 20, replace(ALONE, ways=Ways.of({"VERGLAS_TRANSFORM": "stride"})))
    assert told is not None and form_for(told, 200, 400, 200) == "stride"
    with pytest.raises(InputError, match="VERGLAS_TRANSFORM"):
        Ways.of({"VERGLAS_TRANSFORM": "1"})
