"""A widget alone on a blank page in a real browser, with a tiny model in place of anywidget's.

The page has no network: what is under `http://lab.test` is answered from here, and all else would fail.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, Route

import mistudio_widgets

STATIC = Path(mistudio_widgets.__file__).parent / "static"

ORIGIN = "http://lab.test"

HTML = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>One widget</title>
<link rel="stylesheet" href="/job_progress.css">
{config}
<style>body {{ margin: 16px; {style} }}</style></head>
<body {attributes}><main id="main"></main><script type="module">
import widget from "/job_progress.js";
class Model {{
  constructor(state) {{ this.state = state; this.heard = {{}}; this.sent = []; }}
  get(name) {{ return this.state[name]; }}
  set(name, value) {{ this.state[name] = value; for (const f of this.heard[`change:${{name}}`] ?? []) f(); }}
  on(name, f) {{ (this.heard[name] ??= []).push(f); }}
  off(name, f) {{ this.heard[name] = (this.heard[name] ?? []).filter((each) => each !== f); }}
  send(message) {{ this.sent.push(message); window.kernel?.(message, this); }}
  answer(message) {{ for (const f of [...(this.heard["msg:custom"] ?? [])]) f(message); }}
}}
window.draw = async (view) => {{
  window.controller?.abort();
  window.controller = new AbortController();
  window.model = new Model({{ view }});
  const {{ initialize, render }} = widget();
  const signal = window.controller.signal;
  await initialize({{ model: window.model, signal }});
  await render({{ model: window.model, el: document.getElementById("main"), signal }});
}};
let pulse = 0;
window.update = (view) => window.model.set("view", {{ ...window.model.get("view"), ...view, pulse: ++pulse }});
window.ready = true;
</script></body></html>"""

Answer = Callable[[Route], None]


def open_page(
    page: Page, *, jupyter: bool = False, style: str = "", attributes: str = "", answer: Answer | None = None
) -> list[str]:
    """Load the page; answers the list of addresses it asked for, which grows.

    Args:
        jupyter: whether the page says that it is a Jupyter server's.
        style: declarations for the body, such as a theme's variables.
        attributes: of the body.
        answer: takes requests below `/lab/mistudio/`.
    """
    asked: list[str] = []
    config = '<script id="jupyter-config-data" type="application/json">{"baseUrl": "/lab/"}</script>' if jupyter else ""
    html = HTML.format(config=config, style=style, attributes=attributes)

    def serve(route: Route) -> None:
        path = route.request.url.removeprefix(ORIGIN)
        asked.append(path)
        if path == "/":
            route.fulfill(body=html, content_type="text/html")
        elif path.startswith("/job_progress."):
            kind = "text/css" if path.endswith("css") else "text/javascript"
            route.fulfill(body=(STATIC / path[1:]).read_text("utf-8"), content_type=kind)
        elif path.startswith("/lab/mistudio/") and answer is not None:
            answer(route)
        else:
            route.fulfill(status=404, body="")

    page.route("**/*", serve)
    page.goto(f"{ORIGIN}/")
    page.wait_for_function("window.ready")
    return asked


def draw(page: Page, view: dict[str, Any]) -> None:
    """Show the widget with this view."""
    page.evaluate("view => window.draw(view)", view)


def update(page: Page, **view: Any) -> None:
    """What the kernel sends next; the pulse counts up by itself."""
    page.evaluate("view => window.update(view)", view)


def view(at: float = 1000.0, slug: str = "train-0007", **job: Any) -> dict[str, Any]:
    """A view as `JobProgress` sends it."""
    record = {
        "slug": slug,
        "operation": "train_sae",
        "state": "running",
        "subject": "training/stories-l2",
        "author": "person",
        "attempt": 1,
        "progress": 0.42,
        "stage": "training: step 1,680 of 4,000",
        "rate": 12345.6,
        "unit": "tokens",
        "eta_seconds": 80.0,
        "metrics": {"loss": 0.12345, "l0": 31.94, "fvu": 0.18249, "dead_fraction": 0.0215},
        "resumes": "checkpoint",
        "result": None,
        "error": None,
        "message": "",
        "created_at": 940.0,
        "started_at": 942.0,
        "finished_at": None,
    }
    return {"slug": slug, "job": record | job, "error": None, "at": at, "pulse": 0}
