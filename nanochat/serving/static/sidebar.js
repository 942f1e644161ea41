/** The list of conversations: choose, search, rename, delete. */
import { h } from "./dom.js";

const DAY_MS = 86_400_000;

/** Draw the conversations whose title holds `filter`. actions: select(id), rename(id, title), remove(id). */
export function drawHistory(container, conversations, currentId, filter, actions) {
  const wanted = filter.trim().toLowerCase();
  const found = conversations.filter((one) => title(one).toLowerCase().includes(wanted));
  const drawn = [...grouped(found)].flatMap(([name, group]) => [
    h("h2", {}, name),
    h("ul", {}, group.map((one) => row(one, one.id === currentId, actions))),
  ]);
  container.replaceChildren(...(drawn.length ? drawn : [h("p", { class: "hint" }, wanted ? "Nothing found" : "No conversation yet")]));
}

const title = (conversation) => conversation.title || "Untitled";

function grouped(conversations) {
  const groups = new Map();
  for (const one of conversations) groups.set(age(one), [...(groups.get(age(one)) ?? []), one]);
  return groups;
}

function age({ updated }) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (updated >= midnight) return "Today";
  if (updated >= midnight - DAY_MS) return "Yesterday";
  return updated >= midnight - 7 * DAY_MS ? "Last 7 days" : "Older";
}

function row(conversation, current, actions) {
  const name = title(conversation);
  const open = h("a", { href: `#${conversation.id}`, dir: "auto", "aria-current": current ? "page" : null, title: name }, name);
  const item = h("li", { class: current ? "current" : null }, open);
  const button = (label, text, onclick) => h("button", { type: "button", class: "icon", "aria-label": `${label} ${name}`, title: label, onclick }, text);
  item.append(button("Rename", "✎", () => rename(item, conversation, actions)), button("Delete", "✕", () => actions.remove(conversation.id)));
  return item;
}

function rename(item, conversation, actions) {
  const input = h("input", { "aria-label": "Title", maxlength: 200 });
  let left = false; // Enter also takes the focus away
  const leave = (value) => {
    if (left) return;
    left = true;
    input.remove();
    actions.rename(conversation.id, value.trim() || conversation.title);
  };
  input.value = conversation.title;
  input.addEventListener("blur", () => leave(input.value));
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.stopPropagation();
    leave(event.key === "Enter" ? input.value : conversation.title);
  });
  item.replaceChildren(input);
  input.select();
}
