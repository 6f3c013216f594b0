// The live cache as a picture: little squares, each standing for some cells, in the order of the prefix tree. What several
// conversations hold stands out; what is one's own has that one's colour; what nobody runs on fades as it gets older.

const GAP = 2;

/** Who the prefixes belong to, from rows of the snapshot: Map number -> node with children, owner, depth. */
export function treeOf(snapshot) {
  const nodes = new Map();
  const roots = [];
  for (const [number, parent, namespace, start, tokens, holders, running, idle, hits, replica] of snapshot.prefixes) {
    const node = { number, parent: nodes.get(parent), namespace, start, tokens, holders, running, idle, hits, replica, children: [], ends: [], owner: null };
    nodes.set(number, node);
    (node.parent ? node.parent.children : roots).push(node);
  }
  for (const sequence of snapshot.sequences) nodes.get(sequence[5])?.ends.push(sequence[0]);
  // parents come before children, so backwards every node has heard of its owner before its parent asks
  for (const node of [...nodes.values()].reverse()) {
    node.owner = Math.min(node.owner ?? Infinity, ...node.ends);
    if (node.parent) node.parent.owner = Math.min(node.parent.owner ?? Infinity, node.owner);
  }
  const byAge = (a, b) => a.number - b.number;
  // of several servers, seen from their ingress, one tree beside the other
  roots.sort((a, b) => (a.replica ?? "").localeCompare(b.replica ?? "", "en", { numeric: true }) || byAge(a, b));
  for (const node of nodes.values()) node.children.sort(byAge);
  return { nodes, roots };
}

/** The sequences that hold a node: those that end in it or below. */
export function holdersOf(node) {
  return [...node.ends, ...node.children.flatMap(holdersOf)].sort((a, b) => a - b);
}

/** The first of the sequences that hold a node: it gives the colour. */
export const ownerOf = (node) => (Number.isFinite(node.owner) ? node.owner : 0);

/** [{tokens, node | sequence, ...}], what to paint in which order. Private copies (streams) are painted by sequence. */
function segments(snapshot, tree) {
  const out = [];
  if (snapshot.pool.layout === "unified") {
    const walk = (node) => {
      out.push({ tokens: node.tokens, node, owner: ownerOf(node), holders: node.holders, running: node.running, idle: node.idle });
      node.children.forEach(walk);
    };
    tree.roots.forEach(walk);
  } else {
    for (const [sequence, state, tokens, , idle, prefix] of snapshot.sequences) {
      out.push({ tokens, node: tree.nodes.get(prefix), owner: sequence, holders: 1, running: state === "idle" ? 0 : 1, idle });
    }
  }
  const drawn = out.reduce((sum, segment) => sum + segment.tokens, 0);
  const rest = snapshot.pool.used_cells - drawn;
  if (rest > 0) out.push({ tokens: rest, owner: null, holders: 0, running: 0, idle: 0 });
  return out;
}

export class PoolPicture {
  #canvas;
  #targets = [];
  #shown = [];
  #columns = 1;
  #size = 10;
  #frame = 0;
  #calm = matchMedia("(prefers-reduced-motion: reduce)");
  #dark = matchMedia("(prefers-color-scheme: dark)");

  constructor(canvas) {
    this.#canvas = canvas;
    this.#dark.addEventListener("change", () => this.#animate());
  }

  /** Take over a snapshot; the squares that differ fade into their new colour. */
  update(snapshot, tree) {
    const width = this.#canvas.clientWidth || 600;
    this.#size = width < 500 ? 9 : 11;
    this.#columns = Math.max(1, Math.floor((width + GAP) / this.#size));
    const rows = width < 500 ? 22 : 16;
    const squares = Math.min(this.#columns * rows, snapshot.pool.cells);
    const each = snapshot.pool.cells / squares;
    const targets = new Array(squares).fill(null);
    let at = 0;
    for (const segment of segments(snapshot, tree)) {
      const end = at + segment.tokens;
      // a square belongs to whoever has its middle
      for (let k = Math.max(0, Math.ceil(at / each - 0.5)); k < squares && (k + 0.5) * each < end; k++) targets[k] = segment;
      at = end;
    }
    this.#targets = targets;
    this.cellsEach = each;
    const height = Math.ceil(squares / this.#columns) * this.#size;
    const ratio = devicePixelRatio || 1;
    if (this.#canvas.width !== Math.round(width * ratio) || this.#canvas.height !== Math.round(height * ratio)) {
      this.#canvas.width = Math.round(width * ratio);
      this.#canvas.height = Math.round(height * ratio);
      this.#canvas.style.height = `${height}px`;
      this.#shown = [];
    }
    this.#animate();
  }

  /** What is drawn at a point of the canvas; undefined for free cells. */
  at(x, y) {
    return this.#targets[Math.floor(y / this.#size) * this.#columns + Math.floor(x / this.#size)] ?? undefined;
  }

  /** Fade the squares whose colour is not the one they should have; the others are left alone. */
  #animate() {
    cancelAnimationFrame(this.#frame);
    const colours = new Map();
    for (const segment of this.#targets) if (!colours.has(segment)) colours.set(segment, this.#colour(segment));
    const goals = this.#targets.map((segment) => colours.get(segment));
    const fresh = this.#shown.length !== goals.length;
    if (fresh) this.#shown = goals.map((goal) => [...goal]);
    let moving = [...goals.keys()].filter((k) => fresh || goals[k].some((value, i) => value !== this.#shown[k][i]));
    const step = () => {
      moving = this.#paint(moving, goals);
      if (moving.length) this.#frame = requestAnimationFrame(step);
    };
    this.#frame = requestAnimationFrame(step);
  }

  /** One frame of the squares in `moving`; those that have not arrived. */
  #paint(moving, goals) {
    const context = this.#canvas.getContext("2d");
    const ratio = devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const side = this.#size - GAP;
    return moving.filter((k) => {
      const goal = goals[k];
      const shown = this.#shown[k];
      let arrived = true;
      for (let i = 0; i < 4; i++) {
        const gap = goal[i] - shown[i];
        const near = this.#calm.matches || Math.abs(gap) < (i === 3 ? 0.03 : 6);
        shown[i] = near ? goal[i] : shown[i] + gap * 0.25;
        arrived &&= near;
      }
      const x = (k % this.#columns) * this.#size;
      const y = Math.floor(k / this.#columns) * this.#size;
      context.clearRect(x, y, side, side);
      context.fillStyle = `rgb(${shown[0]} ${shown[1]} ${shown[2]} / ${shown[3]})`;
      context.fillRect(x, y, side, side);
      return !arrived;
    });
  }

  #colour(segment) {
    if (segment === null) return this.#dark.matches ? [255, 255, 255, 0.07] : [0, 30, 10, 0.07];
    if (segment.owner === null) return [128, 128, 128, 0.6];
    const fade = segment.running ? 1 : Math.max(0.28, 0.75 - segment.idle / 60);
    if (segment.holders > 1) return this.#dark.matches ? [250, 190, 70, fade] : [226, 142, 0, fade];
    return [...colourOf(segment.owner, this.#dark.matches), fade];
  }
}

/** A sequence's own colour, away from the amber of what is shared: greens, blues, violets. */
export function colourOf(sequence, dark) {
  const hue = 95 + ((sequence * 67.5) % 235);
  const [s, l] = dark ? [0.55, 0.62] : [0.55, 0.42];
  const channel = (n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (l - s * Math.min(l, 1 - l) * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [channel(0), channel(8), channel(4)];
}
