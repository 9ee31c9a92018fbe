"""The widget's front end alone in a real browser: every state, every way to the engine, every button."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from widget_page import ORIGIN, draw, open_page, update, view

pytest.importorskip("playwright", reason="playwright is not installed; it is in the extra [dev]")

from playwright.sync_api import Page, Route, WebSocketRoute, expect

pytestmark = pytest.mark.browser

WIDGETS = Path(__file__).parents[2] / "mistudio_widgets"

LOST = {"code": "engine_missing", "what": "The engine does not answer.", "why": "", "fix": "Start it."}

ANSWERING = """(refusal) => {
  window.kernel = ({ id, kind }, model) => setTimeout(() =>
    model.answer(kind === "ping" || !refusal ? { id, ok: true } : { id, ok: false, error: refusal }));
}"""


@pytest.fixture
def page(browser: Any) -> Generator[Page]:
    context = browser.new_context(viewport={"width": 800, "height": 600}, reduced_motion="reduce", locale="en-GB")
    context.set_default_timeout(10_000)
    context.add_cookies([{"name": "_xsrf", "value": "the%2Fxsrf", "url": ORIGIN}])
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    context.close()
    assert wrong == []


def button(page: Page, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def test_a_running_job_reads_like_this(page: Page) -> None:
    open_page(page)
    draw(page, view(author="agent:claude", attempt=2))
    expect(page.locator("#main")).to_match_aria_snapshot("""
      - region "Job train-0007":
        - text: Running job/train-0007
        - button "Pause"
        - button "Cancel"
        - text: "/training: step 1,680 of 4,000 42.0 %/"
        - progressbar "Progress of job train-0007"
        - text: /12.3k tokens\\/s .* left .* elapsed/
        - term: loss
        - definition: "0.123"
        - term: L0
        - definition: "31.9"
        - term: FVU
        - definition: "0.182"
        - term: dead fraction
        - definition: "0.0215"
        - text: Started by agent claude Attempt 2 Live through the kernel
        - button "Copy as Python"
        - status: "Job train-0007: running, 25 percent done"
    """)
    bar = page.get_by_role("progressbar")
    expect(bar).to_have_attribute("aria-valuenow", "42")
    expect(bar).to_have_attribute(
        "aria-valuetext", re.compile(r"^42\.0 %, training: step 1,680 of 4,000, 1 min \d+ s left$")
    )


@pytest.mark.parametrize(
    ("state", "word", "buttons"),
    [
        ("queued", "Queued", {"Pause", "Cancel"}),
        ("running", "Running", {"Pause", "Cancel"}),
        ("pausing", "Pausing", {"Resume", "Cancel"}),
        ("paused", "Paused", {"Resume", "Cancel"}),
        ("interrupted", "Interrupted", {"Resume", "Cancel"}),
        ("completed", "Completed", set()),
        ("failed", "Failed", {"Retry"}),
        ("cancelled", "Cancelled", {"Retry"}),
    ],
)
def test_each_state_has_its_word_its_drawing_and_the_buttons_that_it_allows(
    page: Page, state: str, word: str, buttons: set[str]
) -> None:
    open_page(page)
    draw(page, view(state=state, finished_at=960.0 if state in ("completed", "failed", "cancelled") else None))
    expect(page.locator(".ms-job-state")).to_have_text(word)
    expect(page.locator(".ms-icon path")).to_have_attribute("d", re.compile("^M"))
    shown = {each.inner_text() for each in page.get_by_role("button").all()}
    assert shown == buttons | {"Copy as Python"}


def test_a_job_that_could_not_go_on_later_has_no_pause_button(page: Page) -> None:
    open_page(page)
    draw(page, view(resumes="never"))
    expect(button(page, "Cancel")).to_be_visible()
    expect(button(page, "Pause")).to_be_hidden()


def test_without_a_job_it_says_what_to_do(page: Page) -> None:
    open_page(page)
    draw(page, {"slug": None, "job": None, "error": None, "at": 0})
    expect(page.locator("#main")).to_contain_text("No job to follow. Start one, such as job = studio.train_sae(…)")
    expect(page.get_by_role("button")).to_have_count(0)


def test_before_the_record_is_known_the_place_of_the_words_is_kept(page: Page) -> None:
    open_page(page)
    draw(page, {"slug": "train-0007", "job": None, "error": None, "at": 0})
    expect(page.get_by_role("region")).to_have_attribute("aria-busy", "true")
    expect(page.locator(".ms-skeleton").first).to_be_visible()
    update(page, **view())
    expect(page.get_by_role("region")).not_to_have_attribute("aria-busy", "true")
    expect(page.locator(".ms-skeleton").first).to_be_hidden()


def test_a_failed_job_says_what_why_and_what_to_do(page: Page) -> None:
    open_page(page)
    error = {"code": "out_of_memory", "what": "Needs 31.2 GiB.", "why": "18.0 GiB is free.", "fix": "Unload a model."}
    draw(page, view(state="failed", error=error, finished_at=960.0))
    alert = page.get_by_role("alert")
    expect(alert.get_by_role("paragraph")).to_have_text(["Needs 31.2 GiB.", "18.0 GiB is free.", "Unload a model."])


def test_a_job_that_does_not_exist_is_an_error_and_not_a_lost_connection(page: Page) -> None:
    open_page(page)
    error = {
        "code": "not_found",
        "what": "There is no job 'x'.",
        "why": "Known: train-0007.",
        "fix": "Use one of them.",
    }
    draw(page, {"slug": "x", "job": None, "error": error, "at": 0})
    expect(page.get_by_role("alert")).to_contain_text("There is no job 'x'.")
    expect(page.locator("#main")).not_to_contain_text("Connection lost")


def test_a_completed_job_shows_what_came_of_it(page: Page) -> None:
    open_page(page)
    draw(
        page,
        view(state="completed", finished_at=1125.3, result={"sae": "stories-l2", "n_tokens": 1048576, "fvu": 0.18}),
    )
    expect(page.locator("#main")).to_contain_text("Took 3 min 3 s")
    results = page.get_by_label("Result").get_by_role("definition")
    expect(results).to_have_text(["stories-l2", "1,048,576", "0.180"])
    expect(page.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "100")
    expect(page.locator("#main")).not_to_contain_text("Live through")


def test_work_of_unknown_size_has_a_bar_without_a_number(page: Page) -> None:
    open_page(page)
    draw(page, view(progress=None, eta_seconds=None, rate=3.2e6, unit="bytes"))
    bar = page.get_by_role("progressbar")
    expect(bar).not_to_have_attribute("aria-valuenow", re.compile(".*"))
    expect(bar).to_have_attribute("aria-valuetext", re.compile("^share not known"))
    expect(page.locator("#main")).to_contain_text("3.20 MB/s")


def test_text_from_elsewhere_stays_text(page: Page) -> None:
    open_page(page)
    draw(page, view(stage="<img src=x onerror=alert(1)>", author="agent:<b>x</b>", metrics={"<i>loss</i>": 1.0}))
    expect(page.locator("#main")).to_contain_text("<img src=x onerror=alert(1)>")
    expect(page.locator("#main :is(img, b, i)")).to_have_count(0)


def test_updates_leave_the_focus_where_it_is(page: Page) -> None:
    open_page(page)
    draw(page, view())
    button(page, "Cancel").focus()
    update(page, **view(progress=0.5))
    expect(page.locator("#main")).to_contain_text("50.0 %")
    expect(button(page, "Cancel")).to_be_focused()
    update(page, **view(state="cancelled", finished_at=990.0))
    expect(button(page, "Copy as Python")).to_be_focused()  # and not on the top of the page


def test_a_screen_reader_hears_of_new_states_and_each_quarter_only(page: Page) -> None:
    open_page(page)
    draw(page, view(progress=0.1))
    page.evaluate("""() => {
      window.said = [];
      const status = document.querySelector("[role=status]");
      new MutationObserver(() => window.said.push(status.textContent)).observe(status, { childList: true });
    }""")
    for percent in range(10, 80):
        update(page, **view(progress=percent / 100))
    update(page, **view(state="completed", progress=1.0, finished_at=1000.0))
    expect(page.get_by_role("status")).to_have_text("Job train-0007: completed")
    assert page.evaluate("window.said") == [
        "Job train-0007: running, 25 percent done",
        "Job train-0007: running, 50 percent done",
        "Job train-0007: running, 75 percent done",
        "Job train-0007: completed",
    ]


def test_cancel_goes_through_a_kernel_that_answers(page: Page) -> None:
    open_page(page, jupyter=True)
    page.evaluate(ANSWERING, None)
    draw(page, view())
    button(page, "Cancel").click()
    page.wait_for_function("window.model.sent.some(({ kind }) => kind === 'control')")
    expect(button(page, "Cancelling …")).to_be_visible()  # until the job's next step
    update(page, **view(state="cancelled", finished_at=990.0))
    expect(button(page, "Retry")).to_be_visible()
    sent = page.evaluate("window.model.sent")
    assert [each["kind"] for each in sent] == ["ping", "ping", "control"]
    assert sent[-1]["action"] == "cancel"


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    open_page(page)
    page.evaluate(ANSWERING, None)
    draw(page, view())
    page.keyboard.press("Tab")
    expect(button(page, "Pause")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function("window.model.sent.some(({ action }) => action === 'cancel')")


def test_what_the_engine_refuses_is_said(page: Page) -> None:
    open_page(page)
    refusal = {"code": "conflict", "what": "job/train-0007 is completed.", "why": "", "fix": "Make the call again."}
    page.evaluate(ANSWERING, refusal)
    draw(page, view())
    button(page, "Cancel").click()
    expect(page.get_by_role("alert")).to_contain_text("job/train-0007 is completed.")
    expect(button(page, "Cancel")).to_be_enabled()


class JupyterServer:
    """What stands behind `/lab/mistudio/` in these tests: a record, and what was asked of it."""

    def __init__(self, page: Page, **job: Any) -> None:
        self.record = view(**job)["job"]
        self.asked: list[tuple[str, str, str | None]] = []
        self.sockets: list[WebSocketRoute] = []
        self.subscriptions: list[dict[str, Any]] = []
        page.route_web_socket(re.compile("ws://lab.test/.*"), self._socket)

    def answer(self, route: Route) -> None:
        request = route.request
        self.asked.append((request.method, request.url.removeprefix(ORIGIN), request.headers.get("x-xsrftoken")))
        if request.method == "POST":
            self.record["state"] = {"cancel": "cancelled", "pause": "paused"}[
                json.loads(request.post_data or "")["action"]
            ]
        route.fulfill(json=self.record)

    def _socket(self, socket: WebSocketRoute) -> None:
        self.sockets.append(socket)
        socket.on_message(lambda message: self._subscribed(socket, json.loads(message)))

    def _subscribed(self, socket: WebSocketRoute, message: dict[str, Any]) -> None:
        self.subscriptions.append(message)
        socket.send(json.dumps({"channel": "engine", "event": "hello", "seq": 0, "at": 0.0, "data": {}}))

    def send(self, event: str, seq: int, **data: Any) -> None:
        message = {"channel": "jobs/train-0007", "event": event, "seq": seq, "at": 1010.0, "data": data}
        self.sockets[-1].send(json.dumps(message))


def test_when_the_kernel_falls_silent_the_jupyter_server_is_followed_and_then_the_kernel_again(page: Page) -> None:
    server = JupyterServer(page, progress=0.6)
    page.clock.install()
    open_page(page, jupyter=True, answer=server.answer)
    draw(page, view(progress=0.5))
    main = page.locator("#main")
    expect(main).to_contain_text("Live through the kernel")
    page.clock.run_for(8_000)
    expect(main).to_contain_text("Live through the Jupyter server (the kernel is silent)")
    expect(main).to_contain_text("60.0 %")
    assert server.subscriptions == [{"subscribe": ["jobs/train-0007"], "after": None}]
    server.send("progress", 41, progress=0.7, stage="training: step 2,800 of 4,000")
    server.send("metrics", 42, metrics={"loss": 0.0999})
    expect(main).to_contain_text("70.0 %")
    expect(page.get_by_role("definition").first).to_have_text("0.0999")

    server.sockets[-1].close()
    expect(main).to_contain_text("Connection lost")
    expect(main).to_contain_text("running, 70.0 %")
    page.clock.run_for(1_000)
    expect(main).to_contain_text("Live through the Jupyter server")
    assert server.subscriptions[-1]["after"] == 42

    update(page, **view(progress=0.8))
    expect(main).to_contain_text("Live through the kernel")
    expect(main).to_contain_text("80.0 %")


def test_the_end_of_the_job_arrives_without_the_kernel(page: Page) -> None:
    server = JupyterServer(page)
    page.clock.install()
    open_page(page, jupyter=True, answer=server.answer)
    draw(page, view())
    page.clock.run_for(8_000)
    expect(page.locator("#main")).to_contain_text("the kernel is silent")
    server.record |= {"state": "completed", "progress": 1.0, "finished_at": 1100.0, "result": {"sae": "stories-l2"}}
    server.send("completed", 50, state="completed")
    expect(page.locator(".ms-job-state")).to_have_text("Completed")
    expect(page.get_by_label("Result")).to_contain_text("stories-l2")


def test_a_busy_kernel_is_passed_by_and_no_action_is_left_in_its_queue(page: Page) -> None:
    server = JupyterServer(page)
    open_page(page, jupyter=True, answer=server.answer)
    draw(page, view())
    button(page, "Cancel").click()
    expect(button(page, "Cancelling …")).to_be_visible()
    expect(page.locator(".ms-job-state")).to_have_text("Cancelled")
    path = "/lab/mistudio/api/v1/jobs/train-0007"
    assert server.asked == [("GET", path, None), ("POST", f"{path}/control", "the/xsrf")]
    assert {each["kind"] for each in page.evaluate("window.model.sent")} == {"ping", "refresh"}


def test_a_job_of_the_same_name_in_another_engine_is_neither_followed_nor_cancelled(page: Page) -> None:
    server = JupyterServer(page, progress=0.9, created_at=17.0)
    page.clock.install()
    open_page(page, jupyter=True, answer=server.answer)
    draw(page, view(progress=0.5))
    page.clock.run_for(8_000)
    expect(page.locator("#main")).to_contain_text("Connection lost")
    expect(page.locator("#main")).to_contain_text("50.0 %")
    button(page, "Cancel").click()
    page.clock.run_for(2_000)
    expect(page.get_by_role("alert")).to_contain_text("there is no other way to the engine")
    assert "POST" not in {method for method, _, _ in server.asked}


def test_where_there_is_no_jupyter_server_a_silent_kernel_is_a_lost_connection(page: Page) -> None:
    page.clock.install()
    open_page(page)
    draw(page, view())
    page.clock.run_for(8_000)
    expect(page.locator("#main")).to_contain_text(
        re.compile(r"Connection lost\. Last known at \d\d:\d\d:\d\d: running, 42\.0 %")
    )
    expect(page.locator("#main")).to_contain_text("Not connected")
    update(page, **view(at=1008.0, progress=0.5))
    expect(page.locator("#main")).to_contain_text("Live through the kernel")
    expect(page.locator("div.ms-note")).to_be_hidden()


def test_a_kernel_that_lost_the_engine_says_so_and_keeps_the_last_known_state(page: Page) -> None:
    open_page(page)
    draw(page, view())
    update(page, error=LOST)  # the view's own error, not the job's
    expect(page.locator("div.ms-note")).to_contain_text("Connection lost.")
    expect(page.locator("div.ms-note")).to_contain_text("Start it.")
    expect(page.locator("#main")).to_contain_text("42.0 %")
    expect(page.get_by_role("status")).to_have_text(re.compile("connection lost$"))


def test_a_kernel_whose_engine_stopped_answering_does_not_look_live(page: Page) -> None:
    page.clock.install()
    open_page(page)
    draw(page, view())
    for _ in range(6):  # it pulses, but `at`, when it heard the engine last, stands still
        update(page)
        page.clock.run_for(2_000)
    expect(page.locator("#main")).to_contain_text("Not connected")


def test_the_times_go_on_between_two_reports(page: Page) -> None:
    page.clock.install()
    open_page(page)
    draw(page, view())
    page.clock.run_for(5_000)
    expect(page.locator("#main")).to_contain_text(re.compile(r"1 min 1[45] s left.*1 min [34] s elapsed"))


def test_copy_as_python_gives_lines_that_do_the_same(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_page(page)
    draw(page, view())
    page.evaluate(
        """() => { document.execCommand = () => { window.copied = document.activeElement.value; return true; } }"""
    )
    button(page, "Copy as Python").click()
    expect(button(page, "Copied")).to_be_visible()
    copied = page.evaluate("window.copied")
    assert 'studio.call(ShowJob(job="train-0007"))' in copied
    compile(copied, "copied", "exec")


@pytest.mark.parametrize("width", [400, 480, 1200])
def test_it_fits_from_a_narrow_column_to_the_full_width(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 600})
    open_page(page)
    draw(page, view(slug="train-" + "long-" * 20 + "name", stage="training " + "x" * 200, author="agent:" + "y" * 60))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for one in page.locator("#main .ms-pairs dd, #main button").all():
        if one.is_visible():
            assert one.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), one.inner_text()


def test_nothing_moves_where_motion_is_unwelcome(page: Page) -> None:
    open_page(page)
    draw(page, view(progress=None))
    moving = "[...document.querySelectorAll('.ms *')].filter((e) => e.getAnimations().length > 0).length"
    assert page.evaluate(moving) == 0
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(moving) > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground_without_any_theme(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    open_page(page, style="color-scheme: light dark; background: Canvas")
    draw(page, view(state="failed", error=LOST))
    assert page.evaluate(CONTRAST) >= 4.5


CONTRAST = """() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const paint = (...colours) => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratios = [];
  for (const element of document.querySelectorAll("#main :is(span, p, dt, dd, button)")) {
    if (!element.checkVisibility() || !element.textContent) continue;
    const grounds = [];
    for (let e = element; e; e = e.parentElement) grounds.unshift(getComputedStyle(e).backgroundColor);
    const ground = paint(...grounds);
    const ink = paint(...grounds, getComputedStyle(element).color);
    ratios.push((Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05));
  }
  return Math.min(...ratios);
}"""
"""The least contrast of any words, as WCAG counts it."""


AXE = WIDGETS / "node_modules" / "axe-core" / "axe.min.js"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", ["queued", "running", "paused", "completed", "failed"])
def test_axe_finds_nothing(page: Page, state: str, scheme: Any) -> None:
    if not AXE.is_file():
        pytest.skip("axe-core is not there; `npm ci` in mistudio_widgets brings it")
    page.emulate_media(color_scheme=scheme)
    open_page(page, style="color-scheme: light dark; background: Canvas")
    draw(page, view(state=state, error=LOST if state == "failed" else None, result={"sae": "stories-l2"}))
    page.add_script_tag(path=AXE)
    found = page.evaluate("axe.run('#main').then(({ violations }) => violations)")
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []


def test_the_widget_asks_for_nothing_but_its_own_two_files(page: Page) -> None:
    asked = open_page(page, jupyter=True)
    draw(page, view())
    expect(page.get_by_role("progressbar")).to_be_visible()
    assert set(asked) <= {"/", "/job_progress.js", "/job_progress.css", "/favicon.ico"}


def test_a_view_that_is_closed_leaves_no_listener_behind(page: Page) -> None:
    open_page(page)
    draw(page, view())
    page.evaluate("window.controller.abort()")
    assert page.evaluate("Object.values(window.model.heard).flat().length") == 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("number(0)", "0"),
        ("number(0.12345)", "0.123"),
        ("number(-31.94)", "-31.9"),
        ("number(999.6)", "1.00k"),
        ("number(12345.6)", "12.3k"),
        ("number(3.2e9)", "3.20G"),
        ("number(1.2e-5)", "1.20e-5"),
        ("number(1e18)", "1.00e+18"),
        ("number(NaN)", "–"),
        ("number(null)", "–"),
        ("percent(0)", "0 %"),
        ("percent(0.0000001)", "0 %"),
        ("percent(0.0011)", "0.110 %"),
        ("percent(0.042)", "4.20 %"),
        ("percent(0.9999)", "99.9 %"),
        ("percent(1)", "100 %"),
        ("duration(0.44)", "0.4 s"),
        ("duration(59.6)", "1 min"),
        ("duration(80)", "1 min 20 s"),
        ("duration(7500)", "2 h 5 min"),
        ("duration(273600)", "3 d 4 h"),
        ("duration(null)", "–"),
        ("rate(12345, 'tokens')", "12.3k tokens/s"),
        ("rate(3.2e6, 'bytes')", "3.20 MB/s"),
        ("rate(512, 'bytes')", "512 B/s"),
        ("count(1048576)", "1,048,576"),
    ],
)
def test_numbers_have_three_significant_figures_and_their_unit(format_page: Page, call: str, text: str) -> None:
    assert format_page.evaluate(f"window.format.{call}") == text


@pytest.fixture(scope="module")
def format_page(browser: Any) -> Generator[Page]:
    context = browser.new_context()
    page = context.new_page()
    source = (WIDGETS / "js" / "lib" / "format.js").read_text("utf-8")
    page.route("**/*", lambda route: route.fulfill(body=source, content_type="text/javascript"))
    page.goto(f"{ORIGIN}/format.js")
    page.evaluate("async () => { window.format = await import('/format.js'); }")
    yield page
    context.close()
