"""The health of a dictionary is what its arrays say."""

from __future__ import annotations

import numpy as np
import pytest

from mistudio_engine.discovery import health
from mistudio_engine.discovery.health import findings, nearest_cosines, quantiles


def unit_rows(n: int, d: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_nearest_cosine_is_that_of_a_brute_force_among_the_living(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_AT_ONCE", 7)
    rows = unit_rows(40, 12, 0)
    rows[31] = rows[4]
    among = np.array([each for each in range(40) if each % 5 != 3])
    found = nearest_cosines(rows, among)
    assert found.looked_at.tolist() == among.tolist()
    for feature, cosine in zip(found.looked_at, found.cosine, strict=True):
        expected = max(float(rows[feature].astype(np.float64) @ rows[other]) for other in among if other != feature)
        assert cosine == pytest.approx(expected, abs=1e-6)
    assert found.cosine[among.tolist().index(4)] == pytest.approx(1, abs=1e-6)


def test_of_many_features_a_sample_is_compared_with_all() -> None:
    rows = unit_rows(300, 8, 1)
    whole, some = nearest_cosines(rows, np.arange(300)), nearest_cosines(rows, np.arange(300), n_looked_at=50)
    assert len(some.cosine) == len(set(some.looked_at.tolist())) == 50
    assert some.cosine == pytest.approx(whole.cosine[some.looked_at], abs=1e-6)


@pytest.mark.parametrize("among", [[], [3]])
def test_one_living_feature_has_no_neighbour(among: list[int]) -> None:
    assert len(nearest_cosines(unit_rows(5, 4, 2), np.array(among, dtype=np.int64)).cosine) == 0


def test_quantiles_leave_out_what_is_not_known() -> None:
    found = quantiles([np.nan, 1.0, 2.0, 3.0])
    assert found is not None and found["n"] == 3 and found["p50"] == 2.0 and found["mean"] == 2.0
    assert quantiles([np.nan]) is None and quantiles([]) is None


def test_a_healthy_dictionary_has_no_findings_and_a_sick_one_names_each() -> None:
    assert findings({"dead": 0.01, "dense": 0.0, "rare": 0.1, "silent": 0.0, "interpretability": 0.9}) == []
    sick = {"dead": 0.5, "dense": 0.1, "rare": 0.4, "silent": 0.2, "duplicates": 0.3, "interpretability": 0.55}
    said = findings(sick)
    assert len(said) == 6
    assert said[2].startswith("40% of the living")
    assert said[0].startswith("50%") and "0.55" in said[-1]
    assert findings({"silent": None}) == []
