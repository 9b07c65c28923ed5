// The page of a data set: flags and words choose among its cards, and a click opens a clip.

const { clips } = readValue(); // of the cards, in their order
const cards = [...document.querySelectorAll("article")], buttons = [...document.querySelectorAll("[data-flag]")];
const find = document.querySelector("input"), shown = document.querySelector("#shown");
let flag = "";

function show() {
  const words = find.value.toLowerCase();
  let count = 0;
  for (const card of cards) {
    const flags = card.dataset.flags.split("|");
    card.hidden = !((!flag || flags.includes(flag)) && (!words || card.textContent.toLowerCase().includes(words)));
    count += !card.hidden;
  }
  shown.textContent = `${count} of ${cards.length} shown`;
}

// A clip with the strips of its card, which stand in for files that no browser plays.
function clipOf(card) {
  const strips = Object.fromEntries([...card.querySelectorAll("img[data-stream]")].map(image => [image.dataset.stream, image.src]));
  return { ...clips[cards.indexOf(card)], strips };
}

for (const button of buttons) button.onclick = () => {
  flag = button.dataset.flag;
  for (const other of buttons) other.setAttribute("aria-pressed", other === button);
  show();
};
find.oninput = show;
document.querySelector(".cards").onclick = event => {
  event.target.closest(".caption")?.classList.toggle("whole");
  if (!event.target.closest(".open")) return;
  const open = cards.filter(card => !card.hidden);
  openPlayer(open.map(clipOf), open.indexOf(event.target.closest("article")));
};
show();
