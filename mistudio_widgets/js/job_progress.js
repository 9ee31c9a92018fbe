// What a job looks like: its state, how far it is, what it measures, what came of it, and what can be done with it.
// Where the job is known from is the source's business.

import { copy, h, pairs, say, set, show, stateIcon } from "./lib/dom.js";
import { clock, count, duration, number, percent, rate } from "./lib/format.js";
import { EngineError } from "./lib/jupyter.js";
import { JobSource } from "./job_source.js";

const STATES = {
  queued: "Queued",
  running: "Running",
  pausing: "Pausing",
  paused: "Paused",
  interrupted: "Interrupted",
  completed: "Completed",
  failed: "Failed",
  cancelled: "Cancelled",
};

const ACTIONS = {
  pause: { label: "Pause", states: ["queued", "running"], doing: "Pausing …" },
  resume: { label: "Resume", states: ["pausing", "paused", "interrupted"], doing: "Resuming …" },
  retry: { label: "Retry", states: ["failed", "cancelled"], doing: "Retrying …" },
  cancel: { label: "Cancel", states: ["queued", "running", "pausing", "paused", "interrupted"], doing: "Cancelling …" },
};

const METRIC_NAMES = {
  l0: "L0",
  l1: "L1",
  fvu: "FVU",
  mse: "MSE",
  kl: "KL",
  ce_loss: "CE loss",
  ce_loss_score: "CE-loss score",
  kl_div_score: "KL score",
};

/** Shown elsewhere already. */
const NOT_LISTED = new Set(["tokens_per_second"]);

/** An action is done at the job's next step; until its state changes, or for so long, the button says that it is on its way. */
const ON_ITS_WAY_MS = 10_000;

const ROUTES = {
  kernel: "Live through the kernel",
  jupyter: "Live through the Jupyter server (the kernel is silent)",
};

const word = (state) => STATES[state] ?? state;
const readable = (name) => METRIC_NAMES[name] ?? name.replaceAll("_", " ");
const shown = (value) => (typeof value !== "number" ? String(value) : Number.isInteger(value) ? count(value) : number(value));
const starter = (author) => (author === "person" ? "a person" : author.replace(":", " "));

class JobView {
  #source;
  #pressed = null;
  #failure = null;
  #announced = "";

  constructor(source, el, signal) {
    this.#source = source;
    this.icon = stateIcon();
    this.state = h("span", { class: "ms-job-state" });
    this.name = h("span", { class: "ms-job-name ms-code" });
    this.buttons = Object.fromEntries(
      Object.entries(ACTIONS).map(([action, { label }]) => [
        action,
        h("button", { type: "button", class: "ms-button", onclick: () => this.#press(action) }, label),
      ]),
    );
    this.stage = h("span", { class: "ms-job-stage" });
    this.share = h("span", { class: "ms-job-share" });
    this.fill = h("div", { class: "ms-bar-fill" });
    this.bar = h("div", { class: "ms-bar", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": 100 }, this.fill);
    this.rate = h("span");
    this.left = h("span");
    this.elapsed = h("span");
    this.metrics = h("dl", { class: "ms-pairs", "aria-label": "Latest metrics" });
    this.result = h("dl", { class: "ms-pairs ms-pairs--wide", "aria-label": "Result" });
    this.note = h("div", { class: "ms-note" }, h("p", { class: "ms-note-what" }), h("p"), h("p"));
    this.author = h("span");
    this.attempt = h("span");
    this.route = h("span");
    this.copied = h("button", {
      type: "button",
      class: "ms-button ms-button--quiet",
      title: "Copy the lines that do the same in a program",
      onclick: () => this.#copy(),
    }, "Copy as Python");
    this.status = h("div", { class: "ms-unseen", role: "status" });
    this.empty = h(
      "p",
      { class: "ms-note ms-note--plain" },
      "No job to follow. Start one, such as ",
      h("code", { class: "ms-code" }, "job = studio.train_sae(…)"),
      ", and show it with ",
      h("code", { class: "ms-code" }, "JobProgress(job, studio)"),
      ".",
    );
    this.loading = h(
      "div",
      { class: "ms-job-loading", "aria-hidden": "true" },
      ...["38%", "100%", "62%"].map((width) => h("span", { class: "ms-skeleton", style: `width:${width}` })),
    );
    this.body = h(
      "div",
      { style: "display:contents" },
      h("div", { class: "ms-job-line" }, this.stage, this.share),
      this.bar,
      (this.times = h("div", { class: "ms-job-times ms-quiet" }, this.rate, this.left, this.elapsed)),
      this.metrics,
      this.result,
    );
    this.head = h(
      "div",
      { class: "ms-job-head" },
      h("div", { class: "ms-job-title" }, this.icon.element, this.state, this.name),
      h("div", { class: "ms-job-buttons" }, ...Object.values(this.buttons)),
    );
    this.foot = h(
      "div",
      { class: "ms-job-foot ms-quiet" },
      this.author,
      this.attempt,
      this.route,
      this.copied,
    );
    this.card = h(
      "section",
      { class: "ms-job" },
      this.head,
      this.empty,
      this.loading,
      this.body,
      this.note,
      this.foot,
      this.status,
    );
    this.root = h("div", { class: "ms" }, this.card);
    el.replaceChildren(this.root);

    const draw = () => this.#draw();
    source.addEventListener("change", draw, { signal });
    const timer = setInterval(() => this.#drawTimes(), 1000);
    signal.addEventListener("abort", () => clearInterval(timer));
    this.#draw();
  }

  #draw() {
    const { job, slug, route } = this.#source;
    const lost = route === "lost" && !this.#source.finished;
    set(this.card, "aria-label", slug ? `Job ${slug}` : "No job");
    set(this.card, "data-state", job?.state);
    set(this.card, "data-lost", lost);
    set(this.card, "aria-busy", slug !== null && job === null && !this.#source.error ? "true" : null);
    show(this.empty, slug === null);
    show(this.loading, slug !== null && job === null && !this.#source.error);
    show(this.head, slug !== null);
    show(this.icon.element, job !== null);
    show(this.body, job !== null);
    show(this.foot, slug !== null);
    say(this.state, job ? word(job.state) : this.#source.error ? "Unknown" : "Looking it up …");
    say(this.name, slug === null ? "" : `job/${slug}`);
    this.#drawButtons(job?.state);
    if (job) this.#drawJob(job, lost);
    this.#drawNote(lost);
    say(this.route, job === null || this.#source.finished ? "" : lost ? "Not connected" : ROUTES[route]);
    this.#announce();
  }

  #drawJob(job, lost) {
    const ended = this.#source.finished;
    this.icon.draw(job.state);
    set(this.name, "title", job.subject ? `${job.operation}, working on ${job.subject}` : job.operation);
    say(this.stage, job.stage || (job.message && !job.error ? job.message : "") || job.operation.replaceAll("_", " "));
    const fraction = job.state === "completed" ? 1 : job.progress;
    const known = typeof fraction === "number";
    const unknown = !known && this.#source.goingOn;
    say(this.share, known ? percent(fraction) : "");
    this.fill.style.width = known ? `${Math.min(100, Math.max(0, fraction * 100))}%` : "0";
    set(this.bar, "data-unknown", unknown && !lost);
    set(this.bar, "aria-label", `Progress of job ${job.slug}`);
    set(this.bar, "aria-valuenow", known ? Math.round(fraction * 1000) / 10 : null);
    say(this.rate, job.rate && !ended && !lost ? rate(job.rate, job.unit) : "");
    this.#drawTimes();
    const metrics = Object.entries(job.metrics ?? {}).filter(([name]) => !NOT_LISTED.has(name));
    pairs(this.metrics, metrics.map(([name, value]) => [readable(name), number(value), `${name} = ${value}`]));
    show(this.metrics, metrics.length > 0);
    const result = job.state === "completed" ? Object.entries(job.result ?? {}).filter(([, v]) => Object(v) !== v && v !== null) : [];
    pairs(this.result, result.map(([name, value]) => [readable(name), shown(value), `${name} = ${value}`]));
    show(this.result, result.length > 0);
    say(this.author, job.author ? `Started by ${starter(job.author)}` : "");
    say(this.attempt, job.attempt > 1 ? `Attempt ${job.attempt}` : "");
  }

  #drawTimes() {
    const source = this.#source;
    if (!source.job) return;
    const elapsed = source.elapsed();
    const left = source.route === "lost" ? null : source.left();
    const ending = { completed: "Took ", failed: "Failed after ", cancelled: "Cancelled after " }[source.job.state];
    say(this.elapsed, elapsed === null ? "" : ending ? ending + duration(elapsed) : `${duration(elapsed)} elapsed`);
    say(this.left, left === null ? "" : `${duration(left)} left`);
    show(this.times, Boolean(this.rate.textContent || this.left.textContent || this.elapsed.textContent));
    const share = this.share.textContent || "share not known";
    set(this.bar, "aria-valuetext", [share, this.stage.textContent, this.left.textContent].filter(Boolean).join(", "));
  }

  #drawButtons(state) {
    for (const [action, { label, states, doing }] of Object.entries(ACTIONS)) {
      const button = this.buttons[action];
      const pressed = this.#pressed === action;
      const cannot = action === "pause" && this.#source.job?.resumes === "never";
      const visible = (states.includes(state) && !cannot) || pressed;
      // A focused button that vanishes would throw the keyboard back to the top of the page.
      if (!visible && document.activeElement === button) this.copied.focus({ preventScroll: true });
      show(button, visible);
      say(button, pressed ? doing : label);
      set(button, "aria-disabled", this.#pressed ? "true" : null);
      set(button, "title", `studio.call(ControlJob(job="${this.#source.slug}", action="${action}"))`);
    }
  }

  #drawNote(lost) {
    const { job, error } = this.#source;
    const failed = job?.state === "failed" ? job.error : null;
    const body = this.#failure ?? error ?? failed;
    let lines = ["", "", ""];
    if (body) lines = [body.what, body.why, body.fix];
    else if (lost) lines = this.#lostLines();
    else if (job?.message && job.message !== this.stage.textContent) lines = [job.message, "", ""];
    show(this.note, lines.some(Boolean));
    set(this.note, "class", body ? "ms-note ms-note--error" : "ms-note");
    set(this.note, "role", body ? "alert" : null);
    [...this.note.children].forEach((line, index) => {
      say(line, lines[index] ?? "");
      show(line, Boolean(lines[index]));
    });
  }

  #lostLines() {
    const { at, job, away } = this.#source;
    const when = at ? ` at ${clock(new Date((at - (this.#source.offset ?? 0)) * 1000))}` : "";
    const known = job ? `Last known${when}: ${word(job.state).toLowerCase()}${this.share.textContent ? `, ${this.share.textContent}` : ""}.` : "";
    return [`Connection lost. ${known} Following again as soon as it answers.`, away?.what ?? "", away?.fix ?? ""];
  }

  /** Tell a screen reader what matters: a new state, each quarter of the way, a lost connection; not every step. */
  #announce() {
    const { job, slug } = this.#source;
    if (!job) return;
    const quarter = typeof job.progress === "number" ? Math.floor(job.progress * 4) * 25 : 0;
    const lost = this.card.hasAttribute("data-lost");
    const parts = [`Job ${slug}: ${word(job.state).toLowerCase()}`];
    if (!this.#source.finished && quarter) parts.push(`${quarter} percent done`);
    if (lost) parts.push("connection lost");
    const text = parts.join(", ");
    if (text !== this.#announced) say(this.status, (this.#announced = text));
  }

  async #press(action) {
    if (this.#pressed) return;
    this.#pressed = action;
    this.#failure = null;
    this.#draw();
    const before = this.#source.job.state;
    try {
      await this.#source.control(action);
      await this.#source.when(({ job }) => job.state !== before, ON_ITS_WAY_MS);
    } catch (error) {
      if (!(error instanceof EngineError)) throw error;
      this.#failure = error.body;
    } finally {
      this.#pressed = null;
      this.#draw();
    }
  }

  async #copy() {
    const { slug } = this.#source;
    const done = await copy(
      [
        "from mistudio_engine import connect",
        "from mistudio_engine.api.operations.jobs import ControlJob, ShowJob",
        "",
        "studio = connect()",
        `job = studio.call(ShowJob(job="${slug}"))`,
        `# studio.call(ControlJob(job="${slug}", action="cancel"))  # or pause, resume, retry`,
        "job.wait()",
        "",
      ].join("\n"),
    );
    say(this.copied, done ? "Copied" : "Cannot copy here");
    setTimeout(() => say(this.copied, "Copy as Python"), 2000);
  }
}

export default () => {
  let source;
  return {
    initialize({ model, signal }) {
      source = new JobSource(model, signal);
    },
    render({ el, signal }) {
      new JobView(source, el, signal);
    },
  };
};
