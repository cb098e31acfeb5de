"""docs/clusters.md: its Slurm scripts do what it says, with a made-up srun, and it names the commands whose work is shared."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from verglas.cli.common import HelpedComputing, SharedComputing
from verglas.cli.main import all_commands, command_class

PAGE = (Path(__file__).parent.parent / "docs" / "clusters.md").read_text(encoding="utf-8")
# Two tasks, one after the other, with the options of srun left out.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=$rank "$@"; done
"""
VERGLAS = """#!/bin/bash
echo "$SLURM_PROCID of $SLURM_STEP_NUM_TASKS: $*" >> said.txt
"""


def scripts() -> list[str]:
    """Every indented block that is a script of its own."""
    blocks = re.findall(r"(?:^    .*\n)+", PAGE, re.MULTILINE)
    return [re.sub("^    ", "", block, flags=re.MULTILINE) for block in blocks if block.startswith("    #!/bin/bash")]


def run(script: str, folder: Path) -> list[str]:
    """What verglas is called with, `rank of ranks: words`."""
    for name, text in (("srun", SRUN), ("verglas", VERGLAS), ("job", script)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "said.txt").unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    subprocess.run([str(folder / "job")], cwd=folder, env=environment, check=True, timeout=60)
    return (folder / "said.txt").read_text().splitlines()


@pytest.mark.parametrize("number", [0, 1])
def test_a_job_submitted_again_goes_on(number: int, tmp_path: Path) -> None:
    script = scripts()[number]
    command, out, tasks = [("solve", "solved", [" of "]), ("refine", "refine", ["0 of 2", "1 of 2"])][number]
    first = run(script, tmp_path)
    assert [line.partition(":")[0] for line in first] == tasks
    assert all(f": {command} --particles " in line and f" --out {out}" in line for line in first)
    (tmp_path / out).mkdir()
    (tmp_path / out / "config.json").touch()
    again = run(script, tmp_path)
    assert all(f": {command} --continue {out}" in line and "--particles" not in line for line in again)
    assert ("--gpus all" in first[0]) == ("--gpus all" in again[0]) == (command == "solve")


@pytest.mark.parametrize(("kind", "beginning", "end"), [
    (SharedComputing, "# Several GPUs, several computers\n\n", " share "),
    (HelpedComputing, "--cpu-ranks 1; also with torchrun and srun, N on every computer\n\n", " can "),
])  # fmt: skip
def test_the_page_names_the_commands_that_share(kind: type[SharedComputing], beginning: str, end: str) -> None:
    def shares(name: str) -> bool:
        factories = [one.default_factory for one in fields(command_class(name))]  # type: ignore[arg-type]
        return any(isinstance(factory, type) and issubclass(factory, kind) for factory in factories)

    named = re.findall(r"`([\w ]+)`", PAGE.partition(beginning)[2].partition(end)[0])
    assert sorted(named) == sorted(name for name in all_commands() if shares(name))
