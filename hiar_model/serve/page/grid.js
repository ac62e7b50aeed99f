// The grid of steps and blocks: which tasks have run, which block is on the screen, where a prompt begins.

const SVG = "http://www.w3.org/2000/svg";
const CELL = 30, ROW = 24, LEFT = 44, TOP = 40;

function shape(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

export class Grid {
  // svg, text: the drawing and the words for those who do not see it. onBlock: called with the block of a click.
  constructor(svg, text, onBlock) {
    this.svg = svg;
    this.text = text;
    svg.addEventListener("click", (event) => {
      const block = event.target.dataset.block;
      if (block !== undefined) onBlock(Number(block));
    });
  }

  // steps; plan: groups of [kind, step, block] of the first blocks; block: the next to come, all before it are done.
  start(steps, plan, block) {
    this.steps = steps;
    const tasks = plan.flat();
    const blocks = 1 + Math.max(0, ...tasks.map(([, , n]) => n));
    const inner = Math.floor(blocks / 2); // a block away from both ends
    const stored = (n) => tasks.filter(([kind, , m]) => kind === "cache" && m === n).map(([, step]) => step);
    this.firstStored = new Set(stored(0));
    this.stored = new Set(stored(inner));
    this.denoised = Array(steps).fill(block - 1); // per step: the last block that has run
    this.cached = Array(steps).fill(block - 2);
    this.running = [];
    this.started = this.finished = block - 1;
  }

  // The last group of tasks; what it needs has run before it, even where the messages about it were left out.
  progress({ tasks, started, finished }) {
    for (const [kind, step, block] of tasks) {
      for (let s = 0; s <= step; s++) {
        this.denoised[s] = Math.max(this.denoised[s], block);
        this.cached[s] = Math.max(this.cached[s], kind === "cache" && s === step ? block : block - 1);
      }
    }
    this.running = tasks;
    this.started = started;
    this.finished = finished - 1;
  }

  // Back to a block: all from it on is to come.
  back(block) {
    this.denoised = this.denoised.map((n) => Math.min(n, block - 1));
    this.cached = this.cached.map((n) => Math.min(n, block - 1));
    this.running = [];
    this.started = this.finished = block - 1;
  }

  has(step, block) { return (block === 0 ? this.firstStored : this.stored).has(step); }

  state(kind, step, block) {
    if (this.running.some(([k, s, n]) => k === kind && s === step && n === block)) return "running";
    if (kind === "denoise") return this.denoised[step] >= block ? "done" : "wait";
    return this.cached[step] >= block ? "stored" : "wait";
  }

  // shown: block on the screen, or null; prompts: [{block, index}] rising; coming: block of a prompt that is not on the screen
  // yet, or null; total: blocks of the video, or null.
  draw({ shown, prompts, coming, total }) {
    if (this.steps === undefined) return;
    const columns = this.svg.clientWidth && this.svg.clientWidth < 420 ? 9 : 14;
    const newest = Math.max(this.started, coming ?? 0, shown ?? 0);
    const from = Math.max(0, Math.min((shown ?? newest) - 1, newest + 3 - columns));
    const blocks = Array.from({ length: columns }, (_, i) => from + i).filter((n) => total === null || n < total);
    const height = TOP + this.steps * ROW, parts = [];
    for (let s = 0; s < this.steps; s++) {
      parts.push(shape("text", { class: "row-name", x: LEFT - 6, y: TOP + s * ROW + 13 }, `step ${s}`));
    }
    for (const n of blocks) {
      const x = LEFT + (n - from) * CELL, middle = x + CELL / 2 - 1;
      const index = prompts.findLast((p) => p.block <= n)?.index ?? 0;
      parts.push(shape("text", { x: middle, y: 11 }, n));
      parts.push(shape("rect", { class: `band${index % 4}`, x, y: 16, width: CELL - 2, height: 14, rx: 2 }));
      parts.push(shape("text", { class: "band", x: middle, y: 27 }, index + 1));
      for (let s = 0; s < this.steps; s++) {
        const y = TOP + s * ROW;
        parts.push(shape("rect", { class: this.state("denoise", s, n), x, y, width: CELL - 2, height: 14, rx: 2 }));
        if (this.has(s, n)) {
          parts.push(shape("rect", { class: this.state("cache", s, n), x, y: y + 15, width: CELL - 2, height: 5, rx: 2 }));
        }
      }
      if (n === coming) parts.push(shape("line", { class: "coming", x1: x - 1, x2: x - 1, y1: 0, y2: height }));
      parts.push(shape("rect", { x, y: 0, width: CELL, height, fill: "transparent", "data-block": n }));
    }
    if (shown !== null) {
      const x = LEFT + (shown - from) * CELL - 2;
      parts.push(shape("rect", { class: "head", x, y: TOP - 4, width: CELL + 2, height: height - TOP + 2, rx: 3 }));
    }
    this.svg.setAttribute("viewBox", `0 0 ${LEFT + columns * CELL} ${height + 2}`);
    this.svg.replaceChildren(...parts);
    const flight = this.started > this.finished ? `, blocks ${this.finished + 1} to ${this.started} in flight` : "";
    const next = coming === null ? "" : `; a new prompt begins at block ${coming}`;
    const text = `${shown === null ? "No block" : `Block ${shown}`} on the screen, ${this.finished + 1} blocks finished${flight}, ${this.steps} steps${next}.`;
    if (this.text.textContent !== text) this.text.textContent = text;
  }
}
