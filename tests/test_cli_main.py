"""Every end of the command line: exit codes, one clear paragraph for errors, help without heavy imports."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import tyro

import verglas
from verglas.cli import main as cli
from verglas.cli.common import Computing, resolve_device, set_threads
from verglas.errors import InputError


@dataclass(kw_only=True)
class Fail:
    """Fail in a chosen way.

    A second paragraph.

    Example: verglas fail --how input
    """

    how: str = "not"
    """The way to fail."""
    width: Annotated[float, tyro.conf.arg(metavar="Å")] = 3.0
    """Width of the failure."""
    computing: Computing = field(default_factory=Computing)

    def run(self) -> None:
        """Fail as asked."""
        ends: dict[str, BaseException] = {
            "input": InputError("particles.star", "no column rlnAngleRot", "poses", "Refine first."),
            "keys": KeyboardInterrupt(),
            "defect": ZeroDivisionError("division by zero"),
            "file": FileNotFoundError(2, "No such file or directory", "gone.mrc"),
        }
        if self.how in ends:
            raise ends[self.how]
        print(f"ran with {self.width}")


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMMANDS", {"Tests": {"fail": "fail:Fail"}})
    monkeypatch.setattr(cli, "command_class", lambda name: Fail)
    monkeypatch.delenv("VERGLAS_DEBUG", raising=False)


@pytest.mark.usefixtures("fail")
def test_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fail", "--width", "2.5"]) == 0
    assert capsys.readouterr().out == "ran with 2.5\n"


@pytest.mark.usefixtures("fail")
def test_an_input_error_is_one_paragraph(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fail", "--how", "input"]) == 2
    err = capsys.readouterr().err
    assert err == "error: particles.star: no column rlnAngleRot; expected poses. Refine first.\n"


@pytest.mark.usefixtures("fail")
def test_a_missing_file_is_an_error_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fail", "--how", "file"]) == 2
    assert capsys.readouterr().err == "error: gone.mrc: No such file or directory.\n"


@pytest.mark.usefixtures("fail")
def test_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fail", "--how", "keys"]) == 130
    assert "left behind" in capsys.readouterr().err


@pytest.mark.usefixtures("fail")
def test_a_defect_leaves_a_crash_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cli.main(["fail", "--how", "defect"]) == 1
    err = capsys.readouterr().err
    (log,) = tmp_path.iterdir()
    assert str(log) in err and "Traceback" not in err
    assert "ZeroDivisionError" in log.read_text() and "Traceback" in log.read_text()


@pytest.mark.usefixtures("fail")
def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERGLAS_DEBUG", "1")
    assert cli.main(["fail", "--how", "defect"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.usefixtures("fail")
def test_wrong_options_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fail", "--widht", "3"]) == 2
    assert "--widht" in capsys.readouterr().err
    assert cli.main(["fial"]) == 2
    assert "Did you mean 'fail'?" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["refine", "--diameter", "wide"], "could not convert string to float: 'wide'"),
    (["refine", "--diameter", "None"], "could not convert string to float: 'None'"),
    (["plan", "--diameter", "150", "--n", "many"], "invalid literal for int"),
    (["refine", "--particles", "p", "--reference", "m", "--diameter", "0", "--out", "x"], "--diameter: 0; expected"),
    (["solve", "--particles", "p.star", "--diameter", "0", "--out", "x"], "--diameter: 0"),
    (["plan", "--diameter", "150", "--memory", "-2"], "--memory: -2 GB; expected a finite number above 0"),
])  # fmt: skip
def test_numbers_that_make_no_sense(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in err and "NoneType" not in err


@pytest.mark.usefixtures("fail")
def test_help_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fail", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--width Å" in out and "Width of the failure. (default: 3.0)" in out
    assert "computing options" in out and "--device auto|cpu|cuda" in out
    assert out.count("Example") == 0 and out.endswith("example: verglas fail --how input\n")
    assert cli.main(["help", "fail"]) == 0
    assert capsys.readouterr().out == out
    assert cli.main(["--help"]) == 0
    assert "Fail in a chosen way" in capsys.readouterr().out


def test_a_closed_pipe_is_quiet() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([sys.executable, "-m", "verglas", "--version"], stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert done.returncode == 141 and done.stderr == ""


def test_version() -> None:
    done = subprocess.run([sys.executable, "-m", "verglas", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"verglas {verglas.__version__}\n"


@pytest.mark.parametrize("name", sorted(cli.all_commands()))
def test_every_command_documents_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = cli.command_class(name)
    description, example = cli.split_docstring(command)
    first = description.partition("\n")[0]
    assert dataclasses.is_dataclass(command) and 10 < len(first) <= 100, f"the first line on {name}: {first!r}"
    assert example.startswith(f"verglas {name}"), f"the docstring of {name} needs an 'Example: verglas {name} ...' line"
    assert cli.main([name, "--help"]) == 0
    assert "usage: verglas " + name in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(cli.all_commands()))
def test_help_of_a_command_imports_nothing_heavy(name: str) -> None:
    heavy = "{'torch', 'numpy', 'pandas', 'scipy', 'numba', 'matplotlib'}"
    code = (
        f"import sys; from verglas.cli.main import main; main([{name!r}, '--help']); sys.exit(bool({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    assert done.returncode == 0


def test_cuda_where_there_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cpu"):
        resolve_device("cuda")
    device, reason = resolve_device("auto")
    assert device.type == "cpu" and "--device auto" in reason
    assert resolve_device("cpu")[0].type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)  # a thread wakes the GPU meanwhile
    assert resolve_device("auto")[0].type == "cuda"


def test_help_is_wrapped_to_the_terminal_alone() -> None:
    command = [sys.executable, "-m", "verglas", "refine", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "70"}, check=True)
    assert "files are on a slow or shared disk. The copies" in [line.strip(" │") for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", ["solve", "refine", "classify2d", "abinitio", "classify3d", "reconstruct", "ptycho reconstruct"])
def test_torchrun_hands_over_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its parser ends at a word behind `-m verglas` that could be short for more than one of its own options."""
    from torch.distributed.run import get_args_parser

    own = {word for action in get_args_parser()._actions for word in action.option_strings}
    assert cli.main([*name.split(), "--help"]) == 0
    options = set(re.findall(r"^\W*(--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE))
    assert len(options) > 10
    assert [one for one in options if sum(word.startswith(one) for word in own - {one}) > 1] == []


def test_threads_reach_torch_and_numba() -> None:
    code = (
        "from verglas.cli.common import set_threads; set_threads(1); import numba, torch;"
        "print(numba.get_num_threads(), torch.get_num_threads())"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["1", "1"]
    told = environment | {"OMP_NUM_THREADS": "1"}  # as torchrun does: Numba alone would take all cores, and have torch take them
    unasked = [sys.executable, "-c", code.replace("(1)", "(None)")]
    done = subprocess.run(unasked, capture_output=True, text=True, check=True, env=told)
    assert done.stdout.split() == ["1", "1"]
    with pytest.raises(InputError):
        set_threads(0)
