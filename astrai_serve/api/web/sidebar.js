// The list of conversations: open, rename, export, delete.

import { $, icon, iconButton, make, saveFile } from "./dom.js";
import { say } from "./words.js";

const DAY = 24 * 3600 * 1000;

// `acts`: {open(conversation), rename(conversation, title), remove(conversation)}
export function drawConversations(conversations, current, running, acts) {
  const groups = new Map();
  for (const conversation of conversations) {
    const group = groupOf(conversation.data.updated);
    groups.set(group, [...(groups.get(group) ?? []), conversation]);
  }
  $("conversations").replaceChildren(...[...groups].flatMap(([group, members]) => [
    make("h3", { text: say(group) }),
    make("ul", {}, ...members.map((one) => entry(one, one.id === current.id, running.has(one.id), acts))),
  ]));
}

function groupOf(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "today";
  return time >= today - 6 * DAY ? "week" : "older";
}

function entry(conversation, isCurrent, isRunning, acts) {
  const title = conversation.data.title || say("untitled");
  const open = make("button", {
    type: "button", class: "open", "aria-current": isCurrent && "page", text: title, title,
    on: { click: () => acts.open(conversation) },
  });
  const item = make("li", { class: isRunning && "running", data: { id: conversation.id } }, open);
  item.append(iconButton("more", say("more", { title }), (event) => {
    showMenu(event.currentTarget, item, conversation, acts);
  }, { class: "quiet menu", "aria-haspopup": "menu" }));
  return item;
}

function showMenu(button, item, conversation, acts) {
  const choice = (name, words, act) => make("button", {
    type: "button", role: "menuitem", on: { click: () => { close(); act(); } },
  }, icon(name), make("span", { text: say(words) }));
  const menu = make("div", { class: "menu", role: "menu" },
    choice("edit", "rename", () => rename(item, conversation, acts)),
    choice("save", "exportMarkdown", () => exportMarkdown(conversation)),
    choice("save", "exportJson", () => exportJson(conversation)),
    choice("trash", "remove", () => askToRemove(conversation, acts)));
  const close = () => {
    menu.remove();
    document.removeEventListener("pointerdown", leave, true);
    button.focus();
  };
  const leave = (event) => menu.contains(event.target) || close();
  menu.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const choices = [...menu.children];
    if (step) choices.at((choices.indexOf(document.activeElement) + step) % choices.length).focus();
    else if (event.key === "Escape" || event.key === "Tab") close();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  document.addEventListener("pointerdown", leave, true);
  item.append(menu);
  const box = button.getBoundingClientRect();
  menu.classList.toggle("above", box.bottom + menu.offsetHeight > innerHeight);
  menu.firstChild.focus();
}

function rename(item, conversation, acts) {
  const input = make("input", { "aria-label": say("newName"), value: conversation.data.title, maxlength: 120 });
  let isOver = false;
  const end = (title) => {
    if (isOver) return; // losing the focus and Enter both end it
    isOver = true;
    acts.rename(conversation, title);
  };
  input.addEventListener("blur", () => end(input.value.trim()));
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) end(input.value.trim());
    else if (event.key === "Escape") end("");
    else return;
    event.stopPropagation();
  });
  item.replaceChildren(input);
  input.select();
}

function askToRemove(conversation, acts) {
  const dialog = $("confirm");
  $("question").textContent = say("removeAsk", { title: conversation.data.title || say("untitled") });
  dialog.onclose = () => dialog.returnValue === "yes" && acts.remove(conversation);
  dialog.returnValue = "";
  dialog.showModal();
}

const fileName = (conversation) =>
  (conversation.data.title || "chat").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);

function exportMarkdown(conversation) {
  const text = conversation.markdown({ user: say("you"), assistant: "AstrAI" });
  saveFile(`${fileName(conversation)}.md`, "text/markdown", text);
}

function exportJson(conversation) {
  const text = JSON.stringify(conversation.data, null, 2);
  saveFile(`${fileName(conversation)}.json`, "application/json", text);
}
