// A conversation is a tree: an edited question or another answer is a new branch beside the old
// one. Each message remembers which of its replies is on show; the path of those is what is read.

export function newId() {
  // randomUUID is kept from pages that come over plain HTTP from another machine
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export class Conversation {
  // `settings`: {system, sampling}, copied, so that later changes elsewhere leave it alone
  static begin(settings) {
    const now = Date.now();
    const first = { replies: [], chosen: 0 };
    return new Conversation({ id: newId(), title: "", created: now, updated: now, first, messages: {}, ...structuredClone(settings) });
  }

  constructor(data) {
    this.data = data;
  }

  get id() {
    return this.data.id;
  }

  get isEmpty() {
    return this.data.first.replies.length === 0;
  }

  // Messages from the first to the last on show.
  get path() {
    const path = [];
    let place = this.data.first;
    while (place.replies.length) {
      place = this.data.messages[place.replies[place.chosen]];
      path.push(place);
    }
    return path;
  }

  // Add a reply to a message, or a first message where `parent` is null, and show it.
  add(parent, role, content) {
    const message = { id: newId(), parent: parent?.id ?? null, role, content, replies: [], chosen: 0 };
    this.data.messages[message.id] = message;
    const place = this.#place(message);
    place.chosen = place.replies.push(message.id) - 1;
    this.data.updated = Date.now();
    if (role === "user") this.data.title ||= titleOf(content);
    return message;
  }

  // Take back a message that came to nothing; what was shown before it is shown again.
  remove(message, shown = null) {
    const place = this.#place(message);
    place.replies.splice(place.replies.indexOf(message.id), 1);
    const index = shown ? place.replies.indexOf(shown.id) : -1;
    place.chosen = index >= 0 ? index : Math.max(0, place.replies.length - 1);
    delete this.data.messages[message.id];
  }

  // Which of its siblings a message is: {index, count}, counted from 1.
  versions(message) {
    const { replies } = this.#place(message);
    return { index: replies.indexOf(message.id) + 1, count: replies.length };
  }

  // Show the sibling `step` further on, and what followed it.
  choose(message, step) {
    const place = this.#place(message);
    const index = place.replies.indexOf(message.id) + step;
    place.chosen = Math.min(Math.max(index, 0), place.replies.length - 1);
  }

  parentOf(message) {
    return message.parent === null ? null : this.data.messages[message.parent];
  }

  // All that is sent to have `message` answered.
  prompt(message) {
    const said = [];
    for (let one = message; one; one = this.parentOf(one)) {
      said.unshift({ role: one.role, content: one.content });
    }
    const system = this.data.system.trim();
    return system ? [{ role: "system", content: system }, ...said] : said;
  }

  markdown(names) {
    const parts = this.path.map(({ role, content }) => `**${names[role]}**\n\n${content}\n`);
    return [`# ${this.data.title}\n`, ...parts].join("\n");
  }

  #place(message) {
    return this.parentOf(message) ?? this.data.first;
  }
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0];
  const characters = Array.from(line); // whole characters, not halves of them
  return characters.length <= 48 ? line : `${characters.slice(0, 47).join("")}…`;
}
