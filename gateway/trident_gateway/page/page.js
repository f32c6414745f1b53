// The frame: tabs, the key, and which models each form can ask.

import { ask, useKey } from "./api.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const connection = document.querySelector("#connection");
const key = document.querySelector("#key");

function select(tab) {
  for (const each of tabs) {
    const chosen = each === tab;
    each.setAttribute("aria-selected", String(chosen));
    each.tabIndex = chosen ? 0 : -1;
    document.getElementById(each.getAttribute("aria-controls")).hidden = !chosen;
  }
}

tabs.forEach((tab, place) => {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: tabs.length - 1 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const next = tabs[(steps[event.key] + tabs.length) % tabs.length];
    select(next);
    next.focus();
  });
});

/** Offer each form the models of its tasks; one without any can't be sent. */
function offer(models) {
  for (const choice of document.querySelectorAll("select[data-tasks]")) {
    const tasks = choice.dataset.tasks.split(" ");
    const fitting = models.filter(({ task }) => tasks.includes(task)).map(({ id }) => id);
    const before = choice.value;
    choice.replaceChildren(...(fitting.length ? fitting.map((id) => new Option(id, id)) : [new Option("no model here does this", "")]));
    if (fitting.includes(before)) choice.value = before;
    choice.form.elements.send.disabled = !fitting.length;
  }
}

async function load() {
  try {
    const { data } = await ask("v1/models");
    offer(data);
    connection.textContent = data.length === 1 ? "1 model" : `${data.length} models`;
  } catch (error) {
    offer([]);
    connection.textContent = error.status === 401 ? "This gateway needs an API key." : error.message;
  }
}

key.addEventListener("change", () => {
  useKey(key.value);
  load();
});
load();
