"""Features on a plane: vectors laid out in two dimensions by UMAP or PCA.

Rows are brought to length 1 first, so that near means a like direction. Both ways are repeatable: the same vectors and
seed give the same map. It knows neither what the vectors are nor where a map is kept, and imports no torch: it is run
in a process of its own.
"""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mistudio_engine.api.errors import BadInput, WrongShape

__all__ = ["Layout", "lay_out", "lay_out_file", "pca", "umap"]

Method = Literal["umap", "pca"]

N_NEIGHBORS, MIN_DIST = 15, 0.1
"""UMAP's defaults (McInnes, Healy and Melville 2018, section 4.3 on what they do)."""

_FEW = 4
"""Below this many different points UMAP's spectral start has no solution; they are started at random."""


class Layout(NamedTuple):
    """Points on a plane."""

    xy: NDArray[np.float64]
    """(n, 2)"""

    explained_variance: list[float] | None
    """Share of the variance of the unit vectors along each axis; of PCA only."""


def lay_out(
    vectors: ArrayLike,
    method: Method = "umap",
    *,
    n_neighbors: int = N_NEIGHBORS,
    min_dist: float = MIN_DIST,
    seed: int = 0,
) -> Layout:
    """Lay out (n, d) vectors on a plane; the last three arguments are UMAP's.

    Raises:
        WrongShape: it is no table with at least one row and column.
        BadInput: a number in it is not finite, or a setting is out of range.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    if rows.ndim != 2 or not rows.size:
        raise WrongShape(f"A map needs a table of vectors and this has shape {rows.shape}.")
    if not np.isfinite(rows).all():
        at = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise BadInput(f"Row {at} of the vectors holds NaN or infinity.", fix="Leave it out, or check the SAE.")
    if n_neighbors < 2 or not 0 <= min_dist <= 1:
        raise BadInput(
            f"n_neighbors is {n_neighbors} and min_dist {min_dist}.",
            fix="Use at least 2 neighbours and a distance from 0 to 1.",
        )
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return pca(rows) if method == "pca" else Layout(umap(rows, n_neighbors, min_dist, seed), None)


def pca(rows: NDArray[np.float64]) -> Layout:
    """The two directions of largest variance, in float64.

    The right singular vectors of the centred rows; for tall tables they are taken from the covariance, whose
    eigenvectors they are. The largest entry of each is made positive, so that the same rows give the same map.
    """
    centred = rows - rows.mean(axis=0)
    n, d = centred.shape
    if n > 2 * d:
        values, directions = np.linalg.eigh(centred.T @ centred)
        variance, axes = values[::-1].clip(min=0), directions[:, ::-1].T
    else:
        _, singular, axes = np.linalg.svd(centred, full_matrices=False)
        variance = singular**2
    axes = axes[:2]
    largest = np.abs(axes).argmax(axis=1)
    axes = axes * np.where(axes[np.arange(len(axes)), largest] < 0, -1.0, 1.0)[:, None]
    xy = np.zeros((n, 2))
    xy[:, : len(axes)] = centred @ axes.T
    total = float(variance.sum())
    shares = [float(each) / total if total else 0.0 for each in variance[:2]]
    return Layout(xy, shares + [0.0] * (2 - len(shares)))


def umap(rows: NDArray[np.float64], n_neighbors: int, min_dist: float, seed: int) -> NDArray[np.float64]:
    """(n, 2) by cosine distance between unit rows. Rows that are the same lie on one point.

    McInnes, Healy and Melville (2018). On one thread, without which a seed would not repeat.
    """
    points, place = np.unique(rows.astype(np.float32), axis=0, return_inverse=True)
    place = place.reshape(-1)
    n = len(points)
    if n < 3:  # no neighbourhood has a shape: one point at the origin, or two apart
        return np.array([[0.0, 0.0], [1.0, 0.0]])[place]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TensorFlow is missing; that a group of points has no way to the others
        from umap import UMAP  # takes seconds

        xy = UMAP(
            n_neighbors=min(n_neighbors, n - 1),
            min_dist=min_dist,
            metric="cosine",
            init="spectral" if n > _FEW else "random",
            random_state=seed % 2**32,
            n_jobs=1,
        ).fit_transform(points)
    xy = np.asarray(xy, dtype=np.float64)
    lost = ~np.isfinite(xy).all(axis=1)  # points without a single neighbour; in the middle they are at least seen
    xy[lost] = xy[~lost].mean(axis=0) if (~lost).any() else 0.0
    return (xy - xy.mean(axis=0))[place]


def lay_out_file(
    path: str, method: Method, n_neighbors: int, min_dist: float, seed: int
) -> tuple[NDArray[np.float64], list[float] | None]:
    """`lay_out` of the vectors in a `.npy` file, as plain data for another process."""
    vectors = np.load(path, allow_pickle=False)
    layout = lay_out(vectors, method, n_neighbors=n_neighbors, min_dist=min_dist, seed=seed)
    return layout.xy, layout.explained_variance
