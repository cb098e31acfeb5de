"""Particles as RELION 3.1 reads them: it knows no float16, and its programs want paths beside the STAR file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from verglas.io.mrc import Stack, StackWriter
from verglas.particles.table import ParticleTable


def as_one_stack(table: ParticleTable, out: Path, **columns: Any) -> Path:
    """Write all images into `out`/all.mrcs, float32, and the table to `out`/all.star, whose path is returned.

    columns: of the new table, in place of the old ones or beside them. All images have the box of the first group.
    """
    locations, group = table.image_locations(), table.groups[0]
    with StackWriter(out / "all.mrcs", len(table), (group.box, group.box), group.pixel_size) as writer:
        for stack, image in zip(locations.stack_index_B, locations.image_index_B):
            writer.append(Stack.open(locations.paths[stack]).read(slice(int(image), int(image) + 1)))
    names = [f"{i + 1:06d}@all.mrcs" for i in range(len(table))]
    replace(table, frame=table.frame.assign(rlnImageName=names, **columns), folder=out).write(out / "all.star")
    return out / "all.star"
