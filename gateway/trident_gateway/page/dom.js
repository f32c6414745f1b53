// Elements. A text only ever becomes the text of an element: what a model says is never HTML.

/** An element with attributes and children; a child that is a string becomes text. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A table. `rows` are lists of cells; a cell is a text, a number or an element. */
export function table(caption, heads, rows) {
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)));
  const body = rows.map((row) => element("tr", {}, ...row.map(cell)));
  return element("table", {}, element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, ...body));
}

function cell(value) {
  if (value instanceof HTMLTableCellElement) return value;
  if (typeof value === "number") return element("td", { class: "number" }, shown(value));
  return element("td", { dir: "auto" }, value);
}

/** A number with as many digits as say something. */
export function shown(value) {
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(Math.abs(value) >= 1 ? 2 : 4);
}

/** The lines of a text that are not blank. */
export function lines(text) {
  return text.split("\n").map((line) => line.trim()).filter(Boolean);
}

/**
 * What a form does when it is sent: one request at a time, a Stop button and Escape that abort it, and places for what
 * is going on (`role=status`) and for what failed (`role=alert`).
 *
 * @param work takes an AbortSignal and returns what the status says at the end.
 */
export function onSend(form, work) {
  const [status, failed] = [form.querySelector(".status"), form.querySelector(".error")];
  const { send, stop } = form.elements;
  let running = null;
  const end = () => running?.abort();
  stop.addEventListener("click", end);
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) end();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running || send.disabled) return;
    running = new AbortController();
    failed.textContent = "";
    status.textContent = "The model is working.";
    stop.disabled = false;
    send.setAttribute("aria-disabled", "true");
    try {
      status.textContent = await work(running.signal);
    } catch (error) {
      status.textContent = running.signal.aborted ? "Stopped." : "";
      if (!running.signal.aborted) failed.textContent = error.message;
    }
    running = null;
    if (document.activeElement === stop) send.focus();
    stop.disabled = true;
    send.removeAttribute("aria-disabled");
  });
}
