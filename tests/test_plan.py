"""The plan of a refinement: counts equal to the engine's, memory that grows as it must, refusals with a setting that fits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from verglas.cli.main import main
from verglas.core.fourier import half_plane_pixels
from verglas.core.memory import size_text
from verglas.core.rows import packed_sphere
from verglas.errors import InputError
from verglas.expectation.sampling import OffsetGrid, OrientationGrid
from verglas.projection.volume import padded_size
from verglas.refinement.config import Classify2dConfig, ClassifyConfig, RefineConfig
from verglas.refinement.plan import RunPlan, plan
from verglas.refinement.plan_ranks import plans_up_to
from verglas.refinement.plan_sizes import Machine, Problem, all_sizes, half_plane_count, padded_edge, sphere_count
from verglas.refinement.schedule import coarse_size, initial_schedule

GB = 1e9
SMALL = Problem(1391, 64, 3.54)
EMPIAR_10028 = Problem(105_247, 360, 1.34)
SMALL_GPU = Machine("cuda", 20 * GB, 7 * GB)
CPU, H100 = Machine("cpu", 20 * GB, cores=2), Machine("cuda", 100 * GB, 80 * GB)


def config(**changes) -> RefineConfig:
    return RefineConfig(**{"diameter": 200.0, "symmetry": "D2"} | changes)


def of_iterations(made: RunPlan) -> float:
    """Seconds without start and reading."""
    return sum(one.times * sum(one.seconds.values()) for one in made.iterations)


@pytest.mark.parametrize("radius", [1, 2, 7, 16, 31, 57])
def test_coefficients_are_those_of_the_engine(radius):
    assert half_plane_count(radius) == half_plane_pixels(128, radius).count


@pytest.mark.parametrize("radius", [8.0, 32.0, 64.0, 180.0])
def test_voxels_are_those_of_the_engine(radius):
    assert sphere_count(radius) == pytest.approx(packed_sphere(radius).count, rel=0.02)


def test_grids_are_those_of_the_engine():
    first, last_global = (
        next(s for s in all_sizes(SMALL, config()) if (s.kind, s.order) == ("global", order)) for order in (2, 3)
    )
    for sizes in (first, last_global):
        grid = OrientationGrid.build(sizes.order, 1, "D2")
        assert sizes.orientations == pytest.approx(grid.count, rel=0.05)
        schedule = replace(initial_schedule(config(), 3.54), healpix_order=sizes.order)
        assert 2 * sizes.coarse_radius == coarse_size(schedule, config(), 64, 3.54, 2 * sizes.radius)
    assert first.offsets == OffsetGrid.build(5 * 3.54, 2 * 3.54, 1).count
    assert padded_edge(90, 1.5) == padded_size(90, 1.5) and padded_edge(64, 2.0) == 128


def test_kinds_of_iteration_follow_the_options():
    assert [(s.kind, s.order) for s in all_sizes(SMALL, config())] == [
        ("correlation", 2), ("blurred", 2), ("global", 2), ("global", 3), ("local", 4), ("local", 5), ("last", 6),
    ]  # fmt: skip
    kinds = [s.kind for s in all_sizes(SMALL, config(absolute_greyscale=True))]
    assert kinds[0] == "blurred" and "correlation" not in kinds
    assert all_sizes(SMALL, config())[-1].radius == 32  # the last iteration uses the whole box


def test_peak_is_the_sum_of_its_items_and_within_what_is_free():
    for problem, machine in ((SMALL, CPU), (Problem(5000, 128, 1.5), H100), (EMPIAR_10028, H100)):
        made = plan(problem, config(), machine)
        assert made.fits
        made.check()
        for where in made.places:
            for one in made.iterations:
                assert one.peak(where) == pytest.approx(sum(i.bytes for i in one.items if i.where == where))
            assert 0 < made.peak(where) <= machine.memory(where)
        assert all(seconds > 0 for one in made.iterations for seconds in one.seconds.values())


def test_memory_grows_with_particles_box_and_precision_as_it_must():
    base = plan(SMALL, config(), CPU)
    more = plan(replace(SMALL, n_particles=10 * 1391), config(), CPU)
    images = 9 * 1391 * 64**2 * 4
    assert more.peak("host") - base.peak("host") >= images
    half = plan(replace(SMALL, n_particles=10 * 1391, image_bytes=2), config(), CPU)
    assert more.peak("host") - half.peak("host") == pytest.approx(10 * 1391 * 64**2 * 2)
    double = plan(SMALL, config(precision="double"), CPU)
    sums = [{item.name: item.bytes for item in made.iterations[-1].items}["sums of all maps"] for made in (base, double)]
    assert sums[1] == 2 * sums[0]
    # Sums and maps of twice the box, one particle at a time: eight times as many voxels.
    items = [{i.name: i.bytes for i in plan(Problem(100, box, 1.5), config(), CPU).iterations[-1].items} for box in (128, 256)]
    assert items[1]["sums of all maps"] / items[0]["sums of all maps"] == pytest.approx(8, rel=0.05)
    assert items[1]["images"] == 4 * items[0]["images"]


@pytest.mark.parametrize(("machine", "limits"), [(CPU, (10.0, 2.5, 1e-4)), (H100, (60.0, 6.0, 1e-4))])
def test_batches_shrink_with_the_memory_but_never_vanish(machine, limits):
    many = replace(SMALL, n_particles=20_000)
    plans = [plan(many, config(memory_gb=m), machine) for m in limits]
    batches = [[one.batch for one in made.iterations] for made in plans]
    assert all(a >= b >= c for a, b, c in zip(*batches)) and batches[0] != batches[1]
    assert min(batches[2]) >= 1 and max(batches[0]) <= 10_000
    assert [made.fits for made in plans] == [True, True, False]
    where = machine.works_on
    assert plans[1].peak(where) <= limits[1] * GB < plans[0].peak(where)


def test_images_stay_where_they_fit_in_the_best_precision_that_fits():
    def residence(n: int, **changes) -> tuple[str, int]:
        made = plan(replace(EMPIAR_10028, n_particles=n), config(**changes), Machine("cuda", 300 * GB, 80 * GB))
        assert made.fits
        return made.residency.home, made.residency.image_bytes or made.problem.image_bytes

    assert residence(50_000) == ("device", 4)
    assert residence(150_000) == ("device", 2)  # 78 GB in single precision
    assert residence(150_000, precision="single") == ("host", 4)
    assert residence(400_000) == ("host", 4)
    assert residence(600_000) == ("disk", 4)  # 311 GB


def test_streamed_images_take_what_is_allowed_and_bound_the_batches():
    large = Problem(20_000, 128, 2.0)
    kept, read = (plan(large, config(image_memory_gb=limit), CPU) for limit in (1.4, 0.131))
    assert (kept.residency.home, read.residency.home) == ("device", "disk")
    assert "0.131 GB" in read.residency.reason and kept.peak("host") - read.peak("host") > 1.0 * GB
    images = {one.name: one.bytes for one in read.iterations[0].items}
    assert images["images read ahead"] == 0.131e9 and "images" not in images
    assert max(one.batch for one in read.iterations) * large.one_image * 2 <= 0.131e9
    assert all(one.seconds["wait"] >= 0 for one in read.iterations)
    device = plan(replace(EMPIAR_10028, image_bytes=2), config(image_memory_gb=5.0), H100)
    assert device.residency.home == "disk" and device.peak("host") < 10 * GB
    there = {(one.name, one.where): one.bytes for one in device.iterations[0].items}
    assert there["images read ahead", "device"] == there["images read ahead", "host"] == device.residency.budget


@pytest.mark.parametrize(
    ("problem", "changes", "machine", "advice"),
    [
        (Problem(5000, 128, 1.5), {"memory_gb": 1.2}, CPU, r"--memory ([\d.]+)"),
        (Problem(5000, 256, 1.0), {"precision": "double", "symmetry": "C1"}, SMALL_GPU, "--precision single"),
        (EMPIAR_10028, {"symmetry": "I1"}, replace(CPU, host_memory=12 * GB), r"verglas stack --box (\d+)"),
    ],
)
def test_what_cannot_fit_is_refused_with_a_setting_that_does(problem, changes, machine, advice):
    made = plan(problem, config(**changes), machine)
    assert not made.fits
    with pytest.raises(InputError, match=r"GB needed in '") as refused:
        made.check()
    found = re.search(advice, str(refused.value))
    assert found, refused.value
    if "--memory" in advice:
        changes = {"memory_gb": float(found[1].rstrip("."))}
    if "stack" in advice:
        box = int(found[1])
        problem = replace(problem, box=box, pixel_size=problem.pixel_size * problem.box / box)
    if "single" in advice:
        changes = changes | {"precision": "single"}
    assert plan(problem, config(**changes), machine).fits


def test_a_machine_without_memory_is_told_so():
    with pytest.raises(InputError, match="No setting of it fits here"):
        plan(SMALL, config(), Machine("cpu", 0.3 * GB)).check()


def test_command_prints_and_writes_the_plan(tmp_path: Path, capsys):
    target = tmp_path / "plan.json"
    call = ["plan", "--n", "5000", "--box", "128", "--apix", "1.5", "--diameter", "150", "--device", "cuda", "--out", str(target)]
    assert main([*call, "--device-memory", "80", "--host-memory", "100"]) == 0
    text = capsys.readouterr().out
    written = json.loads(target.read_text())
    assert "Memory of the device" in text and "global, order 3" in text
    assert written["fits"] and written["peak_bytes"]["device"] < 80e9 and len(written["iterations"]) == 7
    expected = plan(Problem(5000, 128, 1.5), RefineConfig(diameter=150.0), Machine("cuda", 100 * GB, 80 * GB))
    assert written["peak_bytes"]["device"] == pytest.approx(expected.peak("device"))


def test_command_takes_sizes_from_particles(tmp_path: Path, capsys):
    rows = "".join(f"{i + 1}@s.mrcs 1\n" for i in range(50))
    optics = "data_optics\nloop_\n_rlnOpticsGroup\n_rlnImagePixelSize\n_rlnImageSize\n1 2.5 96\n\n"
    (tmp_path / "p.star").write_text(f"{optics}data_particles\nloop_\n_rlnImageName\n_rlnOpticsGroup\n{rows}")
    target = tmp_path / "plan.json"
    call = ["plan", "--particles", str(tmp_path / "p.star"), "--diameter", "150", "--device", "cpu", "--out", str(target)]
    assert main(call) == 0
    written = json.loads(target.read_text())
    assert (written["particles"], written["box_px"], written["pixel_size_angstrom"]) == (50, 96, 2.5)


def test_command_is_told_how_images_are_stored(capsys):
    """Files tell it themselves; without them the plan is that of a run only if it knows."""
    call = ["plan", "--n", "2000", "--box", "800", "--apix", "0.4", "--diameter", "256", "--device", "cuda",
            "--device-memory", "80", "--host-memory", "200"]  # fmt: skip
    found = []
    for words in ([], ["--float16"]):
        assert main([*call, *words]) == 0
        found.append(next(line.split() for line in capsys.readouterr().out.splitlines() if " images " in line))
    assert found[0][3] == "5.12" and found[1][3] == "2.56", found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--box", "127"], "even"),
        (["--diameter", "500"], "width of the box"),
        (["--n", "0"], "more than 0"),
        (["--sym", "Q3"], "Q3"),
        (["--host-memory", "0.4"], "No setting of it fits"),
    ],
)
def test_command_refuses_what_makes_no_sense(change, says, capsys):
    call = {"--n": "500", "--box": "64", "--apix": "3", "--diameter": "150", "--device": "cpu", "--host-memory": "20"}
    call[change[0]] = change[1]
    assert main(["plan", *[text for pair in call.items() for text in pair]]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_command_needs_particles_or_their_sizes(capsys):
    assert main(["plan", "--diameter", "100", "--device", "cpu", "--box", "64", "--apix", "2"]) == 2
    assert "--n" in capsys.readouterr().err


def classification(classes: int, **changes) -> ClassifyConfig:
    return ClassifyConfig(**{"diameter": 200.0, "symmetry": "D2", "classes": classes} | changes)


def test_a_classification_takes_memory_and_time_for_every_class():
    problem = Problem(10_000, 128, 2.6)
    for machine in (CPU, H100):
        one, four = (plan(problem, classification(k), machine) for k in (1, 4))
        assert sum(item.times for item in four.iterations) == 25 and [i.sizes.kind for i in four.iterations][-1] == "global"
        a, b = one.iterations[-1], four.iterations[-1]
        assert b.sizes.orientations == 4 * a.sizes.orientations
        assert b.seconds["coarse"] == pytest.approx(4 * a.seconds["coarse"])
        for name in ("sums of all maps", "reference, packed"):
            small, large = ([i.bytes for i in p.iterations[-1].items if i.name == name] for p in (one, four))
            assert large == pytest.approx([4 * value for value in small])
        assert 1.3 * of_iterations(one) < of_iterations(four) < 4.5 * of_iterations(one) and four.fits
    few = plan(problem, classification(2, max_iterations=1), CPU)
    assert sum(item.times for item in few.iterations) == 1


def test_a_classification_without_a_search_is_planned_as_one_slice_a_class():
    problem = Problem(10_000, 128, 2.6)
    whole, given = (plan(problem, classification(4, align=align), CPU) for align in ("all", "none"))
    assert [i.sizes.kind for i in given.iterations] == ["given"] and given.iterations[0].times == 25
    assert given.iterations[0].sizes.samples == 4 and given.seconds < 0.2 * whole.seconds
    offsets = plan(problem, classification(4, align="offsets"), CPU)
    assert given.seconds < offsets.seconds < whole.seconds


def test_the_command_plans_classifications(capsys):
    words = ["plan", "--n", "1000", "--box", "64", "--apix", "3.5", "--diameter", "200", "--device", "cpu"]
    assert main([*words, "--classes", "3"]) == 0
    assert "global, order 2" in capsys.readouterr().out
    assert main([*words, "--classes", "3", "--skip-align"]) == 0
    assert "given, order 2" in capsys.readouterr().out
    assert main([*words, "--skip-align"]) == 2 and main([*words, "--classes", "0"]) == 2
    assert "--classes" in capsys.readouterr().err


def planes(classes: int, **changes) -> Classify2dConfig:
    return Classify2dConfig(**{"diameter": 200.0, "classes": classes, "gradient": False} | changes)


def test_class_averages_take_memory_and_time_for_every_class():
    problem = Problem(100_000, 128, 2.6)
    for machine in (CPU, H100):
        few, many = (plan(problem, planes(k), machine) for k in (50, 200))
        assert sum(one.times for one in many.iterations) == 25 and many.fits
        a, b = few.iterations[-1], many.iterations[-1]
        assert (a.sizes.title, b.sizes.orientations, b.sizes.radius) == ("50 classes", 200 * 30, 64)
        assert b.seconds["coarse"] == pytest.approx(4 * a.seconds["coarse"])
        for name in ("sums of all maps", "reference, packed", "images, summed but not turned"):
            small, large = ([i.bytes for i in p.iterations[-1].items if i.name == name] for p in (few, many))
            assert small and large == pytest.approx([4 * value for value in small])
        as_maps = plan(problem, classification(200, symmetry="C1"), machine)
        assert many.seconds < 0.02 * as_maps.seconds and many.disk_bytes < 0.1 * as_maps.disk_bytes


def test_batches_of_the_gradient_take_less_time():
    problem = Problem(100_000, 128, 2.6)
    em, gradient = (plan(problem, planes(100, gradient=mode), H100) for mode in (False, True))
    assert [one.sizes.share < 1 for one in gradient.iterations] == [True, True, False]
    assert sum(one.times for one in gradient.iterations) == 25 and of_iterations(gradient) < 0.6 * of_iterations(em)
    assert gradient.iterations[-1].sizes.share == 1 and gradient.peak("device") == pytest.approx(em.peak("device"), rel=0.2)


def test_the_folder_of_a_run_is_as_large_as_planned():
    measured = 12.94e6  # bytes of a folder of 8 iterations, two of its checkpoints among them
    assert plan(Problem(1000, 64, 3.5), planes(50, max_iterations=8), CPU).disk_bytes == pytest.approx(measured, rel=0.25)


def test_the_command_plans_2d_classifications_and_their_disk(capsys):
    words = ["plan", "--n", "1000", "--box", "64", "--apix", "3.5", "--diameter", "200", "--device", "cpu"]
    assert main([*words, "--classes", "50", "--two-d"]) == 0
    text = capsys.readouterr().out
    assert "50 classes" in text and "The run folder takes about 40.8 MB" in text
    assert main([*words, "--two-d"]) == 2 and "--two-d" in capsys.readouterr().err


def test_ranks_share_particles_and_what_they_say_costs_time():
    plans = plans_up_to(EMPIAR_10028, config(), replace(H100, host_memory=500 * GB), 6)
    assert [one.ranks for one in plans] == [1, 2, 4, 6]
    assert sum(one.ranks * one.one.problem.n_particles >= EMPIAR_10028.n_particles for one in plans) == 4
    seconds, efficiencies = [one.one.seconds for one in plans], [one.efficiency for one in plans]
    assert seconds == sorted(seconds, reverse=True) and efficiencies == sorted(efficiencies, reverse=True)
    assert efficiencies[0] == 1 and 0.3 < efficiencies[-1] < 1
    assert plans[0].between_ranks == 0 < plans[-1].between_ranks
    assert plans[0].one.disk_bytes == pytest.approx(plans[-1].one.disk_bytes, rel=1e-4)  # of the run, whoever computes
    assert plans[-1].one.peak("device") < plans[0].one.peak("device") and plans[-1].host_bytes > 2 * plans[0].host_bytes
    on_cores = plans_up_to(EMPIAR_10028, config(), replace(CPU, host_memory=500 * GB), 2)  # of one host: two ranks have one each
    assert on_cores[1].one.machine.cores == 1 and on_cores[1].one.seconds > on_cores[0].one.seconds


def test_what_does_not_get_less_with_more_ranks_is_told_whenever_memory_has_its_peak() -> None:
    """Of three icosahedral classes the peak is where maps are solved for; references and sums are there all the same."""
    classes = ClassifyConfig(diameter=200.0, symmetry="I", classes=3)
    machine = replace(H100, host_memory=500 * GB)
    few, many = (plans_up_to(Problem(100_000, 256, 1.0), classes, machine, most)[-1] for most in (2, 8))
    assert few.whole_on_each == many.whole_on_each > 3 * 12 * sphere_count(padded_edge(few.one.iterations[-1].sizes.radius, 2.0))


def test_sizes_of_files_and_memory_are_said_in_plain_digits() -> None:
    assert [size_text(size) for size in (7.8e6, 1.52e9, 112e9, 3.12e12)] == ["7.8 MB", "1.52 GB", "112 GB", "3,120 GB"]


def test_the_command_plans_for_several_gpus_that_need_not_be_here(tmp_path: Path, capsys):
    words = ["plan", "--n", "100000", "--box", "256", "--apix", "1.3", "--diameter", "240", "--device", "cuda",
             "--device-memory", "80", "--host-memory", "400", "--out", str(tmp_path / "plan.json")]  # fmt: skip
    assert main([*words, "--gpus", "4"]) == 0
    said = capsys.readouterr().out
    assert "By number of GPUs" in said and "GB on each, references and sums of all maps" in said
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["ranks"] == 4 and found["particles"] == 25_000 and list(found["seconds_on"]) == ["1", "2", "4"]
    assert main([*words, "--overwrite"]) == 0
    assert "By number of GPUs" not in capsys.readouterr().out
    assert main([*words, "--overwrite", "--gpus", "0"]) == 2
