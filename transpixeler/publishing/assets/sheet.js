// All samples of a call on one page. A video is loaded once it comes into sight, as there may be hundreds.

const data = readValue();
const { words, samples } = data;

function cards() {
  const views = samples.map((sample, i) => sampleView(words, [sample], () => openPlayer(samples.map(one => clipOf(words, one)), i)));
  const nodes = samples.map((sample, i) => el("article", { class: "card sample" }, el("p", {}, sample.prompt || sample.name, givenOf(sample.given)), el("p", { class: "facts" }, sample.name), views[i].node));
  const watch = new IntersectionObserver(entries => {
    for (const entry of entries) if (entry.isIntersecting) { views[nodes.indexOf(entry.target)].show(Infinity); watch.unobserve(entry.target); }
  }, { rootMargin: "400px" });
  for (const node of nodes) watch.observe(node);
  return [el("div", { class: "tools", id: "steps" }, playButton()), el("div", { class: "samples" }, nodes)];
}

document.title = `${data.name} · transpixeler`;
document.querySelector("nav").remove();
document.getElementById("main").replaceChildren(el("header", {}, el("h1", {}, data.name), el("p", { class: "lead" }, plural(samples.length, "sample"))), ...cards());
