// The way to the engine through the kernel: questions that are answered or given up, and whether anything is heard.
// It knows the model of anywidget and nothing of what is asked.

export class Kernel {
  #model;
  #asked = new Map();
  #count = 0;
  #name = Math.random().toString(36).slice(2);

  /** Stops listening when `signal` aborts. */
  constructor(model, signal) {
    this.#model = model;
    const answered = (message) => {
      // Several pages may show one widget: an answer concerns whoever asked.
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
        resolve(null); // the comm is closed
      }
    });
  }

  /**
   * Whether the kernel answers now. A busy kernel keeps what it is sent and carries it out when it has time, perhaps an
   * hour later: so whatever does something is sent only after this said yes.
   */
  async answers(milliseconds = 1000) {
    return (await this.ask({ kind: "ping" }, milliseconds)) !== null;
  }
}
