/** The messages of a conversation, and what can be done with each. */
import { copyButton, h } from "./dom.js";
import { render } from "./markdown.js";
import { citations, sourcesView } from "./sources.js";
import { path, versions } from "./store.js";

const ENDS = { length: "Ended at the longest answer allowed", content_filter: "Ended by the server" };

/** Draw the branch that is shown -> views by message id. A view has `element`, `update()` for a message that has grown,
 *  and, for a question, `edit()`.
 *  actions: running(node), regenerate(node), rewrite(node, text), show(node). */
export function drawThread(container, conversation, actions) {
  const views = path(conversation).map((node) => [node.id, messageView(conversation, node, actions)]);
  container.replaceChildren(...views.map(([, view]) => view.element));
  return new Map(views);
}

export function messageView(conversation, node, actions) {
  const draw = node.role === "user" ? question : answer;
  const content = h("div", { class: "content" });
  const extra = h("div", { class: "extra" });
  const footer = h("footer", { class: "actions" });
  const label = node.role === "user" ? "You" : `Answer of ${node.model || "the model"}`;
  const element = h("article", { class: `message ${node.role}`, "data-id": node.id, "aria-label": label }, content, extra, footer);
  const view = { element, content, extra, footer, conversation, node, actions, cite: undefined };
  view.update = () => draw(view);
  view.edit = () => edit(view);
  view.update();
  return view;
}

// ---- questions ----

function question(view) {
  const { node, content, footer } = view;
  content.setAttribute("dir", "auto");
  content.replaceChildren(node.content);
  footer.replaceChildren(...pager(view), copyButton(() => node.content), h("button", { type: "button", onclick: view.edit }, "Edit"));
}

function edit(view) {
  const { node, content, footer, actions, element } = view;
  const area = h("textarea", { "aria-label": "Edit the message", rows: Math.min(node.content.split("\n").length + 1, 12) });
  area.value = node.content;
  const leave = () => {
    element.classList.remove("editing");
    view.update();
    footer.lastChild.focus();
  };
  const send = () => (area.value.trim() && area.value !== node.content ? actions.rewrite(node, area.value) : leave());
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation(); // would stop an answer
      leave();
    } else if (sends(event)) {
      event.preventDefault();
      send();
    }
  });
  element.classList.add("editing");
  content.replaceChildren(area);
  footer.replaceChildren(
    h("button", { type: "button", class: "main", onclick: send }, "Send"),
    h("button", { type: "button", onclick: leave }, "Cancel"),
  );
  area.focus();
}

/** Whether a key press sends: Enter alone, and not while a word is composed; on a touch screen it breaks the line. */
export function sends(event) {
  const plain = event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
  return plain && (event.ctrlKey || event.metaKey || !matchMedia("(pointer: coarse)").matches);
}

// ---- answers ----

function answer(view) {
  const { node, element, content } = view;
  const running = view.actions.running(node);
  if (!running && node.sources) view.cite ??= citations(node.sources, (n) => openSource(element, n));
  element.classList.toggle("running", running);
  element.setAttribute("aria-busy", running);
  render(content, node.content, view.cite);
  view.extra.replaceChildren(...(running ? [] : below(view)));
  view.footer.replaceChildren(...(running ? [] : answerActions(view)));
}

function below({ node, conversation, actions }) {
  const asked = conversation.nodes[node.parent]?.content;
  const calls = (node.calls ?? []).map((call) => h("details", { class: "call" }, h("summary", {}, `Calls ${call.name}`), h("pre", {}, call.arguments)));
  const again = h("button", { type: "button", onclick: () => actions.regenerate(node) }, "Try again");
  const error = node.error ? h("div", { class: "error", role: "alert" }, h("span", {}, node.error), again) : null;
  return [...calls, error, sourcesView(node, asked)].filter(Boolean);
}

function answerActions(view) {
  const { node, actions } = view;
  const again = h("button", { type: "button", onclick: () => actions.regenerate(node) }, "Regenerate");
  const notes = [node.stopped ? "Stopped" : ENDS[node.finish], speed(node)].filter(Boolean);
  return [...pager(view), copyButton(() => node.content), again, h("span", { class: "hint" }, notes.join(" · "))];
}

function speed({ tokens, seconds }) {
  if (!tokens) return null;
  const rate = tokens / seconds;
  const shown = seconds > 0 ? `, ${rate < 10 ? rate.toFixed(1) : Math.round(rate)} a second` : "";
  return `${tokens} ${tokens === 1 ? "token" : "tokens"}${shown}`;
}

/** Open source n of a message, and take the keyboard there. */
function openSource(element, n) {
  const source = element.querySelector(`.source[data-n="${n}"]`);
  for (let details = source; details && element.contains(details); details = details.parentElement.closest("details")) details.open = true;
  source.scrollIntoView({ block: "nearest" });
  source.querySelector("summary").focus({ preventScroll: true });
}

// ---- versions ----

/** Buttons to the other versions of a message; none where there is one. */
function pager({ conversation, node, actions }) {
  const all = versions(conversation, node);
  const at = all.indexOf(node);
  if (all.length < 2) return [];
  const to = (other, label, text) =>
    h("button", { type: "button", class: "icon", "aria-label": label, disabled: !other, onclick: () => actions.show(other) }, text);
  const place = h("span", { class: "place" }, `${at + 1}/${all.length}`);
  return [to(all[at - 1], "Version before", "‹"), place, to(all[at + 1], "Version after", "›")];
}
