// A block of code: its language, a button that copies it, and quiet colours for the languages whose
// comments and words are known.

import { copyButton, make } from "./dom.js";
import { say } from "./words.js";

const LONGEST = 20_000; // characters; longer code stays plain, so that a page never hangs on it
const WORDS = {
  python: "and as assert async await break class continue def del elif else except False finally for from global if import in is lambda None nonlocal not or pass raise return True try while with yield match case self",
  shell: "if then else elif fi for in do done while case esac function return export local cd echo sudo set",
  c: "auto bool break case char class const continue default do double else enum extern false float for goto if inline int long namespace new nullptr NULL private public return short signed sizeof static struct switch template this true typedef typename union unsigned using virtual void volatile while include define",
  script: "async await break case catch class const continue default delete do else export extends false finally for from function if import in instanceof interface let new null of return static super switch this throw true try type typeof undefined var void while yield",
  java: "abstract boolean break byte case catch char class const continue default do double else enum extends false final finally float for if implements import instanceof int interface long new null package private protected public return short static super switch this throw throws true try var void while fun val when object",
  go: "break case chan const continue default defer else fallthrough false for func go goto if import interface map nil package range return select struct switch true type var",
  rust: "as async await break const continue crate dyn else enum extern false fn for if impl in let loop match mod move mut pub ref return self Self static struct super trait true type unsafe use where while",
  sql: "select from where and or not insert into values update set delete create table primary key join left right inner on group by order having limit as distinct null is in like between union all",
  data: "true false null yes no on off",
};
// name: [words, comments]; a comment begins with # or // or -- and ends with the line
const LANGUAGES = {
  python: ["python", "#"], py: ["python", "#"],
  bash: ["shell", "#"], sh: ["shell", "#"], shell: ["shell", "#"], zsh: ["shell", "#"], console: ["shell", "#"],
  yaml: ["data", "#"], yml: ["data", "#"], toml: ["data", "#"], json: ["data", "//"],
  c: ["c", "//"], cpp: ["c", "//"], "c++": ["c", "//"], h: ["c", "//"],
  javascript: ["script", "//"], js: ["script", "//"], typescript: ["script", "//"], ts: ["script", "//"], jsx: ["script", "//"], tsx: ["script", "//"],
  java: ["java", "//"], kotlin: ["java", "//"], go: ["go", "//"], rust: ["rust", "//"], rs: ["rust", "//"],
  sql: ["sql", "--"],
};
const COMMENTS = { "#": "#[^\\n]*", "//": "\\/\\/[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)", "--": "--[^\\n]*" };
const STRINGS = "\"\"\"[^]*?(?:\"\"\"|$)|\"(?:[^\"\\\\\\n]|\\\\.)*\"?|'(?:[^'\\\\\\n]|\\\\.)*'?|`(?:[^`\\\\]|\\\\[^])*`?";
const NUMBERS = "\\b\\d[\\w.]*";

export function codeBlock(language, code) {
  const shown = make("code", {}, ...colour(language.toLowerCase(), code));
  const copy = copyButton(say("copyCode"), say("copied"), () => code);
  const head = make("figcaption", {}, make("span", { text: language }), copy);
  return make("figure", { class: "code" }, head, make("pre", { tabindex: "0" }, shown));
}

function colour(language, code) {
  const [kind, comment] = Object.hasOwn(LANGUAGES, language) ? LANGUAGES[language] : [];
  if (!kind || code.length > LONGEST) return [code];
  const words = new Set(WORDS[kind].split(" "));
  const pattern = new RegExp(`(${COMMENTS[comment]})|(${STRINGS})|(${NUMBERS})|([A-Za-z_]\\w*)`, "g");
  const nodes = [];
  let end = 0;
  for (const found of code.matchAll(pattern)) {
    const [text, isComment, isString, isNumber, word] = found;
    const isKnown = word && words.has(kind === "sql" ? word.toLowerCase() : word);
    const kindOf = isComment ? "comment" : isString ? "string" : isNumber ? "number" : isKnown ? "word" : null;
    if (!kindOf) continue;
    nodes.push(code.slice(end, found.index), make("span", { class: kindOf, text }));
    end = found.index + text.length;
  }
  nodes.push(code.slice(end));
  return nodes;
}
