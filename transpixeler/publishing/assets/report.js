// The page: one function a part, each from the value that Python gathered.

const data = JSON.parse(document.getElementById("data").textContent);
const streams = Object.keys(data.config.streams ?? { rgb: "" });
const colors = ["var(--c0)", "var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)"];
const colorOf = name => colors[(streams.indexOf(name) + colors.length) % colors.length];
const HIGHER_IS_BETTER = new Set(["iou", "edge_alignment", "psnr", "vae_psnr"]);
const ABOUT = {
  mad: "mean absolute difference", mse: "mean squared error", sad: "sum of absolute differences", grad: "gradient error",
  conn: "connectivity error", dtssd: "temporal error", iou: "overlap at one half",
  channel_spread: "is the matte grey?", edge_alignment: "matte edges on picture edges", fill_deviation: "colour under zero alpha",
  holes: "see-through inside shapes", flicker: "comes and goes", rgb_drift: "RGB against the base's", vae_psnr: "the VAE's own round trip",
};
const ALONE = new Set(["channel_spread", "edge_alignment", "fill_deviation", "holes", "flicker"]);
const TITLES = { mad: "MAD", mse: "MSE", sad: "SAD", grad: "Grad", conn: "Conn", dtssd: "dtSSD", iou: "IoU", rgb_drift: "RGB drift", vae_psnr: "VAE PSNR" };
const smoothing = [];

const known = values => (values ?? []).filter(v => v !== null && v !== undefined);
const mean = values => known(values).length ? known(values).reduce((a, b) => a + b, 0) / known(values).length : null;
const tail = values => mean(known(values).slice(-Math.max(1, Math.ceil(known(values).length / 20))));
const head = values => mean(known(values).slice(0, Math.max(1, Math.ceil(known(values).length / 20))));
const percent = share => `${share > 0 ? "+" : share < 0 ? "−" : ""}${Math.abs(share * 100).toFixed(Math.abs(share) < 0.1 ? 1 : 0)} %`;
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

function time(seconds) {
  if (seconds < 90) return `${short(Math.round(seconds * 10) / 10)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${short(Math.round(minutes / 6) / 10)} h`;
}

// --- figures ---

function heading() {
  const { config, manifest } = data, layout = manifest.layout ?? {}, ranks = Object.values(layout).reduce((a, b) => a * b, 1);
  const kind = config.lora?.kind === "dora" ? "DoRA" : "LoRA";
  const each = config.lora?.per_stream ? " for each stream" : "";
  const adapter = config.lora?.enabled === false ? "The whole model" : `A ${kind} of rank ${config.lora?.rank}${each} on ${scope(config.lora?.scope)}`;
  const model = String(manifest.model?.path ?? config.model?.path ?? "").split("/").filter(Boolean).slice(-2).join("/");
  const parts = [
    `${adapter}, trained on ${plural(manifest.clips?.train ?? 0, "clip")}`,
    `base ${model}`, `streams ${streams.join(" + ")}`,
    ranks > 1 ? `${ranks} devices (${Object.entries(layout).map(([k, n]) => `${k} ${n}`).join(" × ")})` : "one device",
  ];
  return el("header", {}, el("h1", {}, data.name), el("p", { class: "lead" }, parts.join(" · ")), el("div", { class: "totals" }, figures()));
}

function scope(value) {
  return value === "all" ? "all streams" : value === "aux" ? "the aux streams" : [value].flat().join(", ");
}

function figures() {
  const { last, manifest } = data, loss = tail(data.steps.loss), start = head(data.steps.loss);
  const found = [
    figure("steps", (last.step ?? data.steps.step.at(-1) ?? 0).toLocaleString("en"), manifest.steps ? `of ${manifest.steps.toLocaleString("en")}, epoch ${last.epoch ?? "–"}` : ""),
    figure("training loss", short(loss), loss === null ? "" : `${percent(loss / start - 1)} since the start`),
    ...heldOutFigures(), ...metricFigures(),
    figure("time in steps", time(data.seconds), last.seconds ? `${short(tail(data.steps.seconds))} s a step` : ""),
    figure("peak memory", last.memory_gib ? `${short(Number(last.memory_gib.toFixed(2)))} GiB` : "–", deviceName()),
  ];
  if (data.skipped.length) found.push(figure("skipped", data.skipped.length.toLocaleString("en"), "clips, reasons below", "bad"));
  return found;
}

function deviceName() {
  const device = data.manifest.machine?.device ?? "";
  return device === "x86_64" || device === "aarch64" ? `CPU, ${device}` : device;
}

function figure(name, value, note, kind) {
  return el("div", { class: "figure" }, el("span", {}, name), el("b", { class: kind ?? null }, value), el("small", {}, note ?? ""));
}

function heldOutFigures() {
  return streams.slice(-1).flatMap(stream => {
    const curve = heldOut(stream), now = curve.y.at(-1);
    if (now === undefined || now === null) return [];
    const base = curve.x[0] === 0 && curve.x.length > 1 ? curve.y[0] : null;
    const change = base ? now / base - 1 : null;
    return [figure(`held-out loss, ${stream}`, short(now), change === null ? "no base to compare" : `${percent(change)} against the base`)];
  });
}

function metricFigures() {
  const values = metricCurves().find(c => c.name === "iou");
  return values ? [figure("alpha IoU", short(values.y.at(-1)), `best ${short(Math.max(...known(values.y)))}`)] : [];
}

// --- curves ---

function curve(name, options = {}) {
  const y = data.steps[name];
  return y && known(y).length ? { name, x: data.steps.step, y, ...options } : null;
}

function charts(kind, list) {
  return el("div", { class: `charts ${kind}` }, list.filter(Boolean).map(chart => chart.node));
}

function smooth(chart) {
  smoothing.push(chart);
  return chart;
}

function trainingPart() {
  if (!data.steps.step.length) return [el("p", { class: "none" }, "No step is done yet.")];
  const slider = el("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: data.steps.step.length > 12 ? 0.9 : 0, "aria-label": "Smoothing" });
  const shown = el("output", {});
  const apply = () => {
    shown.textContent = Number(slider.value).toFixed(2);
    for (const chart of smoothing) { chart.weight = Number(slider.value); chart.draw(); }
  };
  slider.oninput = apply;
  const losses = streams.map(s => curve(`loss_${s}`, { name: s, color: colorOf(s), raw: true })).filter(Boolean);
  if (losses.length !== 1) losses.unshift(curve("loss", { name: "all", color: "var(--ink)", raw: true, width: 2.2 }));
  const ofExperts = Object.keys(data.steps).filter(name => name.startsWith("loss.")).sort();
  const byExpert = ofExperts.map((name, i) => curve(name, { name: name.slice(5), color: `var(--c${2 + i})`, raw: true }));
  const bins = Object.keys(data.steps).filter(name => name.startsWith("loss_by_t."));
  const byTime = bins.map((name, i) => curve(name, { name: `t ${short(i / bins.length)}–${short((i + 1) / bins.length)}`, color: `var(--t${Math.min(4, i)})`, raw: true })).filter(Boolean);
  const parts = [
    el("div", { class: "tools" }, el("label", {}, "smoothing", slider, shown)),
    charts("", [
      smooth(new Chart({ title: "Loss by stream", series: losses.filter(Boolean), height: 280 })),
      byExpert.length ? smooth(new Chart({ title: "Loss by expert", sub: "each trains in its own range of noise", series: byExpert, height: 280 })) : null,
      byTime.length ? smooth(new Chart({ title: "Loss by time", sub: "t = 1 is pure noise", series: byTime, height: 280 })) : null,
    ]),
    charts("", [
      smooth(new Chart({ title: "Gradient norm", series: [curve("grad_norm", { name: "norm", color: "var(--c3)", raw: true })].filter(Boolean), height: 170, zero: true })),
      new Chart({ title: "Learning rate", series: [curve("lr", { name: "rate", color: "var(--c4)" })].filter(Boolean), height: 170, zero: true }),
    ]),
  ];
  apply();
  return parts;
}

// --- held out ---

const sets = [...new Set(data.evals.flatMap(line => Object.keys(line.eval)))];
const lossSets = sets.filter(set => data.evals.some(line => line.eval[set]?.loss));
const setName = set => lossSets.length > 1 ? set : "";

function lossesOf(line, set, stream, kind = "loss") {
  return line?.eval?.[set]?.[kind]?.[stream] ?? {};
}

function heldOut(stream, kind = "loss", among = sets) {
  const lines = data.evals.filter(line => among.some(set => Object.keys(lossesOf(line, set, stream, kind)).length));
  return { x: lines.map(l => l.step), y: lines.map(l => mean(among.flatMap(set => Object.values(lossesOf(l, set, stream, kind))))) };
}

function quantiles(line, set, stream, kind, options) {
  const pairs = Object.entries(lossesOf(line, set, stream, kind)).map(([t, v]) => [Number(t), v]).sort((a, b) => a[0] - b[0]);
  return pairs.length ? { x: pairs.map(p => p[0]), y: pairs.map(p => p[1]), marks: true, ...options } : null;
}

function quantileChart(set, stream) {
  const having = data.evals.filter(line => Object.keys(lossesOf(line, set, stream)).length), now = having.at(-1);
  if (!now) return null;
  const base = having[0].step === 0 && now.step > 0 ? having[0] : null;
  const series = [
    base && quantiles(base, set, stream, "loss", { name: "base", color: "var(--base)", dash: true }),
    quantiles(now, set, stream, "loss_ema", { name: "EMA", color: "var(--c2)" }),
    quantiles(now, set, stream, "loss", { name: `step ${now.step.toLocaleString("en")}`, color: colorOf(stream) }),
  ].filter(Boolean);
  return new Chart({ title: `${stream}, loss at each time`, sub: setName(set), series, xlabel: "t", xname: t => `t = ${short(t)}` });
}

function heldOutChart(set, stream) {
  const plain = heldOut(stream, "loss", [set]), ema = heldOut(stream, "loss_ema", [set]);
  if (!plain.x.length) return null;
  const based = plain.x[0] === 0 && plain.x.length > 1;
  const series = [
    ema.x.length ? { name: "EMA", ...ema, color: "var(--c2)", marks: true } : null,
    { name: stream, ...plain, color: colorOf(stream), marks: true },
    based ? { name: "base", x: plain.x, y: plain.x.map(() => plain.y[0]), color: "var(--base)", dash: true } : null,
  ].filter(Boolean);
  return new Chart({ title: `${stream}, mean over times`, sub: setName(set), series });
}

function heldOutPart() {
  if (!lossSets.length)
    return [el("p", { class: "none" }, "Nothing was evaluated yet: data.eval names the clips, eval.every_steps and eval.every_epochs say when.")];
  const note = "The same clips with the same noise each time, so that every change is the model's. The base's line is the loss before the first step.";
  return [el("p", { class: "note" }, note), charts("pairs", lossSets.flatMap(set => streams.flatMap(s => [quantileChart(set, s), heldOutChart(set, s)])))];
}

// --- alpha ---

function metricCurves() {
  return sets.flatMap(set => {
    const lines = data.evals.filter(line => line.eval[set]?.metrics);
    const names = [...new Set(lines.flatMap(line => Object.keys(line.eval[set].metrics)))];
    return names.map(name => {
      const having = lines.filter(line => typeof line.eval[set].metrics[name] === "number");
      return { set, name, x: having.map(l => l.step), y: having.map(l => l.eval[set].metrics[name]) };
    }).filter(c => c.x.length);
  });
}

function alphaPart() {
  const curves = metricCurves();
  if (!curves.length) return [el("p", { class: "none" }, "No sample was measured yet: eval.samples says how many clips of data.eval are sampled at each evaluation.")];
  const names = [...new Set(curves.map(c => c.name))];
  const groups = [["Against a reference", names.filter(name => !ALONE.has(name))], ["Without a reference", names.filter(name => ALONE.has(name))]];
  return groups.filter(([, list]) => list.length).flatMap(([title, list]) => [el("h3", { class: "group" }, title), charts("small", list.map(name => metricChart(name, curves)))]);
}

function metricChart(name, curves) {
  const way = HIGHER_IS_BETTER.has(name) ? "↑ more is better" : "↓ less is better";
  const line = [ABOUT[name], way].filter(Boolean).join(" · ");
  const series = curves.filter(c => c.name === name).map(c => ({ ...c, name: c.set, color: colors[sets.indexOf(c.set) % colors.length], marks: true }));
  return new Chart({ title: TITLES[name] ?? name.replaceAll("_", " "), line, series, height: 150 });
}

// --- samples ---

function samplesPart() {
  const names = [...new Set(data.samples.map(s => s.name))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const steps = [...new Set(data.samples.map(s => s.step))].sort((a, b) => a - b);
  if (!names.length) return [el("p", { class: "none" }, "No sample was made yet: sample.prompts or data.eval say of what, eval.every_steps when.")];
  const cards = names.map(name => sampleCard(data.samples.filter(s => s.name === name).sort((a, b) => a.step - b.step)));
  const slider = el("input", { type: "range", min: 0, max: steps.length - 1, step: 1, value: steps.length - 1, "aria-label": "Step of the samples" });
  const shown = el("output", {});
  const apply = () => {
    const step = steps[Number(slider.value)];
    shown.textContent = step.toLocaleString("en");
    for (const card of cards) card.show(step);
  };
  slider.oninput = apply;
  apply();
  const tools = el("div", { class: "tools", id: "steps" }, el("label", {}, "step", steps.length > 1 ? slider : null, shown), playButton());
  return [tools, el("div", { class: "samples" }, cards.map(card => card.node))];
}

function playButton() {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const button = el("button", { "aria-pressed": String(!still) }, still ? "play" : "pause");
  button.onclick = () => {
    const plays = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(plays));
    button.textContent = plays ? "pause" : "play";
    for (const video of document.querySelectorAll("video")) plays ? video.play() : video.pause();
  };
  return button;
}

function sampleCard(versions) {
  const order = [...versions.at(-1).streams, "checkerboard", "composite"].filter(n => versions.some(v => v.videos[n]));
  const videos = order.map(name => el("video", { muted: "", loop: "", playsinline: "", preload: "auto", title: name, onclick: e => e.target.paused ? e.target.play() : e.target.pause() }));
  for (const video of videos) video.muted = true;
  videos[0].ontimeupdate = () => {
    for (const other of videos.slice(1)) if (Math.abs(other.currentTime - videos[0].currentTime) > 0.06) other.currentTime = videos[0].currentTime;
  };
  const facts = el("p", { class: "facts" }), title = el("p", {});
  const frame = el("div", { class: `videos ${["", "one", "two"][order.length] ?? ""}` }, order.map((name, i) => el("figure", {}, videos[i], el("figcaption", {}, label(name)))));
  const node = el("article", { class: "card sample" }, title, frame, facts);
  let current = null;
  return { node, show(step) {
    const version = versions.findLast(v => v.step <= step) ?? versions[0];
    if (version === current) return;
    current = version;
    title.textContent = version.prompt || version.name;
    facts.textContent = factsOf(version);
    const paused = document.querySelector("#steps button")?.getAttribute("aria-pressed") === "false" || matchMedia("(prefers-reduced-motion: reduce)").matches;
    order.forEach((name, i) => {
      videos[i].src = version.videos[name] ?? "";
      if (!paused) videos[i].play().catch(() => {});
    });
  } };
}

function label(name) {
  return { checkerboard: "cut out", composite: "over a background" }[name] ?? name;
}

function factsOf(sample) {
  const parts = [`step ${sample.step.toLocaleString("en")}`, `${sample.width}×${sample.height}, ${plural(sample.frames, "frame")}`];
  for (const name of ["seed", "steps", "guidance", "shift", "scheduler"]) if (sample[name] !== undefined && sample[name] !== null && typeof sample[name] !== "object") parts.push(`${name} ${sample[name]}`);
  for (const name of ["iou", "mad"]) if (typeof sample.metrics?.[name] === "number") parts.push(`${TITLES[name]} ${short(sample.metrics[name])}`);
  if (sample.given?.length) parts.push(`given ${sample.given.join(", ")}`);
  if (sample.alpha_mode === "premultiplied") parts.push("premultiplied");
  return parts.join(" · ");
}

// --- speed, data, settings ---

function speedPart() {
  if (!data.steps.step.length) return [el("p", { class: "none" }, "No step is done yet.")];
  const waits = { name: "data wait", color: "var(--c1)", raw: true };
  const share = data.steps.data_wait && { ...waits, x: data.steps.step, y: data.steps.data_wait.map((w, i) => w === null || !data.steps.seconds[i] ? null : 100 * w / data.steps.seconds[i]) };
  const kinds = [
    ["Samples a second", [curve("samples_per_second", { name: "samples/s", color: "var(--c0)", raw: true })]],
    ["Tokens a second", [curve("tokens_per_second", { name: "tokens/s", color: "var(--c4)", raw: true })]],
    ["TFLOP/s a device", [curve("tflops", { name: "TFLOP/s", color: "var(--c3)", raw: true })]],
    ["Model FLOPs utilisation", [curve("mfu", { name: "MFU", color: "var(--c3)", raw: true })]],
    ["Waiting for data, % of a step", [share || null]],
    ["Stalled by checkpoints, s", [curve("checkpoint_stall", { name: "seconds", color: "var(--c1)" })]],
    ["Memory, GiB", [curve("memory_gib", { name: "peak", color: "var(--c2)" })]],
  ];
  const list = kinds.filter(([, series]) => series[0]).map(([title, series]) => {
    const chart = new Chart({ title, series, height: 140, zero: true });
    return series[0].raw ? smooth(chart) : chart;
  });
  return [charts("small", list)];
}

function table(heads, rows, numeric = []) {
  const cell = (tag, value, i) => el(tag, { class: numeric.includes(i) ? "number" : null }, text(value));
  const head = heads.length ? el("thead", {}, el("tr", {}, heads.map((h, i) => cell("th", h, i)))) : null;
  const body = rows.map(row => el("tr", {}, row.map((value, i) => cell(!heads.length && i === 0 ? "th" : "td", value, i))));
  return el("div", { class: "scroll" }, el("table", {}, head, el("tbody", {}, body)));
}

function text(value) {
  if (value === null || value === undefined) return "none";
  return typeof value === "object" ? JSON.stringify(value).replace(/[{}[\]"]/g, "").replaceAll(",", ", ").replaceAll(":", ": ") : String(value);
}

function dataPart() {
  const counts = Object.entries(data.manifest.clips ?? {}).map(([set, n]) => [set, n]);
  const reasons = new Map();
  for (const [, reason] of data.skipped) reasons.set(reason, (reasons.get(reason) ?? 0) + 1);
  const parts = [el("p", { class: "lead" }, counts.map(([set, n]) => `${plural(n, "clip")} to ${set === "train" ? "train on" : "evaluate"}`).join(", "), data.skipped.length ? `; ${data.skipped.length.toLocaleString("en")} skipped.` : "; none was skipped.")];
  if (reasons.size < data.skipped.length) parts.push(details("Why clips were skipped", plural(reasons.size, "reason"), table(["reason", "clips"], [...reasons].sort((a, b) => b[1] - a[1]), [1]), true));
  if (data.skipped.length) parts.push(details("Skipped clips", data.skipped.length.toLocaleString("en"), table(["sample", "reason"], data.skipped), data.skipped.length <= 20));
  return parts;
}

function details(title, note, content, open) {
  return el("details", open ? { open: "" } : {}, el("summary", {}, title, " ", el("small", {}, note ?? "")), content.tagName === "PRE" ? content : el("div", {}, content));
}

function settingsPart() {
  const { manifest } = data, made = [["code", manifest.git], ...Object.entries(manifest.versions ?? {})].filter(([, v]) => v);
  const where = [["host", manifest.machine?.host], ["device", deviceName()], ...Object.entries(manifest.layout ?? {}), ["command", (manifest.command ?? []).slice(1).join(" ")], ["VAE", manifest.model?.vae?.slice(0, 16)]].filter(([, v]) => v);
  return [
    el("div", { class: "card" }, el("h3", {}, "Set by this run ", el("small", {}, "all else is the default")), table([], data.changed)),
    el("div", { class: "pair", style: "margin-top: 16px" },
      el("div", { class: "card" }, el("h3", {}, "Where it ran"), table([], where)),
      el("div", { class: "card" }, el("h3", {}, "Made with"), table([], made))),
    details("The whole config", "", el("pre", {}, yaml(data.config)), false),
  ];
}

function yaml(value, indent = "") {
  return Object.entries(value).map(([name, part]) => part !== null && typeof part === "object" && !Array.isArray(part) && Object.keys(part).length
    ? `${indent}${name}:\n${yaml(part, `${indent}  `)}` : `${indent}${name}: ${JSON.stringify(part)}\n`).join("");
}

// --- the page ---

const PARTS = [
  ["samples", "Samples", samplesPart], ["training", "Training", trainingPart], ["held-out", "Held-out loss", heldOutPart],
  ["alpha", "Alpha", alphaPart], ["speed", "Speed and memory", speedPart], ["data", "Data", dataPart], ["settings", "Settings", settingsPart],
];

document.title = `${data.name} · transpixeler`;
const main = document.getElementById("main"), nav = document.getElementById("nav");
main.replaceChildren(heading());
for (const [id, title, part] of PARTS) {
  main.append(el("section", { id }, el("h2", {}, title), part()));
  nav.append(el("a", { href: `#${id}` }, title));
}
main.append(el("footer", {}, `transpixeler${data.manifest.versions?.transpixeler ? ` ${data.manifest.versions.transpixeler}` : ""}`));
for (const chart of smoothing) chart.weight = Number(document.querySelector("#training input")?.value ?? 0);
for (const chart of Chart.all) chart.draw();
const observer = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) for (const link of nav.children) link.classList.toggle("here", link.hash === `#${entry.target.id}`);
}, { rootMargin: "-30% 0px -65% 0px" });
for (const section of document.querySelectorAll("section")) observer.observe(section);
