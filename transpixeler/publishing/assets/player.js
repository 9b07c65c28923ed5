// One clip at full size: over a choice of backgrounds, its alpha alone, its edge, frame by frame.
//
// A clip is {title, facts, fps, frames, files, alpha, inside, still, strips, histogram}. files: address by stream, colour
// first. alpha: the stream that is the matte. inside: the first file has its alpha in it. still: files are pictures.
// strips: {name: address} of `shown` frames side by side, for files that no browser plays. histogram: of the whole clip.
//
// All pictures are made by blending whole canvases, never by reading pixels: a page that is opened from a disk may draw
// the files beside it but not read them. Only the histogram of a frame and the plate's colour read, where that is allowed.

const GROUNDS = ["black", "white", "checker", "plate"];
const BINS = 64; // of a histogram, four levels each: the first is transparent, the last opaque
const STRIP_GAP = 4; // pixels between a strip's frames
const EDGE_REACH = 2; // pixels that an edge is widened by to be seen
const KEYS = "space: play · ← →: frame · ↑ ↓: clip · 1–9: view · b: background · z: size";

function blend(paint, how, what) {
  const { width, height } = paint.canvas;
  paint.globalCompositeOperation = how;
  if (typeof what === "string") { paint.fillStyle = what; paint.fillRect(0, 0, width, height); } else paint.drawImage(what, 0, 0, width, height);
  paint.globalCompositeOperation = "source-over";
}

function pixels(canvas) {
  try { return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data; } catch (fault) {
    if (fault.name === "SecurityError") return null;
    throw fault;
  }
}

function choice(names, label, pick) {
  const buttons = names.map(name => el("button", { onclick: () => pick(name) }, label(name)));
  const node = el("div", { class: "group", role: "group" }, buttons);
  return { node, show: name => names.forEach((one, i) => buttons[i].setAttribute("aria-pressed", String(one === name))) };
}

class Player {
  constructor() {
    this.view = "cut"; this.ground = "checker"; this.plate = null; this.playing = false;
    const button = (label, says, onclick) => el("button", { onclick, title: says, "aria-label": says }, label);
    this.title = el("h3", {}); this.facts = el("small", {});
    this.screen = el("canvas", { class: "screen" }); this.note = el("p", { hidden: "" });
    this.stage = el("div", { class: "stage", onclick: () => this.zoom() }, this.screen, this.note);
    this.play = button("play", "Play or pause", () => this.setPlaying(!this.playing));
    this.play.autofocus = true;
    this.slider = el("input", { type: "range", min: 0, step: 1, "aria-label": "Frame", oninput: () => this.seek(Number(this.slider.value)) });
    this.count = el("output", {});
    this.others = [button("‹", "Previous clip", () => this.next(-1)), button("›", "Next clip", () => this.next(1))];
    this.views = el("div", { class: "row" });
    this.grounds = choice(GROUNDS, name => name, name => this.set({ ground: name }));
    this.own = el("input", { type: "file", accept: "image/*", onchange: () => this.takePlate() });
    this.chart = el("canvas", { width: 384, height: 80, role: "img" }); this.shares = el("small", {});
    this.histogram = el("div", { class: "histogram" }, this.chart, this.shares);
    this.node = el("dialog", { class: "player", "aria-label": "Player", onkeydown: event => this.key(event), onclose: () => this.stop() },
      el("header", {}, el("div", {}, this.title, this.facts), this.others, button("✕", "Close", () => this.node.close())),
      this.stage,
      el("div", { class: "controls" },
        el("div", { class: "row" }, this.play, button("◂", "One frame back", () => this.seek(this.frame - 1)), button("▸", "One frame on", () => this.seek(this.frame + 1)), this.slider, this.count),
        this.views, el("small", { class: "hint" }, KEYS)));
    this.layers = Object.fromEntries(["matte", "inverse", "cut", "edge", "wide"].map(name => [name, document.createElement("canvas").getContext("2d")]));
    document.body.append(this.node);
  }

  open(clips, index) {
    this.clips = clips;
    this.others.forEach(one => { one.hidden = clips.length < 2; });
    this.node.showModal();
    this.load(index);
  }

  next(by) {
    if (this.clips.length > 1) this.load((this.index + by + this.clips.length) % this.clips.length);
  }

  load(index) {
    const clip = this.clip = this.clips[this.index = index];
    this.stop();
    this.title.textContent = clip.title; this.facts.textContent = clip.facts;
    this.strips = !Object.keys(clip.files).length;
    this.media = Object.entries(this.strips ? clip.strips : clip.files).map(([name, address]) => this.media1(name, address));
    const withAlpha = clip.inside || (clip.alpha && this.media.some(one => one.name === clip.alpha));
    const names = this.media.map(one => one.name).filter(name => name !== clip.alpha);
    const views = withAlpha ? ["cut", "fringe", "alpha", ...clip.inside && !this.strips ? [] : names] : names;
    if (!views.includes(this.view)) this.view = views[0];
    this.options = views;
    this.pick = choice(views, name => ({ cut: "cut out", alpha: "alpha only" })[name] ?? name, name => this.set({ view: name }));
    const grounds = [el("span", {}, "over"), this.grounds.node, el("button", { onclick: () => this.own.click(), title: "A picture of your own as the plate" }, "own …"), this.own];
    this.views.replaceChildren(this.pick.node, ...withAlpha ? grounds : [], ...withAlpha ? [this.histogram] : []);
    this.plateColor = null; this.readAt = 0;
    this.tell("");
    this.set({});
    if (!this.single && !matchMedia("(prefers-reduced-motion: reduce)").matches) this.setPlaying(true);
  }

  media1(name, address) {
    const picture = this.strips || this.clip.still;
    const node = picture ? el("img") : el("video", { muted: "", loop: "", playsinline: "", preload: "auto" });
    if (!picture) node.muted = true;
    node.onseeked = node.onloadeddata = node.onload = () => this.refresh();
    node.onerror = () => this.failed(name);
    node.src = address;
    const medium = { name, node, picture };
    if (!picture) this.listen(medium);
    return medium;
  }

  // A browser says that it has sought before it has the frame to paint, so the picture is drawn again when that arrives.
  listen(medium) {
    medium.node.requestVideoFrameCallback?.((now, { mediaTime }) => {
      medium.shows = mediaTime;
      if (!this.playing && this.media.includes(medium)) this.refresh();
      this.listen(medium);
    });
  }

  failed(name) {
    if (this.strips || !Object.keys(this.clip.strips ?? {}).length) { this.tell(`${name}: this browser does not play the file, or it is not where it was`); return; }
    this.clips = this.clips.with(this.index, { ...this.clip, files: {}, still: true });
    this.load(this.index);
    this.tell("this browser does not play the file, or it is not where it was: the few frames on the page are shown");
  }

  tell(words) {
    this.note.textContent = words; this.note.hidden = !words;
  }

  // --- time ---

  get single() { return this.strips || this.clip.still; }
  get frames() { return this.strips ? this.clip.shown : this.clip.still ? 1 : this.clip.frames; }
  get frame() { return this.single ? this.at ?? 0 : Math.min(this.frames - 1, Math.floor(this.media[0].node.currentTime * this.clip.fps + 0.01)); }

  seek(frame) {
    this.setPlaying(false);
    this.at = (frame + this.frames) % this.frames;
    if (this.single) this.refresh();
    else for (const { node } of this.media) node.currentTime = (this.at + 0.5) / this.clip.fps;
  }

  setPlaying(plays) {
    if (this.single) plays = false;
    const began = plays && !this.playing;
    this.playing = plays;
    this.play.textContent = plays ? "pause" : "play"; this.play.disabled = this.single;
    for (const { node, picture } of this.media) if (!picture) plays ? node.play().catch(() => this.setPlaying(false)) : node.pause();
    if (began) this.tick();
    else if (!plays && !this.single) this.together();
  }

  // Files are played side by side by the browser, which lets them drift apart.
  together() {
    const [first, ...rest] = this.media.map(one => one.node), most = Math.max(0.03, 0.5 / this.clip.fps);
    for (const other of rest) if (Math.abs(other.currentTime - first.currentTime) > most) other.currentTime = first.currentTime;
  }

  tick() {
    if (!this.node.open || !this.playing) return;
    requestAnimationFrame(() => this.tick());
    this.together();
    this.refresh();
  }

  // Draw what there is, if all of it is of one frame; what is still on its way calls again when it arrives.
  refresh() {
    if (this.media.every(({ node, picture }) => picture ? node.naturalWidth : node.readyState >= 2 && (this.playing || !node.seeking))) this.draw();
  }

  stop() {
    this.playing = false; this.at = 0;
    for (const { node, picture } of this.media ?? []) { node.onerror = null; if (!picture) node.pause(); node.removeAttribute("src"); }
  }

  // --- pictures ---

  set(change) {
    Object.assign(this, change);
    this.pick.show(this.view); this.grounds.show(this.view === "cut" ? this.ground : null);
    for (const button of this.grounds.node.children) button.disabled = this.view !== "cut";
    this.refresh();
  }

  draw() {
    const { node } = this.media[0], frames = this.frames;
    const height = this.strips ? node.naturalHeight : node.videoHeight || node.naturalHeight;
    const width = this.strips ? Math.round((node.naturalWidth + STRIP_GAP) / frames) - STRIP_GAP : node.videoWidth || node.naturalWidth;
    for (const paint of [this.screen.getContext("2d"), ...Object.values(this.layers)]) if (paint.canvas.width !== width || paint.canvas.height !== height) { paint.canvas.width = width; paint.canvas.height = height; }
    this.screen.style.imageRendering = this.stage.clientWidth > 2 * width ? "pixelated" : "auto";
    const paint = this.screen.getContext("2d");
    if (["cut", "fringe", "alpha"].includes(this.view)) this.layer();
    if (this.view === "cut") this.over(paint, this.paintGround);
    else if (this.view === "fringe") this.fringe(paint);
    else if (this.view === "alpha") blend(paint, "source-over", this.layers.matte.canvas);
    else { blend(paint, "source-over", "#000"); this.paintFile(paint, this.view); }
    this.slider.max = frames - 1; this.slider.value = this.frame;
    this.count.replaceChildren(el("span", {}, "frame "), `${this.frame + 1} of ${frames}`);
    this.measure();
  }

  paintFile(paint, name) {
    const { node } = this.media.find(one => one.name === name), { width, height } = paint.canvas;
    if (this.strips) paint.drawImage(node, this.frame * (width + STRIP_GAP), 0, width, height, 0, 0, width, height);
    else paint.drawImage(node, 0, 0, width, height);
  }

  // The matte, its inverse, and the colour times the matte, each on black.
  layer() {
    const { matte, inverse, cut } = this.layers, color = this.media[0].name;
    blend(cut, "copy", "#000");
    this.paintFile(cut, color);
    if (this.clip.inside && !this.strips) {
      matte.clearRect(0, 0, matte.canvas.width, matte.canvas.height);
      this.paintFile(matte, color);
      blend(matte, "source-in", "#fff");
      blend(matte, "destination-over", "#000");
    } else {
      blend(matte, "copy", "#000");
      this.paintFile(matte, this.clip.alpha);
      blend(cut, "multiply", matte.canvas);
    }
    blend(inverse, "copy", "#fff");
    blend(inverse, "difference", matte.canvas);
  }

  over(paint, ground) {
    ground.call(this, paint);
    blend(paint, "multiply", this.layers.inverse.canvas);
    blend(paint, "lighter", this.layers.cut.canvas);
  }

  // The edge, where alpha is neither 0 nor 1, over the colour that differs most from it; all else is dimmed.
  fringe(paint) {
    const { matte, inverse, edge, wide } = this.layers, { width, height } = edge.canvas;
    this.plateColor ??= this.contrast();
    blend(edge, "copy", matte.canvas);
    blend(edge, "multiply", inverse.canvas);
    for (let i = 0; i < 2; i++) blend(edge, "lighter", edge.canvas); // a(1 - a) is a quarter at most
    blend(edge, "multiply", edge.canvas); // and what is all but clear or solid is no edge
    blend(wide, "copy", "#000");
    wide.globalCompositeOperation = "lighten";
    for (let y = -EDGE_REACH; y <= EDGE_REACH; y++) for (let x = -EDGE_REACH; x <= EDGE_REACH; x++) wide.drawImage(edge.canvas, x, y);
    wide.globalCompositeOperation = "source-over";
    for (let i = 0; i < 4; i++) blend(wide, "lighter", wide.canvas);
    blend(edge, "copy", "#fff");
    blend(edge, "difference", wide.canvas); // what is no edge
    this.over(paint, () => blend(paint, "copy", this.plateColor));
    blend(wide, "multiply", paint.canvas);
    blend(paint, "multiply", "#383838");
    blend(paint, "multiply", edge.canvas);
    paint.globalCompositeOperation = "lighter";
    paint.drawImage(wide.canvas, 0, 0, width, height);
    paint.globalCompositeOperation = "source-over";
  }

  contrast() {
    const cut = pixels(this.layers.cut.canvas), matte = pixels(this.layers.matte.canvas), sums = [0, 0, 0];
    let alpha = 0;
    for (let i = 0; cut && i < matte.length; i += 4) {
      if (matte[i] < 9 || matte[i] > 246) continue;
      alpha += matte[i];
      for (let c = 0; c < 3; c++) sums[c] += cut[i + c];
    }
    return alpha ? `rgb(${sums.map(sum => sum / alpha < 0.5 ? 255 : 0).join(" ")})` : "#f0f";
  }

  paintGround(paint) {
    const { width, height } = paint.canvas, side = Math.max(4, Math.round(Math.min(width, height) / 24));
    if (this.ground !== "checker" && this.ground !== "plate") { blend(paint, "copy", this.ground === "white" ? "#fff" : "#000"); return; }
    if (this.ground === "plate") { this.paintPlate(paint, width, height); return; }
    blend(paint, "copy", "#ccc");
    paint.fillStyle = "#999";
    for (let y = 0; y * side < height; y++) for (let x = y % 2; x * side < width; x += 2) paint.fillRect(x * side, y * side, side, side);
  }

  // A scene with light and dark, warm and cold, soft and hard parts; or the picture that the user gave.
  paintPlate(paint, width, height) {
    if (this.plate) {
      const scale = Math.max(width / this.plate.width, height / this.plate.height), wide = this.plate.width * scale, tall = this.plate.height * scale;
      paint.drawImage(this.plate, (width - wide) / 2, (height - tall) / 2, wide, tall);
      return;
    }
    const sky = paint.createLinearGradient(0, 0, 0, height);
    for (const [at, color] of [[0, "#1d3f6e"], [0.45, "#7fa3b8"], [0.62, "#f2c28a"], [0.66, "#3c4a33"], [1, "#12160f"]]) sky.addColorStop(at, color);
    paint.fillStyle = sky; paint.fillRect(0, 0, width, height);
    [[0.06, 0.3], [0.2, 0.46], [0.31, 0.2], [0.52, 0.5], [0.68, 0.36], [0.84, 0.15]].forEach(([x, top], i) => {
      paint.fillStyle = ["#2b2f3a", "#59606b", "#8c7463"][i % 3];
      paint.fillRect(x * width, top * height, 0.11 * width, (0.68 - top) * height);
    });
  }

  takePlate() {
    const [file] = this.own.files;
    if (!file) return;
    createImageBitmap(file).then(plate => this.set({ plate, ground: "plate", view: "cut" }), () => this.tell(`${file.name} is no picture that this browser reads`));
  }

  zoom() {
    this.stage.classList.toggle("whole");
  }

  // --- the histogram ---

  measure() {
    const whole = this.clip.histogram, now = performance.now();
    if (!this.histogram.isConnected || (this.playing && now - this.readAt < 250)) return;
    this.readAt = now;
    if (!["cut", "fringe", "alpha"].includes(this.view)) this.layer();
    const levels = pixels(this.layers.matte.canvas), counts = levels ? new Array(BINS).fill(0) : null;
    if (levels) for (let i = 0; i < levels.length; i += 4) counts[levels[i] >> 2]++;
    const total = (levels?.length ?? 0) / 4, own = counts?.map(count => count / total);
    const shown = own ?? whole;
    this.histogram.hidden = !shown;
    if (!shown) return;
    const paint = this.chart.getContext("2d"), { width, height } = this.chart, step = width / BINS, tall = share => Math.sqrt(share) * (height - 4);
    paint.clearRect(0, 0, width, height);
    paint.fillStyle = own ? "#7ea2ff" : "#7d8187";
    shown.forEach((share, i) => share && paint.fillRect(i * step, height - Math.max(2, tall(share)), step - 1, height));
    paint.fillStyle = "#f0b35a";
    if (own && whole) whole.forEach((share, i) => share && paint.fillRect(i * step, height - Math.max(2, tall(share)), step - 1, 3));
    const say = share => `${share > 0 && share < 0.01 ? "<1" : Math.round(share * 100)} %`, partly = shown.slice(1, -1).reduce((a, b) => a + b, 0);
    const words = [`clear ${say(shown[0])}`, `partly ${say(partly)}`, `solid ${say(shown.at(-1))}`];
    this.chart.setAttribute("aria-label", `Histogram of alpha: ${words.join(", ")}`);
    this.shares.replaceChildren(words.join(" · "), el("br"), own ? whole ? "alpha of this frame; orange: whole clip" : "alpha of this frame" : "alpha of the whole clip");
  }

  // --- keys ---

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const does = {
      " ": () => this.setPlaying(!this.playing), ArrowLeft: () => this.seek(this.frame - 1), ArrowRight: () => this.seek(this.frame + 1),
      ArrowUp: () => this.next(-1), ArrowDown: () => this.next(1), Home: () => this.seek(0), End: () => this.seek(this.frames - 1),
      b: () => this.set({ view: this.options[0], ground: GROUNDS[(GROUNDS.indexOf(this.ground) + 1) % GROUNDS.length] }), z: () => this.zoom(),
    }[event.key] ?? (this.options[Number(event.key) - 1] ? () => this.set({ view: this.options[Number(event.key) - 1] }) : null);
    if (!does) return;
    event.preventDefault();
    does();
  }
}

let player = null;

function openPlayer(clips, index) {
  player ??= new Player();
  player.open(clips, index);
}
