"""class_ranking.star of a 2-D classification."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from verglas.io.star import StarBlock, write_star
from verglas.refinement.class_quality import ClassQuality, ranking
from verglas.refinement.files_data import shown_path


def write_ranking(path: Path, stack: Path, qualities: list[ClassQuality], chosen: list[int]) -> None:
    """Write the classes, the best first, with their figures (rlnClassScore: class_quality) and whether they are selected
    (rlnSelected). stack: of the averages; chosen: numbers from 1."""
    order = ranking(qualities)
    frame = pd.DataFrame({
        "rlnReferenceImage": [f"{k + 1:06d}@{shown_path(stack)}" for k in order],
        "rlnClassNumber": [k + 1 for k in order],
        "rlnClassScore": [qualities[k].score for k in order],
        "vglClassFit": [qualities[k].fit for k in order],
        "vglClassDetailFit": [qualities[k].detail_fit for k in order],
        "vglClassContrast": [qualities[k].contrast for k in order],
        "rlnClassDistribution": [qualities[k].share for k in order],
        "rlnEstimatedResolution": [qualities[k].resolution for k in order],
        "rlnNrOfParticles": [qualities[k].particles for k in order],
        "rlnSelected": [int(k + 1 in chosen) for k in order],
    })  # fmt: skip
    write_star(path, {"class_ranking": StarBlock.table("class_ranking", frame)}, overwrite=True)
