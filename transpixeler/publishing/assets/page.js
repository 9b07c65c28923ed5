// What all pages share: elements from plain values (never from HTML), numbers as people read them, tables.

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node[name] = value;
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter(child => child !== null && child !== undefined));
  return node;
}

function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("e+", "e").replace(/\.?0+e/, "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

const known = values => (values ?? []).filter(v => v !== null && v !== undefined);
const mean = values => known(values).length ? known(values).reduce((a, b) => a + b, 0) / known(values).length : null;
const tail = values => mean(known(values).slice(-Math.max(1, Math.ceil(known(values).length / 20))));
const percent = share => `${share > 0 ? "+" : share < 0 ? "−" : ""}${Math.abs(share * 100).toFixed(Math.abs(share) < 0.1 ? 1 : 0)} %`;
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

function time(seconds) {
  if (seconds < 90) return `${short(Math.round(seconds * 10) / 10)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${short(Math.round(minutes / 6) / 10)} h`;
}

function text(value) {
  if (value === null || value === undefined) return "none";
  if (value === "") return "“”";
  return typeof value === "object" ? JSON.stringify(value).replace(/[{}[\]"]/g, "").replaceAll(",", ", ").replaceAll(":", ": ") : String(value);
}

// A cell is a value, or {value, kind} with a class.
function table(heads, rows, numeric = []) {
  const cell = (tag, value, i) => el(tag, { class: [numeric.includes(i) ? "number" : "", value?.kind ?? ""].join(" ").trim() || null }, text(value?.kind ? value.value : value));
  const head = heads.length ? el("thead", {}, el("tr", {}, heads.map((h, i) => cell("th", h, i)))) : null;
  const body = rows.map(row => el("tr", {}, row.map((value, i) => cell(!heads.length && i === 0 ? "th" : "td", value, i))));
  return el("div", { class: "scroll" }, el("table", {}, head, el("tbody", {}, body)));
}

function details(title, note, content, open) {
  return el("details", open ? { open: "" } : {}, el("summary", {}, title, " ", el("small", {}, note ?? "")), content.tagName === "PRE" ? content : el("div", {}, content));
}

function readValue() {
  return JSON.parse(document.getElementById("data").textContent);
}

// Parts of a page under their headings, and links to them that follow the reader.
function layOut(parts) {
  const main = document.getElementById("main"), nav = document.getElementById("nav");
  for (const [id, title, part] of parts) {
    main.append(el("section", { id }, el("h2", {}, title), part()));
    nav.append(el("a", { href: `#${id}` }, title));
  }
}

function followReader() {
  const observer = new IntersectionObserver(entries => {
    for (const entry of entries) if (entry.isIntersecting) for (const link of document.getElementById("nav").children) link.classList.toggle("here", link.hash === `#${entry.target.id}`);
  }, { rootMargin: "-30% 0px -65% 0px" });
  for (const section of document.querySelectorAll("section")) observer.observe(section);
}
