// Conversations and settings in the browser's storage. Each conversation has a key of its own, so
// that two tabs do not overwrite each other's.

import { Conversation } from "./conversation.js";

const PREFIX = "astrai.chat.";
const SETTINGS = "astrai.settings";
const KEY = "astrai.key";

const DEFAULTS = { theme: "", language: "", system: "", sampling: {} };

const storage = (() => {
  try {
    localStorage.setItem("astrai.probe", "");
    localStorage.removeItem("astrai.probe");
    return localStorage;
  } catch {
    return null; // switched off by the user: everything then lives as long as the tab
  }
})();
const memory = new Map();

export const isLasting = storage !== null;

const read = (key) => (storage ? storage.getItem(key) : (memory.get(key) ?? null));
const write = (key, text) => (storage ? storage.setItem(key, text) : memory.set(key, text));
const erase = (key) => (storage ? storage.removeItem(key) : memory.delete(key));
const keys = () => (storage ? Object.keys(storage) : [...memory.keys()]);

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null; // written by something else
  }
}

// The latest first.
export function conversations() {
  const found = keys().filter((key) => key.startsWith(PREFIX)).map((key) => parse(read(key)));
  const ours = found.filter((data) => data?.messages && data.first);
  return ours.sort((a, b) => b.updated - a.updated).map((data) => new Conversation(data));
}

// Throws QuotaExceededError where the browser's storage is full.
export const save = (conversation) => write(PREFIX + conversation.id, JSON.stringify(conversation.data));

export const remove = (conversation) => erase(PREFIX + conversation.id);

export const isConversation = (key) => key === null || key.startsWith(PREFIX);

export const settings = { ...DEFAULTS, ...parse(read(SETTINGS)) };

export const saveSettings = () => write(SETTINGS, JSON.stringify(settings));

// The key lives as long as the tab, unless the user lets the device remember it.
export const apiKey = () => sessionStorage.getItem(KEY) ?? read(KEY) ?? "";

export function setApiKey(key, isKept) {
  erase(KEY);
  sessionStorage.removeItem(KEY);
  if (key && isKept) write(KEY, key);
  else if (key) sessionStorage.setItem(KEY, key);
}

export const isKeyKept = () => Boolean(read(KEY));
