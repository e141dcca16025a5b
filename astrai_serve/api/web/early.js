// Loaded before the page is drawn, so that it never flashes in the wrong colours or language.
{
  const settings = (() => {
    try {
      return JSON.parse(localStorage.getItem("astrai.settings")) ?? {};
    } catch {
      return {}; // no storage, or not ours: the page begins as new
    }
  })();
  const root = document.documentElement;
  if (["light", "dark"].includes(settings.theme)) root.dataset.theme = settings.theme;
  root.lang = settings.language || (navigator.language.toLowerCase().startsWith("zh") ? "zh-CN" : "en");
}
