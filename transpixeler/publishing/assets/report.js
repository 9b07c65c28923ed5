// The report of a run: one function a part, each from the value that Python gathered.

const data = readValue();
const { words } = data;
const streams = Object.keys(data.config.streams ?? { rgb: "" });
const colorOf = name => COLORS[(streams.indexOf(name) + COLORS.length) % COLORS.length];
const start = values => mean(known(values).slice(0, Math.max(1, Math.ceil(known(values).length / 20))));

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
  const { last, manifest } = data, loss = tail(data.steps.loss), first = start(data.steps.loss);
  const found = [
    figure("steps", (last.step ?? data.steps.step.at(-1) ?? 0).toLocaleString("en"), manifest.steps ? `of ${manifest.steps.toLocaleString("en")}, epoch ${last.epoch ?? "–"}` : ""),
    figure("training loss", short(loss), loss === null ? "" : `${percent(loss / first - 1)} since the start`),
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
    const curve = heldOut(data, stream), now = curve.y.at(-1);
    if (now === undefined || now === null) return [];
    const base = curve.x[0] === 0 && curve.x.length > 1 ? curve.y[0] : null;
    const change = base ? now / base - 1 : null;
    return [figure(`held-out loss, ${stream}`, short(now), change === null ? "no base to compare" : `${percent(change)} against the base`)];
  });
}

function metricFigures() {
  const values = metricCurves(data).find(c => c.name === "iou");
  return values ? [figure("alpha IoU", short(values.y.at(-1)), `${values.set}, best ${short(Math.max(...known(values.y)))}`)] : [];
}

// --- curves ---

function trainingPart() {
  if (!data.steps.step.length) return [el("p", { class: "none" }, "No step is done yet.")];
  const losses = streams.map(s => curve(data, `loss_${s}`, { name: s, color: colorOf(s), raw: true })).filter(Boolean);
  if (losses.length !== 1) losses.unshift(curve(data, "loss", { name: "all", color: "var(--ink)", raw: true, width: 2.2 }));
  const ofExperts = Object.keys(data.steps).filter(name => name.startsWith("loss.")).sort();
  const byExpert = ofExperts.map((name, i) => curve(data, name, { name: name.slice(5), color: `var(--c${2 + i})`, raw: true }));
  const bins = Object.keys(data.steps).filter(name => name.startsWith("loss_by_t."));
  const byTime = bins.map((name, i) => curve(data, name, { name: `t ${short(i / bins.length)}–${short((i + 1) / bins.length)}`, color: `var(--t${Math.min(4, i)})`, raw: true })).filter(Boolean);
  return [
    smoothingTools(data.steps.step.length),
    charts("", [
      smooth(new Chart({ title: "Loss by stream", series: losses.filter(Boolean), height: 280 })),
      byExpert.length ? smooth(new Chart({ title: "Loss by expert", sub: "each trains in its own range of noise", series: byExpert, height: 280 })) : null,
      byTime.length ? smooth(new Chart({ title: "Loss by time", sub: "t = 1 is pure noise", series: byTime, height: 280 })) : null,
    ]),
    charts("", [
      smooth(new Chart({ title: "Gradient norm", series: [curve(data, "grad_norm", { name: "norm", color: "var(--c3)", raw: true })].filter(Boolean), height: 170, zero: true })),
      new Chart({ title: "Learning rate", series: [curve(data, "lr", { name: "rate", color: "var(--c4)" })].filter(Boolean), height: 170, zero: true }),
    ]),
  ];
}

// --- held out ---

const sets = setsOf(data);
const lossSets = sets.filter(set => data.evals.some(line => line.eval[set]?.loss));
const setName = set => lossSets.length > 1 ? set : "";

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
  const plain = heldOut(data, stream, "loss", [set]), ema = heldOut(data, stream, "loss_ema", [set]);
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

function alphaPart() {
  const curves = metricCurves(data);
  if (!curves.length) return [el("p", { class: "none" }, "No sample was measured yet: eval.samples says how many clips of data.eval are sampled at each evaluation.")];
  const names = [...new Set(curves.map(c => c.name))];
  const groups = [["Against a reference", names.filter(name => !words[name]?.alone)], ["Without a reference", names.filter(name => words[name]?.alone)]];
  return groups.filter(([, list]) => list.length).flatMap(([title, list]) => [el("h3", { class: "group" }, title), charts("small", list.map(name => metricChart(name, curves)))]);
}

function metricChart(name, curves) {
  const line = [words[name]?.about, wayOf(words, name)].filter(Boolean).join(" · ");
  const series = curves.filter(c => c.name === name).map(c => ({ ...c, name: c.set, color: COLORS[sets.indexOf(c.set) % COLORS.length], marks: true }));
  return new Chart({ title: titleOf(words, name), line, series, height: 150 });
}

// --- samples ---

function samplesPart() {
  const names = [...new Set(data.samples.map(s => s.name))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  if (!names.length) return [el("p", { class: "none" }, "No sample was made yet: sample.prompts or data.eval say of what, eval.every_steps when.")];
  const steps = [...new Set(data.samples.map(s => s.step))].sort((a, b) => a - b), cards = [];
  const clips = () => cards.map(card => clipOf(words, card.view.current));
  names.forEach((name, i) => {
    const versions = data.samples.filter(s => s.name === name).sort((a, b) => a.step - b.step);
    const view = sampleView(words, versions, () => openPlayer(clips(), i)), title = el("p", {});
    const show = step => { view.show(step); title.replaceChildren(view.current.prompt || name, givenOf(view.current.given)); };
    cards.push({ node: el("article", { class: "card sample" }, title, view.node), view, show });
  });
  return throughSteps(cards, steps);
}

// --- speed, data, settings ---

function speedPart() {
  if (!data.steps.step.length) return [el("p", { class: "none" }, "No step is done yet.")];
  const waits = { name: "data wait", color: "var(--c1)", raw: true };
  const share = data.steps.data_wait && { ...waits, x: data.steps.step, y: data.steps.data_wait.map((w, i) => w === null || !data.steps.seconds[i] ? null : 100 * w / data.steps.seconds[i]) };
  const kinds = [
    ["Samples a second", [curve(data, "samples_per_second", { name: "samples/s", color: "var(--c0)", raw: true })]],
    ["Tokens a second", [curve(data, "tokens_per_second", { name: "tokens/s", color: "var(--c4)", raw: true })]],
    ["TFLOP/s a device", [curve(data, "tflops", { name: "TFLOP/s", color: "var(--c3)", raw: true })]],
    ["Model FLOPs utilisation", [curve(data, "mfu", { name: "MFU", color: "var(--c3)", raw: true })]],
    ["Waiting for data, % of a step", [share || null]],
    ["Stalled by checkpoints, s", [curve(data, "checkpoint_stall", { name: "seconds", color: "var(--c1)" })]],
    ["Memory, GiB", [curve(data, "memory_gib", { name: "peak", color: "var(--c2)" })]],
  ];
  const list = kinds.filter(([, series]) => series[0]).map(([title, series]) => {
    const chart = new Chart({ title, series, height: 140, zero: true });
    return series[0].raw ? smooth(chart) : chart;
  });
  return [charts("small", list)];
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
document.getElementById("main").replaceChildren(heading());
layOut(PARTS);
document.getElementById("main").append(el("footer", {}, `transpixeler${data.manifest.versions?.transpixeler ? ` ${data.manifest.versions.transpixeler}` : ""}`));
drawCharts();
keepUp(document.querySelector("header .lead"), data.live);
followReader();
