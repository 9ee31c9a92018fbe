// The way to the engine past the kernel: through the Jupyter server extension, which adds the engine's token itself.
// Only where the page is JupyterLab or Notebook; elsewhere (VS Code, Colab, marimo) there is none and `base()` is null.

/** An error as it travels: {code, what, why, fix}. */
export class EngineError extends Error {
  constructor(body) {
    super(body.what);
    this.body = body;
  }
}

/** The server's address below which the engine is, or null where there is no Jupyter server. */
export function base() {
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

/** Carry out a REST call of the engine: `call("POST", "jobs/train-0007/control", { action: "cancel" })`. */
export async function call(method, path, body, signal) {
  const headers = { Accept: "application/json" };
  if (method !== "GET") headers["X-XSRFToken"] = decodeURIComponent(xsrf());
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(`${base()}api/v1/${path}`, {
      method,
      headers,
      signal,
      credentials: "same-origin",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new EngineError({
      code: "unreachable",
      what: "The Jupyter server does not answer.",
      why: "",
      fix: "Look whether it runs and whether the network is there.",
    });
  }
  const answer = await response.json().catch(() => null);
  if (response.ok && answer !== null) return answer;
  throw new EngineError(
    answer?.error ?? {
      code: response.status === 404 ? "not_found" : "internal",
      what: `The Jupyter server answered ${response.status}.`,
      why: response.status === 404 ? "Its miStudio extension may not be enabled." : "",
      fix: "See what `jupyter server extension list` says.",
    },
  );
}

/**
 * Follow events until `signal` aborts, through any number of broken connections.
 *
 * `onEvent` gets each event; `onOpen` is called when a connection stands, the first and every later one, so that the
 * caller reads what it follows anew; what happened in between is replayed from the last number seen.
 */
export function follow(channels, { onEvent, onOpen, onLost, signal }) {
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
      if (signal.aborted) return; // it was under way when we stopped
      failures = 0;
      const event = JSON.parse(data);
      if (!channels.includes(event.channel)) return; // the engine's greeting
      seq = Math.max(seq ?? 0, event.seq);
      onEvent(event);
    };
    socket.onclose = () => {
      if (signal.aborted) return;
      onLost();
      // 0.5 s, 1 s, 2 s … 15 s, each a little different: widgets of one page do not knock together.
      const pause = Math.min(15, 0.5 * 2 ** failures++) * (0.75 + Math.random() / 2);
      timer = setTimeout(connect, pause * 1000);
    };
  }

  signal.addEventListener("abort", () => {
    clearTimeout(timer);
    socket?.close();
  });
  connect();
}
