"""Pictures of maps: the surface is where the density says, seen from the stated side, lit; montages keep their order."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from matplotlib.image import imread

from verglas.report import Pictures
from verglas.report.page import block
from verglas.report.pictures import MONTAGE_EDGE, map_picture, montage, png, projections, shown
from verglas.report.surface import first_crossing, resized, surface_level, surface_views, view, without_dust


def ball(box: int, centre_xyz: tuple[float, float, float], radius: float, edge: float = 2.0) -> np.ndarray:
    axis = np.arange(box) - box // 2
    x, y, z = centre_xyz
    distance = np.sqrt((axis[:, None, None] - z) ** 2 + (axis[:, None] - y) ** 2 + (axis - x) ** 2)
    return (1 / (1 + np.exp((distance - radius) / (edge / 4)))).astype(np.float32)


def centre_of(opacity_YX: np.ndarray) -> tuple[float, float]:
    """(right, up) of what is opaque, as a share of half the width."""
    row, column = np.nonzero(opacity_YX)
    half = len(opacity_YX) / 2
    return column.mean() / half - 1, 1 - row.mean() / half


def test_views_look_from_the_stated_sides() -> None:
    views = np.array_split(surface_views(ball(32, (8, -6, 4), 4)), 3, axis=1)
    share = {"x": 8 / 16, "y": -6 / 16, "z": 4 / 16}
    for one, (right, up) in zip(views, (("x", "y"), ("x", "z"), ("y", "z")), strict=True):
        assert centre_of(one[..., 3]) == pytest.approx((share[right], share[up]), abs=0.04)


def test_what_is_nearer_hides_what_is_behind() -> None:
    behind, front = ball(32, (0, 0, -9), 6), ball(32, (0, 0, 9), 3)
    both, near, far = (surface_views(one, 0.5)[:, :192].astype(int) for one in (behind + front, front, behind))
    middle = slice(84, 108)
    assert np.abs(both - near)[middle, middle].mean() < 4 < 20 < np.abs(both - far)[middle, middle].mean()
    assert (both[..., 3] > 0).sum() > 2 * (near[..., 3] > 0).sum()


def test_the_size_of_a_ball_and_its_light() -> None:
    picture = np.array_split(surface_views(ball(64, (0, 0, 0), 20), 0.5), 3, axis=1)[0]
    radius = np.sqrt((picture[..., 3] > 0).sum() / np.pi) * 64 / len(picture)
    assert radius == pytest.approx(20, abs=0.3)
    brightness = picture[..., :3].sum(-1).astype(int)
    quarter = len(picture) // 2 - len(picture) // 8, len(picture) // 2 + len(picture) // 8
    assert brightness[quarter[0], quarter[0]] > 1.5 * brightness[quarter[1], quarter[1]]  # the lamp is at the upper left


def test_depth_lies_between_voxels() -> None:
    map_DYX = np.zeros((8, 2, 2), np.float32)
    map_DYX[4:, 0, 0] = 1.0
    depth_YX, hit_YX = first_crossing(map_DYX, 0.25)
    assert depth_YX[0, 0] == pytest.approx(3.25) and hit_YX.tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("box", [15, 16, 50, 192, 500])
def test_resizing_keeps_values(box: int) -> None:
    level = resized(np.full((box, box, box), 3.0, np.float32))
    assert level.shape == (192, 192, 192) and np.abs(level - 3).max() < 1e-4


def test_dust_goes_and_empty_maps_give_empty_pictures() -> None:
    map_ZYX = ball(48, (0, 0, 0), 12) + ball(48, (18, 0, 0), 2)
    kept = without_dust(map_ZYX, 0.5)
    assert kept[24, 24, 42] <= 0.5 < kept[24, 24, 24]
    assert not surface_views(np.zeros((16, 16, 16), np.float32))[..., 3].any()
    assert not view(np.zeros((4, 4, 4), np.float32), 1.0).any()


def test_level_is_between_solvent_and_particle() -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, (48, 48, 48)).astype(np.float32)
    assert 0.3 < surface_level(ball(48, (0, 0, 0), 10) + noise) < 0.7


def test_projections_and_montage_are_in_order_and_upright() -> None:
    map_ZYX = np.zeros((4, 4, 4), np.float32)
    map_ZYX[1, 2, 3] = 1.0
    assert [tuple(np.argwhere(one)[0]) for one in projections(map_ZYX)] == [(2, 3), (1, 3), (1, 2)]
    image_BYX = np.zeros((3, 16, 16), np.float32)
    for i in range(3):
        image_BYX[i, 12:, 4 * i : 4 * i + 4] = 1.0  # at the top, further right each
    page = montage(image_BYX, 2)
    step = page.shape[0] - MONTAGE_EDGE
    for i in range(3):
        top, left = step * (i // 2), step * (i % 2)
        row, column = np.nonzero(page[top : top + MONTAGE_EDGE, left : left + MONTAGE_EDGE, 0] > 200)
        assert row.mean() < 0.25 * MONTAGE_EDGE and column.mean() == pytest.approx((4 * i + 2) * MONTAGE_EDGE / 16, abs=2)
    assert not page[-1, -1].any()  # nothing stands in the last place
    assert shown(np.zeros((300, 300)), 128).shape == (128, 128, 4)


def test_a_picture_of_a_map_is_quick_and_stands_on_the_page() -> None:
    map_ZYX = ball(128, (0, 0, 0), 30)
    map_picture(map_ZYX)
    start = time.process_time()
    picture = map_picture(map_ZYX)
    assert time.process_time() - start < 3.0  # about 1 s
    assert np.array_equal((imread(io.BytesIO(png(picture))) * 255).round().astype(np.uint8), picture)
    body = block(Pictures("Maps", {"a <map>": picture}), "figure0").body
    assert "a &lt;map&gt;" in body and 'src="data:image/png;base64,' in body
