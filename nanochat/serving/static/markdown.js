/** Markdown as DOM nodes: what a model writes is never read as HTML.
 *
 *  The parts of CommonMark and GitHub's tables that models write: paragraphs, headings, lists, quotes, rules, fenced
 *  code, tables; code, strong, emphasis, strikethrough, links. HTML and its entities are text, images are links (nothing is loaded),
 *  indentation is no code, a line below dashes no heading, and a line break stays one (in the style sheet).
 *  Work grows with the length of the text, whatever stands in it: searches that failed are not repeated.
 */
import { copyButton, h } from "./dom.js";

const MAX_DEPTH = 8; // of lists and quotes, and of emphasis; deeper is text
const FENCE = /^ {0,3}(`{3,}|~{3,}) *([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t](.*))?$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( {1,4})(?=\S)| *$)/;
const LINKS = ["http:", "https:", "mailto:"];

const uncited = () => null;
const shown = new WeakMap(); // element -> {cite, raws}: what its children were made of

/** Show `text` inside `element`. Blocks that stand there already are left alone, so that a growing text keeps its
 *  selection. cite(n): the node for "[n]", or null where that is plain text; another function draws everything anew. */
export function render(element, text, cite = uncited) {
  const blocks = parse(text.split(/\r\n?|\n/), 0);
  const before = shown.get(element);
  const raws = before?.cite === cite ? before.raws : [];
  let same = 0;
  while (same < raws.length && same < blocks.length && raws[same] === blocks[same].raw) same += 1;
  while (element.childNodes.length > same) element.lastChild.remove();
  element.append(...blocks.slice(same).map((block) => block.node(cite)));
  shown.set(element, { cite, raws: blocks.map((block) => block.raw) });
}

// ---- blocks: {raw, node(cite)} ----

function parse(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [end, node] = block(lines, at, depth);
    blocks.push({ raw: lines.slice(at, end).join("\n"), node });
    at = end;
  }
  return blocks;
}

/** The block that begins at a line -> [the line after it, what makes its node]. */
function block(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return fence(lines, at);
  const heading = HEADING.exec(line);
  if (heading) {
    const text = (heading[2] ?? "").trim().replace(/(^| )#+$/, "");
    return [at + 1, (cite) => h(`h${heading[1].length}`, { dir: "auto" }, inline(text, cite))];
  }
  if (RULE.test(line)) return [at + 1, () => h("hr")];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return list(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end, depth)) end += 1;
  const text = lines.slice(at, end).map((line) => line.trim().replace(/\\$/, "")).join("\n");
  return [end, (cite) => h("p", { dir: "auto" }, inline(text, cite))];
}

/** Whether a paragraph ends before this line. A number other than 1 at a line's start is more often a year than a list. */
function interrupts(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || isTable(lines, at)) return true;
  if (depth >= MAX_DEPTH) return false;
  const item = ITEM.exec(line);
  return QUOTE.test(line) || (item?.[3] !== undefined && (item[2].length === 1 || parseInt(item[2]) === 1));
}

function fence(lines, at) {
  const [, mark, language] = FENCE.exec(lines[at]);
  const closed = (line) => line.trim().length >= mark.length && line.trim() === mark[0].repeat(line.trim().length);
  let end = at + 1;
  while (end < lines.length && !closed(lines[end])) end += 1;
  const indent = lines[at].search(/\S/);
  const code = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, Math.max(line.search(/\S|$/), 0))));
  return [Math.min(end + 1, lines.length), () => codeBlock(code.join("\n"), language)];
}

function codeBlock(code, language) {
  const bar = h("div", { class: "bar" }, h("span", {}, language || "text"), copyButton(() => code));
  return h("div", { class: "code" }, bar, h("pre", { tabindex: "0" }, h("code", {}, code)));
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = parse(lines.slice(at, end).map((line) => line.replace(QUOTE, "")), depth + 1);
  return [end, (cite) => h("blockquote", {}, inner.map((block) => block.node(cite)))];
}

function list(lines, at, depth) {
  const kind = (mark) => (mark.length > 1 ? mark.at(-1) : mark);
  const first = ITEM.exec(lines[at]);
  const items = [];
  let end = at;
  let loose = false;
  for (let item = first; item && kind(item[2]) === kind(first[2]) && !RULE.test(lines[end]); item = ITEM.exec(lines[end] ?? "")) {
    const [next, inner] = listItem(lines, end, item);
    const blanks = next - end - inner.length;
    items.push(parse(inner, depth + 1));
    loose ||= inner.some((line, i) => !line.trim() && i < inner.length - 1) && items.at(-1).length > 1;
    end = next;
    if (blanks > 0 && ITEM.test(lines[end] ?? "") && kind(ITEM.exec(lines[end])[2]) === kind(first[2])) loose = true;
  }
  const ordered = first[2].length > 1;
  const start = ordered && parseInt(first[2]) !== 1 ? parseInt(first[2]) : null;
  return [end, (cite) => h(ordered ? "ol" : "ul", { start }, items.map((item) => h("li", { dir: "auto" }, content(item, loose, cite))))];
}

/** Lines of one item, without what indents them -> [the line after it and the blank lines behind it, its lines]. */
function listItem(lines, at, item) {
  const indent = item[1].length;
  const inner = [lines[at].slice(item[0].length)];
  const width = Math.min(item[0].length, indent + 4);
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const deep = line.search(/\S/);
    if (deep >= Math.min(width, indent + 2)) inner.push(line.slice(Math.min(deep, width)));
    else if (deep < 0) inner.push("");
    else if (inner.at(-1) && !ITEM.test(line) && !interrupts(lines, end, 0)) inner.push(line);
    else break;
  }
  while (inner.length > 1 && !inner.at(-1)) inner.pop();
  return [end, inner];
}

/** A tight list shows its paragraphs without space around them. */
function content(blocks, loose, cite) {
  const nodes = blocks.map((block) => block.node(cite));
  return nodes.flatMap((node) => (!loose && node.tagName === "P" ? [...node.childNodes] : [node]));
}

const isTable = (lines, at) => {
  const below = lines[at + 1];
  if (below === undefined || !lines[at].includes("|") || !/^[\s|:-]*-[\s|:-]*$/.test(below)) return false;
  const rules = cells(below);
  return rules.length === cells(lines[at]).length && rules.every((rule) => /^:?-+:?$/.test(rule));
};

const cells = (line) => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));

function table(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].trim() && lines[end].includes("|")) end += 1;
  const sides = cells(lines[at + 1]).map((rule) => (rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "right") : null));
  const row = (tag, line, cite) => {
    const given = cells(line);
    return h("tr", {}, sides.map((side, i) => h(tag, { dir: "auto", class: side }, inline(given[i] ?? "", cite))));
  };
  return [end, (cite) => {
    const body = lines.slice(at + 2, end).map((line) => row("td", line, cite));
    return h("div", { class: "table", tabindex: "0" }, h("table", {}, h("thead", {}, row("th", lines[at], cite)), h("tbody", {}, body)));
  }];
}

// ---- inline ----

const LABEL = /!?\[((?:[^[\]\\]|\\.|\[[^[\]]{0,200}\]){0,500})\]\(\s{0,9}<?((?:[^\s()<>]|\([^\s()<>]{0,500}\)){0,2000})>?(?:\s{1,9}"[^"]{0,300}")?\s{0,9}\)/y;
const CITATION = /\[(\d{1,3})\]/y;
const URL_HERE = /<?https?:\/\/[^\s<>"`]{1,2000}>?/y;
const ESCAPED = /\\([!-/:-@[-`{-~])/y;
const MARK = /\*{1,3}|_{1,3}|~~/y;
const NEXT = /[\\`*_~![<]|https?:\/\//g;

/** Text of one block -> nodes and strings. */
export function inline(text, cite, depth = 0) {
  const out = [];
  const failed = new Set(); // marks that have no end behind here
  let plain = 0;
  for (let at = next(text, 0); at < text.length; ) {
    const [end, made] = span(text, at, cite, depth, failed);
    if (end > at) {
      out.push(text.slice(plain, at), ...made);
      plain = at = end;
    } else at += 1;
    at = next(text, at);
  }
  out.push(text.slice(plain));
  return out.filter((piece) => piece !== "");
}

function next(text, from) {
  NEXT.lastIndex = from;
  return NEXT.exec(text)?.index ?? text.length;
}

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

/** What begins at a character -> [its end, nodes]; an end at or before `at` where nothing does. */
function span(text, at, cite, depth, failed) {
  const c = text[at];
  const escaped = c === "\\" && match(ESCAPED, text, at);
  if (escaped) return [at + 2, [escaped[1]]];
  if (c === "`") return code(text, at, failed);
  if (c === "[" || (c === "!" && text[at + 1] === "[")) return link(text, at, cite, depth);
  if (c === "h" || c === "<") return bareLink(text, at);
  const mark = depth < MAX_DEPTH && match(MARK, text, at);
  return mark ? emphasis(text, at, mark[0], cite, depth, failed) : [at, []];
}

function code(text, at, failed) {
  const mark = /`+/y;
  mark.lastIndex = at;
  const ticks = mark.exec(text)[0];
  const end = failed.has(ticks) ? -1 : codeEnd(text, at + ticks.length, ticks);
  if (end < 0) {
    failed.add(ticks);
    return [at + ticks.length, [ticks]];
  }
  const inside = text.slice(at + ticks.length, end).replaceAll("\n", " ");
  const padded = inside.startsWith(" ") && inside.endsWith(" ") && inside.trim();
  return [end + ticks.length, [h("code", {}, padded ? inside.slice(1, -1) : inside)]];
}

/** Where exactly as many backticks stand again, or -1. */
function codeEnd(text, from, ticks) {
  const runs = /`+/g;
  runs.lastIndex = from;
  for (let run = runs.exec(text); run; run = runs.exec(text)) if (run[0].length === ticks.length) return run.index;
  return -1;
}

function emphasis(text, at, run, cite, depth, failed) {
  const inWord = run[0] === "_" && /[\p{L}\p{N}_]/u.test(text[at - 1] ?? "");
  const opens = !inWord && /\S/.test(text[at + run.length] ?? "");
  const end = opens && !failed.has(run) ? markEnd(text, at + run.length, run) : -1;
  if (end < 0) {
    if (opens) failed.add(run);
    return [at + run.length, [run]];
  }
  const inside = inline(text.slice(at + run.length, end), cite, depth + 1);
  const tags = { 1: ["em"], 2: [run === "~~" ? "del" : "strong"], 3: ["em", "strong"] }[run.length];
  const node = tags.reduceRight((children, tag) => [h(tag, {}, ...children)], inside);
  return [end + run.length, node];
}

/** Where the mark closes: behind a character that is no space, not inside code; a longer run closes with its last
 *  characters, and a pair is no end of a single mark. */
function markEnd(text, from, run) {
  const marks = run[0] === "*" ? /\\.|`+|\*+/gs : run[0] === "_" ? /\\.|`+|_+/gs : /\\.|`+|~~/gs;
  marks.lastIndex = from;
  for (let found = marks.exec(text); found; found = marks.exec(text)) {
    const [mark] = found;
    if (mark[0] === "`") {
      const end = codeEnd(text, marks.lastIndex, mark);
      if (end >= 0) marks.lastIndex = end + mark.length;
      continue;
    }
    const inWord = mark[0] === "_" && /[\p{L}\p{N}]/u.test(text[marks.lastIndex] ?? "");
    const fits = run.length === 1 ? mark.length % 2 === 1 : mark.length >= run.length;
    if (mark[0] === run[0] && fits && found.index > from && !inWord && /\S/.test(text[found.index - 1]))
      return marks.lastIndex - run.length;
  }
  return -1;
}

function link(text, at, cite, depth) {
  const found = match(LABEL, text, at);
  if (found) {
    const made = anchor(found[2], text[at] === "!" ? [found[1] || "image"] : inline(found[1], uncited, depth + 1));
    return made ? [at + found[0].length, [made]] : [at, []];
  }
  const cited = match(CITATION, text, at);
  const node = cited && cite(parseInt(cited[1]));
  return node ? [at + cited[0].length, [node]] : [at, []];
}

function bareLink(text, at) {
  const found = match(URL_HERE, text, at);
  if (!found) return [at, []];
  const bracketed = found[0].startsWith("<") && found[0].endsWith(">");
  if (!bracketed && found[0].startsWith("<")) return [at, []];
  let address = bracketed ? found[0].slice(1, -1) : found[0].replace(/>$/, "").replace(/[.,;:!?*_~'\])]+$/, "");
  if (!bracketed && address.includes("(") && found[0][address.length] === ")") address += ")";
  const made = anchor(address, [address]);
  return made ? [at + (bracketed ? found[0].length : address.length), [made]] : [at, []];
}

/** A link that leaves the page, or null for an address that is not of the web. */
function anchor(address, children) {
  const url = URL.canParse(address) ? new URL(address) : null;
  if (!url || !LINKS.includes(url.protocol)) return null;
  return h("a", { href: url.href, title: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}
