"""What is known of features is read as it is wanted: a few labels of a large dictionary are not all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mistudio_engine.api.records import LabelRecord
from mistudio_engine.handlers.knowledge import Labels
from mistudio_engine.runtime.store import Store


class Counting(Store):
    """A store that counts how often all labels were read."""

    n_all = 0

    def labels(self, sae: str) -> dict[int, LabelRecord]:
        self.n_all += 1
        return super().labels(sae)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Counting]:
    """A store with labels of features 0 to 4."""
    made = Counting(tmp_path / "mistudio.db")
    for index in range(5):
        name(made, index, f"first {index}")
    yield made
    made.close()


def name(store: Store, index: int, label: str) -> None:
    store.add_label(LabelRecord(sae="s", index=index, label=label, author="person"))


def test_labels_that_are_asked_for_by_feature_are_read_alone(store: Counting) -> None:
    labels = Labels(store, "s")
    assert labels[3].label == "first 3" and labels.get(9) is None and 9 not in labels and 4 in labels
    assert store.n_all == 0
    assert sorted(labels) == list(range(5)) and len(labels) == 5 and len(list(labels.values())) == 5
    assert labels.get(9) is None and store.n_all == 1


def test_a_label_stays_as_it_was_when_it_was_first_looked_at(store: Counting) -> None:
    labels = Labels(store, "s")
    assert (labels[1].label, labels.get(7)) == ("first 1", None)
    for index in (1, 2, 7):
        name(store, index, f"second {index}")
    assert (labels[1].label, labels[2].label, labels.get(7)) == ("first 1", "second 2", None)
    assert {index: label.label for index, label in labels.items()} == {
        0: "first 0",
        1: "first 1",
        2: "second 2",
        3: "first 3",
        4: "first 4",
    }
