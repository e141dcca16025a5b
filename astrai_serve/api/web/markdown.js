// Markdown as elements: lines to blocks, blocks to nodes. Text of a model is hostile until proven
// otherwise, so text only ever becomes text nodes, tags only those named here, and addresses only
// those of web pages and mail. The work grows linearly with the text, nested as it may be.

import { codeBlock } from "./code.js";
import { make } from "./dom.js";
import { inline } from "./inline.js";

const DEEPEST = 8; // what is nested deeper stays as it was written
// no pattern can match one text in two ways: it would try them all on a line made for that
const FENCE = /^ {0,3}(`{3,}(?!`)|~{3,}(?!~))([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(\S.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +(.*)|$)/;
const TASK = /^\[([ xX])\] +/;
const BORDER = /^:?-+:?$/;

const isBlank = (line) => line.trim() === "";

// Shows a text that grows. Blocks that have not changed keep their elements, and with them the
// reader's selection and the place in long code.
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.shown = [];
  }

  update(text) {
    const blocks = parse(text.split("\n"));
    const written = blocks.map((block) => JSON.stringify(block));
    let same = 0;
    while (same < written.length && written[same] === this.shown[same]) same += 1;
    while (this.root.childNodes.length > same) this.root.lastChild.remove();
    this.root.append(...blocks.slice(same).map(render));
    this.shown = written;
  }
}

// Lines to plain objects: {kind, ...}.
export function parse(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const read = [fence, heading, rule, table, ...(depth < DEEPEST ? [quote, list] : []), paragraph];
    for (const one of read) {
      const found = one(lines, at, depth);
      if (!found) continue;
      blocks.push(found.block);
      at = found.next;
      break;
    }
  }
  return blocks;
}

function fence(lines, at) {
  const opening = FENCE.exec(lines[at]);
  if (!opening) return null;
  const [, mark, language] = opening;
  const isEnd = (line) => {
    const end = line.trim();
    return end.length >= mark.length && end === mark[0].repeat(end.length);
  };
  let next = at + 1;
  while (next < lines.length && !isEnd(lines[next])) next += 1;
  const code = lines.slice(at + 1, next).join("\n");
  return { block: { kind: "code", language: language.trim().split(/\s/, 1)[0], code }, next: next + 1 };
}

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  if (!found) return null;
  const text = found[2].trimEnd().replace(/\s#+$/, "").trimEnd();
  return { block: { kind: "heading", level: found[1].length, text }, next: at + 1 };
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? { block: { kind: "rule" }, next: at + 1 } : null;
}

function quote(lines, at, depth) {
  if (!QUOTE.test(lines[at])) return null;
  let next = at;
  while (next < lines.length && QUOTE.test(lines[next])) next += 1;
  const inner = lines.slice(at, next).map((line) => line.replace(QUOTE, ""));
  return { block: { kind: "quote", blocks: parse(inner, depth + 1) }, next };
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  if (!first) return null;
  const isOrdered = /\d/.test(first[2]);
  const indent = first[1].length;
  const items = [];
  let next = at;
  while (next < lines.length) {
    const item = ITEM.exec(lines[next]);
    if (!item || item[1].length > indent + 1 || item[1].length < indent) break;
    if (/\d/.test(item[2]) !== isOrdered || RULE.test(lines[next])) break;
    const width = item[1].length + item[2].length + 1;
    const inner = [item[3] ?? ""];
    next += 1;
    while (next < lines.length && belongs(lines, next, indent)) {
      inner.push(lines[next].slice(Math.min(width, lines[next].search(/\S|$/))));
      next += 1;
    }
    // blank lines between two items are no part of either
    let after = next;
    while (after < lines.length && isBlank(lines[after])) after += 1;
    if (after < lines.length && ITEM.test(lines[after])) next = after;
    const task = TASK.exec(inner[0]);
    if (task) inner[0] = inner[0].slice(task[0].length);
    items.push({ task: task && task[1] !== " " ? "done" : task ? "open" : null, blocks: parse(inner, depth + 1) });
  }
  const start = isOrdered ? Number.parseInt(first[2], 10) : 1;
  return { block: { kind: "list", isOrdered, start, items }, next };
}

// Whether a line goes on with an item: it is indented, or follows without a blank line and begins
// nothing new. A blank line belongs if an indented one comes after it.
function belongs(lines, at, indent) {
  const line = lines[at];
  if (isBlank(line)) {
    let after = at;
    while (after < lines.length && isBlank(lines[after])) after += 1;
    return after < lines.length && after - at < 3 && lines[after].search(/\S/) > indent + 1;
  }
  if (line.search(/\S/) > indent + 1) return true;
  const isNew = ITEM.test(line) || FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line);
  return !isNew && !isBlank(lines[at - 1]);
}

function table(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|")) return null;
  const borders = cells(lines[at + 1]);
  if (!borders.every((border) => BORDER.test(border))) return null;
  const head = cells(lines[at]);
  const sides = borders.map(side);
  if (head.length !== sides.length) return null;
  const rows = [];
  let next = at + 2;
  while (next < lines.length && !isBlank(lines[next]) && lines[next].includes("|")) {
    const row = cells(lines[next]);
    rows.push(head.map((_, column) => row[column] ?? ""));
    next += 1;
  }
  return { block: { kind: "table", head, sides, rows }, next };
}

function side(border) {
  if (border.startsWith(":") && border.endsWith(":")) return "middle";
  return border.endsWith(":") ? "end" : "start";
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.replaceAll("\\|", "|").trim());
}

function paragraph(lines, at) {
  let next = at + 1;
  while (next < lines.length && !isBlank(lines[next]) && !interrupts(lines, next)) next += 1;
  const text = lines.slice(at, next).map((line) => line.trimStart()).join("\n");
  return { block: { kind: "paragraph", text }, next };
}

function interrupts(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  return FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line) ||
    Boolean(item?.[3]) || Boolean(table(lines.slice(at, at + 2), 0));
}

function render(block) {
  switch (block.kind) {
    case "code":
      return codeBlock(block.language, block.code);
    case "heading": // the page has its own first two levels
      return make(`h${Math.min(6, block.level + 2)}`, {}, ...inline(block.text));
    case "rule":
      return make("hr");
    case "quote":
      return make("blockquote", {}, ...block.blocks.map(render));
    case "list":
      return make(block.isOrdered ? "ol" : "ul", { start: block.start !== 1 && block.start }, ...block.items.map(renderItem));
    case "table":
      return renderTable(block);
    default:
      return make("p", {}, ...inline(block.text));
  }
}

function renderItem({ task, blocks }) {
  const item = make("li", { class: task && "task" });
  if (task) item.append(make("input", { type: "checkbox", disabled: true, checked: task === "done" }));
  for (const [index, block] of blocks.entries()) {
    // the words of an item stand beside its mark, not in a paragraph below it
    const isPlain = index === 0 && block.kind === "paragraph";
    item.append(...(isPlain ? inline(block.text) : [render(block)]));
  }
  return item;
}

function renderTable({ head, sides, rows }) {
  const row = (tag, texts) =>
    make("tr", {}, ...texts.map((text, column) => make(tag, { class: sides[column] }, ...inline(text))));
  const table = make("table", {}, make("thead", {}, row("th", head)), make("tbody", {}, ...rows.map((texts) => row("td", texts))));
  // wide tables scroll by themselves, with the keyboard too
  return make("div", { class: "wide", tabindex: "0" }, table);
}
