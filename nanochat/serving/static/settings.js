/** The settings panel: what is sent with each question. A field left empty is the server's own default. */
import { h } from "./dom.js";
import { loadKey, loadSettings, saveKey, saveSettings } from "./store.js";

const NUMBERS = [
  ["temperature", "Temperature", "0 takes the likeliest token", { min: 0, max: 2, step: 0.05 }],
  ["top_p", "Top p", "fewest tokens of this total probability", { min: 0, max: 1, step: 0.01 }],
  ["top_k", "Top k", "only the k likeliest tokens; 0 = all", { min: 0, step: 1 }],
  ["min_p", "Min p", "at least this share of the likeliest", { min: 0, max: 1, step: 0.01 }],
  ["repetition_penalty", "Repetition penalty", "1 = none", { min: 1, max: 2, step: 0.01 }],
  ["max_tokens", "Longest answer", "tokens", { min: 1, step: 1 }],
  ["seed", "Seed", "the same seed gives the same answer", { step: 1 }],
];

export const settings = loadSettings();

/** Fields of a request that the user has set. */
export function requestFields() {
  const given = NUMBERS.map(([name]) => [name, settings[name]]).filter(([, value]) => value !== undefined);
  const stop = (settings.stop ?? "").split("\n").filter(Boolean);
  return { ...Object.fromEntries(given), ...(stop.length && { stop }) };
}

/** Keep a setting; undefined forgets it. */
export function set(name, value) {
  settings[name] = value;
  saveSettings(settings);
}

/** Fill the form. keyChanged() is called when another API key was typed. */
export function drawSettings(form, keyChanged) {
  form.replaceChildren(
    field("System prompt", "said before every conversation", textArea("system", 3)),
    ...NUMBERS.map(([name, label, hint, limits]) => field(label, hint, number(name, limits))),
    field("Stop at", "one text a line", textArea("stop", 2)),
    field("Theme", "", choice("theme", [["", "As the system"], ["light", "Light"], ["dark", "Dark"]], applyTheme)),
    field("API key", "where the server asks for one; forgotten with the tab", keyInput(keyChanged)),
    h("button", { type: "button", onclick: () => reset(form, keyChanged) }, "Back to defaults"),
  );
}

export function applyTheme() {
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
}

function field(label, hint, input) {
  return h("label", { class: "setting" }, h("span", {}, label), input, h("small", { class: "hint", "data-hint": hint }, hint));
}

function textArea(name, rows) {
  const area = h("textarea", { name, rows, oninput: () => set(name, area.value || undefined) });
  area.value = settings[name] ?? "";
  return area;
}

/** A number outside its limits is not kept; its hint says why. */
function number(name, limits) {
  const input = h("input", { type: "number", name, inputmode: "decimal", placeholder: "server's default", ...limits });
  input.value = settings[name] ?? "";
  input.addEventListener("input", () => {
    const { valid } = input.validity;
    set(name, valid && input.value !== "" ? input.valueAsNumber : undefined);
    const hint = input.nextElementSibling;
    hint.textContent = valid ? hint.dataset.hint : `${input.validationMessage} (not used)`;
  });
  return input;
}

function choice(name, options, changed) {
  const select = h("select", { name }, options.map(([value, label]) => h("option", { value }, label)));
  select.value = settings[name] ?? "";
  select.addEventListener("change", () => {
    set(name, select.value || undefined);
    changed();
  });
  return select;
}

function keyInput(changed) {
  const input = h("input", { type: "password", name: "key", autocomplete: "off" });
  input.value = loadKey();
  input.addEventListener("change", () => {
    saveKey(input.value.trim());
    changed();
  });
  return input;
}

function reset(form, keyChanged) {
  const { model, retrieval } = settings;
  for (const name of Object.keys(settings)) delete settings[name];
  Object.assign(settings, { model, retrieval });
  saveSettings(settings);
  applyTheme();
  drawSettings(form, keyChanged);
}
