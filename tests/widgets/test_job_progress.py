"""The Python side of the job widget: what it follows, what it sends to the browser, what it answers."""

from __future__ import annotations

import itertools
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mistudio_widgets
from mistudio_engine.api.errors import BadInput, Conflict, EngineMissing, MistudioError, NotFound
from mistudio_engine.api.events import Event
from mistudio_engine.api.operations.jobs import ControlJob, ShowJob
from mistudio_engine.api.records import Job
from mistudio_widgets import JobProgress, _base, job_progress
from mistudio_widgets._base import Publisher

WIDGETS = Path(mistudio_widgets.__file__).parent

PATIENCE = 20.0


class Script:
    """A client whose engine does what the test says: one job, its events, and whether anybody answers."""

    def __init__(self, **job: Any) -> None:
        self.record = Job(**{"slug": "train-0007", "operation": "train_sae", "state": "running", **job})
        self.away: MistudioError | None = None
        self.events: queue.Queue[Event | None] = queue.Queue()
        self.changed = threading.Condition()
        self.n_reads = 0
        self._seq = itertools.count(1)

    def call(self, operation: Any) -> Job:
        if isinstance(operation, ControlJob):
            if self.record.finished and operation.action != "retry":
                raise Conflict(f"{self.record.ref} is {self.record.state}.")
            states = {"cancel": "cancelled", "pause": "paused", "resume": "running", "retry": "queued"}
            self.becomes(state=states[operation.action])
            return self.record
        assert isinstance(operation, ShowJob)
        self.n_reads += 1
        with self.changed:
            self.changed.wait_for(lambda: self.away or self.record.finished, timeout=operation.wait_s)
            if self.away:
                raise self.away
            return self.record

    def follow(self, channels: Iterable[str], after: int | None = None) -> Iterator[Event]:
        assert list(channels) == ["jobs/train-0007"]
        while (event := self.events.get()) is not None:
            yield event

    def happens(self, event: str, **data: Any) -> None:
        self.events.put(Event(seq=next(self._seq), at=0.0, channel="jobs/train-0007", event=event, data=data))

    def becomes(self, **changes: Any) -> None:
        with self.changed:
            self.record = self.record.model_copy(update=changes)
            self.changed.notify_all()
        self.happens(self.record.state)


class Watched(JobProgress):
    """The widget, with everything it sends to the browser written down."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self.answers: list[dict[str, Any]] = []
        self.news = threading.Condition()
        super().__init__(*arguments, **keywords)
        self.observe(self._note, "view")

    def _note(self, change: Any) -> None:
        with self.news:
            self.sent.append(change["new"])
            self.news.notify_all()

    def send(self, content: Any, buffers: Any = None) -> None:
        self.answers.append(content)

    def sees(self, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Wait until the browser would see a view like this."""
        with self.news:
            assert self.news.wait_for(lambda: condition(self.view), timeout=PATIENCE), self.view
            return self.view


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that a person would not mind are shortened."""
    monkeypatch.setattr(_base, "PULSE_SECONDS", 0.05)
    monkeypatch.setattr(job_progress, "WATCH_SECONDS", 0.1)
    monkeypatch.setattr(job_progress, "RETRY_SECONDS", 0.01)


@pytest.fixture
def follow(request: pytest.FixtureRequest) -> Callable[..., tuple[Watched, Script]]:
    """Makes a widget that follows a script; both end with the test."""

    def make(job: Any = "train-0007", **fields: Any) -> tuple[Watched, Script]:
        script = Script(**fields)
        widget = Watched(job, script)

        def end() -> None:
            widget.close()
            script.events.put(None)

        request.addfinalizer(end)
        return widget, script

    return make


def test_the_record_is_shown_and_is_a_value_in_python(follow: Any) -> None:
    widget, _ = follow(progress=0.25)
    view = widget.sees(lambda view: view["job"])
    assert (view["slug"], view["job"]["state"], view["job"]["progress"], view["error"]) == (
        "train-0007",
        "running",
        0.25,
        None,
    )
    assert widget.job.progress == 0.25
    assert widget.result is None
    assert repr(widget) == "JobProgress(job/train-0007: running, 25%)"


@pytest.mark.parametrize("job", ["train-0007", "job/train-0007", Job(slug="train-0007", operation="train_sae")])
def test_a_job_is_given_by_its_slug_its_ref_or_its_record(follow: Any, job: Any) -> None:
    widget, _ = follow(job)
    assert widget.sees(lambda view: view["job"] and view["job"]["state"] == "running")["slug"] == "train-0007"


def test_without_a_job_nothing_is_followed() -> None:
    widget = JobProgress()
    assert (widget.view["slug"], widget.view["job"], widget.job, repr(widget)) == (
        None,
        None,
        None,
        "JobProgress(no job)",
    )
    with pytest.raises(BadInput):
        widget.cancel()
    assert widget.refresh() is None


def test_progress_arrives_with_its_events(follow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_progress, "WATCH_SECONDS", PATIENCE)  # the record is read once and then not again
    widget, script = follow(metrics={"l0": 32.0})
    widget.sees(lambda view: view["job"])
    script.happens("metrics", job="train-0007", metrics={"loss": 0.5})
    script.happens(
        "progress", job="train-0007", progress=0.5, stage="step 2", rate=10.0, unit="tokens", eta_seconds=3.0
    )
    job = widget.sees(lambda view: view["job"]["progress"] == 0.5)["job"]
    assert (job["stage"], job["rate"], job["eta_seconds"], job["metrics"]) == (
        "step 2",
        10.0,
        3.0,
        {"l0": 32.0, "loss": 0.5},
    )


def test_a_flood_of_events_becomes_ten_updates_a_second_and_ends_with_the_end(follow: Any) -> None:
    widget, script = follow()
    widget.sees(lambda view: view["job"])
    n_before, began = len(widget.sent), time.monotonic()
    for step in range(5000):
        script.happens("progress", progress=step / 5000)
    script.becomes(state="completed", progress=1.0, result={"sae": "stories-l2", "features": [1, 2]})
    view = widget.sees(lambda view: view["job"]["state"] == "completed")
    seconds = time.monotonic() - began
    assert len(widget.sent) - n_before <= 10 * seconds + 2
    assert view["job"]["result"] == {"sae": "stories-l2"}
    assert widget.result == {"sae": "stories-l2", "features": [1, 2]}


def test_the_last_state_is_the_last_message(follow: Any) -> None:
    widget, script = follow()
    widget.sees(lambda view: view["job"])
    script.becomes(state="failed", progress=0.5)
    script.happens("progress", progress=0.6)  # a straggler
    widget.sees(lambda view: view["job"]["state"] == "failed")
    with widget.news:
        widget.news.wait_for(lambda: False, timeout=0.5)
    assert {each["job"]["state"] for each in widget.sent[-2:]} == {"failed"}
    assert widget.job.progress == 0.5


def test_an_engine_that_is_away_is_said_and_the_last_known_state_stays(follow: Any) -> None:
    widget, script = follow(progress=0.25)
    known = widget.sees(lambda view: view["job"])
    with script.changed:
        script.away = EngineMissing("The engine does not answer.", fix="Start it.")
        script.changed.notify_all()
    lost = widget.sees(lambda view: view["error"])
    assert (lost["error"]["code"], lost["error"]["fix"], lost["job"]["progress"]) == (
        "engine_missing",
        "Start it.",
        0.25,
    )
    assert lost["at"] >= known["at"]
    script.away = None
    assert widget.sees(lambda view: not view["error"])["at"] > lost["at"]


def test_a_job_that_does_not_exist_is_not_asked_for_again_and_again(follow: Any) -> None:
    script = Script()
    script.away = NotFound.of("job", "train-0007", [])
    widget = Watched("train-0007", script)
    widget.sees(lambda view: view["error"] and view["error"]["code"] == "not_found")
    n_reads = script.n_reads
    with widget.news:
        widget.news.wait_for(lambda: False, timeout=0.3)
    assert script.n_reads == n_reads
    widget.close()
    script.events.put(None)


def test_the_browser_is_answered_whatever_it_asks(follow: Any) -> None:
    widget, _ = follow()
    widget.sees(lambda view: view["job"])
    for question in ({"kind": "ping"}, {"kind": "control", "action": "cancel"}, {"kind": "control", "action": "pause"}):
        widget._handle_custom_msg({"id": question["kind"], **question}, [])
    widget._handle_custom_msg({"id": 4, "kind": "format the disk"}, [])
    widget._handle_custom_msg({"id": 5, "kind": "control"}, [])
    ping, cancelled, refused, unknown, malformed = widget.answers
    assert ping == {"id": "ping", "ok": True} and cancelled["ok"]
    assert (refused["ok"], refused["error"]["code"]) == (False, "conflict")
    assert (unknown["ok"], unknown["error"]["code"]) == (False, "bad_input")
    assert (malformed["ok"], malformed["error"]["code"]) == (False, "internal")
    assert widget.job.state == "cancelled"


def test_a_job_that_is_retried_is_followed_again(follow: Any) -> None:
    widget, script = follow()
    widget.sees(lambda view: view["job"])
    widget.cancel()
    widget.sees(lambda view: view["job"]["state"] == "cancelled")
    assert widget.retry().state == "queued"
    script.becomes(state="running", attempt=2, progress=0.1)
    assert widget.sees(lambda view: view["job"]["progress"] == 0.1)["job"]["attempt"] == 2


def test_a_job_that_was_retried_elsewhere_is_followed_again_when_the_browser_says_so(follow: Any) -> None:
    widget, script = follow(state="cancelled")
    widget.sees(lambda view: view["job"] and view["job"]["state"] == "cancelled")
    script.becomes(state="running", attempt=2)
    widget._handle_custom_msg({"id": 1, "kind": "refresh"}, [])
    script.becomes(progress=0.75)
    widget.sees(lambda view: view["job"]["progress"] == 0.75)


def test_a_widget_of_a_finished_job_needs_no_engine() -> None:
    widget = JobProgress(Job(slug="train-0007", operation="train_sae", state="completed", result={"sae": "x"}))
    assert widget.view["job"]["state"] == "completed"
    assert widget.result == {"sae": "x"}


def test_while_a_job_goes_on_the_widget_says_that_its_kernel_is_there(follow: Any) -> None:
    widget, _ = follow(state="queued")
    first = widget.sees(lambda view: view["job"])["pulse"]
    widget.sees(lambda view: view["pulse"] >= first + 3)


def test_a_publisher_never_sends_faster_than_ten_times_a_second_and_loses_only_what_was_replaced() -> None:
    sent: list[tuple[float, dict[str, Any]]] = []
    publisher = Publisher(lambda values: sent.append((time.monotonic(), values)), name="test")
    began = time.monotonic()
    n = 0
    while time.monotonic() - began < 0.55:
        n += 1
        publisher.put(n=n, odd=n % 2)
    publisher.settle(last=True)
    publisher.close()
    assert publisher.join(PATIENCE)
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(sent)]
    assert min(gaps) > 0.095 and 4 <= len(sent) <= 10
    assert sent[-1][1] == {"n": n, "odd": n % 2, "last": True, "pulse": len(sent)}


def test_the_last_state_is_repeated_in_case_it_was_lost_and_then_all_is_still() -> None:
    sent: list[dict[str, Any]] = []
    publisher = Publisher(sent.append, name="test")
    publisher.settle(state="completed")
    still = threading.Event()
    still.wait(1.0)  # twenty pulses
    assert [each["state"] for each in sent] == ["completed"] * (1 + _base.FAREWELLS)
    publisher.close()
    assert publisher.join(PATIENCE)


@pytest.mark.parametrize("kind", ["js", "css"])
def test_the_built_files_are_in_the_package_and_small(kind: str) -> None:
    path = WIDGETS / "static" / f"job_progress.{kind}"
    assert 1_000 < path.stat().st_size < 100_000
    assert "http" not in path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "").replace("/^http/", "")


def test_the_built_files_are_what_their_sources_make() -> None:
    if shutil.which("node") is None or not (WIDGETS / "node_modules" / "esbuild").is_dir():
        pytest.skip("node or esbuild is not there; `npm ci` in mistudio_widgets brings the second")
    done = subprocess.run(["node", "js/build.mjs", "--check"], cwd=WIDGETS, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
