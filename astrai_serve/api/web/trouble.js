// What stands in an answer's place when it did not come, with a way on. A notice is known by its
// name, so that one that is still right stays, with the focus and what was typed into it.

import { make } from "./dom.js";
import { apiKey } from "./store.js";
import { say } from "./words.js";

const WORDS = { busy: "busyStill", draining: "draining", gone: "gone", broken: "broken" };

// What to say of a ServerError; what was refused or failed, the server knows better.
export const wordsFor = (error) => (WORDS[error.kind] ? say(WORDS[error.kind]) : error.message);

const notice = (name, ...children) =>
  make("div", { class: "notice", role: "alert", data: { name } }, ...children);

// A sentence and a button.
export function ofText(kind, text, label, press) {
  const name = `${kind} ${document.documentElement.lang}`;
  const draw = () =>
    notice(name, make("p", { text }), make("button", { type: "button", text: label, on: { click: press } }));
  return { name, text, draw };
}

// A field for the server's key; `use` is called with it and whether it is to be remembered.
export function ofKey(use) {
  const name = `key ${apiKey() ? "wrong" : "none"} ${document.documentElement.lang}`;
  return { name, draw: () => notice(name, keyForm(use)) };
}

function keyForm(use) {
  const input = make("input", { type: "password", autocomplete: "off", "aria-label": say("key"), class: "key" });
  const keep = make("input", { type: "checkbox" });
  const form = make("form", { class: "keyForm" },
    make("p", { text: say(apiKey() ? "wrongKey" : "needsKey") }),
    make("div", { class: "row" }, input, make("button", { class: "strong", text: say("use") })),
    make("label", {}, keep, make("span", { text: say("keyKeep") })));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    use(input.value.trim(), keep.checked);
  });
  return form;
}
