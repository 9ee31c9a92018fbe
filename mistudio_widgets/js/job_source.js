// One job as the browser knows it, and the way it is known: through the kernel while that is heard, else through the
// Jupyter server, else not at all, with the last known state kept. All views of a widget share one source.

import { EngineError, base, call, follow } from "./lib/jupyter.js";
import { Kernel } from "./lib/kernel.js";

const TICK_SECONDS = 1;

/** The kernel pulses every 2 s (`PULSE_SECONDS` in _base.py): three missed, and it is taken to be silent. */
const SILENT_SECONDS = 6.5;

/** The engine is asked every 2 s as well, by the kernel, for as long as the job is unfinished. */
const STALE_SECONDS = 8;

const AWAY = new Set(["engine_missing", "engine_busy", "unreachable"]);
const FINISHED = new Set(["completed", "failed", "cancelled"]);
const GOING_ON = new Set(["running", "pausing"]);
const PROGRESS = ["progress", "stage", "rate", "unit", "eta_seconds"];

export class JobSource extends EventTarget {
  #model;
  #kernel;
  #proxy = null; // aborts what follows through the Jupyter server
  #proxyOpen = false;
  #reading = false;
  #again = false;
  #signal;

  job = null;
  slug = null;
  /** kernel, jupyter, or lost. */
  route = "kernel";
  /** Why the job cannot be followed: {code, what, why, fix}. */
  error = null;

  constructor(model, signal) {
    super();
    this.#model = model;
    this.#signal = signal;
    this.#kernel = new Kernel(model, signal);
    this.kernelHeard = this.engineHeard = this.now();
    const changed = () => this.#fromKernel();
    model.on("change:view", changed);
    const timer = setInterval(() => this.#tick(), TICK_SECONDS * 1000);
    signal.addEventListener("abort", () => {
      model.off("change:view", changed);
      clearInterval(timer);
      this.#stopProxy();
    });
    this.#fromKernel();
    // The first question, asked while the kernel has time, gives comms a thread of their own: later ones are then
    // answered although a cell is busy.
    this.#kernel.answers();
  }

  /** Seconds on a clock that never jumps. */
  now() {
    return performance.now() / 1000;
  }

  /** The engine's clock, as far as it can be told from here. */
  engineTime() {
    return Date.now() / 1000 + (this.offset ?? 0);
  }

  /** Whether the job is at work. */
  get goingOn() {
    return this.job !== null && GOING_ON.has(this.job.state);
  }

  get finished() {
    return this.job !== null && FINISHED.has(this.job.state);
  }

  /** Seconds the job has been running, by the engine's clock; null while it rests. */
  elapsed() {
    const job = this.job;
    if (!job?.started_at) return null;
    if (job.finished_at) return job.finished_at - job.started_at;
    if (!this.goingOn) return null;
    return Math.max(0, (this.route === "lost" ? this.at : this.engineTime()) - job.started_at);
  }

  /** Seconds left, counted down between two reports. */
  left() {
    if (typeof this.job?.eta_seconds !== "number" || !this.goingOn) return null;
    return Math.max(0, this.job.eta_seconds - (this.route === "lost" ? 0 : this.now() - this.engineHeard));
  }

  /** Wait until something is so, at most so long. */
  when(condition, milliseconds) {
    return new Promise((resolve) => {
      const over = new AbortController();
      const done = () => {
        clearTimeout(timer);
        over.abort();
        resolve();
      };
      const timer = setTimeout(done, milliseconds);
      this.addEventListener("change", () => condition(this) && done(), { signal: over.signal });
      if (condition(this)) done();
    });
  }

  /** Cancel, pause, resume or retry; through the kernel when it answers, else through the Jupyter server. */
  async control(action) {
    const kernelAnswers = await this.#kernel.answers();
    if (kernelAnswers) {
      const answer = await this.#kernel.ask({ kind: "control", action }, 15000);
      if (answer?.ok) return;
      throw new EngineError(answer?.error ?? unanswered("The kernel took the request and has not answered yet."));
    }
    if (!(await this.#sameEngine())) {
      throw new EngineError(unanswered("The kernel does not answer, and from here there is no other way to the engine."));
    }
    this.#adopt(await call("POST", `${this.#path()}/control`, { action }));
    // Whenever the kernel has time again, it reads what was done; harmless at any later time.
    this.#kernel.ask({ kind: "refresh" }, 0);
  }

  #fromKernel() {
    const view = this.#model.get("view") ?? {};
    this.kernelHeard = this.now();
    this.slug = view.slug ?? null;
    if (view.at !== this.at) {
      this.at = view.at;
      this.engineHeard = this.now();
      if (view.at) this.offset = view.at - Date.now() / 1000;
    }
    if (view.job) this.job = view.job;
    this.error = view.error && !AWAY.has(view.error.code) ? view.error : null;
    this.away = view.error && AWAY.has(view.error.code) ? view.error : null;
    this.#stopProxy();
    this.#route(this.away ? "lost" : "kernel");
  }

  #route(route) {
    this.route = route;
    this.dispatchEvent(new Event("change"));
  }

  #tick() {
    if (this.slug === null || this.finished || this.error) return;
    const now = this.now();
    if (this.#proxy) return;
    if (now - this.kernelHeard > SILENT_SECONDS) this.#startProxy();
    else if (this.route === "kernel" && now - this.engineHeard > STALE_SECONDS) this.#route("lost");
  }

  /** Whether the Jupyter server's engine has this very job: it may serve another data directory than the kernel. */
  async #sameEngine() {
    if (base() === null || this.slug === null || this.job === null) return false;
    try {
      const record = await call("GET", this.#path(), undefined, this.#signal);
      return record.created_at === this.job.created_at;
    } catch (error) {
      if (error instanceof EngineError && error.body.code === "not_found") return false;
      throw error;
    }
  }

  #path() {
    return `jobs/${encodeURIComponent(this.slug)}`;
  }

  async #startProxy() {
    const proxy = (this.#proxy = new AbortController());
    if (base() === null || this.job === null) return this.#route("lost");
    const lost = () => {
      this.#proxyOpen = false;
      this.#route("lost");
    };
    follow([`jobs/${this.slug}`], {
      signal: proxy.signal,
      onOpen: () => {
        this.#proxyOpen = true;
        this.#read();
      },
      onLost: lost,
      onEvent: (event) => {
        if (this.route !== "jupyter") return; // until the record has been read, it may be another engine's job
        const { data } = event;
        if (event.event === "metrics") {
          this.#adopt({ ...this.job, metrics: { ...this.job.metrics, ...data.metrics } }, event.at);
        } else if (event.event === "progress") {
          const changes = Object.fromEntries(PROGRESS.filter((name) => name in data).map((name) => [name, data[name]]));
          this.#adopt({ ...this.job, ...changes }, event.at);
        } else {
          this.#read();
        }
      },
    });
  }

  #stopProxy() {
    this.#proxy?.abort();
    this.#proxy = null;
    this.#proxyOpen = false;
  }

  /** Read the record through the Jupyter server; when asked for while reading, once more afterwards. */
  async #read() {
    this.#again = true;
    if (this.#reading) return;
    this.#reading = true;
    const { signal } = this.#proxy;
    try {
      while (this.#again && this.#proxy && this.#proxyOpen) {
        this.#again = false;
        const record = await call("GET", this.#path(), undefined, signal);
        if (record.created_at !== this.job.created_at) return this.#route("lost");
        this.#adopt(record);
      }
    } catch (error) {
      if (signal.aborted) return; // the kernel is back
      if (!(error instanceof EngineError)) throw error;
      this.away = error.body;
      this.#route("lost");
    } finally {
      this.#reading = false;
    }
  }

  #adopt(record, at = this.engineTime()) {
    this.job = record;
    this.at = at;
    this.engineHeard = this.now();
    this.away = null;
    if (this.finished) this.#stopProxy();
    this.#route(this.#proxy || this.now() - this.kernelHeard > SILENT_SECONDS ? "jupyter" : this.route);
  }
}

function unanswered(what) {
  return { code: "unreachable", what, why: "", fix: "Wait until the cell has run or interrupt it, then try again." };
}
