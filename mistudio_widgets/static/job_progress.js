// lib/dom.js
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else set(element, name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}
function set(element, name, value) {
  if (value == null || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else {
    const text = value === true ? "" : String(value);
    if (element.getAttribute(name) !== text) element.setAttribute(name, text);
  }
}
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
function show(element, visible) {
  set(element, "hidden", !visible);
}
function pairs(list, rows) {
  while (list.children.length > rows.length) list.lastElementChild.remove();
  rows.forEach(([name, value, hint], index) => {
    let row = list.children[index];
    if (!row) {
      row = h("div", {}, h("dt"), h("dd"));
      list.append(row);
    }
    say(row.firstElementChild, name);
    say(row.lastElementChild, value);
    set(row, "title", hint);
  });
}
var SHAPES = {
  queued: "M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 1 0 0-11M8 5v3.2l2.2 1.6",
  running: "M5.5 3.5v9l7-4.5z",
  pausing: "M5.5 3.5v9M10.5 3.5v9",
  paused: "M5.5 3.5v9M10.5 3.5v9",
  interrupted: "M8 2.5v6.5M8 12.4v.6",
  completed: "M3 8.5l3.5 3.5L13 4.5",
  failed: "M4 4l8 8M12 4l-8 8",
  cancelled: "M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 1 0 0-11M4.2 4.2l7.6 7.6"
};
function stateIcon() {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  set(svg, "viewBox", "0 0 16 16");
  set(svg, "class", "ms-icon");
  set(svg, "aria-hidden", "true");
  svg.append(path);
  return { element: svg, draw: (state) => set(path, "d", SHAPES[state] ?? SHAPES.queued) };
}
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { "aria-hidden": "true", style: "position:fixed;opacity:0" });
    area.value = text;
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus?.();
    return done;
  }
}

// lib/format.js
var SCALES = [
  [1e12, "T"],
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"]
];
function number(value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3) return value.toExponential(2);
  const scale = SCALES.find(([unit]) => size >= unit * 0.9995);
  if (!scale) return value.toPrecision(3);
  if (size < 1e15) return (value / scale[0]).toPrecision(3) + scale[1];
  return value.toExponential(2);
}
function percent(fraction) {
  if (typeof fraction !== "number" || !Number.isFinite(fraction)) return "–";
  const value = fraction * 100;
  if (fraction < 1 && value >= 99.95) return "99.9 %";
  if (value < 1e-3) return "0 %";
  return `${value.toPrecision(3)} %`;
}
function duration(seconds) {
  if (typeof seconds !== "number" || !Number.isFinite(seconds) || seconds < 0) return "–";
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return join(Math.floor(whole / 60), "min", whole % 60, "s");
  if (whole < 86400) return join(Math.floor(whole / 3600), "h", Math.floor(whole % 3600 / 60), "min");
  return join(Math.floor(whole / 86400), "d", Math.floor(whole % 86400 / 3600), "h");
}
function join(large, largeUnit, small, smallUnit) {
  return small ? `${large} ${largeUnit} ${small} ${smallUnit}` : `${large} ${largeUnit}`;
}
function rate(perSecond, unit) {
  const figure = number(perSecond);
  if (unit !== "bytes") return unit ? `${figure} ${unit}/s` : `${figure}/s`;
  const [, digits, scale] = figure.match(/^(.*?)([a-zA-Z]?)$/);
  return `${digits} ${scale}B/s`;
}
function count(value) {
  return value.toLocaleString("en");
}
function clock(date) {
  return date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
}

// lib/jupyter.js
var EngineError = class extends Error {
  constructor(body) {
    super(body.what);
    this.body = body;
  }
};
function base() {
  const element = document.getElementById("jupyter-config-data");
  if (!element) return null;
  try {
    const config = JSON.parse(element.textContent);
    return new URL(`${(config.baseUrl ?? "/").replace(/\/$/, "")}/mistudio/`, location.origin).href;
  } catch {
    return null;
  }
}
function xsrf() {
  return document.cookie.match(/(?:^|;\s*)_xsrf=([^;]*)/)?.[1] ?? "";
}
async function call(method, path, body, signal) {
  const headers = { Accept: "application/json" };
  if (method !== "GET") headers["X-XSRFToken"] = decodeURIComponent(xsrf());
  if (body !== void 0) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(`${base()}api/v1/${path}`, {
      method,
      headers,
      signal,
      credentials: "same-origin",
      body: body === void 0 ? void 0 : JSON.stringify(body)
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new EngineError({
      code: "unreachable",
      what: "The Jupyter server does not answer.",
      why: "",
      fix: "Look whether it runs and whether the network is there."
    });
  }
  const answer = await response.json().catch(() => null);
  if (response.ok && answer !== null) return answer;
  throw new EngineError(
    answer?.error ?? {
      code: response.status === 404 ? "not_found" : "internal",
      what: `The Jupyter server answered ${response.status}.`,
      why: response.status === 404 ? "Its miStudio extension may not be enabled." : "",
      fix: "See what `jupyter server extension list` says."
    }
  );
}
function follow(channels, { onEvent, onOpen, onLost, signal }) {
  let seq = null;
  let failures = 0;
  let timer = null;
  let socket = null;
  function connect() {
    socket = new WebSocket(`${base().replace(/^http/, "ws")}api/v1/ws`);
    socket.onopen = () => {
      socket.send(JSON.stringify({ subscribe: channels, after: seq }));
      onOpen();
    };
    socket.onmessage = ({ data }) => {
      if (signal.aborted) return;
      failures = 0;
      const event = JSON.parse(data);
      if (!channels.includes(event.channel)) return;
      seq = Math.max(seq ?? 0, event.seq);
      onEvent(event);
    };
    socket.onclose = () => {
      if (signal.aborted) return;
      onLost();
      const pause = Math.min(15, 0.5 * 2 ** failures++) * (0.75 + Math.random() / 2);
      timer = setTimeout(connect, pause * 1e3);
    };
  }
  signal.addEventListener("abort", () => {
    clearTimeout(timer);
    socket?.close();
  });
  connect();
}

// lib/kernel.js
var Kernel = class {
  #model;
  #asked = /* @__PURE__ */ new Map();
  #count = 0;
  #name = Math.random().toString(36).slice(2);
  /** Stops listening when `signal` aborts. */
  constructor(model, signal) {
    this.#model = model;
    const answered = (message) => {
      const resolve = this.#asked.get(message?.id);
      this.#asked.delete(message?.id);
      resolve?.(message);
    };
    model.on("msg:custom", answered);
    signal.addEventListener("abort", () => model.off("msg:custom", answered));
  }
  /** The kernel's answer `{ok, error}`, or null when none comes in time. */
  ask(question, milliseconds) {
    const id = `${this.#name}-${++this.#count}`;
    return new Promise((resolve) => {
      const timer = setTimeout(() => {
        this.#asked.delete(id);
        resolve(null);
      }, milliseconds);
      this.#asked.set(id, (answer) => {
        clearTimeout(timer);
        resolve(answer);
      });
      try {
        this.#model.send({ ...question, id });
      } catch {
        resolve(null);
      }
    });
  }
  /**
   * Whether the kernel answers now. A busy kernel keeps what it is sent and carries it out when it has time, perhaps an
   * hour later: so whatever does something is sent only after this said yes.
   */
  async answers(milliseconds = 1e3) {
    return await this.ask({ kind: "ping" }, milliseconds) !== null;
  }
};

// job_source.js
var TICK_SECONDS = 1;
var SILENT_SECONDS = 6.5;
var STALE_SECONDS = 8;
var AWAY = /* @__PURE__ */ new Set(["engine_missing", "engine_busy", "unreachable"]);
var FINISHED = /* @__PURE__ */ new Set(["completed", "failed", "cancelled"]);
var GOING_ON = /* @__PURE__ */ new Set(["running", "pausing"]);
var PROGRESS = ["progress", "stage", "rate", "unit", "eta_seconds"];
var JobSource = class extends EventTarget {
  #model;
  #kernel;
  #proxy = null;
  // aborts what follows through the Jupyter server
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
    const timer = setInterval(() => this.#tick(), TICK_SECONDS * 1e3);
    signal.addEventListener("abort", () => {
      model.off("change:view", changed);
      clearInterval(timer);
      this.#stopProxy();
    });
    this.#fromKernel();
    this.#kernel.answers();
  }
  /** Seconds on a clock that never jumps. */
  now() {
    return performance.now() / 1e3;
  }
  /** The engine's clock, as far as it can be told from here. */
  engineTime() {
    return Date.now() / 1e3 + (this.offset ?? 0);
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
      const answer = await this.#kernel.ask({ kind: "control", action }, 15e3);
      if (answer?.ok) return;
      throw new EngineError(answer?.error ?? unanswered("The kernel took the request and has not answered yet."));
    }
    if (!await this.#sameEngine()) {
      throw new EngineError(unanswered("The kernel does not answer, and from here there is no other way to the engine."));
    }
    this.#adopt(await call("POST", `${this.#path()}/control`, { action }));
    this.#kernel.ask({ kind: "refresh" }, 0);
  }
  #fromKernel() {
    const view = this.#model.get("view") ?? {};
    this.kernelHeard = this.now();
    this.slug = view.slug ?? null;
    if (view.at !== this.at) {
      this.at = view.at;
      this.engineHeard = this.now();
      if (view.at) this.offset = view.at - Date.now() / 1e3;
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
      const record = await call("GET", this.#path(), void 0, this.#signal);
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
    const proxy = this.#proxy = new AbortController();
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
        if (this.route !== "jupyter") return;
        const { data } = event;
        if (event.event === "metrics") {
          this.#adopt({ ...this.job, metrics: { ...this.job.metrics, ...data.metrics } }, event.at);
        } else if (event.event === "progress") {
          const changes = Object.fromEntries(PROGRESS.filter((name) => name in data).map((name) => [name, data[name]]));
          this.#adopt({ ...this.job, ...changes }, event.at);
        } else {
          this.#read();
        }
      }
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
        const record = await call("GET", this.#path(), void 0, signal);
        if (record.created_at !== this.job.created_at) return this.#route("lost");
        this.#adopt(record);
      }
    } catch (error) {
      if (signal.aborted) return;
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
};
function unanswered(what) {
  return { code: "unreachable", what, why: "", fix: "Wait until the cell has run or interrupt it, then try again." };
}

// job_progress.js
var STATES = {
  queued: "Queued",
  running: "Running",
  pausing: "Pausing",
  paused: "Paused",
  interrupted: "Interrupted",
  completed: "Completed",
  failed: "Failed",
  cancelled: "Cancelled"
};
var ACTIONS = {
  pause: { label: "Pause", states: ["queued", "running"], doing: "Pausing …" },
  resume: { label: "Resume", states: ["pausing", "paused", "interrupted"], doing: "Resuming …" },
  retry: { label: "Retry", states: ["failed", "cancelled"], doing: "Retrying …" },
  cancel: { label: "Cancel", states: ["queued", "running", "pausing", "paused", "interrupted"], doing: "Cancelling …" }
};
var METRIC_NAMES = {
  l0: "L0",
  l1: "L1",
  fvu: "FVU",
  mse: "MSE",
  kl: "KL",
  ce_loss: "CE loss",
  ce_loss_score: "CE-loss score",
  kl_div_score: "KL score"
};
var NOT_LISTED = /* @__PURE__ */ new Set(["tokens_per_second"]);
var ON_ITS_WAY_MS = 1e4;
var ROUTES = {
  kernel: "Live through the kernel",
  jupyter: "Live through the Jupyter server (the kernel is silent)"
};
var word = (state) => STATES[state] ?? state;
var readable = (name) => METRIC_NAMES[name] ?? name.replaceAll("_", " ");
var shown = (value) => typeof value !== "number" ? String(value) : Number.isInteger(value) ? count(value) : number(value);
var starter = (author) => author === "person" ? "a person" : author.replace(":", " ");
var JobView = class {
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
        h("button", { type: "button", class: "ms-button", onclick: () => this.#press(action) }, label)
      ])
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
      onclick: () => this.#copy()
    }, "Copy as Python");
    this.status = h("div", { class: "ms-unseen", role: "status" });
    this.empty = h(
      "p",
      { class: "ms-note ms-note--plain" },
      "No job to follow. Start one, such as ",
      h("code", { class: "ms-code" }, "job = studio.train_sae(…)"),
      ", and show it with ",
      h("code", { class: "ms-code" }, "JobProgress(job, studio)"),
      "."
    );
    this.loading = h(
      "div",
      { class: "ms-job-loading", "aria-hidden": "true" },
      ...["38%", "100%", "62%"].map((width) => h("span", { class: "ms-skeleton", style: `width:${width}` }))
    );
    this.body = h(
      "div",
      { style: "display:contents" },
      h("div", { class: "ms-job-line" }, this.stage, this.share),
      this.bar,
      this.times = h("div", { class: "ms-job-times ms-quiet" }, this.rate, this.left, this.elapsed),
      this.metrics,
      this.result
    );
    this.head = h(
      "div",
      { class: "ms-job-head" },
      h("div", { class: "ms-job-title" }, this.icon.element, this.state, this.name),
      h("div", { class: "ms-job-buttons" }, ...Object.values(this.buttons))
    );
    this.foot = h(
      "div",
      { class: "ms-job-foot ms-quiet" },
      this.author,
      this.attempt,
      this.route,
      this.copied
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
      this.status
    );
    this.root = h("div", { class: "ms" }, this.card);
    el.replaceChildren(this.root);
    const draw = () => this.#draw();
    source.addEventListener("change", draw, { signal });
    const timer = setInterval(() => this.#drawTimes(), 1e3);
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
    set(this.bar, "aria-valuenow", known ? Math.round(fraction * 1e3) / 10 : null);
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
      const visible = states.includes(state) && !cannot || pressed;
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
    const when = at ? ` at ${clock(new Date((at - (this.#source.offset ?? 0)) * 1e3))}` : "";
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
    if (text !== this.#announced) say(this.status, this.#announced = text);
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
        ""
      ].join("\n")
    );
    say(this.copied, done ? "Copied" : "Cannot copy here");
    setTimeout(() => say(this.copied, "Copy as Python"), 2e3);
  }
};
var job_progress_default = () => {
  let source;
  return {
    initialize({ model, signal }) {
      source = new JobSource(model, signal);
    },
    render({ el, signal }) {
      new JobView(source, el, signal);
    }
  };
};
export {
  job_progress_default as default
};
