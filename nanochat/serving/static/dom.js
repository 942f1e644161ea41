/** Elements out of strings, which become attributes and text and nothing else. */

/** A new element. Properties that begin with "on" are listeners; true sets an attribute without value; false, null and
 *  undefined leave it out. Children are nodes or strings. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** A button that copies what `text` returns, and says so. */
export function copyButton(text) {
  return h("button", { type: "button", onclick: (event) => copy(event.currentTarget, text()) }, "Copy");
}

async function copy(button, text) {
  button.textContent = (await written(text)) ? "Copied" : "Not copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

async function written(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copiedBySelection(text); // the clipboard is closed to pages that come over plain http from another machine
  }
}

function copiedBySelection(text) {
  const area = h("textarea", { class: "unseen" });
  const focused = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}
