"""The rules of the house, so that they stay true: who may import whom, sizes, light imports, documentation."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import verglas
from verglas.distributed.ways import PREFIX, Ways

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(verglas.__file__).resolve().parent
MODULES = sorted(SOURCE.rglob("*.py"))
MAX_LINES = 400

# A package may import itself, `errors`, and what stands beside its name.
BASE = {"core"}
LADDER = ["kernels", "optics", "projection", "expectation", "maximization", "refinement"]
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "io": BASE,
    "distributed": BASE,
    **{name: BASE | {"distributed", *LADDER[:height]} for height, name in enumerate(LADDER)},
    "particles": BASE | {"io", "optics"},
    "postprocess": BASE | {"io", "maximization"},
    "simulation": BASE | {"io", "optics", "projection", "particles", "kernels", "nufft"},
    "report": BASE | {"io"},
    "nufft": BASE | {"kernels", "distributed"},
    "ptychography": BASE | {"kernels", "distributed", "io"},  # stands apart from cryo-EM
    "testing": {"core", "distributed", "io", "optics", "particles", "simulation", *LADDER},
}
MAY_IMPORT["maximization"] |= {"nufft"}
MAY_IMPORT["optics"] |= {"io"}  # MTF curves come in STAR files
for name in ("expectation", "maximization", "refinement"):  # they work through batches of particles
    MAY_IMPORT[name] |= {"io", "particles"}
MAY_IMPORT["cli"] = set(MAY_IMPORT) - {"testing"}  # the command line stands on top of everything


def module_id(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_packages(tree: ast.Module) -> set[str]:
    """First names below `verglas` that a module imports, anywhere in it (also inside functions and TYPE_CHECKING)."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" if node.module == "verglas" else str(node.module) for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("verglas.")}
    return found - {"errors", "__version__"}


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_imports_point_one_way(path: Path) -> None:
    inside = path.relative_to(SOURCE).parts
    if len(inside) == 1:
        allowed = {"cli"} if path.name == "__main__.py" else set()
    else:
        allowed = MAY_IMPORT[inside[0]] | {inside[0]}
    wrong = imported_packages(tree_of(path)) - allowed
    assert not wrong, f"{module_id(path)} may not import verglas.{', verglas.'.join(sorted(wrong))}"


@pytest.mark.parametrize("path", MODULES + sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.name)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_verglas_loads_nothing() -> None:
    bare = loaded_by("")
    assert {name for name in loaded_by("import verglas") - bare if not name.startswith("verglas")} <= {"__future__"}


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "pandas", "scipy", "numba", "matplotlib"}
    assert not loaded_by("from verglas.cli.main import main; main(['--help'])") & heavy
    seconds = []
    for _ in range(5):
        start = os.times()  # of the children: what other programs on the machine take does not count
        subprocess.run([sys.executable, "-m", "verglas", "refine", "--help"], stdout=subprocess.DEVNULL, check=True)
        end = os.times()
        seconds.append(end.children_user - start.children_user + end.children_system - start.children_system)
    assert min(seconds) < 0.5, seconds


def tracked_text_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_path_of_one_machine_is_tracked() -> None:
    # Written in pieces, so that this file does not find itself.
    machine = re.compile(
        "|".join(["/wo" + "rk/", "/ho" + r"me/\w", "/ro" + "ot/", r"(?<![\w.])/t" + "mp/", "/Us" + r"ers/\w", r"file:/" + "/"])
    )
    found = []
    for path in tracked_text_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{i}: {line.strip()}" for i, line in enumerate(lines, 1) if machine.search(line)]
    assert not found, "\n".join(found)


def test_every_variable_of_the_environment_is_in_the_table() -> None:
    table = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8").partition("## What verglas reads")[2]
    paths = [*MODULES, *(ROOT / "benchmarks").glob("*.py")]
    named = {name for path in paths for name in re.findall(r"VERGLAS_[A-Z_]*[A-Z]", path.read_text(encoding="utf-8"))}
    named |= {PREFIX + one.name.upper() for one in fields(Ways)}
    assert named - set(re.findall(r"VERGLAS_[A-Z_]*[A-Z]", table)) == set()


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Public functions of a module and public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                    yield f"{node.name}.{member.name}", member


def is_kernel(function: ast.FunctionDef) -> bool:
    """Compiled by Triton or Numba: their arguments are not Python's, so types say nothing there."""
    decorators = " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
    return "jit" in decorators


def tells_itself(name: str, function: ast.FunctionDef) -> bool:
    """Methods of one `return` (`device`, `to`) are as clear as a sentence about them would be."""
    return "." in name and len(function.body) == 1 and isinstance(function.body[0], ast.Return)


def lacks(name: str, function: ast.FunctionDef) -> list[str]:
    """What is missing of a docstring and types."""
    missing = [] if ast.get_docstring(function) or tells_itself(name, function) else ["docstring"]
    if is_kernel(function):
        return missing
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    missing += [f"type of {one.arg}" for one in arguments if one.annotation is None and one.arg not in ("self", "cls")]
    return missing + ([] if function.returns is not None else ["return type"])


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_public_functions_are_documented_and_typed(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree), f"{module_id(path)} needs a docstring"
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    faults = [f"{node.name}: docstring" for node in classes if not ast.get_docstring(node)]
    faults += [
        f"{name}: {', '.join(lacks(name, function))}" for name, function in public_functions(tree) if lacks(name, function)
    ]
    assert not faults, "; ".join(faults)


def kernel_folders() -> list[Path]:
    return sorted(path for path in (SOURCE / "kernels").iterdir() if path.is_dir() and path.name != "__pycache__")


@pytest.mark.parametrize("folder", kernel_folders(), ids=lambda folder: folder.name)
def test_every_kernel_has_its_formula_and_its_reference(folder: Path) -> None:
    assert (folder / "README.md").is_file() and (folder / "reference.py").is_file()
    assert (folder / "cpu.py").is_file()
    # An operation without gather or scatter may run on a GPU as its plain torch definition; its README then says so.
    plain_torch = "what runs on a GPU" in (folder / "README.md").read_text()
    on_gpu = (folder / "triton.py").is_file() or (folder / "cuda.py").is_file()
    assert on_gpu != plain_torch


def is_definition(node: ast.stmt) -> bool:
    """Import, function, class, constant, docstring, or a table of constants that is filled (`_TABLE["a"].append(...)`)."""
    if isinstance(node, ast.Expr):
        fills = isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith((".append", ".update"))
        return fills or isinstance(node.value, ast.Constant)
    constants = ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Assert
    return isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.If | constants)


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__main__.py"], ids=module_id)
def test_no_work_at_import(path: Path) -> None:
    work = [node.lineno for node in tree_of(path).body if not is_definition(node)]
    assert not work, f"{module_id(path)} does work at import in lines {work}"
