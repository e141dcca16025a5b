// Markdown within a line: emphasis, code, links. Nodes out, never markup. Newlines are kept, since
// models break lines where they mean to.

import { make } from "./dom.js";

const DEEPEST = 12;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const ADDRESS = /https?:\/\/[^\s<>"'`\u3000-\u303f\uff00-\uffef]+/y;
const TRAILING = new Set(".,;:!?*_~)]"); // ends the sentence, not the address
const BREAK = /<br\s*\/?>/iy;
const TAGS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };
const ENTITY = /&(amp|lt|gt|quot|nbsp|#39);/y;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', nbsp: "\u00a0", "#39": "'" };

export function inline(text, depth = 0) {
  return new Scanner(text, depth).scan();
}

// The address, if it leads to a web page or to mail; scripts and data do not pass.
function safe(address) {
  try {
    const { protocol, href } = new URL(address);
    return ["http:", "https:", "mailto:"].includes(protocol) ? href : null;
  } catch {
    return null;
  }
}

const link = (address, ...children) =>
  make("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...children);

class Scanner {
  constructor(text, depth) {
    this.text = text;
    this.depth = depth;
    this.at = 0;
    this.plain = ""; // text that waits to become a node
    this.nodes = [];
    this.open = []; // emphasis that has begun: {mark, index in nodes, depth of what is inside}
    this.closings = brackets(text);
    this.ticks = backticks(text);
    this.lacks = new Set(); // closing marks of mathematics that do not come any more
  }

  scan() {
    while (this.at < this.text.length) {
      if (!this.#special()) this.plain += this.text[this.at++];
    }
    this.#flush();
    return this.nodes.map(({ node }) => node);
  }

  // Take what is more than a character; false where it is not.
  #special() {
    switch (this.text[this.at]) {
      case "\\":
        return this.#math() || this.#escape();
      case "`":
        return this.#code();
      case "$":
        return this.#mathBetween("$$", "$$");
      case "*":
      case "_":
      case "~":
        return this.#emphasis();
      case "!":
        return this.text[this.at + 1] === "[" && this.#link(1);
      case "[":
        return this.#link(0);
      case "h":
        return this.#address();
      case "<":
        return this.#match(BREAK, () => this.#push(make("br")));
      case "&":
        return this.#match(ENTITY, (found) => (this.plain += ENTITIES[found[1]]));
      case "\n":
        this.plain = this.plain.trimEnd();
        this.at += 1;
        this.#push(make("br"));
        return true;
      default:
        return false;
    }
  }

  #flush() {
    if (this.plain) this.nodes.push({ node: document.createTextNode(this.plain), depth: 0 });
    this.plain = "";
  }

  #push(node, depth = 0) {
    this.#flush();
    this.nodes.push({ node, depth });
  }

  #match(pattern, take) {
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.text);
    if (!found) return false;
    take(found);
    this.at += found[0].length;
    return true;
  }

  #escape() {
    const next = this.text[this.at + 1];
    if (next === "\n") {
      this.at += 1; // the newline breaks the line by itself
      return true;
    }
    if (!next || !PUNCTUATION.test(next)) return false;
    this.plain += next;
    this.at += 2;
    return true;
  }

  #math() {
    return this.#mathBetween("\\(", "\\)") || this.#mathBetween("\\[", "\\]");
  }

  // Formulas are shown as they were written: their backslashes and stars are not Markdown.
  #mathBetween(opening, closing) {
    if (!this.text.startsWith(opening, this.at) || this.lacks.has(closing)) return false;
    const end = this.text.indexOf(closing, this.at + 2);
    if (end < 0) {
      this.lacks.add(closing);
      return false;
    }
    this.#push(make("span", { class: "math", text: this.text.slice(this.at + 2, end).trim() }));
    this.at = end + 2;
    return true;
  }

  #code() {
    const { end, length } = this.ticks.get(this.at);
    if (end === undefined) {
      this.plain += "`".repeat(length);
      this.at += length;
      return true;
    }
    const code = this.text.slice(this.at + length, end).replaceAll("\n", " ");
    const isPadded = code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "";
    this.#push(make("code", { text: isPadded ? code.slice(1, -1) : code }));
    this.at = end + length;
    return true;
  }

  #link(offset) {
    const start = this.at + offset;
    const middle = this.closings.get(start);
    if (middle === undefined || this.text[middle + 1] !== "(" || this.depth >= DEEPEST) return false;
    const end = this.text.indexOf(")", middle + 2);
    if (end < 0 || end - middle > 2000) return false;
    const address = safe(this.text.slice(middle + 2, end).trim().split(/\s/, 1)[0]);
    if (!address) return false;
    // a picture would tell its server who reads what: it is a link to it
    const words = this.text.slice(start + 1, middle);
    const children = words ? inline(words, this.depth + 1) : [address];
    this.#push(link(address, ...children), 1);
    this.at = end + 1;
    return true;
  }

  #address() {
    if (/\w/.test(this.text[this.at - 1] ?? "")) return false;
    ADDRESS.lastIndex = this.at;
    let found = ADDRESS.exec(this.text)?.[0] ?? "";
    while (found && TRAILING.has(found.at(-1))) found = found.slice(0, -1);
    const address = found && safe(found);
    if (!address) return false;
    this.#push(link(address, found));
    this.at += found.length;
    return true;
  }

  // Runs of one to three marks. Chinese has no spaces around words: a mark opens if something
  // follows it and closes if something stands before it.
  #emphasis() {
    const mark = this.text[this.at];
    let length = 1;
    while (this.text[this.at + length] === mark) length += 1;
    const before = this.text[this.at - 1] ?? " ";
    const after = this.text[this.at + length] ?? " ";
    const within = mark === "_" ? /\w/ : /\d/; // snake_case and 2*3*4 are no emphasis
    const isWithin = within.test(before) && within.test(after);
    const isEmphasis = length <= 3 && !isWithin && (mark !== "~" || length === 2);
    this.at += length;
    let left = length;
    if (isEmphasis && /\S/.test(before)) left = this.#close(mark, left);
    if (isEmphasis && left && /\S/.test(after)) left = this.#begin(mark, left);
    this.plain += mark.repeat(left);
    return true;
  }

  #close(mark, length) {
    let left = length;
    for (let index = this.open.length - 1; index >= 0 && left; index -= 1) {
      const opener = this.open[index];
      if (opener.mark[0] !== mark || opener.mark.length > left) {
        if (this.open.length - index > 8) break; // bounded, however many have been begun
        continue;
      }
      this.#flush();
      const inside = this.nodes.splice(opener.index + 1);
      const depth = 1 + inside.reduce((most, one) => Math.max(most, one.depth), 0);
      this.open.length = index;
      left -= opener.mark.length;
      if (depth > DEEPEST || !inside.length) {
        this.nodes.push(...inside, { node: document.createTextNode(opener.mark), depth: 0 });
        continue;
      }
      const node = make(TAGS[opener.mark], {}, ...inside.map((one) => one.node));
      this.nodes[opener.index] = { node, depth };
    }
    return left;
  }

  // The mark stands as text until what closes it comes.
  #begin(mark, length) {
    const marks = length === 3 ? [mark, mark + mark] : [mark.repeat(length)];
    for (const one of marks) {
      this.#flush();
      this.open.push({ mark: one, index: this.nodes.length });
      this.nodes.push({ node: document.createTextNode(one), depth: 0 });
    }
    return 0;
  }
}

// Where the bracket that begins at a place is closed.
function brackets(text) {
  const closings = new Map();
  const open = [];
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "[") open.push(at);
    else if (text[at] === "]" && open.length) closings.set(open.pop(), at);
  }
  return closings;
}

// Each run of backticks, and where the next run of its length begins.
function backticks(text) {
  const runs = new Map();
  const latest = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    const one = { length: run.length, end: undefined };
    const previous = latest.get(run.length);
    if (previous) previous.end = index;
    latest.set(run.length, one);
    runs.set(index, one);
  }
  return runs;
}
