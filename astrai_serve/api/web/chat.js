// The chat page: it speaks to the server's public API as any other client does, and keeps the
// conversation in memory only.

const CHINESE = {
  new: "新对话", hello: "随便写点什么，中文英文都可以。", settings: "设置", system: "系统提示词",
  temperature: "温度", key: "API 密钥", send: "发送", stop: "停止", stopped: "已停止",
  length: "达到长度上限", tokens: "个词元", rate: "词元/秒", message: "消息",
  gone: "连接不上服务器，它还在运行吗？", broken: "回答中断：连接断开了。",
  needsKey: "这台服务器需要 API 密钥：请填在“设置”里。",
};
const ENGLISH = {
  send: "Send", stop: "Stop", stopped: "stopped", length: "length limit reached", tokens: "tokens",
  rate: "tokens/s", message: "Message", gone: "The server cannot be reached. Is it still running?",
  broken: "The answer broke off: the connection was lost.",
  needsKey: "This server asks for an API key: enter it under Settings.",
};

const isChinese = navigator.language.toLowerCase().startsWith("zh");
const words = isChinese ? CHINESE : ENGLISH;
const $ = (id) => document.getElementById(id);
let messages = [];
let running = null; // the AbortController of the answer under way

function add(className, text = "") {
  $("hello").hidden = true;
  const paragraph = document.createElement("p");
  paragraph.className = className;
  paragraph.textContent = text;
  $("log").append(paragraph);
  paragraph.scrollIntoView({ block: "end" });
  return paragraph;
}

function headers() {
  const key = $("key").value.trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

async function explain(response) {
  if (response.status === 401) {
    document.querySelector("details").open = true;
    $("key").focus();
    return words.needsKey;
  }
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `${response.status} ${response.statusText}`;
}

async function* serverEvents(response) {
  let rest = "";
  for await (const piece of decoded(response.body)) {
    const events = (rest + piece).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event.startsWith("data: ")) yield event.slice(6); // anything else is a ping
    }
  }
}

// not every browser iterates a stream by itself
async function* decoded(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
}

async function answer(show, signal) {
  const system = $("system").value.trim();
  const temperature = $("temperature").value;
  const body = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true },
    ...(temperature !== "" && { temperature: Number(temperature) }),
  };
  const request = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  const response = await fetch("/v1/chat/completions", request);
  if (!response.ok) throw new Error(await explain(response));
  const end = {};
  for await (const data of serverEvents(response)) {
    if (data === "[DONE]") return end;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    Object.assign(end, chunk.usage && { usage: chunk.usage, timings: chunk.timings });
    for (const choice of chunk.choices) {
      end.reason = choice.finish_reason ?? end.reason;
      show(choice.delta.content ?? "");
    }
  }
  throw new Error(words.broken);
}

function summary(end) {
  const notes = [`${end.usage.completion_tokens} ${words.tokens}`];
  const rate = end.timings?.predicted_per_second;
  if (rate) notes.push(`${rate.toFixed(rate < 10 ? 1 : 0)} ${words.rate}`);
  if (end.reason === "length") notes.push(words.length);
  return notes.join(" · ");
}

async function say(text) {
  const mine = add("said user", text);
  const theirs = add("said assistant waits");
  const pane = document.querySelector("main");
  messages.push({ role: "user", content: text });
  running = new AbortController();
  const { signal } = running;
  setBusy(true);
  let said = "";
  const show = (piece) => {
    const follows = pane.scrollHeight - pane.scrollTop - pane.clientHeight < 80;
    said += piece;
    theirs.append(piece);
    if (follows) pane.scrollTop = pane.scrollHeight;
  };
  try {
    const end = await answer(show, signal);
    messages.push({ role: "assistant", content: said });
    add("note", summary(end));
  } catch (error) {
    if (!mine.isConnected) return; // a new conversation has begun
    if (signal.aborted) {
      messages.push({ role: "assistant", content: said });
      add("note", words.stopped);
    } else {
      messages.pop(); // what failed can be sent again
      if (!said) theirs.remove();
      $("text").value ||= text;
      const isLost = error instanceof TypeError; // fetch's word for a broken connection
      const lost = said ? words.broken : words.gone;
      add("error", isLost ? lost : error.message).setAttribute("role", "alert");
    }
  } finally {
    theirs.classList.remove("waits");
    if (running?.signal === signal) setBusy(false);
    resize();
  }
}

function setBusy(isBusy) {
  if (!isBusy) running = null;
  $("send").textContent = isBusy ? words.stop : words.send;
}

function resize() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
}

function submit(event) {
  event.preventDefault();
  const text = $("text").value.trim();
  if (running) {
    running.abort();
  } else if (text) {
    $("text").value = "";
    resize();
    say(text);
  }
}

function startAnew() {
  running?.abort();
  setBusy(false);
  messages = [];
  $("log").replaceChildren($("hello"));
  $("hello").hidden = false;
  $("text").focus();
}

async function greet() {
  const response = await fetch("/v1/models", { headers: headers() }).catch(() => null);
  document.querySelectorAll(".error").forEach((told) => told.remove());
  if (!response) return add("error", words.gone);
  if (!response.ok) return add("error", await explain(response));
  $("model").textContent = (await response.json()).data[0].id;
}

if (isChinese) {
  document.documentElement.lang = "zh";
  for (const element of document.querySelectorAll("[data-text]")) {
    element.textContent = CHINESE[element.dataset.text];
  }
}
$("text").ariaLabel = words.message;
$("base").textContent = `${location.origin}/v1`;
$("form").addEventListener("submit", submit);
$("new").addEventListener("click", startAnew);
$("key").addEventListener("change", greet);
$("text").addEventListener("input", resize);
$("text").addEventListener("keydown", (event) => {
  // an input method's Enter chooses a character and sends nothing
  const isSend = event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (isSend && event.keyCode !== 229 && !running) submit(event);
});
greet();
