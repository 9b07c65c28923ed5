// Several runs on one page: samples side by side, curves over each other in one colour a run, what differs, last figures.

const data = readValue();
const { words, runs } = data;
const colorOf = run => COLORS[runs.indexOf(run) % COLORS.length];
const dashOf = run => runs.indexOf(run) >= COLORS.length;
const one = (run, series, more = {}) => series && series.x.length ? { ...series, name: run.label, color: colorOf(run), dash: dashOf(run), ...more } : null;
const each = series => runs.map(series).filter(Boolean);
const union = lists => [...new Set(lists.flat())];

function chart(title, series, options = {}) {
  return series.length ? new Chart({ title, series, ...options }) : null;
}

function heading() {
  const lines = runs.map(run => el("tr", {}, el("th", {}, el("i", { class: dashOf(run) ? "key dash" : "key", style: `border-color: ${colorOf(run)}` }), run.label), el("td", {}, run.state), el("td", {}, run.place)));
  return el("header", {}, el("h1", {}, `${runs.length} runs compared`), el("div", { class: "card runs" }, el("table", {}, el("tbody", {}, lines))));
}

// --- samples ---

const keyOf = sample => JSON.stringify([sample.prompt || sample.name, sample.given ?? []]);

function samplesPart() {
  const inOrder = samples => samples.toSorted((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  const keys = union(runs.map(run => inOrder(run.samples).map(keyOf))); // as each run's own report has them
  if (!keys.length) return [el("p", { class: "none" }, "None of these runs has made a sample yet.")];
  const steps = union(runs.map(run => run.samples.map(s => s.step))).sort((a, b) => a - b);
  return throughSteps(keys.map(card), steps);
}

// A prompt: the videos of each run beside each other. The player goes from run to run.
function card(key) {
  const parts = runs.map(run => {
    const versions = run.samples.filter(s => keyOf(s) === key).sort((a, b) => a.step - b.step);
    const part = { run, view: versions.length ? sampleView(words, versions, () => openPlayer(...clips(part))) : null };
    part.absent = el("p", { class: "absent" }, "no such sample at this step");
    const name = el("p", { class: "run" }, el("i", { class: "key", style: `border-color: ${colorOf(run)}` }), run.label);
    part.node = el("div", {}, name, part.view?.node, part.absent);
    return part;
  });
  const clips = part => {
    const shown = parts.filter(one => one.absent.hidden);
    return [shown.map(({ run, view }) => clipOf(words, view.current, `${run.label}: ${view.current.prompt || view.current.name}`)), shown.indexOf(part)];
  };
  const [title, given] = JSON.parse(key);
  const node = el("article", { class: "card sample wide" }, el("p", {}, title, givenOf(given)), el("div", { class: "side" }, parts.map(part => part.node)));
  return { node, show(step) {
    for (const { view, absent } of parts) {
      absent.hidden = view !== null && view.first <= step;
      if (view) view.node.hidden = !absent.hidden;
      if (absent.hidden) view.show(step);
    }
  } };
}

// --- curves ---

function trainingPart() {
  const names = union(runs.map(run => Object.keys(run.steps).filter(name => /^loss_(?!by_t)/.test(name))));
  const own = (name, more) => each(run => one(run, curve(run, name), more));
  const list = [
    chart("Loss", own("loss", { raw: true }), { height: 280 }),
    ...names.length > 1 ? names.map(name => chart(`Loss, ${name.slice(5)}`, own(name, { raw: true }), { height: 280 })) : [],
  ].filter(Boolean);
  const rest = [chart("Gradient norm", own("grad_norm", { raw: true }), { height: 170, zero: true }), chart("Learning rate", own("lr"), { height: 170, zero: true }),
    chart("Samples a second", own("samples_per_second", { raw: true }), { height: 170, zero: true })].filter(Boolean);
  if (!list.length) return [el("p", { class: "none" }, "No step is done yet.")];
  return [smoothingTools(Math.max(...runs.map(run => run.steps.step.length))), charts("", list.map(smooth)), charts("", rest.map(c => c.series[0].raw ? smooth(c) : c))];
}

function heldOutPart() {
  const sets = union(runs.map(setsOf)), streams = union(runs.map(run => Object.keys(run.config.streams ?? {})));
  const list = sets.flatMap(set => streams.map(stream => chart(`${stream}, held-out loss`, each(run => one(run, heldOut(run, stream, "loss", [set]), { marks: true })), { sub: set })));
  const metrics = union(runs.map(run => metricCurves(run).map(c => JSON.stringify([c.name, c.set])))).map(key => {
    const [name, set] = JSON.parse(key);
    const series = each(run => { const found = metricCurves(run).find(c => c.name === name && c.set === set); return found && one(run, found, { marks: true }); });
    return chart(titleOf(words, name), series, { sub: set, line: [words[name]?.about, wayOf(words, name)].filter(Boolean).join(" · "), height: 150 });
  });
  if (!list.some(Boolean) && !metrics.some(Boolean)) return [el("p", { class: "none" }, "Nothing was evaluated yet.")];
  return [charts("pairs", list), charts("small", metrics)];
}

// --- tables ---

function lastPart() {
  const rows = [["steps", runs.map(run => run.last.step ?? 0), 0], ["training loss, mean of the last 5 %", runs.map(run => tail(run.steps.loss)), -1], ["time in steps, s", runs.map(run => run.seconds || null), 0], ["peak memory, GiB", runs.map(run => run.last.memory_gib ?? null), -1]];
  for (const set of union(runs.map(setsOf))) {
    for (const stream of union(runs.map(run => Object.keys(run.config.streams ?? {})))) rows.push([`held-out loss of ${stream} (${set})`, runs.map(run => heldOut(run, stream, "loss", [set]).y.at(-1) ?? null), -1]);
    for (const name of union(runs.map(run => metricCurves(run).filter(c => c.set === set).map(c => c.name)))) rows.push([`${titleOf(words, name)}${words[name] ? `, ${words[name].about}` : ""} (${set})`, runs.map(run => metricCurves(run).find(c => c.set === set && c.name === name)?.y.at(-1) ?? null), words[name]?.more ? 1 : -1]);
  }
  const cells = ([name, values, way]) => {
    const there = known(values), best = way && there.length > 1 && new Set(there).size > 1 ? there.reduce((a, b) => (b - a) * way > 0 ? b : a) : null;
    return [name, ...values.map(value => ({ value: short(value), kind: value !== null && value === best ? "best" : "plain" }))];
  };
  return [el("div", { class: "card" }, table(["", ...runs.map(run => run.label)], rows.filter(([, values]) => known(values).length).map(cells), runs.map((_, i) => i + 1)))];
}

function differencesPart() {
  if (!data.differences.length) return [el("p", { class: "none" }, "The configs are the same in all but their names.")];
  return [el("div", { class: "card" }, table(["", ...runs.map(run => run.label)], data.differences.map(([key, values]) => [key, ...values])))];
}

const PARTS = [
  ["samples", "Samples", samplesPart], ["training", "Training", trainingPart], ["held-out", "Held out", heldOutPart],
  ["last", "Last figures", lastPart], ["differences", "Configs' differences", differencesPart],
];

document.title = `${runs.map(run => run.label).join(", ")} · transpixeler`;
document.getElementById("main").replaceChildren(heading());
layOut(PARTS);
drawCharts();
followReader();
