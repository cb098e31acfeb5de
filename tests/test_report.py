"""The report: figures show what they say, and the page stands alone."""

from __future__ import annotations

import base64
import html.parser
import io
import math
import re

import numpy as np
import pytest

from verglas.cli.painters import Painters, painters_for
from verglas.errors import OutputError
from verglas.report import Curve, Histogram, KeyFigures, Orientations, Slices, Table, Text, write_report
from verglas.report.figures import (
    draw_curve,
    draw_histogram,
    last_above,
    onto_vertices,
    sphere_density,
    viewing_directions,
)
from verglas.report.page import Block, drawn_blocks, option_rows, provenance_rows, widen_lone_halves
from verglas.report.sections import Section
from verglas.report.slices import central_slices, draw_slices, grey_limits, grey_png

FACTS = {
    "command": "reconstruct",
    "command_line": "verglas reconstruct --out <dir>",
    "device": "cpu",
    "seed": 0,
    "seconds": 12.3,
    "finished": "2026-01-02T03:04:05+0000",
    "versions": {"verglas": "0.1.0"},
    "inputs": [{"path": "a.star", "bytes": 12345, "modified": "2026-01-02T03:04:05+0000"}],
    "options": {"sym": "D2", "max_resolution": None},
}


class Tags(html.parser.HTMLParser):
    """Counts open elements; HTML's void elements and SVG's self-closed ones do not stay open."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    rng = np.random.default_rng(0)
    x_S = np.arange(33) / 226.56
    sections = [
        KeyFigures("Key figures", {"resolution": {"value": 8.0914, "unit": "Å"}}),
        Curve("FSC", x_S, [np.linspace(1, 0, 33)], ["half-maps"], "Resolution (Å)", "FSC", (0.143,), True, True),
        Curve("FSC again", x_S, [np.linspace(1, 0, 33)], ["half-maps"], "Resolution (Å)", "FSC", (0.143,), True, True),
        Orientations("Views", np.linalg.qr(rng.normal(size=(50, 3, 3)))[0]),
        Slices("Slices", rng.normal(size=(16, 16, 16)), 3.54),
        Histogram("Defocus", np.array([1.0, 2.0, np.nan]), "Å"),
        Table("Groups", [["<one>", 300, 2.7]], ["name", "kV", "mm"]),
        Text("Note", "resolution at <b>0.143</b>"),
    ]
    write_report(path, "β-gal & friends", sections, FACTS)
    with pytest.raises(OutputError):
        write_report(path, "again", [], FACTS)
    return path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_stands_alone(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids)), "two figures share an id"
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert links and all(link.startswith(("#", "data:")) for link in links), "the page may load nothing"
    assert "<script" not in page and "@import" not in page and "url(http" not in page
    assert not re.findall(r"#(0[1-9])\1\1\b", page), "a stand-in colour was not turned into a CSS variable"


def test_the_page_tells_figures_and_provenance(page: str) -> None:
    assert "β-gal &amp; friends" in page
    assert "8.091<small>Å</small>" in page
    assert "&lt;one&gt;" in page and "<b>0.143</b>" in page
    for fact in ("verglas reconstruct --out &lt;dir&gt;", "a.star", "12,345", "max_resolution", "not set"):
        assert fact in page, fact
    assert ("seed", "0") in provenance_rows(FACTS)


def test_grouped_options_stand_for_themselves() -> None:
    options = {"sym": None, "config": {"diameter": 150.0, "mask": None}, "weights": [1, 2]}
    assert option_rows(options) == [("sym", "not set"), ("diameter", "150.0"), ("mask", "not set"), ("weights", "1, 2")]


def test_crossing_is_the_last_point_before_the_curve_drops() -> None:
    fsc_S = np.array([0.0, 1.0, 0.9, 0.2, 0.1, 0.3])
    assert last_above(fsc_S, 0.143) == 3
    assert last_above(np.ones(5), 0.143) == 4
    x_S = np.arange(6) / 40.0
    drawn = draw_curve(Curve("FSC", x_S, [fsc_S], ["a"], "x", "y", (0.143,), True, True), "f")
    assert ">a, 13.3 Å<" in drawn  # 40 Å / 3


def test_slices_cut_through_the_centre() -> None:
    map_ZYX = np.zeros((8, 8, 8), np.float32)
    map_ZYX[4, 2, 3] = 1.0  # z is at the centre
    map_ZYX[1, 4, 6] = 2.0  # y is
    map_ZYX[7, 5, 4] = 3.0  # x is
    slices = dict(central_slices(map_ZYX))
    assert slices["xy"][2, 3] == 1 and slices["xz"][1, 6] == 2 and slices["yz"][7, 5] == 3
    assert dict(central_slices(map_ZYX, thickness=2))["xy"][2, 3] == 0.5


def test_a_drawn_slice_has_its_first_row_below_and_one_grey_scale() -> None:
    from PIL import Image

    slice_YX = np.zeros((32, 64), np.float32)
    slice_YX[:8, :16] = 1.0  # below, to the left
    grey_YX = np.asarray(Image.open(io.BytesIO(grey_png(slice_YX, -1.0, 3.0))))
    assert grey_YX.shape == (320, 640) and grey_YX.dtype == np.uint8
    assert (grey_YX[-40:, :120] == 128).all() and (grey_YX[:200] == 64).all() and (grey_YX[:, 300:] == 64).all()
    beyond_YX = np.asarray(Image.open(io.BytesIO(grey_png(8 * slice_YX - 4, -1.0, 3.0))))
    assert (beyond_YX[-40:, :120] == 255).all() and (beyond_YX[:200] == 0).all()


def test_slices_are_three_pictures_and_a_bar_of_a_round_length() -> None:
    map_ZYX = np.random.default_rng(0).normal(size=(40, 40, 40)).astype(np.float32)
    drawn = draw_slices(Slices("<Map>", map_ZYX, 2.0))
    pictures = [base64.b64decode(data) for data in re.findall(r'href="data:image/png;base64,([^"]+)"', drawn)]
    assert pictures == [grey_png(one, *grey_limits(map_ZYX)) for _, one in central_slices(map_ZYX)]
    assert re.findall(r">(xy|xz|yz|\d+ Å)<", drawn) == ["xy", "xz", "yz", "20 Å"]
    start, end = (float(re.search(rf'{name}="([\d.]+)"', drawn)[1]) for name in ("x1", "x2"))  # type: ignore[index]
    assert end - start == pytest.approx(220 / 4, abs=0.1)  # 20 of 80 Å
    assert "&lt;Map&gt;" in drawn and "var(--ink)" in drawn


def test_grey_limits_survive_an_empty_map() -> None:
    low, high = grey_limits(np.zeros((4, 4, 4)))
    assert low < high


def test_uniform_directions_have_density_one_everywhere() -> None:
    i = np.arange(20000) + 0.5  # Fibonacci sphere
    z, longitude = 1 - 2 * i / len(i), math.pi * (1 + math.sqrt(5)) * i
    view_B3 = np.stack([np.sqrt(1 - z**2) * np.cos(longitude), np.sqrt(1 - z**2) * np.sin(longitude), z], -1)
    density, width = sphere_density(view_B3)
    assert width == pytest.approx(4)
    assert abs(density - 1).max() < 0.05


def test_a_single_direction_is_a_peak_of_the_stated_width_in_its_place() -> None:
    view_B3 = np.tile([math.cos(0.5), math.sin(0.5), 0.0], (10, 1))
    density, width = sphere_density(view_B3)
    row, column = np.unravel_index(density.argmax(), density.shape)
    longitude = (column + 0.5) / density.shape[1] * 2 * math.pi - math.pi
    assert abs(longitude - 0.5) < 0.06 and row in (29, 30)
    # Mean of exp((cos a - 1) / s^2) over the sphere is s^2 (1 - exp(-2 / s^2)) / 2.
    s = math.radians(width)
    assert density.max() == pytest.approx(2 / s**2, rel=0.05)


def test_poles_of_the_drawing() -> None:
    view_B3 = np.tile([0.0, 0.0, 1.0], (10, 1))
    _, latitude, shown = onto_vertices(sphere_density(view_B3)[0])
    assert latitude[-1] == math.pi / 2 and shown[-1].min() > 0.98 * shown.max() and shown[0].max() < 1e-6
    assert np.allclose(shown[:, 0], shown[:, -1])


def test_viewing_direction_is_row_two_and_symmetry_turns_it() -> None:
    rotation_B33 = np.array([[[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]])
    half_turn = np.diag([-1.0, -1.0, 1.0])
    views = viewing_directions(rotation_B33, np.stack([np.eye(3), half_turn]))
    assert np.allclose(views, [[1, 0, 0], [-1, 0, 0]])


def test_blocks_without_a_neighbour_are_widened() -> None:
    def halves(text: str) -> str:
        blocks = widen_lone_halves([Block("", "", "", letter == "h") for letter in text])
        return "".join("h" if block.half else "w" for block in blocks)

    assert [halves(text) for text in ("hh", "h", "hwh", "hhh", "whhw")] == ["hh", "w", "www", "hhw", "whhw"]


@pytest.mark.parametrize("values", [[], [3.0, 3.0], [1.0, 1.0 + 1e-16, 1.0 - 1e-16], [math.nan, 2.0]])
def test_a_histogram_of_values_that_are_all_alike_is_drawn(values: list[float]) -> None:
    assert "<svg" in draw_histogram(Histogram("Pmax", np.array(values), ""), "one")


def some_sections() -> list[tuple[str, Section]]:
    lines = [Curve(f"curve {i}", np.arange(5), [np.arange(5.0) + i], [""], "iteration", "y") for i in range(4)]
    sections = [Text("first", "text"), *lines, Histogram("last", np.linspace(0, 1, 30), "Pmax")]
    return [(f"figure{i}", one) for i, one in enumerate(sections)]


def test_other_processes_draw_the_same() -> None:
    sections = some_sections()
    here = drawn_blocks(sections)
    with Painters(2) as painters:
        assert painters.draw(sections) == here
        assert painters.draw(sections[:1]) == here[:1]  # less than one section each
    assert [process.poll() is None for process in painters._processes] == [False, False]


def test_a_page_is_drawn_although_a_painter_has_died(capsys: pytest.CaptureFixture[str]) -> None:
    sections = some_sections()
    with Painters(2) as painters:
        painters._processes[1].kill()
        painters._processes[1].wait()
        assert painters.draw(sections) == drawn_blocks(sections)
    assert "it is drawn here" in capsys.readouterr().err


@pytest.mark.parametrize("cores, count", [(1, 1), (4, 2), (8, 4), (16, 6), (128, 6)])
def test_painters_leave_the_cores_to_the_run(cores: int, count: int) -> None:
    assert painters_for(cores) == count
