// The server's public API, as any other client speaks it.

import { apiKey } from "./store.js";

// What went wrong, by what the user can do about it:
//   busy      too many wait; `retryAfter` seconds are to pass
//   draining  it is shutting down
//   key       it wants an API key, or another one
//   gone      nobody answers
//   broken    the connection was lost in the middle
//   refused   the request is wrong, and `message` says how
//   failed    the server broke, and `message` says what it knows
export class ServerError extends Error {
  constructor(kind, message = "", retryAfter = 0) {
    super(message);
    this.kind = kind;
    this.retryAfter = retryAfter;
  }
}

const KINDS = { 401: "key", 429: "busy", 503: "failed" };
const STOPPING = ["shutting_down", "cancelled"];
const PATIENCE = 5; // seconds to wait where the server does not say

async function ask(path, options = {}) {
  const key = apiKey();
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServerError("gone");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const told = body?.error ?? {};
  const message = told.message ?? `${response.status} ${response.statusText}`;
  const kind = KINDS[response.status] ?? (response.status < 500 ? "refused" : "failed");
  throw new ServerError(
    STOPPING.includes(told.code) ? "draining" : kind,
    message,
    Number(response.headers.get("retry-after")) || PATIENCE,
  );
}

export async function models() {
  const response = await ask("/v1/models");
  return (await response.json()).data;
}

// Yields {event: "alive"} for every sign of life, and with it what else there is to know:
// {text}, {reasoning}, {progress: {processed, total}}, {queue}, {end}, {usage, timings}.
export async function* answer(body, signal) {
  const response = await ask("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({
      ...body, stream: true, stream_options: { include_usage: true }, return_progress: true,
    }),
    signal,
  });
  let hasEnded = false;
  for await (const { data, comment } of serverEvents(response.body, signal)) {
    if (data === "[DONE]") return;
    if (data === undefined) {
      yield fromComment(comment);
      continue;
    }
    const chunk = parse(data);
    if (chunk.error) {
      const isStopping = STOPPING.includes(chunk.error.code);
      throw new ServerError(isStopping ? "draining" : "failed", chunk.error.message);
    }
    const news = fromChunk(chunk);
    hasEnded ||= Boolean(news.end);
    yield news;
  }
  if (!hasEnded) throw new ServerError("broken");
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ServerError("failed", `not OpenAI's protocol: ${data.slice(0, 80)}`);
  }
}

function fromChunk({ choices, usage, timings, prompt_progress: progress }) {
  const { delta, finish_reason: end } = choices?.[0] ?? {};
  return {
    text: delta?.content || "",
    reasoning: delta?.reasoning_content || delta?.reasoning || "",
    end,
    ...(usage && { usage }),
    ...(timings && { timings }),
    ...(progress && { progress: { processed: progress.processed, total: progress.total } }),
  };
}

// A comment is a sign of life; one that holds JSON may tell how far the prompt has come.
function fromComment(comment) {
  const start = comment.indexOf("{");
  if (start < 0) return {};
  try {
    const told = JSON.parse(comment.slice(start));
    return fromChunk({ prompt_progress: told.prompt_progress ?? (told.total ? told : undefined) });
  } catch {
    return {}; // a comment may say anything
  }
}

// Events and comments of a stream whose lines end at LF, CR or both.
async function* serverEvents(stream, signal) {
  let data = [];
  for await (const line of lines(stream, signal)) {
    if (line === "") {
      if (data.length) yield { data: data.join("\n") };
      data = [];
    } else if (line.startsWith(":")) {
      yield { comment: line.slice(1) };
    } else if (line.startsWith("data:")) {
      data.push(line.slice(line[5] === " " ? 6 : 5));
    }
  }
}

async function* lines(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let next;
    try {
      next = await reader.read();
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ServerError("broken");
    }
    if (next.done) break;
    // a CR at the very end may be half of a CR LF
    const whole = (rest + next.value).match(/^[^]*(?:\r\n|\n|\r(?!$))/)?.[0] ?? "";
    const found = whole.split(/\r\n|\n|\r/);
    found.pop();
    yield* found;
    rest = (rest + next.value).slice(whole.length);
  }
  if (rest) yield* rest.split(/\r\n|\n|\r/);
}
