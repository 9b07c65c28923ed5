// A line chart as SVG at the width it is given, with a cursor that reads all its curves.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { top: 10, right: 12, bottom: 26 };

function draw(parent, tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(n => n * power).find(n => n >= rough * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

function smoothed(values, weight) {
  let mean = 0, total = 0;
  return values.map(value => {
    if (value === null) return total ? mean / total : null;
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}

// Noise at a curve's start must not press the rest of it flat: the outermost points may leave the frame.
function span(series, zero) {
  const values = series.flatMap(s => [...(s.smooth ?? s.y), ...(s.raw ? trimmed(s.y) : [])]).filter(v => v !== null);
  if (!values.length) return [0, 1];
  let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  if (zero) low = Math.min(0, low);
  if (low === high) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
  const room = (high - low) * 0.06;
  return [zero && low === 0 ? 0 : low - room, high + room];
}

function trimmed(values) {
  const sorted = values.filter(v => v !== null).sort((a, b) => a - b), cut = Math.floor(sorted.length * 0.02);
  return sorted.slice(cut, sorted.length - cut);
}

function path(xs, ys, x, y) {
  let line = "", pen = "M";
  ys.forEach((value, i) => {
    if (value === null || value === undefined) { pen = "M"; return; }
    line += `${pen}${x(xs[i]).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = "L";
  });
  return line;
}

// series: {name, x, y, color, dash, raw: draw the points faintly under their smoothed curve, marks: a dot on each point}
// The page draws Chart.all once it is laid out; a chart draws itself again whenever its width changes.
class Chart {
  static all = [];

  constructor({ title, sub, line, series, height = 220, zero = false, xlabel = "step", xname = v => `step ${short(v)}`, wide = false }) {
    Object.assign(this, { series, height, zero, xlabel, xname, weight: 0 });
    this.tip = el("div", { class: "tip", hidden: "" });
    this.svg = document.createElementNS(SVG, "svg");
    const head = el("h3", {}, title, sub ? el("small", {}, ` ${sub}`) : null);
    this.node = el("figure", { class: wide ? "card wide" : "card" }, head, line ? el("div", { class: "legend" }, line) : null, line && series.length < 2 ? null : this.legend(), this.svg, this.tip);
    this.svg.setAttribute("height", height);
    this.svg.setAttribute("role", "img");
    this.svg.setAttribute("aria-label", `${title}: ${series.map(ending).join(", ")}`);
    this.svg.onpointermove = this.svg.onpointerdown = event => this.point(event);
    this.svg.onpointerleave = () => this.leave();
    new ResizeObserver(() => this.svg.clientWidth !== this.width && this.draw()).observe(this.svg);
    Chart.all.push(this);
  }

  legend() {
    if (this.series.length < 2) return el("div", { class: "legend" });
    return el("div", { class: "legend" }, this.series.map(s => el("span", {}, key(s), s.name)));
  }

  draw() {
    const width = this.svg.clientWidth;
    if (!width) return;
    this.svg.replaceChildren();
    this.width = width;
    for (const s of this.series) s.smooth = s.raw ? smoothed(s.y, this.weight) : null;
    const [low, high] = span(this.series, this.zero), rows = ticks(low, high, this.height / 44);
    const left = Math.max(...rows.map(v => short(v).length)) * 6.6 + 12;
    const xs = this.series.flatMap(s => s.x), first = Math.min(...xs), last = Math.max(...xs);
    const right = width - MARGIN.right, bottom = this.height - MARGIN.bottom;
    this.x = v => left + (right - left) * (last > first ? (v - first) / (last - first) : 0.5);
    this.y = v => bottom - (bottom - MARGIN.top) * (v - low) / (high - low);
    this.axes(rows, first, last, { left, right, bottom });
    this.curves({ left, right, bottom });
    this.front = draw(this.svg, "g", {});
  }

  axes(rows, first, last, { left, right, bottom }) {
    for (const v of rows) {
      draw(this.svg, "line", { class: "gridline", x1: left, x2: right, y1: this.y(v), y2: this.y(v) });
      draw(this.svg, "text", { x: left - 8, y: this.y(v) + 4, "text-anchor": "end" }, short(v));
    }
    draw(this.svg, "line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom });
    const columns = last > first ? ticks(first, last, Math.max(2, (right - left) / 90)) : [first];
    const whole = columns.filter(v => this.xlabel !== "step" || Number.isInteger(v));
    const beside = this.x(whole[0]) > 44; // else the axis' name and its first number are one text
    for (const v of beside ? whole : whole.slice(1)) {
      const edge = this.x(v) > right - 14;
      draw(this.svg, "text", { x: edge ? right + MARGIN.right : this.x(v), y: bottom + 17, "text-anchor": edge ? "end" : "middle" }, short(v));
    }
    const name = beside ? this.xlabel : `${this.xlabel} ${short(whole[0])}`;
    draw(this.svg, "text", { class: "name", x: beside ? 0 : Math.max(0, this.x(whole[0]) - 3.1 * name.length), y: bottom + 17 }, name);
  }

  curves({ left, right, bottom }) {
    const id = `clip${Math.random().toString(36).slice(2)}`;
    draw(draw(this.svg, "clipPath", { id }), "rect", { x: left - 4, y: 0, width: right - left + 8, height: bottom });
    const group = draw(this.svg, "g", { "clip-path": `url(#${id})` });
    for (const s of this.series) {
      const style = { stroke: s.color, "stroke-width": s.width ?? 1.8, "stroke-dasharray": s.dash ? "5 4" : "none" };
      if (s.raw && this.weight > 0) draw(group, "path", { ...style, d: path(s.x, s.y, this.x, this.y), "stroke-width": 1, opacity: s.x.length > 400 ? 0.18 : 0.3 });
      draw(group, "path", { ...style, class: "curve", d: path(s.x, s.smooth ?? s.y, this.x, this.y) });
      if (!s.marks && s.x.length > 1) continue;
      s.y.forEach((v, i) => v !== null && draw(group, "circle", { cx: this.x(s.x[i]), cy: this.y(v), r: 2.8, fill: s.color }));
    }
  }

  point(event) {
    if (!this.width) return;
    const box = this.svg.getBoundingClientRect(), at = event.clientX - box.left;
    const all = [...new Set(this.series.flatMap(s => s.x))];
    const near = all.reduce((best, v) => Math.abs(this.x(v) - at) < Math.abs(this.x(best) - at) ? v : best, all[0]);
    const shown = this.series.map(s => ({ s, i: s.x.indexOf(near) })).filter(({ s, i }) => i >= 0 && s.y[i] !== null);
    this.front.replaceChildren();
    draw(this.front, "line", { class: "cursor", x1: this.x(near), x2: this.x(near), y1: MARGIN.top, y2: this.height - MARGIN.bottom });
    this.tip.replaceChildren(el("div", {}, el("b", {}, this.xname(near))));
    for (const { s, i } of shown) {
      const value = (s.smooth ?? s.y)[i];
      draw(this.front, "circle", { cx: this.x(near), cy: this.y(value), r: 3.5, fill: s.color });
      const raw = s.raw && this.weight > 0 ? el("span", { class: "raw" }, ` (${short(s.y[i])})`) : null;
      this.tip.append(el("div", {}, el("span", {}, key(s), s.name), el("span", {}, el("b", {}, short(value)), raw)));
    }
    this.tip.hidden = false;
    this.place(box.left + this.x(near));
  }

  place(x) {
    const frame = this.node.getBoundingClientRect(), tip = this.tip.getBoundingClientRect(), beside = x - frame.left + 14;
    const left = beside + tip.width > frame.width ? beside - tip.width - 28 : beside;
    this.tip.style.left = `${Math.max(4, left)}px`;
    this.tip.style.top = `${this.svg.getBoundingClientRect().top - frame.top + 4}px`;
  }

  leave() {
    this.tip.hidden = true;
    this.front?.replaceChildren();
  }
}

function key(s) {
  return el("i", { class: s.dash ? "key dash" : "key", style: `border-color: ${s.color}` });
}

function ending(s) {
  const known = s.y.filter(v => v !== null);
  return known.length ? `${s.name} from ${short(known[0])} to ${short(known.at(-1))}` : `${s.name} without values`;
}
