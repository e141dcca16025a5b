// The model behind the page: its name in the header, its card, and whether its server is there.

import { $, make } from "./dom.js";
import { models, ServerError } from "./server.js";
import { number, say } from "./words.js";

const SOON = 4000; // ms between looks at a server that is gone

// Servers call the context by different names.
const contextOf = (model) =>
  model?.max_model_len ?? model?.context_length ?? model?.max_input_tokens ?? model?.meta?.n_ctx ?? null;

const TOLD = ["id", "object", "type", "display_name", "created", "created_at", "owned_by", "max_input_tokens",
  "max_tokens", "max_model_len", "context_length", "root", "parent", "permission", "lifecycle"];

export class Model {
  // `changed(state)` is called with "ready", "key" or "gone", and when names are to be drawn anew.
  constructor(changed) {
    this.changed = changed;
    this.list = [];
    this.state = "unknown";
  }

  get chosen() {
    return this.list.find(({ id }) => id === this.wanted) ?? this.list[0] ?? null;
  }

  get name() {
    return this.chosen?.id ?? "";
  }

  get context() {
    return contextOf(this.chosen);
  }

  // Look for the server; where it is gone, look again until it is back.
  async look() {
    clearTimeout(this.timer);
    let state = "ready";
    try {
      this.list = await models();
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      state = error.kind === "key" ? "key" : "gone";
    }
    const was = this.state;
    this.state = state;
    if (state === "gone") this.timer = setTimeout(() => this.look(), SOON);
    this.draw();
    this.changed(state, was);
  }

  draw() {
    const isReady = this.state === "ready";
    $("modelName").textContent = this.name || say("model");
    $("openModel").classList.toggle("ready", isReady);
    $("openModel").classList.toggle("gone", this.state === "gone");
    const state = say(isReady ? "connected" : "disconnected");
    $("openModel").title = `${say("modelCard")} (${state})`;
    $("openModel").ariaLabel = `${say("model")}: ${this.name}, ${state}`;
  }

  showCard() {
    const model = this.chosen;
    const rows = model ? this.#rows(model) : [[say("model"), say("disconnected")]];
    $("card").replaceChildren(...rows.flatMap(([name, value]) => [
      make("dt", { text: name }), make("dd", {}, value)]));
    $("base").textContent = `${location.origin}/v1`;
    $("modelDialog").showModal();
  }

  #rows(model) {
    const tokens = (n) => say("modelTokens", { n: number(n) });
    const made = model.created ? new Date(1000 * model.created).toLocaleString(document.documentElement.lang) : "";
    const known = [
      [say("model"), this.#choice()],
      [say("modelContext"), this.context && tokens(this.context)],
      [say("modelOutput"), model.max_tokens && tokens(model.max_tokens)],
      [say("modelMade"), made],
      [say("modelOwner"), model.owned_by],
    ];
    // whatever else this server tells of its model
    const told = { ...model, ...model.meta };
    const rest = Object.entries(told).filter(([name, value]) => !TOLD.includes(name) && isPlain(value));
    return [...known.filter(([, value]) => value), ...rest.map(([name, value]) => [name, String(value)])];
  }

  #choice() {
    if (this.list.length < 2) return this.name;
    const select = make("select", { "aria-label": say("model") },
      ...this.list.map(({ id }) => make("option", { value: id, selected: id === this.name, text: id })));
    select.addEventListener("change", () => {
      this.wanted = select.value;
      this.draw();
      this.changed(this.state, this.state);
      $("modelDialog").close();
    });
    return select;
  }
}

const isPlain = (value) => ["string", "number", "boolean"].includes(typeof value) && value !== "";
