// Elements without a framework: made once, then changed only where something changed, so that focus, selection and
// what a screen reader has in hand survive an update.

/** An element: `h("button", { class: "ms-button", onclick: f }, "Cancel")`. Text is always text, never markup. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else set(element, name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** Set an attribute; null or false takes it away. Nothing is touched when it is so already. */
export function set(element, name, value) {
  if (value == null || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else {
    const text = value === true ? "" : String(value);
    if (element.getAttribute(name) !== text) element.setAttribute(name, text);
  }
}

/** Set the text of an element, only when it differs. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Show or hide an element, for everybody. */
export function show(element, visible) {
  set(element, "hidden", !visible); // the attribute: a drawing has no such property
}

/** A list of name and value pairs in a <dl>, its elements reused. */
export function pairs(list, rows) {
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

const SHAPES = {
  queued: "M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 1 0 0-11M8 5v3.2l2.2 1.6",
  running: "M5.5 3.5v9l7-4.5z",
  pausing: "M5.5 3.5v9M10.5 3.5v9",
  paused: "M5.5 3.5v9M10.5 3.5v9",
  interrupted: "M8 2.5v6.5M8 12.4v.6",
  completed: "M3 8.5l3.5 3.5L13 4.5",
  failed: "M4 4l8 8M12 4l-8 8",
  cancelled: "M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 1 0 0-11M4.2 4.2l7.6 7.6",
};

/** A small drawing for a job's state: each has a shape of its own, so that none depends on its colour. */
export function stateIcon() {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  set(svg, "viewBox", "0 0 16 16");
  set(svg, "class", "ms-icon");
  set(svg, "aria-hidden", "true");
  svg.append(path);
  return { element: svg, draw: (state) => set(path, "d", SHAPES[state] ?? SHAPES.queued) };
}

/** Copy text, also where the page has no clipboard of its own (plain http on another machine). */
export async function copy(text) {
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
