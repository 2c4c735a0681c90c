"""Tables of how the population moved: its width in each dimension, and a projection on a plane.

Knows genomes as bare numbers, stage by stage; not what they decode to, losses or figures.
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from search.trace import Trace


def spread_table(trace: Trace) -> pd.DataFrame:
    """Return how wide the population is: standard deviation over a generation's candidates, in genome units.

    Index: (`stage`, `generation`). Columns: the genome's dimensions from 0; NaN beyond those that a stage
    has.
    """
    keys = [[g.stage for g in trace.generations], [g.index for g in trace.generations]]
    index = pd.MultiIndex.from_arrays(keys, names=["stage", "generation"])
    rows = [generation.genomes.std(axis=0) for generation in trace.generations]
    width = max((len(row) for row in rows), default=0)
    padded = [np.pad(row, (0, width - len(row)), constant_values=np.nan) for row in rows]
    return pd.DataFrame(np.array(padded).reshape(len(rows), width), index=index)


def projection_table(trace: Trace) -> pd.DataFrame:
    """Project all genomes of a stage on the two directions in which they vary most (principal components).

    Columns: `stage`, `generation`, `candidate`, `x` and `y` (genome units from the stage's mean; y is 0 in
    a stage of one dimension) and `explained` (share of the stage's variance that x and y hold).
    """
    tables = []
    for stage in sorted({generation.stage for generation in trace.generations}):
        generations = [generation for generation in trace.generations if generation.stage == stage]
        plane, explained = _principal_plane(np.concatenate([g.genomes for g in generations]))
        keys = [(stage, g.index, candidate) for g in generations for candidate in range(len(g.genomes))]
        table = pd.DataFrame(keys, columns=["stage", "generation", "candidate"])
        tables.append(table.assign(x=plane[:, 0], y=plane[:, 1], explained=explained))
    columns = ["stage", "generation", "candidate", "x", "y", "explained"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def _principal_plane(genomes: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Return coordinates (n, 2) in the plane of largest variance, and the share of variance in it."""
    centred = genomes - genomes.mean(axis=0)
    # The smaller of the two Gram matrices: seldom are candidates and dimensions both in their thousands.
    is_wide = centred.shape[1] > centred.shape[0]
    variances, vectors = np.linalg.eigh(centred @ centred.T if is_wide else centred.T @ centred)
    order = np.argsort(-variances)[:2]
    plane = (
        vectors[:, order] * np.sqrt(np.maximum(variances[order], 0))
        if is_wide
        else centred @ vectors[:, order]
    )
    plane = np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
    signs = np.where(
        plane[np.abs(plane).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0
    )  # the same picture every time
    return plane * signs, float(variances[order].sum() / max(variances.sum(), np.finfo(float).tiny))
