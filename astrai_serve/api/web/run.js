// One answer under way: it asks, waits where the server is busy, and writes into its message.

import { answer, ServerError } from "./server.js";

const TRIES = 6;

export class Run {
  // `changed` is called whenever there is something new to show.
  constructor(conversation, message, changed) {
    Object.assign(this, { conversation, message, changed });
    this.started = this.heard = performance.now();
    this.firstToken = null;
    this.progress = null; // {processed, total} tokens of the prompt
    this.nextTry = null; // when a busy server is asked again
    this.usage = null;
    this.timings = null;
    this.control = new AbortController();
  }

  get seconds() {
    return (performance.now() - this.started) / 1000;
  }

  get quietSeconds() {
    return (performance.now() - this.heard) / 1000;
  }

  get secondsToNextTry() {
    return Math.max(0, Math.ceil((this.nextTry - performance.now()) / 1000));
  }

  stop() {
    this.control.abort();
  }

  tryNow() {
    this.wake?.();
  }

  // Returns when the message is as complete as it gets; throws ServerError where something failed.
  async answer(body) {
    const clock = setInterval(this.changed, 500); // time passes on the page, too
    try {
      await this.#askUntilTaken(body);
    } catch (error) {
      this.message.end = "interrupted";
      if (!this.control.signal.aborted) throw error;
      this.message.end = "stopped";
    } finally {
      clearInterval(clock);
      this.message.figures = this.#figures();
    }
  }

  async #askUntilTaken(body) {
    for (let tries = 1; ; tries += 1) {
      try {
        return await this.#listen(body);
      } catch (error) {
        const isBusy = error instanceof ServerError && error.kind === "busy";
        if (!isBusy || tries === TRIES) throw error;
        await this.#wait(error.retryAfter);
      }
    }
  }

  async #wait(seconds) {
    this.nextTry = performance.now() + 1000 * seconds;
    this.changed();
    await new Promise((resolve, reject) => {
      const timer = setTimeout(resolve, 1000 * seconds);
      this.wake = resolve;
      this.control.signal.addEventListener("abort", () => reject(this.control.signal.reason));
      this.control.signal.addEventListener("abort", () => clearTimeout(timer));
    });
    this.nextTry = this.wake = null;
    this.started = this.heard = performance.now();
    this.changed();
  }

  async #listen(body) {
    const { message } = this;
    for await (const news of answer(body, this.control.signal)) {
      this.heard = performance.now();
      if (news.text || news.reasoning) this.firstToken ??= this.heard;
      if (news.reasoning) message.reasoning = (message.reasoning ?? "") + news.reasoning;
      if (news.text) {
        if (message.reasoning && !message.content) {
          message.thoughtSeconds = (this.heard - this.firstToken) / 1000;
        }
        message.content += news.text;
      }
      message.end = news.end ?? message.end;
      this.progress = news.progress ?? this.progress;
      this.usage = news.usage ?? this.usage;
      this.timings = news.timings ?? this.timings;
      this.changed();
    }
  }

  // Speeds are the server's where it tells them, else as seen from here.
  #figures() {
    const tokens = this.usage?.completion_tokens;
    const spent = (this.heard - this.firstToken) / 1000;
    const seen = this.firstToken && tokens > 1 && spent > 0 ? (tokens - 1) / spent : null;
    return {
      tokens,
      rate: this.timings?.predicted_per_second || seen,
      prompt: this.usage?.prompt_tokens,
      cached: this.usage?.prompt_tokens_details?.cached_tokens ?? this.timings?.cache_n,
      first: this.firstToken === null ? null : (this.firstToken - this.started) / 1000,
    };
  }
}
