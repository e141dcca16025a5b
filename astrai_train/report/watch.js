// Asks every two seconds whether the run has written something, and shows what is new.

const PAUSE = 2000;
const share = document.getElementById("share");
const text = document.getElementById("text");
const report = document.getElementById("report");
let version = "";

function show(state) {
  if (state.share === null) share.removeAttribute("value");
  else share.value = state.share;
  text.textContent = state.text;
  text.className = "";
  if (state.report === undefined) return;
  version = state.version;
  // made by our own server, which escapes whatever the run wrote; no script of it could run here
  report.innerHTML = state.report;
}

async function look() {
  try {
    const response = await fetch(`/state?${version}`);
    if (!response.ok) throw new Error(response.statusText);
    show(await response.json());
  } catch {
    text.textContent = "astrai-train watch has ended: start it again";
    text.className = "gone";
  }
  setTimeout(look, PAUSE);
}

look();
