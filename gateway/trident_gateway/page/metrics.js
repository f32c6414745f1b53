// Live metrics of the gateway: its /metrics, read while they are shown, as small plots.

import { call } from "./api.js";
import { element, shown, table } from "./dom.js";

const PREFIX = "trident_gateway_";
const SECONDS = 2;
const POINTS = 60;
const SVG = "http://www.w3.org/2000/svg";
const panel = document.querySelector("#metrics");
const failed = panel.querySelector(".error");
const pause = panel.querySelector("[name=pause]");

/** Samples of Prometheus' text format, as lists of {labels, value} by name. */
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name] = value.replace(/\\(.)/g, (_, letter) => (letter === "n" ? "\n" : letter));
    }
    const samples = found.get(match[1]) ?? [];
    samples.push({ labels, value: Number(match[3]) });
    found.set(match[1], samples);
  }
  return found;
}

/** The sum of a metric's samples that belong to a model, or to all models where `wanted` is empty. */
function sum(samples, name, wanted = {}) {
  return (samples.get(PREFIX + name) ?? [])
    .filter(({ labels }) => labels.model && Object.entries(wanted).every(([key, value]) => labels[key] === value))
    .reduce((total, { value }) => total + value, 0);
}

function rate(name, wanted) {
  return (now, before, seconds) => Math.max(sum(now, name, wanted) - sum(before, name, wanted), 0) / seconds;
}

function mean(name) {
  return (now, before) => {
    const count = sum(now, `${name}_count`) - sum(before, `${name}_count`);
    return count > 0 ? (sum(now, `${name}_sum`) - sum(before, `${name}_sum`)) / count : null;
  };
}

const plots = [
  plot("Requests", "/s", rate("requests_total")),
  plot("Tokens of answers", "/s", rate("tokens_total", { kind: "completion" })),
  plot("Running", "", (now) => sum(now, "running")),
  plot("Waiting", "", (now) => sum(now, "waiting")),
  plot("Time to the first byte, mean", " s", mean("first_byte_seconds")),
  plot("Time of a request, mean", " s", mean("request_seconds")),
];

function plot(name, unit, measure) {
  const value = element("strong", {}, "–");
  const svg = document.createElementNS(SVG, "svg");
  const line = document.createElementNS(SVG, "polyline");
  const base = document.createElementNS(SVG, "line");
  for (const [key, text] of Object.entries({ x1: 0, x2: POINTS - 1, y1: 39, y2: 39 })) base.setAttribute(key, text);
  svg.setAttribute("viewBox", `0 0 ${POINTS - 1} 40`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.append(base, line);
  panel.querySelector(".plots").append(element("figure", {}, element("figcaption", {}, name, value), svg));
  const points = [];
  return (...samples) => {
    points.push(measure(...samples));
    if (points.length > POINTS) points.shift();
    const known = points.filter((point) => point !== null);
    const most = Math.max(...known, 0);
    const latest = points.at(-1) === null ? "–" : shown(points.at(-1)) + unit;
    value.textContent = latest;
    svg.setAttribute("aria-label", `${name}: now ${latest}, at most ${shown(most)}${unit} in what is shown`);
    const places = points.map((point, place) => [place + POINTS - points.length, point]);
    const drawn = places.filter(([, point]) => point !== null).map(([x, point]) => `${x},${39 - (most ? (38 * point) / most : 0)}`);
    line.setAttribute("points", drawn.join(" "));
  };
}

function totals(samples) {
  const models = new Set((samples.get(`${PREFIX}requests_total`) ?? []).map(({ labels }) => labels.model).filter(Boolean));
  const rows = [...models].sort().map((model) => [
    element("th", { scope: "row" }, model),
    sum(samples, "requests_total", { model }),
    sum(samples, "tokens_total", { model, kind: "prompt" }),
    sum(samples, "tokens_total", { model, kind: "completion" }),
  ]);
  const servers = samples.get(`${PREFIX}server_healthy`) ?? [];
  const states = servers.map(({ labels, value }) => [labels.server, value ? "answers" : "does not answer"]);
  return [
    table("Models that were asked.", ["Model", "Requests", "Tokens read", "Tokens written"], rows),
    table("Servers behind the gateway.", ["Server", "State"], states),
  ];
}

let before = null;

async function look() {
  if (!panel.hidden && !document.hidden && pause.getAttribute("aria-pressed") === "false") {
    try {
      const now = { at: performance.now(), samples: parse(await (await call("metrics")).text()) };
      if (before) plots.forEach((draw) => draw(now.samples, before.samples, (now.at - before.at) / 1000));
      panel.querySelector(".result").replaceChildren(...totals(now.samples));
      before = now;
      if (failed.textContent) failed.textContent = "";
    } catch (error) {
      // An unchanged text is not announced again.
      if (failed.textContent !== error.message) failed.textContent = error.message;
    }
  }
  setTimeout(look, SECONDS * 1000);
}

pause.addEventListener("click", () => {
  pause.setAttribute("aria-pressed", String(pause.getAttribute("aria-pressed") === "false"));
});
look();
