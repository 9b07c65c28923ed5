// What the report of a run and the comparison of several have in common: curves, held-out losses, measures, samples.

const COLORS = ["var(--c0)", "var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)"];
const smoothing = []; // charts whose curves the slider smooths

function curve(run, name, options = {}) {
  const y = run.steps[name];
  return y && known(y).length ? { name, x: run.steps.step, y, ...options } : null;
}

function charts(kind, list) {
  return el("div", { class: `charts ${kind}` }, list.filter(Boolean).map(chart => chart.node));
}

function smooth(chart) {
  smoothing.push(chart);
  return chart;
}

function smoothingTools(points) {
  const slider = el("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: points > 12 ? 0.9 : 0, "aria-label": "Smoothing" });
  const shown = el("output", {});
  slider.oninput = () => {
    shown.textContent = Number(slider.value).toFixed(2);
    for (const chart of smoothing) { chart.weight = Number(slider.value); chart.draw(); }
  };
  shown.textContent = Number(slider.value).toFixed(2);
  return el("div", { class: "tools", id: "smoothing" }, el("label", {}, "smoothing", slider, shown));
}

function drawCharts() {
  for (const chart of smoothing) chart.weight = Number(document.querySelector("#smoothing input")?.value ?? 0);
  for (const chart of Chart.all) chart.draw();
}

// --- evaluations ---

const setsOf = run => [...new Set(run.evals.flatMap(line => Object.keys(line.eval)))];

function lossesOf(line, set, stream, kind = "loss") {
  return line?.eval?.[set]?.[kind]?.[stream] ?? {};
}

// The mean over times of a stream's held-out losses, at each evaluation.
function heldOut(run, stream, kind = "loss", among = setsOf(run)) {
  const lines = run.evals.filter(line => among.some(set => Object.keys(lossesOf(line, set, stream, kind)).length));
  return { x: lines.map(l => l.step), y: lines.map(l => mean(among.flatMap(set => Object.values(lossesOf(l, set, stream, kind))))) };
}

function metricCurves(run) {
  return setsOf(run).flatMap(set => {
    const lines = run.evals.filter(line => line.eval[set]?.metrics);
    const names = [...new Set(lines.flatMap(line => Object.keys(line.eval[set].metrics)))];
    return names.map(name => {
      const having = lines.filter(line => typeof line.eval[set].metrics[name] === "number");
      return { set, name, x: having.map(l => l.step), y: having.map(l => l.eval[set].metrics[name]) };
    }).filter(c => c.x.length);
  });
}

const titleOf = (words, name) => words[name]?.title ?? name.replaceAll("_", " ");
const wayOf = (words, name) => words[name]?.more ? "↑ more is better" : "↓ less is better";

// --- samples ---

function rateOf(fps) {
  const [count, base = 1] = String(fps ?? "").split("/").map(Number), rate = count / base;
  return rate > 0 && Number.isFinite(rate) ? rate : 1;
}

function factsOf(words, sample) {
  const parts = [typeof sample.step === "number" ? `step ${sample.step.toLocaleString("en")}` : null, `${sample.width}×${sample.height}, ${plural(sample.frames ?? 0, "frame")}`];
  for (const name of ["seed", "steps", "guidance", "shift", "scheduler"]) if (sample[name] !== undefined && sample[name] !== null && typeof sample[name] !== "object") parts.push(`${name} ${sample[name]}`);
  for (const name of ["iou", "mad"]) if (typeof sample.metrics?.[name] === "number") parts.push(`${titleOf(words, name)} ${short(sample.metrics[name])}`);
  if (sample.alpha_mode === "premultiplied") parts.push("premultiplied");
  return parts.filter(Boolean).join(" · ");
}

// What a sample is made from, behind its prompt: a matte of a given video is another thing than a pair from a caption.
const givenOf = given => given?.length ? el("small", {}, ` given ${given.join(", ")}`) : "";

function clipOf(words, sample, title = "") {
  const files = Object.fromEntries(sample.streams.filter(name => sample.videos[name]).map(name => [name, sample.videos[name]]));
  const alpha = sample.streams[1], histogram = sample.alpha_histogram?.length === BINS ? sample.alpha_histogram : null;
  const made = sample.given?.length ? `, given ${sample.given.join(", ")}` : "";
  return { title: (title || sample.prompt || sample.name) + made, facts: factsOf(words, sample), fps: rateOf(sample.fps), frames: sample.frames || 1, files: Object.keys(files).length ? files : sample.videos, alpha: files[alpha] ? alpha : null, histogram };
}

const captionOf = name => ({ checkerboard: "cut out", composite: "over a background" })[name] ?? name;
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
const paused = () => still || document.querySelector("#steps button")?.getAttribute("aria-pressed") === "false";

// The videos of one sample through the steps; `open` opens the player on what is shown.
function sampleView(words, versions, open) {
  const order = [...versions.at(-1).streams, "checkerboard", "composite"].filter(n => versions.some(v => v.videos[n]));
  const { width, height } = versions.at(-1); // so that nothing moves when the videos arrive
  const videos = order.map(name => el("video", { class: "thumb", width, height, muted: "", loop: "", playsinline: "", preload: "auto", title: name }));
  for (const video of videos) video.muted = true;
  if (videos.length) videos[0].ontimeupdate = () => {
    for (const other of videos.slice(1)) if (Math.abs(other.currentTime - videos[0].currentTime) > 0.06) other.currentTime = videos[0].currentTime;
  };
  const figures = order.map((name, i) => el("figure", {}, el("button", { class: "open", "aria-label": `Open ${captionOf(name)} at full size`, onclick: open }, videos[i]), el("figcaption", {}, captionOf(name))));
  const facts = el("p", { class: "facts" }), node = el("div", {}, el("div", { class: `videos ${["", "one", "two"][order.length] ?? ""}` }, figures), facts);
  const view = { node, current: null, first: versions[0].step, show(step) {
    const version = versions.findLast(v => v.step <= step) ?? versions[0];
    if (version === view.current) return;
    view.current = version;
    facts.textContent = factsOf(words, version);
    order.forEach((name, i) => {
      videos[i].src = version.videos[name] ?? "";
      if (!paused()) videos[i].play().catch(() => {});
    });
  } };
  return view;
}

// Cards of samples below a slider through their steps: a card has {node, show(step)}.
function throughSteps(cards, steps) {
  const slider = el("input", { type: "range", min: 0, max: steps.length - 1, step: 1, value: steps.length - 1, "aria-label": "Step of the samples" });
  const shown = el("output", {});
  slider.oninput = () => {
    const step = steps[Number(slider.value)];
    shown.textContent = step.toLocaleString("en");
    for (const card of cards) card.show(step);
  };
  slider.oninput();
  const tools = el("div", { class: "tools", id: "steps" }, el("label", {}, "step", steps.length > 1 ? slider : null, shown), playButton());
  return [tools, el("div", { class: "samples" }, cards.map(card => card.node))];
}

function playButton() {
  const button = el("button", { "aria-pressed": String(!still) }, still ? "play" : "pause");
  button.onclick = () => {
    const plays = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(plays));
    button.textContent = plays ? "pause" : "play";
    for (const video of document.querySelectorAll("video.thumb")) plays ? video.play() : video.pause();
  };
  return button;
}
