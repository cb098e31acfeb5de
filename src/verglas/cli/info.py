"""verglas info: what a file holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from verglas.cli.common import Flag

if TYPE_CHECKING:
    from rich.console import Console

Facts = dict[str, Any]


@dataclass(kw_only=True)
class Info:
    """Say what maps, image stacks, STAR files and cryoSPARC .cs files hold.

    Maps: size, voxel, density statistics, labels. Stacks: images, box, values. STAR and .cs: blocks, columns with their
    ranges, optics groups, and whether the images they name are there.

    Example: verglas info particles.star map.mrc
    """

    files: Positional[Annotated[tuple[Path, ...], arg(metavar="FILE [FILE ...]", help_behavior_hint="(at least one)")]]
    """.mrc .map (also .gz .bz2) .mrcs .star .cs"""
    json: Flag = False
    """Print one JSON list instead of tables."""
    folder: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: where they are found)")] = None
    """What relative image names in STAR and .cs files start from."""

    def run(self) -> None:
        """Describe every file; the first that cannot be read ends the command."""
        from verglas.errors import InputError
        from verglas.io.describe import describe

        if not self.files:
            raise InputError("verglas info", "no file given", "at least one", "For example: verglas info particles.star")
        described = []
        for path in self.files:
            facts, images = describe(path)
            described.append(facts | self._images(images, path))
        if self.json:
            print(_to_json(described))
            return
        from rich.console import Console

        console = Console(highlight=False)
        for facts in described:
            _show(console, facts)

    def _images(self, names: list[str], path: Path) -> Facts:
        from verglas.io.describe import check_images
        from verglas.particles.images import image_folder, parse_image_names

        if not names:
            return {}
        stacks, stack_B, index_B = parse_image_names(names, path)
        return {"images_named": check_images(stacks, index_B, stack_B, self.folder or image_folder(stacks, path.parent))}


def _to_json(described: list[Facts]) -> str:
    import json

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, float) and value - value != 0:  # JSON knows no NaN and no infinity
            return str(value)
        return value.item() if hasattr(value, "item") else value

    return json.dumps(plain(described), indent=2, ensure_ascii=False)


def _show(console: Console, facts: Facts) -> None:
    from rich.markup import escape

    console.print(f"\n[bold]{escape(facts['path'])}[/]  {_headline(facts)}")
    if facts["kind"] in ("map", "stack"):
        _show_rows(console, _image_rows(facts))
        return
    for block in facts.get("blocks", ()):
        _show_block(console, block)
    if "fields" in facts:
        _show_columns(console, facts["fields"], "field")
    if "images_named" in facts:
        _show_rows(console, _image_check_rows(facts["images_named"]))


def _headline(facts: Facts) -> str:
    if facts["kind"] == "map":
        return f"map of {' x '.join(map(str, facts['box']))} voxels"
    if facts["kind"] == "stack":
        return f"{facts['images']:,} images of {' x '.join(map(str, facts['box']))} px"
    if facts["kind"] == "cs":
        return f"cryoSPARC file of {facts['rows']:,} rows"
    blocks = facts["blocks"]
    return f"STAR file of {len(blocks)} block{'s' if len(blocks) != 1 else ''}"


def _image_rows(facts: Facts) -> list[tuple[str, str]]:
    size = f"{facts['bytes'] / 1e6:,.1f} MB"
    rows = [("pixel size", _voxel_text(facts["pixel_size"])),
            ("stored as", f"{facts['dtype']} (mode {facts['mode']}), {facts['byte_order']}-endian, {size}")]  # fmt: skip
    if "min" in facts:
        rows.append(("density", f"{facts['min']:.5g} to {facts['max']:.5g}, mean {facts['mean']:.5g}, std {facts['std']:.5g}"))
    if facts.get("looked_at", 0) < facts.get("images", 0):
        rows.append(("looked at", f"{facts['looked_at']:,} images, evenly spread"))
    for key, text in (("not_finite", "values are NaN or infinite"), ("constant_images", "images are constant"),
                      ("not_finite_images", "images hold NaN or infinity"), ("extra_bytes", "bytes behind the data"),
                      ("extended_header", "bytes of extended header")):  # fmt: skip
        if facts.get(key):
            rows.append(("note", f"{facts[key]:,} {text}"))
    if any(facts.get("origin", ())):
        rows.append(("origin", "  ".join(f"{name} {v:g}" for name, v in zip("xyz", facts["origin"])) + " Å"))
    if facts.get("axes", [1, 2, 3]) != [1, 2, 3]:
        rows.append(("axes", "columns, rows, sections run along " + ", ".join("xyz"[a - 1] for a in facts["axes"])))
    return rows + [("label", label) for label in facts["labels"]]


def _voxel_text(size: float | list[float]) -> str:
    sizes = size if isinstance(size, list) else [size]
    if max(sizes) == 0:
        return "not given in the header"
    return " x ".join(f"{v:g}" for v in (sizes if len(set(sizes)) > 1 else sizes[:1])) + " Å"


def _image_check_rows(images: Facts) -> list[tuple[str, str]]:
    rows = [("images", f"{images['images']:,} in {images['stacks']:,} stacks, looked for in {images['folder']}")]
    for key, text in (("missing_stacks", "missing"), ("damaged_stacks", "unreadable"), ("short_stacks", "too short")):
        stacks = images[key]
        if stacks:
            more = " ..." if len(stacks) > 3 else ""
            rows.append((f"[red]{text}[/]", f"{len(stacks):,} stacks: {', '.join(stacks[:3])}{more}"))
    if len(rows) == 1:
        rows.append(("stacks", "all there, none too short"))
    return rows


def _show_block(console: Console, block: Facts) -> None:
    from rich.markup import escape

    version = f", version {block['version']}" if block["version"] else ""
    size = "single values"
    if "columns" in block:
        size = f"{block['rows']:,} row{'s' * (block['rows'] != 1)} of {len(block['columns'])} columns"
    console.print(f"\n[cyan]data_{escape(block['name'])}[/]  {size}{version}")
    if "values" in block:
        _show_rows(console, [(escape(label), str(value)) for label, value in block["values"].items()])
    if "groups" in block and len(block["groups"]) > 0:
        _show_groups(console, block["groups"])
    elif "columns" in block:
        _show_columns(console, block["columns"], "column")


def _show_groups(console: Console, groups: list[Facts]) -> None:
    """Optics: a column for each group, as there are many labels and few groups."""
    shown = groups[:6] if console.width >= 120 else groups[:3]
    table = _table("label")
    room = console.width - 8 - max(len(_short_label(label)) for label in groups[0])
    for group in shown:
        name = f"group {group.get('rlnOpticsGroup', '')}"
        table.add_column(name, justify="right", overflow="ellipsis", no_wrap=True, max_width=max(room // len(shown) - 3, 8))
    for label in groups[0]:
        table.add_row(_short_label(label), *(_value(group[label]) for group in shown))
    console.print(table)
    if len(groups) > len(shown):
        console.print(f"    and {len(groups) - len(shown)} more groups (--json shows all)")


def _show_columns(console: Console, columns: list[Facts], heading: str) -> None:
    table = _table(heading)
    table.add_column("values", overflow="ellipsis", no_wrap=True)
    labels = [len(_short_label(column["name"])) + 6 * ("shape" in column) for column in columns]
    room = max(console.width - max(labels, default=0) - 8, 30)
    for column in columns:
        shape = f" [dim]x {column['shape'][0]}[/]" if "shape" in column else ""
        table.add_row(_short_label(column["name"]) + shape, _values_text(column, room))
    console.print(table)


def _values_text(column: Facts, room: int) -> str:
    """'-179.8 to 180' for numbers, '10 different, first a/b.mrcs' for texts; a long text loses its middle."""
    from rich.markup import escape

    if "distinct" in column:
        start, text = f"{column['distinct']:,} different, first ", column["first"]
        room -= len(start)
        short = text if len(text) <= room else f"{text[: room // 3]}...{text[-(room - room // 3 - 3) :]}"
        return start + escape(short)
    if "min" not in column:
        return "no values"
    same = column["min"] == column["max"]
    return _value(column["min"]) if same else f"{_value(column['min'])} [dim]to[/] {_value(column['max'])}"


def _short_label(label: str) -> str:
    from rich.markup import escape

    return escape(label.removeprefix("rln"))


def _table(heading: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="dim")
    table.add_column(heading, no_wrap=True)
    return table


def _value(value: Any) -> str:
    from rich.markup import escape

    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else escape(str(value))


def _show_rows(console: Console, rows: list[tuple[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=12)
    grid.add_column()
    for name, text in rows:
        grid.add_row(f"  {name}", Text(text))
    console.print(grid)
