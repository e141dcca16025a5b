// The settings of a conversation and of the page.

import { $, icon } from "./dom.js";
import { apiKey, isKeyKept, saveSettings, setApiKey, settings } from "./store.js";
import { isChinese, say } from "./words.js";

const THEMES = ["", "light", "dark"];
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "repetition_penalty", "seed"];

// `current()` is the conversation on show; `changed(what)` hears of "conversation", "page", "key".
export function connectSettings(current, changed) {
  const dialog = $("settings");
  const form = $("settingsForm");

  const fill = () => {
    const { system, sampling } = current().data;
    $("system").value = system;
    for (const name of NUMBERS) $(name).value = sampling[name] ?? "";
    $("stopStrings").value = (sampling.stop ?? []).join("\n");
    $("theme").value = settings.theme;
    $("language").value = settings.language;
    $("key").value = apiKey();
    $("keyKeep").checked = isKeyKept();
  };

  const readConversation = () => {
    const sampling = {};
    for (const name of NUMBERS) {
      // what the browser finds wrong is told by it and not sent
      if ($(name).value !== "" && $(name).validity.valid) sampling[name] = $(name).valueAsNumber;
    }
    const stop = $("stopStrings").value.split("\n").filter((line) => line !== "");
    if (stop.length) sampling.stop = stop;
    const chosen = { system: $("system").value, sampling };
    Object.assign(current().data, structuredClone(chosen));
    Object.assign(settings, chosen);
    saveSettings();
    changed("conversation");
  };

  form.addEventListener("input", ({ target }) => {
    if (target.id === "system" || target.id === "stopStrings" || NUMBERS.includes(target.id)) readConversation();
  });
  form.addEventListener("change", ({ target }) => {
    if (target.id === "theme" || target.id === "language") {
      settings[target.id] = target.value;
      applyAppearance();
      saveSettings();
      changed("page");
    } else if (target.id === "key" || target.id === "keyKeep") {
      setApiKey($("key").value.trim(), $("keyKeep").checked);
      changed("key");
    }
  });
  $("switchTheme").addEventListener("click", () => {
    settings.theme = THEMES[(THEMES.indexOf(settings.theme) + 1) % THEMES.length];
    applyAppearance();
    saveSettings();
    changed("page");
  });
  $("switchLanguage").addEventListener("click", () => {
    settings.language = isChinese() ? "en" : "zh-CN";
    applyAppearance();
    saveSettings();
    changed("page");
  });
  $("reset").addEventListener("click", () => {
    for (const name of [...NUMBERS, "stopStrings", "system"]) $(name).value = "";
    readConversation();
  });
  $("openSettings").addEventListener("click", () => {
    fill();
    dialog.showModal();
  });
}

export function applyAppearance() {
  const root = document.documentElement;
  if (settings.theme) root.dataset.theme = settings.theme;
  else delete root.dataset.theme;
  const prefersChinese = navigator.language.toLowerCase().startsWith("zh");
  root.lang = settings.language || (prefersChinese ? "zh-CN" : "en");
  const name = { light: "themeLight", dark: "themeDark" }[settings.theme] ?? "themeSystem";
  const picture = { light: "sun", dark: "moon" }[settings.theme] ?? "contrast";
  $("switchTheme").replaceChildren(icon(picture));
  $("switchTheme").title = $("switchTheme").ariaLabel = `${say("theme")}: ${say(name)}`;
}
