// The chat page: it speaks to the server's public API as any other client does, and keeps the
// conversations in this browser. This file ties the parts together.

import { Conversation } from "./conversation.js";
import { $, icon } from "./dom.js";
import { isSend, MessageView } from "./message.js";
import { Model } from "./model.js";
import { Run } from "./run.js";
import { ServerError } from "./server.js";
import { applyAppearance, connectSettings } from "./settings.js";
import { drawConversations } from "./sidebar.js";
import * as store from "./store.js";
import { ofKey, ofText, wordsFor } from "./trouble.js";
import { number, say, translate } from "./words.js";

const SAVING = 1000; // ms between saves of a growing answer
const NEAR = 80; // pixels from the end within which the page follows the answer

const runs = new Map(); // of conversations, by id
const troubles = new Map(); // what kept their last messages from being answered
const removed = new Set(); // conversations that were deleted, by id
const views = new Map(); // of the messages on show, by id
const model = new Model(onModel);
let current = begin();
const pending = new Set(); // messages to be drawn in the next frame

function begin() {
  return Conversation.begin({ system: store.settings.system, sampling: store.settings.sampling });
}

// Drawing

function draw() {
  translate(document);
  model.draw();
  const idle = $("text").value === "";
  drawList();
  drawLog();
  drawComposer();
  if (idle) fit();
}

function drawList() {
  const all = store.conversations();
  if (!current.isEmpty && !all.some(({ id }) => id === current.id)) all.unshift(current);
  drawConversations(all, current, runs, { open, rename, remove });
  $("title").textContent = current.data.title;
  document.title = current.data.title ? `${current.data.title} · AstrAI` : "AstrAI";
}

function drawLog() {
  views.clear();
  const articles = current.path.map((message) => {
    const view = new MessageView(current, message, { choose, edit, again });
    view.update(runOf(message));
    views.set(message.id, view);
    return view.element;
  });
  $("hello").hidden = articles.length > 0;
  $("private").textContent = say("private", { model: model.name || "AstrAI" });
  $("log").replaceChildren(...articles);
  drawTrouble();
  $("pane").scrollTop = $("pane").scrollHeight;
}

// The notice below the log. It is drawn anew only where it is another one, so that a countdown
// does not take the focus from its button, nor a key from its field.
function drawTrouble() {
  const wanted = trouble();
  const shown = $("log").querySelector(".notice");
  if (shown?.dataset.name !== wanted?.name) {
    shown?.remove();
    if (wanted) $("log").append(wanted.draw());
  } else if (wanted?.text) {
    shown.querySelector("p").textContent = wanted.text;
  }
}

function trouble() {
  const run = runs.get(current.id);
  const last = current.path.at(-1);
  if (run?.nextTry) {
    return ofText("waits", say("busy", { n: run.secondsToNextTry }), say("tryNow"), () => run.tryNow());
  }
  if (run) return null;
  const { error, question } = troubles.get(current.id) ?? {};
  if (error && (!question || current.path.includes(question))) {
    if (error.kind === "key") return ofKey((key, isKept) => useKey(key, isKept, question));
    return ofText(error.kind, wordsFor(error), say("retry"), () => ask(question));
  }
  if (last?.role !== "user") return null;
  return ofText("unanswered", say("unanswered"), say("retry"), () => ask(last));
}

function useKey(key, isKept, question) {
  store.setApiKey(key, isKept);
  troubles.delete(current.id);
  model.look();
  if (question) ask(question);
  else drawTrouble();
}

function drawComposer() {
  const isRunning = runs.has(current.id);
  const button = $("send");
  const name = isRunning ? "stop" : "send";
  if (button.dataset.state !== name) button.replaceChildren(icon(name));
  button.dataset.state = name;
  button.title = button.ariaLabel = say(name);
  button.disabled = !isRunning && $("text").value.trim() === "";
  drawContext();
}

function drawContext() {
  const figures = current.path.findLast(({ figures: known }) => known?.prompt)?.figures;
  const used = figures ? figures.prompt + (figures.tokens ?? 0) : 0;
  const size = model.context;
  $("hint").textContent = used && size
    ? say("context", { used: number(used), size: number(size) })
    : say("keys");
  $("hint").classList.toggle("full", Boolean(size) && used > 0.9 * size);
}

// Many words may come between two frames: they are drawn once.
function drawSoon(message) {
  if (pending.size === 0) requestAnimationFrame(drawPending);
  pending.add(message);
}

function drawPending() {
  const pane = $("pane");
  const follows = pane.scrollHeight - pane.scrollTop - pane.clientHeight < NEAR;
  for (const message of pending) views.get(message.id)?.update(runOf(message));
  pending.clear();
  drawTrouble();
  if (follows) pane.scrollTop = pane.scrollHeight;
}

function runOf(message) {
  const run = runs.get(current.id);
  return run?.message === message ? run : null;
}

const announce = (words) => ($("announcer").textContent = words);

// Asking

async function ask(question) {
  const conversation = current;
  const shown = conversation.data.messages[question.replies[question.chosen]];
  const message = conversation.add(question, "assistant", "");
  let saved = 0;
  const run = new Run(conversation, message, () => {
    drawSoon(message);
    if (Date.now() - saved < SAVING) return;
    saved = Date.now();
    save(conversation);
  });
  runs.set(conversation.id, run);
  troubles.delete(conversation.id);
  draw();
  announce(say("answering"));
  const body = { messages: conversation.prompt(question), ...conversation.data.sampling };
  if (model.name) body.model = model.name;
  try {
    await run.answer(body);
    announce(`${say("answered")} ${message.content}`);
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    troubles.set(conversation.id, { error, question });
    if (error.kind === "gone" || error.kind === "key") model.look();
  } finally {
    runs.delete(conversation.id);
    if (!message.content && !message.reasoning) conversation.remove(message, shown);
    conversation.data.updated = Date.now();
    save(conversation);
    finish(conversation, message);
  }
}

function finish(conversation, message) {
  drawList();
  if (conversation !== current) return;
  if (views.has(message.id) && conversation.data.messages[message.id]) {
    drawSoon(message);
  } else {
    drawLog();
  }
  drawComposer();
  drawTrouble();
}

function send(text) {
  if (runs.has(current.id) || !text) return;
  $("text").value = "";
  fit();
  ask(current.add(current.path.at(-1) ?? null, "user", text));
}

function edit(message, text) {
  if (runs.has(current.id)) return;
  ask(current.add(current.parentOf(message), "user", text));
  $("text").focus();
}

function again(message) {
  if (!runs.has(current.id)) ask(current.parentOf(message));
}

function choose(message, step) {
  current.choose(message, step);
  save(current);
  const place = $("pane").scrollTop;
  drawLog();
  drawComposer();
  $("pane").scrollTop = place;
  const version = current.path.find(({ parent }) => parent === message.parent);
  const versions = views.get(version.id).element.querySelector(".versions");
  const same = versions.querySelector(`${step < 0 ? ".before" : ".after"}:not(:disabled)`);
  (same ?? versions.querySelector("button:not(:disabled)")).focus();
}

// Conversations

function save(conversation) {
  if (removed.has(conversation.id)) return;
  try {
    store.save(conversation);
    $("storage").hidden = store.isLasting;
    if (!store.isLasting) $("storage").textContent = say("storageOff");
  } catch (error) {
    if (error.name !== "QuotaExceededError") throw error;
    $("storage").textContent = say("storageFull");
    $("storage").hidden = false;
  }
}

function open(conversation) {
  // the one that is being answered is in memory, newer than what is stored
  current = runs.get(conversation.id)?.conversation ?? conversation;
  toggleMenu(false);
  draw();
  $("text").focus();
}

function rename(conversation, title) {
  const target = conversation.id === current.id ? current : conversation;
  if (title) {
    target.data.title = title;
    save(target);
  }
  drawList();
}

function remove(conversation) {
  removed.add(conversation.id); // an answer that is still being stopped must not bring it back
  runs.get(conversation.id)?.stop();
  store.remove(conversation);
  troubles.delete(conversation.id);
  if (conversation.id === current.id) current = begin();
  draw();
}

// The page

function onModel(state, was) {
  drawComposer();
  if (current.isEmpty) $("private").textContent = say("private", { model: model.name || "AstrAI" });
  const banner = $("connection");
  if (state === "gone") banner.textContent = say("gone");
  else if (was === "gone") announce(say("back"));
  banner.hidden = state !== "gone" || troubles.get(current.id)?.error.kind === "gone";
  if (state === "key" && !troubles.has(current.id)) {
    troubles.set(current.id, { error: new ServerError("key") });
    drawTrouble();
  } else if (state === "ready" && troubles.get(current.id)?.error.kind === "key" && !runs.has(current.id)) {
    troubles.delete(current.id);
    drawTrouble();
  }
}

function fit() {
  const text = $("text");
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
}

function toggleMenu(isOpen) {
  document.body.classList.toggle("menuOpen", isOpen);
  $("menu").setAttribute("aria-expanded", String(isOpen));
}

function startAnew() {
  open(begin());
}

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  const isCommand = event.ctrlKey || event.metaKey;
  if (event.key === "Escape") {
    if (document.body.classList.contains("menuOpen")) toggleMenu(false);
    else runs.get(current.id)?.stop();
  } else if (isCommand && event.shiftKey && event.key.toLowerCase() === "o") {
    startAnew();
  } else if (event.key === "/" && !event.target.closest("input, textarea, select")) {
    $("text").focus();
  } else {
    return;
  }
  event.preventDefault();
}

function connect() {
  for (const [id, name] of [["menu", "menu"], ["new", "plus"], ["openSettings", "sliders"], ["hide", "close"], ["jump", "down"]]) {
    $(id).prepend(icon(name));
  }
  document.querySelectorAll(".closes").forEach((button) => button.append(icon("close")));
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (runs.has(current.id)) runs.get(current.id).stop();
    else send($("text").value.trim());
  });
  $("text").addEventListener("input", () => {
    fit();
    drawComposer();
  });
  $("text").addEventListener("keydown", (event) => {
    if (!isSend(event)) return;
    event.preventDefault();
    send($("text").value.trim());
  });
  $("ideas").addEventListener("click", ({ target }) => target.closest("button") && send(target.textContent));
  $("new").addEventListener("click", startAnew);
  $("menu").addEventListener("click", () => toggleMenu(!document.body.classList.contains("menuOpen")));
  $("hide").addEventListener("click", () => toggleMenu(false));
  $("scrim").addEventListener("click", () => toggleMenu(false));
  $("openModel").addEventListener("click", () => model.showCard());
  $("jump").addEventListener("click", () => $("pane").scrollTo({ top: $("pane").scrollHeight, behavior: "smooth" }));
  $("pane").addEventListener("scroll", () => {
    const { scrollHeight, scrollTop, clientHeight } = $("pane");
    $("jump").hidden = scrollHeight - scrollTop - clientHeight < 2 * NEAR;
  });
  document.addEventListener("keydown", onKey);
  // another tab has changed a conversation
  window.addEventListener("storage", ({ key }) => store.isConversation(key) && drawList());
  window.addEventListener("pagehide", () => runs.forEach((run) => save(run.conversation)));
  connectSettings(() => current, (what) => {
    if (what === "page") draw();
    else if (what === "key") model.look();
    else if (!current.isEmpty) save(current);
  });
}

connect();
applyAppearance();
draw();
$("text").focus();
model.look();
