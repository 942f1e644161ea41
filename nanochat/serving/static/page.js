/** The page: one conversation in view, answers streaming into any number of them. */
import { chat, models } from "./api.js";
import { byId, h } from "./dom.js";
import { applyTheme, drawSettings, requestFields, set, settings } from "./settings.js";
import { drawHistory } from "./sidebar.js";
import * as store from "./store.js";
import { drawThread, messageView, sends } from "./thread.js";

const TITLE_CHARS = 60;
const SAVE_EVERY_MS = 2000;
const input = byId("input");
const scroll = byId("scroll");
const narrow = matchMedia("(max-width: 800px)"); // as in the style sheet

const running = new Map(); // conversation id -> {conversation, node, abort}
const removed = new Set(); // ids of conversations that an answer on its way must not bring back
let current = store.newConversation();
let views = new Map(); // message id -> its view, of the current conversation
let pinned = true; // whether the end is in view, and stays so while an answer grows

const actions = {
  running: (node) => [...running.values()].some((run) => run.node === node),
  regenerate: (node) => answer(current, current.nodes[node.parent]),
  rewrite: (node, text) => say(text, node.parent),
  show: (node) => {
    stop();
    store.showBranch(current, node);
    keep(current);
    draw();
    views.get(node.id)?.element.querySelector(".actions button:not(:disabled)")?.focus();
  },
};

// ---- asking and answering ----

function say(text, parent) {
  stop();
  current.title ||= text.trim().split("\n")[0].slice(0, TITLE_CHARS);
  const node = store.addNode(current, parent, { role: "user", content: text });
  if (location.hash !== `#${current.id}`) history.pushState(null, "", `#${current.id}`);
  pinned = true;
  answer(current, node);
}

/** Stream an answer to a question into its conversation, whether that stays in view or not. */
async function answer(conversation, question) {
  running.get(conversation.id)?.abort.abort();
  const model = byId("model").value;
  const node = store.addNode(conversation, question.id, { role: "assistant", content: "", model });
  const run = { conversation, node, abort: new AbortController() };
  running.set(conversation.id, run);
  keep(conversation);
  draw();
  announce("Answering");
  try {
    await stream(run, request(conversation, question, model));
  } catch (e) {
    if (run.abort.signal.aborted) node.stopped = true;
    else fail(node, e);
  } finally {
    if (running.get(conversation.id) === run) running.delete(conversation.id);
    keep(conversation);
    if (conversation === current) refresh(node);
    announce(node.error ? "" : "Answered");
  }
}

function request(conversation, question, model) {
  const retrieval = byId("retrieval").hidden ? {} : { retrieval: byId("retrieval-on").checked };
  return { model, messages: store.messages(conversation, question.id, settings.system), ...requestFields(), ...retrieval };
}

async function stream({ conversation, node, abort }, body) {
  const begun = performance.now();
  let saved = begun;
  let drawing = 0;
  try {
    for await (const chunk of chat(body, store.loadKey(), abort.signal)) {
      read(node, chunk);
      if (conversation === current) drawing ||= requestAnimationFrame(() => (drawing = grow(node)));
      if (performance.now() - saved > SAVE_EVERY_MS) {
        keep(conversation);
        saved = performance.now();
      }
    }
  } finally {
    cancelAnimationFrame(drawing);
    node.seconds = (performance.now() - begun) / 1000;
  }
}

/** Add one chunk of the API to the message. */
function read(node, chunk) {
  const choice = chunk.choices?.[0];
  node.content += choice?.delta?.content ?? "";
  for (const { index = 0, function: part } of choice?.delta?.tool_calls ?? []) {
    node.calls ??= [];
    node.calls[index] ??= { name: "", arguments: "" };
    node.calls[index].name += part?.name ?? "";
    node.calls[index].arguments += part?.arguments ?? "";
  }
  if (choice?.finish_reason) node.finish = choice.finish_reason;
  if (chunk.usage) node.tokens = chunk.usage.completion_tokens;
  if (Array.isArray(chunk.sources)) node.sources = chunk.sources;
  if (Array.isArray(chunk.trace)) node.trace = chunk.trace;
}

function fail(node, e) {
  node.error = e.wait_s ? `${e.message} (try again in ${e.wait_s} s)` : e.message;
  if (e.status === 401) askForKey();
  if (e.status === undefined) console.error(e); // not of the API: a mistake of this page
}

function stop(conversation = current) {
  running.get(conversation.id)?.abort.abort();
}

/** Store a conversation; what it holds must not be lost without a word. */
function keep(conversation) {
  if (removed.has(conversation.id)) return;
  if (!store.save(conversation)) notice("The browser has no room for this conversation: delete older ones, or it is lost with this tab.");
  list();
}

// ---- drawing ----

function draw() {
  views = drawThread(byId("thread"), current, actions);
  document.body.classList.toggle("empty", views.size === 0);
  document.title = current.title || "nanochat";
  drawButtons();
  list();
  follow();
}

function drawButtons() {
  const busy = running.has(current.id);
  byId("send").textContent = busy ? "Stop" : "Send";
  byId("send").classList.toggle("stop", busy);
}

/** Show what an answer has become -> 0, no frame is asked for. */
function grow(node) {
  views.get(node.id)?.update();
  follow();
  return 0;
}

function refresh(node) {
  const before = views.get(node.id);
  if (before) {
    const view = messageView(current, node, actions);
    before.element.replaceWith(view.element);
    views.set(node.id, view);
  }
  drawButtons();
  follow();
}

function follow() {
  if (pinned) scroll.scrollTop = scroll.scrollHeight;
  byId("latest").hidden = pinned;
}

function list() {
  if (byId("history").querySelector("input")) return; // a title is being written
  drawHistory(byId("history"), store.list(), current.id, byId("filter").value, {
    rename: (id, title) => {
      const conversation = find(id);
      if (!conversation) return list(); // another tab has deleted it
      conversation.title = title;
      keep(conversation);
      document.title = current.title || "nanochat";
    },
    remove: removeConversation,
  });
}

function notice(text, label, act) {
  const close = h("button", { type: "button", class: "icon", "aria-label": "Close", onclick: () => (byId("notice").hidden = true) }, "✕");
  const button = label && h("button", { type: "button", onclick: () => { byId("notice").hidden = true; act(); } }, label);
  byId("notice").replaceChildren(...[h("span", {}, text), button, close].filter(Boolean));
  byId("notice").hidden = false;
}

const announce = (text) => (byId("status").textContent = text);

// ---- conversations ----

const find = (id) => (id === current.id ? current : running.get(id)?.conversation) ?? store.load(id);

function select(id) {
  current = (id && find(id)) || store.newConversation();
  pinned = true;
  draw();
  panel(null);
  input.focus({ preventScroll: true });
}

function fresh() {
  history.pushState(null, "", "#");
  select(null);
}

function removeConversation(id) {
  const conversation = find(id);
  if (!conversation) return list();
  stop(conversation);
  running.delete(id);
  removed.add(id);
  store.remove(id);
  if (id === current.id) fresh();
  else list();
  notice(`Deleted "${conversation.title}".`, "Undo", () => {
    removed.delete(id);
    keep(conversation);
    location.hash = id;
  });
}

// ---- models and key ----

async function loadModels() {
  try {
    const found = await models(store.loadKey());
    byId("model").replaceChildren(...found.map(({ id }) => h("option", { value: id }, id)));
    if (found.some(({ id }) => id === settings.model)) byId("model").value = settings.model;
    byId("retrieval").hidden = !found.some((model) => model.retrieval);
  } catch (e) {
    if (e.status === 401) askForKey();
    else notice(e.message, "Try again", loadModels);
  }
}

function askForKey() {
  notice("This server asks for an API key.", "Enter it", () => {
    panel("settings");
    byId("settings-form").elements.key.focus();
  });
}

// ---- panels ----

/** Open "sidebar" (an overlay on narrow screens only) or "settings", and close the other; null closes both. */
function panel(name) {
  document.body.classList.toggle("nav", name === "sidebar");
  byId("settings").hidden = name !== "settings";
  byId("shade").hidden = name === null;
  document.querySelector("main").inert = name !== null && narrow.matches; // it lies under the panel
  byId("menu").setAttribute("aria-expanded", name === "sidebar");
  byId("options").setAttribute("aria-expanded", name === "settings");
  if (name === "sidebar") byId("new").focus();
}

const opened = () => (document.body.classList.contains("nav") ? "sidebar" : byId("settings").hidden ? null : "settings");

function closePanel() {
  const button = opened() === "sidebar" ? byId("menu") : byId("options");
  panel(null);
  button.focus();
}

// ---- events ----

function submit() {
  if (running.has(current.id)) stop();
  else if (input.value.trim()) {
    const text = input.value;
    input.value = "";
    fit();
    say(text, current.leaf);
  }
}

/** As high as its text, within the style sheet's limit. */
function fit() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function editLast() {
  const last = store.path(current).findLast((node) => node.role === "user");
  if (last) views.get(last.id).edit();
}

function onKey(event) {
  if (event.key === "Escape" && opened()) closePanel();
  else if (event.key === "Escape") stop();
  else if (event.key === "/" && !event.target.closest("input, textarea, select")) input.focus();
  else if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) fresh();
  else return;
  event.preventDefault();
}

function listen() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  input.addEventListener("input", fit);
  input.addEventListener("keydown", (event) => {
    if (sends(event)) {
      event.preventDefault();
      if (!running.has(current.id)) submit();
    } else if (event.key === "ArrowUp" && !input.value) {
      event.preventDefault();
      editLast();
    }
  });
  scroll.addEventListener("scroll", () => {
    pinned = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 40;
    byId("latest").hidden = pinned;
  });
  byId("latest").addEventListener("click", () => {
    pinned = true;
    follow();
  });
  byId("new").addEventListener("click", fresh);
  byId("filter").addEventListener("input", list);
  byId("menu").addEventListener("click", () => panel("sidebar"));
  byId("options").addEventListener("click", () => panel(opened() === "settings" ? null : "settings"));
  byId("settings-close").addEventListener("click", closePanel);
  byId("settings-form").addEventListener("submit", (event) => event.preventDefault());
  byId("shade").addEventListener("click", closePanel);
  byId("model").addEventListener("change", () => set("model", byId("model").value));
  byId("retrieval-on").addEventListener("change", () => set("retrieval", byId("retrieval-on").checked));
  document.addEventListener("keydown", onKey);
  narrow.addEventListener("change", () => panel(null));
  addEventListener("popstate", () => select(location.hash.slice(1))); // also where a link changes the hash
  addEventListener("pagehide", () => running.forEach(({ conversation }) => keep(conversation)));
  store.onOtherTabs((id) => {
    const newer = id === current.id && !running.has(id) && store.load(id);
    if (newer) {
      current = newer;
      draw();
    } else list();
  });
}

applyTheme();
drawSettings(byId("settings-form"), loadModels);
byId("retrieval-on").checked = settings.retrieval ?? true;
listen();
select(location.hash.slice(1));
loadModels();
