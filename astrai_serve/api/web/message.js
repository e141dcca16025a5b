// One message on show. All that is drawn follows from the message and, while it is being answered,
// from its run; `update` brings the elements up to date.

import { copyButton, iconButton, make } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { number, say } from "./words.js";

// `acts`: {choose(message, step), edit(message, text), again(message)}
export class MessageView {
  constructor(conversation, message, acts) {
    Object.assign(this, { conversation, message, acts });
    this.element = make("article", { class: `message ${message.role}`, data: { id: message.id } });
    if (message.role === "user") this.#drawQuestion();
    else this.#drawAnswer();
  }

  update(run = null) {
    if (this.message.role === "assistant") this.#updateAnswer(run);
  }

  #drawQuestion() {
    const { content } = this.message;
    const bubble = make("div", { class: "bubble", dir: "auto", lang: languageOf(content), text: content });
    const name = make("h2", { class: "unseen", text: say("you") });
    this.element.replaceChildren(name, bubble, this.#tools(
      iconButton("edit", say("edit"), () => this.#editQuestion(), { class: "quiet edit" }),
      copyButton(say("copy"), say("copied"), () => content),
    ));
  }

  #editQuestion() {
    const area = make("textarea", { "aria-label": say("edit"), rows: 3 });
    area.value = this.message.content;
    const leave = () => {
      this.#drawQuestion();
      this.element.querySelector(".edit").focus();
    };
    const send = () => area.value.trim() && this.acts.edit(this.message, area.value.trim());
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") leave();
      else if (!isSend(event)) return;
      else send();
      event.preventDefault();
      event.stopPropagation();
    });
    const buttons = make("div", { class: "row" },
      make("button", { type: "button", text: say("cancel"), on: { click: leave } }),
      make("button", { type: "button", class: "strong", text: say("editSend"), on: { click: send } }));
    this.element.replaceChildren(make("div", { class: "editing" }, area, buttons));
    area.focus();
  }

  #drawAnswer() {
    this.text = make("div", { class: "text", dir: "auto" });
    this.markdown = new MarkdownView(this.text);
    this.thoughtsText = make("div", { class: "text" });
    this.thoughts = new MarkdownView(this.thoughtsText);
    this.summary = make("summary");
    this.reasoning = make("details", { class: "reasoning", hidden: true }, this.summary, this.thoughtsText);
    this.state = make("p", { class: "state" });
    this.bar = make("progress", { hidden: true });
    this.figures = make("p", { class: "figures" });
    const again = iconButton("again", say("again"), () => this.acts.again(this.message), { class: "quiet again" });
    this.tools = this.#tools(
      copyButton(say("copy"), say("copied"), () => this.message.content), again, this.figures);
    const name = make("h2", { class: "unseen", text: "AstrAI" });
    this.element.append(name, this.reasoning, this.text, this.state, this.bar, this.tools);
  }

  #updateAnswer(run) {
    const { content, reasoning, thoughtSeconds } = this.message;
    this.text.lang = languageOf(content);
    this.markdown.update(content);
    this.element.classList.toggle("running", Boolean(run));
    this.element.setAttribute("aria-busy", String(Boolean(run)));
    this.reasoning.hidden = !reasoning;
    if (reasoning) {
      this.thoughts.update(reasoning);
      const isThinking = Boolean(run) && !content;
      if (isThinking !== this.wasThinking) this.reasoning.open = isThinking;
      this.wasThinking = isThinking;
      this.summary.textContent = isThinking
        ? say("thinking")
        : thoughtSeconds >= 0.1 ? say("thoughtFor", { n: number(thoughtSeconds, 1) }) : say("thought");
    }
    this.state.textContent = run && !content && !reasoning ? stateOf(run) : "";
    const progress = run && !content && !reasoning ? run.progress : null;
    this.bar.hidden = !progress;
    if (progress) {
      Object.assign(this.bar, { max: progress.total, value: progress.processed, ariaLabel: this.state.textContent });
    }
    this.tools.hidden = Boolean(run);
    this.figures.textContent = run ? "" : figuresOf(this.message);
  }

  // The versions of a message, and what can be done with it.
  #tools(...tools) {
    const { index, count } = this.conversation.versions(this.message);
    const step = (name, words, by) => iconButton(name, say(words), () => this.acts.choose(this.message, by), {
      disabled: by < 0 ? index === 1 : index === count, class: `quiet ${words}`,
    });
    const versions = count > 1 && make("span", { class: "versions" },
      step("left", "before", -1),
      make("span", { "aria-label": say("version", { index, count }), role: "img", text: `${index}/${count}` }),
      step("right", "after", 1));
    return make("div", { class: "tools" }, ...(versions ? [versions] : []), ...tools);
  }
}

// An input method's Enter chooses a character and sends nothing.
export const isSend = (event) =>
  event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

// Fonts draw the characters of Chinese and Japanese differently; a text in Latin keeps the page's.
const languageOf = (text) => (/[\u3400-\u9fff]/.test(text) ? (/[\u3040-\u30ff]/.test(text) ? "ja" : "zh-CN") : "");

function stateOf(run) {
  const { processed, total } = run.progress ?? {};
  const parts = [total ? say("reading", { processed: number(processed), total: number(total) }) : say("waiting")];
  if (run.seconds >= 1) parts.push(say("seconds", { n: Math.floor(run.seconds) }));
  if (run.quietSeconds > 25) parts.push(say("quiet", { n: Math.floor(run.quietSeconds) }));
  return parts.join(" · ");
}

function figuresOf({ figures, end }) {
  const parts = [];
  if (figures?.tokens != null) parts.push(say("tokens", { n: number(figures.tokens) }));
  if (figures?.rate) parts.push(say("rate", { n: number(figures.rate, figures.rate < 10 ? 1 : 0) }));
  if (figures?.cached) {
    parts.push(say("cached", { n: number(figures.cached), total: number(figures.prompt) }));
  }
  if (figures?.first != null) parts.push(say("first", { n: number(figures.first, 1) }));
  if (end !== "stop") parts.push(say(end === "length" || end === "stopped" ? end : "interrupted"));
  return parts.join(" · ");
}
