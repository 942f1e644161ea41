/** Conversations and settings, in this browser's localStorage.
 *
 *  A conversation is a tree of messages, each with the one before it: editing a question or asking for another answer
 *  adds a branch and loses nothing. `leaf` is the end of the branch that is shown.
 */

const PREFIX = "nanochat.chat.";
const SETTINGS = "nanochat.settings";

const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);

// ---- one conversation ----

export function newConversation() {
  return { id: newId(), title: "", updated: Date.now(), nodes: {}, leaf: null };
}

/** Add a message {role, content, ...} behind `parent` (an id or null) and show it. */
export function addNode(conversation, parent, message) {
  const node = { id: newId(), parent, ...message };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.updated = Date.now();
  return node;
}

/** Messages from the first to the leaf. */
export function path(conversation, leaf = conversation.leaf) {
  const nodes = [];
  for (let node = conversation.nodes[leaf]; node; node = conversation.nodes[node.parent]) nodes.unshift(node);
  return nodes;
}

/** The message itself and its other versions, oldest first. */
export function versions(conversation, node) {
  return Object.values(conversation.nodes).filter((other) => other.parent === node.parent);
}

/** Show the branch through `node`, down to its newest message. */
export function showBranch(conversation, node) {
  const nodes = Object.values(conversation.nodes);
  conversation.leaf = node.id;
  for (let child = node; child; child = nodes.findLast((other) => other.parent === conversation.leaf)) conversation.leaf = child.id;
}

/** What the API is sent for an answer to the question `leaf`. Questions without an answer are left out: roles alternate. */
export function messages(conversation, leaf, system) {
  const nodes = path(conversation, leaf);
  const said = nodes.filter((node, i) => i === nodes.length - 1 || (node.content && (node.role !== "user" || nodes[i + 1].content)));
  const first = system ? [{ role: "system", content: system }] : [];
  return [...first, ...said.map(({ role, content }) => ({ role, content }))];
}

// ---- storage ----

/** Every conversation as {id, title, updated}, newest first. */
export function list() {
  const ids = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).map((key) => key.slice(PREFIX.length));
  return ids.map(load).filter(Boolean).sort((a, b) => b.updated - a.updated);
}

/** The conversation, or null where there is none that can be read. */
export function load(id) {
  const found = read(PREFIX + id);
  return found?.id === id && typeof found.nodes === "object" ? found : null;
}

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null; // not written by this page
  }
}

/** -> false where the browser has no room for it. */
export function save(conversation) {
  return write(PREFIX + conversation.id, conversation);
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch (e) {
    if (e.name === "QuotaExceededError") return false;
    throw e;
  }
}

export function remove(id) {
  localStorage.removeItem(PREFIX + id);
}

/** Call `changed(id)` when another tab writes or removes a conversation. */
export function onOtherTabs(changed) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) changed(event.key?.slice(PREFIX.length));
  });
}

export const loadSettings = () => read(SETTINGS) ?? {};
export const saveSettings = (settings) => write(SETTINGS, settings);

/** The API key is forgotten with the tab. */
export const loadKey = () => sessionStorage.getItem("nanochat.key") ?? "";
export const saveKey = (key) => sessionStorage.setItem("nanochat.key", key);
