"""verglas ptycho info: what a file with a scan, or a reconstruction, holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from verglas.cli.common import Flag
from verglas.ptychography.read_options import ReadOptions

if TYPE_CHECKING:
    from verglas.ptychography.scan import Reconstruction, Scan

AT_ONCE = 256  # patterns


@dataclass(kw_only=True)
class PtychoInfo:
    """Say what scans and reconstructions hold, and whether a scan can be reconstructed.

    Reads CXI, NeXus, ptypy's .ptyd, and named arrays in .npz (also .bz2, .gz, .xz of one) or HDF5, as tike, PtyGer and
    pty-chi name them. What a file does not say can be given, and is checked as `verglas ptycho reconstruct` checks it.

    Example: verglas ptycho info scan.cxi
    """

    files: Positional[Annotated[tuple[Path, ...], arg(metavar="FILE [FILE ...]", help_behavior_hint="(at least one)")]]
    """.cxi .h5 .nxs .ptyd .npz"""
    json: Flag = False
    """Print one JSON list instead of tables."""
    read: ReadOptions = field(default_factory=ReadOptions)

    def run(self) -> None:
        """Describe every file; the first that cannot be read ends the command."""
        import json

        from verglas.errors import InputError
        from verglas.io.provenance import plain

        if not self.files:
            raise InputError("verglas ptycho info", "no file given", "at least one", "For example: verglas ptycho info scan.cxi")
        described = {str(path): self._described(path) for path in self.files}
        if self.json:
            print(json.dumps([plain({"path": path, **facts}) for path, facts in described.items()], indent=2, ensure_ascii=False))
            return
        for path, facts in described.items():
            show(path, facts)

    def _described(self, path: Path) -> dict[str, Any]:
        from verglas.ptychography.files import read_raw, scan_of
        from verglas.ptychography.files_result import is_result, read_result

        if is_result(path):
            found, provenance = read_result(path)
            return facts_of_result(found, provenance)
        raw = read_raw(path)
        scan, notices = scan_of(raw, self.read)
        return {"format": raw.format, **facts_of_scan(scan), "notices": notices}


def facts_of_scan(scan: Scan) -> dict[str, Any]:
    """What a person asks of a scan, ready for a table."""
    import torch

    geometry = scan.geometry
    span_2 = (scan.positions_B2.max(0).values - scan.positions_B2.min(0).values).tolist()
    steps_B = (scan.positions_B2[1:] - scan.positions_B2[:-1]).norm(dim=1)
    good_YX = 1 if scan.mask_YX is None else scan.mask_YX
    counts_B = torch.cat([(some_BYX.float() * good_YX).sum((1, 2)) for some_BYX in scan.patterns_BYX.split(AT_ONCE)])
    facts: dict[str, Any] = {
        "patterns": f"{len(scan):,} of {scan.shape[0]} x {scan.shape[1]} px, {str(scan.patterns_BYX.dtype)[6:]}",
        "counts": f"{counts_B.median():.5g} a pattern ({counts_B.min():.4g} to {counts_B.max():.4g})",
        "propagation": "near field" if geometry.kind == "near" else "far field",
        "positions": f"over {span_2[0]:.1f} x {span_2[1]:.1f} px of the object, median step {steps_B.median():.2f} px",
        "object": f"about {round(span_2[0]) + scan.window[0]} x {round(span_2[1]) + scan.window[1]} px",
        "memory": memory_text(scan),
    }
    if scan.object_pixel is not None:
        facts["object pixel"] = f"{1e9 * scan.object_pixel[0]:.5g} x {1e9 * scan.object_pixel[1]:.5g} nm"
    for name, value, unit in (("wavelength", geometry.wavelength, "m"), ("distance", geometry.distance, "m"),
                              ("detector pixel", geometry.detector_pixel, "m")):  # fmt: skip
        facts[name] = "not known" if value is None else f"{value:.6g} {unit}"
    if scan.mask_YX is not None:
        facts["mask"] = f"{int((~scan.mask_YX).sum()):,} bad pixels"
    if scan.probe_MYX is not None:
        facts["probe"] = f"{len(scan.probe_MYX)} mode{'s' * (len(scan.probe_MYX) != 1)}"
    return facts


def memory_text(scan: Scan) -> str:
    """What a reconstruction as `verglas ptycho reconstruct` does it by itself keeps, and where if there is a GPU."""
    import torch

    from verglas.core.memory import size_text
    from verglas.ptychography.memory import Needs, kept
    from verglas.ptychography.options import PtychoOptions
    from verglas.ptychography.share import Share

    needs = Needs.of(scan, PtychoOptions(), Share.of_one(scan).object_pixels(scan))
    if torch.cuda.is_available():
        return kept(needs, torch.device("cuda")).text
    return f"{needs.text}; {size_text(needs.line)} more for line searches where that fits"


def facts_of_result(found: Reconstruction, provenance: dict[str, Any]) -> dict[str, Any]:
    """What a person asks of a reconstruction."""
    modes, slices, rows, columns = found.object_OLYX.shape
    power_M = found.probe_MYX.abs().square().sum((1, 2))
    more = "".join(f", {count} {what}" for count, what in ((modes, "modes"), (slices, "slices")) if count > 1)
    shares = ", ".join(f"{100 * float(one / power_M.sum()):.1f} %" for one in power_M)
    facts: dict[str, Any] = {
        "format": "reconstruction by verglas",
        "object": f"{rows} x {columns} px{more}",
        "probe": f"{shares} of {float(power_M.sum()):.4g} counts",
        "positions": f"{len(found.positions_B2):,}",
        "passes": len(found.error_P),
    }
    if found.pixel is not None:
        facts["object pixel"] = f"{1e9 * found.pixel[0]:.5g} x {1e9 * found.pixel[1]:.5g} nm"
    if found.error_P:
        facts["error"] = f"{found.error_P[-1]:.5g}"
    return facts | {"made by": provenance.get("command_line", ""), "version": provenance.get("version", "")}


def show(path: str, facts: dict[str, Any]) -> None:
    """A table of a file's facts on standard output; notices below."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text.assemble("\n", (path, "bold"), f"  {facts['format']}"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=14)
    grid.add_column()
    for name, value in facts.items():
        if name not in ("format", "notices"):
            grid.add_row(f"  {name}", Text(str(value)))
    for notice in facts.get("notices", ()):
        grid.add_row("  note", Text(notice))
    console.print(grid)
