/** What an answer rests on: the documents the model was shown, with the words the answer took from them marked, and the
 *  searches that found them. */
import { h } from "./dom.js";

const WORD = /[\p{L}\p{N}]+/gu;
const COMMON = new Set(
  ("a about after all also an and any are as at be been but by can did do does for from had has have he her his how i if in " +
    "into is it its more no not of on one or other out she so some than that the their them then there these they this to up " +
    "was we were what when where which who why will with would you your").split(" "),
);

/** The trace of searches, then cited documents, then the others under one heading; null where there is nothing.
 *  sources: [{n, id, title, text, score, cited}]; trace: [{query, titles}]. */
export function sourcesView({ sources = [], trace = [], content }, question) {
  if (!sources.length && !trace.length) return null;
  const cited = sources.filter((source) => source.cited);
  const others = sources.filter((source) => !source.cited);
  const draw = (source) => card(source, content, question);
  const rest = h("details", { class: "others" }, h("summary", {}, `${cited.length ? "Also read" : "Read, not cited"} (${others.length})`), others.map(draw));
  return h("section", { class: "sources", "aria-label": "Sources" }, traceView(trace), cited.map(draw), others.length ? rest : null);
}

function card({ n, id, title, text, score, cited }, answer, question) {
  const details = score == null ? String(id) : `${id} · score ${Number(score).toPrecision(3)}`;
  const heading = h("summary", { dir: "auto" }, h("span", { class: "number" }, String(n)), h("span", { class: "title" }, title || String(id)));
  const body = [h("blockquote", { dir: "auto" }, highlight(String(text), answer, question)), h("p", { class: "hint" }, details)];
  return h("details", { class: cited ? "source cited" : "source", "data-n": n }, heading, body);
}

/** Text with <mark> around what it shares with the answer; with the question where that is nothing. */
export function highlight(text, answer, question) {
  for (const other of [answer, question]) {
    const runs = sharedRuns(text, words(other ?? ""));
    if (runs.length) return marked(text, runs);
  }
  return [text];
}

const words = (text) => new Set((text.toLowerCase().match(WORD) ?? []).filter((word) => !COMMON.has(word)));

/** Runs of shared words as [start, end]. Common words belong to a run only between two shared ones. */
function sharedRuns(text, shared) {
  const runs = [];
  let open = false; // whether nothing but common words and spaces came since the last run
  for (const found of text.matchAll(WORD)) {
    const word = found[0].toLowerCase();
    const end = found.index + found[0].length;
    if (shared.has(word)) {
      if (open && !/[.!?\n]/.test(text.slice(runs.at(-1)[1], found.index))) runs.at(-1)[1] = end;
      else runs.push([found.index, end]);
      open = true;
    } else open &&= COMMON.has(word);
  }
  return runs;
}

function marked(text, runs) {
  const pieces = [];
  let at = 0;
  for (const [start, end] of runs) {
    pieces.push(text.slice(at, start), h("mark", {}, text.slice(start, end)));
    at = end;
  }
  return [...pieces, text.slice(at)];
}

function traceView(trace) {
  if (!trace.length) return null;
  const hop = ({ query, titles }) => {
    const found = (titles ?? []).map((title) => h("li", { dir: "auto" }, title));
    return h("li", { dir: "auto" }, h("span", { class: "query" }, query), found.length ? h("ul", {}, found) : " nothing found");
  };
  const count = trace.length === 1 ? "1 search" : `${trace.length} searches`;
  return h("details", { class: "trace" }, h("summary", {}, count), h("ol", {}, trace.map(hop)));
}

/** A function for `render` that turns [n] into a button which opens source n, where there is one. */
export function citations(sources, open) {
  const titles = new Map(sources.map((source) => [Number(source.n), source.title || String(source.id)]));
  return (n) => {
    if (!titles.has(n)) return null;
    const label = `Source ${n}: ${titles.get(n)}`;
    return h("button", { type: "button", class: "cite", "aria-label": label, title: label, onclick: () => open(n) }, String(n));
  };
}
