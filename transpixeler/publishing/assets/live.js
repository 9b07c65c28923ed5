// A page of a run that still trains reads itself again as often as it is written, and the reader stays where they were.

const RETRY = 2; // seconds, while the reader looks at a clip

function whereIAm() {
  const ranges = [...document.querySelectorAll("main input[type=range]")].map(range => range.value === range.max ? "last" : range.value);
  const opened = [...document.querySelectorAll("main details")].map(part => part.open);
  return { top: scrollY, ranges, opened, paused: document.querySelector("#steps button")?.getAttribute("aria-pressed") === "false" };
}

function comeBack(before) {
  [...document.querySelectorAll("main input[type=range]")].forEach((range, i) => {
    if (before.ranges[i] === undefined) return;
    range.value = before.ranges[i] === "last" ? range.max : before.ranges[i];
    range.oninput();
  });
  [...document.querySelectorAll("main details")].forEach((part, i) => { part.open = before.opened[i] ?? part.open; });
  if (before.paused && !still) document.querySelector("#steps button")?.click();
  scrollTo({ top: before.top, behavior: "instant" });
}

// A line after `place` says how far the run is.
// live: seconds between writings, 0 for a run that has ended; written: of this page; words: what the line says.
function keepUp(place, { live, written, words }) {
  const before = history.state?.live, node = el("p", { class: live ? "live on" : "live" }, el("i", {}), words);
  place.after(node);
  const same = live && before?.written === written ? before.same + 1 : 0; // times that nothing new was there
  history.scrollRestoration = before ? "manual" : "auto";
  if (!live) {
    if (before) comeBack(before);
    history.replaceState(null, "");
    return;
  }
  const wait = live * 2 ** Math.min(same, 4), button = el("button", {}, "stop refreshing");
  let on = true;
  const again = seconds => setTimeout(() => {
    if (!on) return;
    if (document.hidden || document.querySelector("dialog[open]")) { again(RETRY); return; }
    history.replaceState({ live: { ...whereIAm(), written, same } }, "");
    location.reload();
  }, seconds * 1000);
  button.onclick = () => {
    on = !on;
    button.textContent = on ? "stop refreshing" : "refresh again";
    if (on) again(0);
  };
  node.append(button, same > 2 ? " nothing new for a while: it may have ended without a word" : "");
  if (before) comeBack(before);
  history.replaceState(null, "");
  again(wait);
}
