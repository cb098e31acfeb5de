"""The command `verglas`: finds the sub-command, reads its options, runs it, and turns every end into an exit code.

0 done; 1 a defect of verglas (crash log written); 2 wrong options, bad input or output that cannot be written; 3 another process
of the run was lost, or held it up; 130 / 143 stopped by Ctrl-C / SIGTERM; 141 the reader of a pipe went away.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, Protocol

import verglas
from verglas.core.imports import quiet_messages
from verglas.distributed.place import LAST_WORDS, LeadMissing, Place, place_of
from verglas.errors import VerglasError

if TYPE_CHECKING:
    from rich.console import Console

# Heading -> command -> "module:class" in verglas.cli. A module is imported only when its command is asked for (or for --help).
COMMANDS: dict[str, dict[str, str]] = {
    "From particles to a map": {
        "solve": "solve:Solve",
        "refine": "refine:Refine",
        "classify2d": "classify2d:Classify2d",
        "abinitio": "abinitio:AbInitio",
        "classify3d": "classify3d:Classify3d",
        "plan": "plan:Plan",
        "reconstruct": "reconstruct:Reconstruct",
        "postprocess": "postprocess:Postprocess",
        "mask": "mask:Mask",
        "localres": "localres:Localres",
    },
    "Files": {
        "info": "info:Info",
        "convert": "convert:Convert",
        "stack": "stack:Stack",
        "select": "select:Select",
        "map": "map:MapTool",
        "flip": "flip:Flip",
        "align-symmetry": "align_symmetry:AlignSymmetry",
    },
    "Known truth": {
        "simulate": "simulate:Simulate",
        "project": "project:Project",
    },
    "Ptychography: from diffraction patterns to an image": {
        "ptycho reconstruct": "ptycho_reconstruct:PtychoReconstruct",
        "ptycho info": "ptycho_info:PtychoInfo",
        "ptycho report": "ptycho_report:PtychoReport",
        "ptycho simulate": "ptycho_simulate:PtychoSimulate",
    },
}


class Command(Protocol):
    """An option dataclass that can be run."""

    def run(self) -> None:
        """Do the work; raise VerglasError for what the user can put right."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: unwinds like Ctrl-C, so that run folders are cleaned up."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `verglas ARGV` (default: the arguments of the process) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _sigterm_raises():
            code = _dispatch(arguments)
            sys.stdout.flush()  # here, so that a closed pipe is met inside the try
            return code
    except VerglasError as error:
        return _report_error(error, str(error))
    except KeyboardInterrupt as stop:
        _print_error("stopped", "Nothing half-written is left behind.")
        return 143 if isinstance(stop, Terminated) else 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at exit
        return 141
    except OSError as error:
        if error.filename is None or error.strerror is None:
            return _report_crash(error)
        return _report_error(error, f"{error.filename}: {error.strerror}.")
    except Exception as error:
        if _is_out_of_memory(error):
            fix = "Use a smaller box, fewer particles at once or another machine."
            return _report_error(error, f"There is not enough memory for this: {error}. {fix}")
        return _report_crash(error)


def process() -> int:
    """`main` for a process of its own, which ends with it."""
    if _place() is not None:
        quiet_messages()
    return ended(main())


def ended(code: int) -> int:
    """End a process that worked on a GPU, or as one of several ranks, at once, unless somebody profiles or traces it and wants
    its end: nothing is torn down that the system frees anyway. After work on a GPU that takes seconds; and a thread of PyTorch
    that is about to let go of a message when Python ends aborts the process. Returns the code of any other process."""
    meeting, torch = sys.modules.get("verglas.distributed.meeting"), sys.modules.get("torch")
    has_met = meeting is not None and meeting.part(code)
    on_gpu = torch is not None and torch.cuda.is_initialized()
    if (has_met or on_gpu) and sys.getprofile() is None and sys.gettrace() is None:
        if (scratch := sys.modules.get("verglas.distributed.scratch")) is not None:
            scratch.remove_all()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _is_out_of_memory(error: Exception) -> bool:
    """numpy and Python raise MemoryError; torch a RuntimeError of its own on a GPU, and one known by its text on the CPU."""
    by_torch = type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and by_torch)


def all_commands() -> dict[str, str]:
    """Command -> 'module:class', without the headings."""
    return {name: place for group in COMMANDS.values() for name, place in group.items()}


def command_class(name: str) -> type[Command]:
    """Import the module of command `name` and return its option dataclass."""
    module, _, attribute = all_commands()[name].partition(":")
    return getattr(importlib.import_module(f"verglas.cli.{module}"), attribute)


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:3], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_overview()
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"verglas {verglas.__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if any(one.startswith(f"{name} ") for one in all_commands()):  # the first word of several commands
        if not rest or rest[0] in ("-h", "--help"):
            _print_overview(name)
            return 0
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in all_commands():
        close = difflib.get_close_matches(name, all_commands(), n=1)
        hint = f"Did you mean '{close[0]}'?" if close else "`verglas --help` lists the commands."
        raise VerglasError(f"There is no command '{name}'. {hint}")
    return run_words(name, rest)


def run_words(name: str, arguments: list[str]) -> int:
    """Run command `name` with these words as options; the exit code. Errors of the command are raised."""
    import tyro

    from verglas.cli.common import REGISTRY, SharedComputing

    chosen = command_class(name)
    description, example = split_docstring(chosen)
    if asks_help := bool({"-h", "--help"} & set(arguments)):
        _print_description(description)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    try:
        with _whole_lines() if asks_help else nullcontext():
            options = tyro.cli(chosen, prog=f"verglas {name}", description="", args=arguments, config=config, registry=REGISTRY)
    except SystemExit as stop:
        if asks_help and example:
            _print_example(example)
        return int(stop.code or 0)
    computing, place = getattr(options, "computing", None), place_of(os.environ)
    if isinstance(computing, SharedComputing):
        if computing.gpus is not None and "RANK" not in os.environ:  # else this is one of the processes that were started for it
            from verglas.cli.launch import launch

            return launch(computing.gpus, [*name.split(), *arguments], getattr(options, "elastic", False))
    elif place is not None and place.rank > 0:  # this command's work is not shared: the first process does it
        return 0
    options.run()
    return 0


@contextmanager
def _whole_lines() -> Iterator[None]:
    """What options say is wrapped to the terminal alone; by itself tyro also breaks it where the source does."""
    import docstring_parser

    plain = docstring_parser.parse_from_object

    def joined(thing: object) -> docstring_parser.Docstring:
        found = plain(thing)
        for option in found.params:
            option.description = " ".join((option.description or "").split())
        return found

    docstring_parser.parse_from_object = joined  # type: ignore[assignment]
    try:
        yield
    finally:
        docstring_parser.parse_from_object = plain


def split_docstring(command: type) -> tuple[str, str]:
    """Docstring of an option dataclass -> (description, example); the example starts at a line 'Example: verglas ...'."""
    lines = inspect.cleandoc(command.__doc__ or "").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("Example")), len(lines))
    example = "\n".join(lines[start:]).partition(":")[2]
    return "\n".join(lines[:start]).strip(), inspect.cleandoc(example).strip()


def _print_overview(family: str = "") -> None:
    """All commands, or those that begin with the word `family`."""
    from rich.table import Table

    out = _console(stderr=False)
    out.print(f"[bold]verglas {verglas.__version__}[/]  particle images in, trustworthy 3-D maps out\n")
    out.print(f"[bold]usage:[/] verglas {f'{family} ' if family else ''}COMMAND [OPTIONS]\n")
    width = max((len(name) for name in all_commands()), default=0)
    for heading, commands in COMMANDS.items():
        if family and not any(name.startswith(f"{family} ") for name in commands):
            continue
        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan", min_width=width + 2)
        table.add_column()
        for name in commands:
            table.add_row(f"  {name}", split_docstring(command_class(name))[0].partition("\n")[0].rstrip("."))
        out.print(f"[bold]{heading}[/]")
        out.print(table)
        out.print()
    out.print("`verglas COMMAND --help` tells the options of a command.")


def _print_description(description: str) -> None:
    """Each paragraph wrapped to the terminal (tyro would print it as one long line); lists (indented lines) are kept."""
    out = _console(stderr=False)
    for i, paragraph in enumerate(description.split("\n\n")):
        lines = paragraph.splitlines()
        text = paragraph if any(line.startswith(" ") for line in lines) else " ".join(lines)
        out.print(text + "\n", style="bold" if i == 0 else "", markup=False)


def _print_example(example: str) -> None:
    out = _console(stderr=False)
    out.print("[bold]example:[/] ", end="")
    out.print(example, markup=False, soft_wrap=True)


def _report_error(error: BaseException, text: str) -> int:
    if os.environ.get("VERGLAS_DEBUG") == "1":
        traceback.print_exception(error)
    _print_error("error", text, everyone=isinstance(error, LeadMissing))
    return 2


def _report_crash(error: Exception) -> int:
    """A defect of verglas: keep the traceback in a file, or show it with VERGLAS_DEBUG=1."""
    text = f"verglas met a defect of its own ({type(error).__name__}: {error})."
    if os.environ.get("VERGLAS_DEBUG") == "1":
        traceback.print_exception(error)
    else:
        handle, path = tempfile.mkstemp(prefix="verglas-crash-", suffix=".log")
        with open(handle, "w", encoding="utf-8") as log:
            log.write(f"verglas {verglas.__version__} {' '.join(sys.argv[1:])}\n")
            log.writelines(traceback.format_exception(error))
        text += f" Please report it with the file {path}."
    _print_error("crash", text)
    return 1


def _print_error(kind: str, text: str, everyone: bool = False) -> None:
    """One paragraph on stderr; wrapped and coloured on a terminal, one plain line elsewhere.

    Of several processes of a run (ranks) that have not met yet only the first one speaks, as all find the same, unless
    `everyone` has to.
    """
    place = _place()
    if place is not None and place.rank > 0:
        if not _have_met() and not everyone:
            time.sleep(LAST_WORDS)  # whoever started the ranks ends all when the first one goes
            return
        if kind == "stopped":
            return
        text = f"rank {place.rank}: {text}"
    from rich.text import Text

    err = _console(stderr=True)
    line = " ".join(text.split())
    err.print(
        Text.assemble((f"{kind}: ", "bold red" if kind != "stopped" else "bold yellow"), line), soft_wrap=not err.is_terminal
    )


def _place() -> Place | None:
    """`place_of`; None, too, where the environment makes no sense, of which the command then complains."""
    try:
        return place_of(os.environ)
    except VerglasError:
        return None


def _have_met() -> bool:
    """Whether the ranks of this run have found one another."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def _console(stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Batch systems stop jobs by SIGTERM; inside, it raises Terminated. Without effect off the main thread."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
