"""A map keeps neighbours together, repeats, and says so when its file is torn."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.metrics import silhouette_score

from mistudio_engine.api.errors import BadInput, CorruptFile, NotFound, WrongShape
from mistudio_engine.discovery.feature_map import Layout, lay_out
from mistudio_engine.discovery.map_store import read_map, write_map


def planted(seed=0, *, n_clusters=5, n=24, d=32, noise=0.15):
    """Clusters of directions, of any length, and which cluster each row is of."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n_clusters, d))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    rows = np.repeat(centres, n, axis=0) + noise * rng.normal(size=(n_clusters * n, d)) / np.sqrt(d) * 3
    return rows * rng.uniform(0.2, 5, size=(len(rows), 1)), np.repeat(np.arange(n_clusters), n)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(("method", "apart"), [("umap", 0.6), ("pca", 0.2)])
def test_planted_clusters_come_out_apart(method, apart):
    rows, cluster = planted()
    xy = lay_out(rows, method).xy
    assert xy.shape == (len(rows), 2)
    assert silhouette_score(xy, cluster) > apart


def test_neighbours_by_cosine_are_neighbours_on_the_map():
    rows, _ = planted()
    assert trustworthiness(rows, lay_out(rows, "umap").xy, n_neighbors=10, metric="cosine") > 0.85


@pytest.mark.parametrize("shape", [(40, 8), (12, 30), (500, 6), (6, 6)])
def test_pca_equals_scikit_learns(shape):
    rows = np.random.default_rng(3).normal(size=shape)
    reference = PCA(2, svd_solver="full").fit(unit(rows))
    found = lay_out(rows, "pca")
    np.testing.assert_allclose(found.xy, reference.transform(unit(rows)), atol=1e-9)
    np.testing.assert_allclose(found.explained_variance, reference.explained_variance_ratio_, atol=1e-9)


@pytest.mark.parametrize("method", ["umap", "pca"])
def test_the_same_seed_gives_the_same_map_to_the_bit(method):
    rows, _ = planted(n=8)
    assert (lay_out(rows, method, seed=3).xy == lay_out(rows, method, seed=3).xy).all()


def test_another_seed_gives_another_map():
    rows, _ = planted(n=8)
    assert not np.allclose(lay_out(rows, "umap", seed=3).xy, lay_out(rows, "umap", seed=4).xy)


@pytest.mark.parametrize("method", ["umap", "pca"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])
def test_fewer_features_than_neighbours_have_a_map(method, n):
    xy = lay_out(np.random.default_rng(n).normal(size=(n, 7)), method).xy
    assert xy.shape == (n, 2)
    assert np.isfinite(xy).all()
    assert len(np.unique(xy.round(6), axis=0)) == n


@pytest.mark.parametrize("method", ["umap", "pca"])
def test_the_same_direction_is_the_same_point_whatever_its_length(method):
    rows, _ = planted(n=6)
    xy = lay_out(np.concatenate([rows, rows[::-1], 4 * rows]), method).xy
    np.testing.assert_allclose(xy[: len(rows)], xy[len(rows) : 2 * len(rows)][::-1], atol=1e-9)
    np.testing.assert_allclose(xy[: len(rows)], xy[2 * len(rows) :], atol=1e-9)


@pytest.mark.parametrize("method", ["umap", "pca"])
def test_one_direction_many_times_is_one_point_and_a_zero_vector_has_a_place(method):
    assert len(np.unique(lay_out(np.ones((20, 5)), method).xy, axis=0)) == 1
    rows, _ = planted(n=5)
    rows[3] = 0
    assert np.isfinite(lay_out(rows, method).xy).all()


@pytest.mark.parametrize("method", ["umap", "pca"])
def test_vectors_of_one_number_have_a_map(method):
    assert np.isfinite(lay_out([[1.0], [-2.0], [3.0]], method).xy).all()


@pytest.mark.parametrize(
    ("vectors", "settings", "error", "match"),
    [
        ([[1.0, np.nan]], {}, BadInput, "Row 0"),
        ([[1.0], [np.inf]], {}, BadInput, "Row 1"),
        ([], {}, WrongShape, "shape"),
        ([1.0, 2.0], {}, WrongShape, "shape"),
        ([[1.0]], {"n_neighbors": 1}, BadInput, "n_neighbors is 1"),
        ([[1.0]], {"min_dist": 2.0}, BadInput, "min_dist 2"),
    ],
)
def test_what_cannot_be_mapped_is_refused(vectors, settings, error, match):
    with pytest.raises(error, match=match):
        lay_out(vectors, **settings)


def test_the_process_that_lays_out_loads_no_torch():
    code = "import sys, mistudio_engine.discovery.feature_map; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_map_is_read_as_it_was_written(tmp_path):
    xy = np.random.default_rng(0).normal(size=(4, 2))
    path = tmp_path / "map-decoder-pca.parquet"
    write_map(path, [3, 5, 8, 9], Layout(xy, [0.5, 0.25]), {"seed": 7})
    found = read_map(path)
    assert found.index.tolist() == [3, 5, 8, 9]
    assert (found.xy == xy).all()
    assert (found.settings, found.explained_variance) == ({"seed": 7}, [0.5, 0.25])
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_missing_and_a_torn_map_are_typed_errors(tmp_path):
    path = tmp_path / "map.parquet"
    with pytest.raises(NotFound, match="map_features"):
        read_map(path)
    write_map(path, [1], Layout(np.zeros((1, 2)), None), {})
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(CorruptFile):
        read_map(path)
