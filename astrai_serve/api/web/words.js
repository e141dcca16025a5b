// What the page says, in English and Chinese. Elements name their words in data-text (content),
// data-label (spoken name and tooltip) or data-hint (placeholder).

export const WORDS = {
  newChat: ["New chat", "新对话"],
  conversations: ["Conversations", "对话列表"],
  openMenu: ["Show conversations", "显示对话列表"],
  closeMenu: ["Hide conversations", "隐藏对话列表"],
  skip: ["Skip to the message", "跳到输入框"],
  today: ["Today", "今天"],
  week: ["Last 7 days", "最近七天"],
  older: ["Older", "更早"],
  untitled: ["New chat", "新对话"],
  more: ["More about “{title}”", "“{title}”的更多操作"],
  rename: ["Rename", "重命名"],
  newName: ["New name of the conversation", "对话的新名称"],
  exportMarkdown: ["Export as Markdown", "导出为 Markdown"],
  exportJson: ["Export as JSON", "导出为 JSON"],
  remove: ["Delete", "删除"],
  removeAsk: ["Delete “{title}”? It is kept nowhere else.", "删除“{title}”？它没有别的副本。"],
  cancel: ["Cancel", "取消"],
  close: ["Close", "关闭"],
  theme: ["Colours", "外观"],
  themeSystem: ["As the system", "跟随系统"],
  themeLight: ["Light", "浅色"],
  themeDark: ["Dark", "深色"],
  language: ["Language", "语言"],
  otherLanguage: ["中文", "English"],
  hello: ["What is on your mind?", "想聊点什么？"],
  private: ["{model} runs on your own machine. Conversations stay in this browser.", "{model} 运行在你自己的机器上，对话只保存在这个浏览器里。"],
  idea1: ["What is 37 plus 45?", "37加45等于多少？"],
  idea2: ["Translate “good morning” into Chinese.", "把“早上好”翻译成英文。"],
  idea3: ["Which is larger, 9.11 or 9.8?", "9.11和9.8哪个大？"],
  message: ["Message", "消息"],
  messageHint: ["Write a message", "写点什么"],
  send: ["Send", "发送"],
  stop: ["Stop the answer", "停止回答"],
  jump: ["To the latest message", "跳到最新消息"],
  keys: ["Enter sends, Shift+Enter starts a line, Esc stops", "回车发送，Shift+回车换行，Esc 停止"],
  context: ["{used} of {size} tokens of context", "上下文 {used} / {size} 词元"],
  you: ["You", "你"],
  edit: ["Edit and ask again", "修改后重新提问"],
  editSend: ["Send", "发送"],
  again: ["Answer again", "重新回答"],
  copy: ["Copy", "复制"],
  copied: ["Copied", "已复制"],
  copyCode: ["Copy code", "复制代码"],
  before: ["Previous version", "上一个版本"],
  after: ["Next version", "下一个版本"],
  version: ["Version {index} of {count}", "第 {index} 个版本，共 {count} 个"],
  waiting: ["Waiting for the first word", "等待第一个字"],
  reading: ["Reading the prompt: {processed} of {total} tokens", "正在读取提示：{processed} / {total} 词元"],
  queued: ["In the queue: {ahead} ahead", "排队中：前面还有 {ahead} 个"],
  seconds: ["{n} s", "{n} 秒"],
  quiet: ["The server has said nothing for {n} s", "服务器已 {n} 秒没有动静"],
  thinking: ["Thinking", "思考中"],
  thought: ["Thoughts", "思考过程"],
  thoughtFor: ["Thought for {n} s", "思考了 {n} 秒"],
  tokens: ["{n} tokens", "{n} 词元"],
  rate: ["{n} tokens/s", "{n} 词元/秒"],
  cached: ["{n} of {total} prompt tokens cached", "提示的 {total} 个词元中 {n} 个来自缓存"],
  first: ["first word after {n} s", "首字 {n} 秒"],
  stopped: ["stopped", "已停止"],
  length: ["cut off by the length limit", "达到长度上限"],
  interrupted: ["broken off", "回答中断"],
  answered: ["The answer is complete.", "回答完毕。"],
  answering: ["Answering.", "正在回答。"],
  busy: ["The server is busy. Next try in {n} s.", "服务器正忙，{n} 秒后重试。"],
  busyStill: ["The server is still busy.", "服务器仍然很忙。"],
  tryNow: ["Try now", "立即重试"],
  retry: ["Try again", "重试"],
  draining: ["The server is shutting down and takes no new questions.", "服务器正在关闭，不再接受新的问题。"],
  gone: ["The server cannot be reached. Is it still running?", "连接不上服务器，它还在运行吗？"],
  back: ["The server is back.", "服务器恢复了。"],
  broken: ["The answer broke off: the connection was lost.", "回答中断：连接断开了。"],
  unanswered: ["This message has no answer yet.", "这条消息还没有回答。"],
  needsKey: ["This server asks for an API key.", "这台服务器需要 API 密钥。"],
  wrongKey: ["The server does not know this API key.", "服务器不认识这个 API 密钥。"],
  key: ["API key", "API 密钥"],
  keyKeep: ["Remember on this device", "在这台设备上记住"],
  keyNote: ["Kept until this tab is closed, unless you let the device remember it.", "除非选择记住，关闭标签页后即忘记。"],
  use: ["Use", "使用"],
  settings: ["Settings", "设置"],
  settingsNote: ["For this conversation and those begun after it. Empty leaves it to the server.", "用于当前对话和之后的新对话；留空则由服务器决定。"],
  system: ["System prompt", "系统提示词"],
  systemHint: ["How the model should behave", "希望模型怎样表现"],
  temperature: ["Temperature", "温度"],
  top_p: ["Top p", "Top p"],
  top_k: ["Top k", "Top k"],
  min_p: ["Min p", "Min p"],
  max_tokens: ["Most tokens", "最多词元"],
  repetition_penalty: ["Repetition penalty", "重复惩罚"],
  seed: ["Seed", "随机种子"],
  stopStrings: ["Stop strings, one a line", "停止字符串，每行一个"],
  byServer: ["server's", "默认"],
  reset: ["Back to the server's values", "恢复服务器默认值"],
  page: ["This page", "本页"],
  model: ["Model", "模型"],
  modelCard: ["About the model", "关于模型"],
  modelContext: ["Context", "上下文长度"],
  modelOutput: ["Longest answer", "最长回答"],
  modelMade: ["Made", "创建时间"],
  modelOwner: ["Served by", "服务程序"],
  modelTokens: ["{n} tokens", "{n} 词元"],
  connected: ["connected", "已连接"],
  disconnected: ["not connected", "未连接"],
  storageFull: ["The browser's storage is full: this conversation is not saved. Delete or export old ones.", "浏览器存储已满，当前对话未保存。请删除或导出旧对话。"],
  storageOff: ["This browser lets the page store nothing: conversations end with the tab.", "浏览器不允许本页保存数据，对话会随标签页关闭而消失。"],
};

export const isChinese = () => document.documentElement.lang.startsWith("zh");

export function say(name, values = {}) {
  const text = WORDS[name][isChinese() ? 1 : 0];
  return text.replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

export const number = (value, digits = 0) =>
  value.toLocaleString(isChinese() ? "zh-CN" : "en", { maximumFractionDigits: digits });

export function translate(root) {
  for (const element of root.querySelectorAll("[data-text]")) {
    element.textContent = say(element.dataset.text);
  }
  for (const element of root.querySelectorAll("[data-label]")) {
    element.title = element.ariaLabel = say(element.dataset.label);
  }
  for (const element of root.querySelectorAll("[data-hint]")) {
    element.placeholder = say(element.dataset.hint);
  }
}
