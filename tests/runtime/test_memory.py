"""Memory is promised before work starts, and given back by whoever has not been used for longest."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from mistudio_engine.api.errors import Conflict, NotFound, OutOfMemory, Unsupported
from mistudio_engine.runtime.compute import ComputeLane
from mistudio_engine.runtime.memory import MemoryLedger, measured_capacities

GIB = 1024**3


@pytest.fixture
def ledger() -> MemoryLedger:
    return MemoryLedger(capacities={"cpu": 10 * GIB, "cuda:0": 4 * GIB})


def use(ledger: MemoryLedger, key: str, gib: float, unloaded: list[str] | None = None) -> str:
    with ledger.resident(
        key, int(gib * GIB), lambda: f"<{key}>", unloaded.append if unloaded is not None else None
    ) as it:
        return it


def test_a_resident_is_loaded_once_and_stays(ledger: MemoryLedger) -> None:
    loads: list[int] = []
    for _ in range(3):
        with ledger.resident("model/gpt2", GIB, lambda: loads.append(1) or "weights") as weights:
            assert weights == "weights"
            assert ledger.loaded()[0].in_use
    assert loads == [1]
    (resident,) = ledger.loaded()
    assert (resident.key, resident.n_bytes, resident.in_use) == ("model/gpt2", GIB, False)
    assert ledger.free_bytes() == 9 * GIB


def test_the_least_recently_used_idle_residents_make_room(ledger: MemoryLedger) -> None:
    unloaded: list[str] = []
    for key in ("a", "b", "c"):
        use(ledger, key, 3, unloaded)
    use(ledger, "a", 3)
    use(ledger, "d", 4, unloaded)
    assert unloaded == ["<b>"]
    assert [each.key for each in ledger.loaded()] == ["c", "a", "d"]


def test_what_is_in_use_is_never_unloaded_and_the_refusal_names_it(ledger: MemoryLedger) -> None:
    use(ledger, "idle", 2)
    with (
        ledger.resident("model/big", 7 * GIB, lambda: None),
        pytest.raises(OutOfMemory, match=r"Training needs about 5.0 GiB and 3.0 GiB is free.*model/big \(7.0 GiB\)"),
        ledger.reserve("Training", 5 * GIB),
    ):
        pass
    assert [each.key for each in ledger.loaded()] == ["idle", "model/big"], "a refusal unloads nothing in vain"


def test_more_than_there_is_in_all_is_said_to_be_so(ledger: MemoryLedger) -> None:
    with pytest.raises(OutOfMemory, match=r"Loading x needs about 11.0 GiB .*cpu has 10.0 GiB in all"):
        use(ledger, "x", 11)


def test_a_reservation_counts_until_its_block_ends(ledger: MemoryLedger) -> None:
    use(ledger, "idle", 8)
    with ledger.reserve("Training", 9 * GIB):
        assert ledger.loaded() == []
        assert ledger.free_bytes() == GIB
    with pytest.raises(ZeroDivisionError), ledger.reserve("Training", 9 * GIB):
        raise ZeroDivisionError
    assert ledger.free_bytes() == 10 * GIB


def test_devices_are_counted_apart(ledger: MemoryLedger) -> None:
    with ledger.resident("on gpu", 3 * GIB, lambda: None, device="cuda:0"):
        assert (ledger.free_bytes(), ledger.free_bytes("cuda:0")) == (10 * GIB, GIB)
        use(ledger, "on cpu", 10)
        with pytest.raises(OutOfMemory), ledger.reserve("More", 2 * GIB, device="cuda:0"):
            pass
    ledger.set_capacity(GIB, "cuda:0")
    assert ledger.capacity("cuda:0") == GIB
    with pytest.raises(Unsupported, match="There is no device 'cuda:7' here"):
        ledger.free_bytes("cuda:7")


def test_a_load_that_fails_leaves_nothing_behind(ledger: MemoryLedger) -> None:
    with pytest.raises(ZeroDivisionError), ledger.resident("x", GIB, lambda: 1 // 0):
        pass
    assert ledger.loaded() == []
    assert ledger.free_bytes() == 10 * GIB


def test_unloading_by_hand_says_why_it_cannot(ledger: MemoryLedger) -> None:
    unloaded: list[str] = []
    with ledger.resident("a", GIB, lambda: "<a>", unloaded.append), pytest.raises(Conflict, match="a is in use"):
        ledger.unload("a")
    ledger.unload("a")
    assert unloaded == ["<a>"]
    with pytest.raises(NotFound, match="a is not in memory"):
        ledger.unload("a")


def test_one_resident_can_have_several_users_that_leave_in_any_order(ledger: MemoryLedger) -> None:
    first, second = ExitStack(), ExitStack()
    first.enter_context(ledger.resident("a", GIB, lambda: None))
    second.enter_context(ledger.resident("a", GIB, lambda: None))
    first.close()
    assert ledger.loaded()[0].n_users == 1
    second.close()
    assert not ledger.loaded()[0].in_use


def test_with_a_lane_only_its_thread_may_load(ledger: MemoryLedger) -> None:
    lane = ComputeLane()
    lane.start()
    try:
        guarded = MemoryLedger(lane, {"cpu": GIB})
        with pytest.raises(RuntimeError, match="only the thread 'mistudio-compute'"):
            use(guarded, "a", 0.5)
        assert lane.run(lambda: use(guarded, "a", 0.5)) == "<a>"
        assert [each.key for each in guarded.loaded()] == ["a"]
    finally:
        lane.stop()
    guarded.clear()
    assert guarded.loaded() == []


def test_the_measured_capacities_are_those_of_this_machine() -> None:
    found = measured_capacities()
    assert found["cpu"] > 64 * 1024**2
    assert all(name == "cpu" or name.startswith("cuda:") for name in found)
