// The chat: a conversation whose answers are streamed.

import { stream } from "./api.js";
import { element, onSend, shown } from "./dom.js";

const form = document.querySelector("#chat form");
const log = form.querySelector(".log");
const field = form.elements;
const NUMBERS = ["temperature", "top_p", "top_k", "repetition_penalty", "seed", "max_tokens"];
const EXAMPLE = {
  type: "object",
  properties: { name: { type: "string", maxLength: 40 }, inhabitants: { type: "integer", minimum: 0, maximum: 99999999 } },
  required: ["name", "inhabitants"],
  additionalProperties: false,
};
let history = [];

function request(message) {
  const system = field.system.value.trim();
  const body = {
    model: field.model.value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...history, { role: "user", content: message }],
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of NUMBERS) {
    if (field[name].value !== "") body[name] = field[name].valueAsNumber;
  }
  const schema = field.schema.value.trim();
  if (schema) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: parsed(schema) } };
  return body;
}

function parsed(schema) {
  try {
    return JSON.parse(schema);
  } catch (error) {
    throw new Error(`The schema is no JSON: ${error.message}`);
  }
}

/** A new message in the log, whose texts grow. */
function message(role, who) {
  const text = element("p", { class: "text", dir: "auto" });
  const about = element("p", { class: "about" });
  const whole = element("div", { class: `message ${role}` }, element("p", { class: "who" }, who), text, about);
  log.append(whole);
  let thoughts = null;
  return {
    text,
    about,
    say: (part) => shift(() => text.append(part)),
    think: (part) => shift(() => {
      if (!thoughts) {
        thoughts = element("p", { dir: "auto" });
        text.before(element("details", {}, element("summary", {}, "Reasoning"), thoughts));
      }
      thoughts.append(part);
    }),
    remove: () => whole.remove(),
  };
}

/** Change the log, and stay at its end unless the reader has scrolled up. */
function shift(change) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

onSend(form, async (signal) => {
  const asked = field.message.value;
  const body = request(asked);
  const here = history; // a new conversation may begin meanwhile
  const mine = message("user", "You");
  mine.say(asked);
  const answer = message("assistant", body.model);
  field.message.value = "";
  log.scrollTop = log.scrollHeight;
  // Screen readers then read the answer when it is complete, instead of every token.
  log.setAttribute("aria-busy", "true");
  const began = performance.now();
  let [text, first, usage, ended] = ["", null, null, ""];
  try {
    for await (const chunk of stream("v1/chat/completions", body, signal)) {
      usage = chunk.usage ?? usage;
      for (const { delta, finish_reason } of chunk.choices) {
        if (delta.reasoning_content || delta.content) first ??= performance.now();
        if (delta.reasoning_content) answer.think(delta.reasoning_content);
        if (delta.content) answer.say(delta.content);
        text += delta.content ?? "";
        ended = finish_reason ?? ended;
      }
    }
  } catch (error) {
    if (!text) {
      mine.remove();
      answer.remove();
      if (here === history) field.message.value ||= asked;
    } else {
      answer.about.textContent = signal.aborted ? "stopped" : "broken off";
      here.push({ role: "user", content: asked }, { role: "assistant", content: text });
    }
    throw error;
  } finally {
    log.removeAttribute("aria-busy");
  }
  here.push({ role: "user", content: asked }, { role: "assistant", content: text });
  shift(() => {
    answer.about.textContent = about(body, text, ended, usage, began, first);
  });
  return "The answer is complete.";
});

function about(body, text, ended, usage, began, first) {
  const said = [];
  if (usage) said.push(`${usage.prompt_tokens} + ${usage.completion_tokens} tokens`);
  if (first !== null) {
    said.push(`first after ${shown((first - began) / 1000)} s`);
    const seconds = (performance.now() - first) / 1000;
    if (usage?.completion_tokens > 1 && seconds > 0) said.push(`${shown((usage.completion_tokens - 1) / seconds)} tokens/s`);
  }
  if (ended === "length") said.push("cut at the limit of tokens");
  if (body.response_format) said.push(isJson(text) ? "JSON" : "no JSON");
  return said.join(" · ");
}

function isJson(text) {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

field.message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
field.new.addEventListener("click", () => {
  field.stop.click();
  history = [];
  log.replaceChildren();
  field.message.focus();
});
field.example.addEventListener("click", () => {
  field.schema.value = JSON.stringify(EXAMPLE, null, 2);
  field.schema.focus();
});
