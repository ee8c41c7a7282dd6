// As packing.py (Rows, choose_subset, laid_out) and attention.py (packed_attention), for three documents without
// pictures.

const APART = 100;
const PAD = -1;

// Places in `sizes` of the set that fills `room` best: packing.choose_subset without vision.
function bestSet(sizes, room) {
  let reach = new Set([0]);
  const history = [reach];
  for (const size of sizes) {
    const more = [...reach].map((total) => total + size).filter((total) => total <= room);
    reach = new Set([...reach, ...more]);
    history.push(reach);
    if (reach.has(room)) break;
  }
  // walk back: what is not reachable without a document has it
  let left = Math.max(...reach);
  const chosen = [];
  for (let i = history.length - 2; i >= 0; i--) {
    if (history[i].has(left)) continue;
    chosen.push(i);
    left -= sizes[i];
  }
  return chosen;
}

// Rows of numbers of documents: packing.Rows.
function fillRows(sizes, capacity) {
  let waiting = range(sizes.length);
  const rows = [];
  while (waiting.length) {
    const row = [];
    const room = () => capacity - sum(row.map((d) => sizes[d]));
    const take = (documents) => {
      row.push(...documents);
      waiting = waiting.filter((d) => !documents.includes(d));
      return waiting.filter((d) => sizes[d] <= room());
    };
    // the oldest; the largest, if no two of its size share a row; the best of the others
    let fits = take([waiting[0]]);
    const largest = fits.reduce((best, d) => (best === null || sizes[d] > sizes[best] ? d : best), null);
    if (largest !== null && 2 * sizes[largest] > capacity) fits = take([largest]);
    const chosen = bestSet(fits.map((d) => sizes[d]), room());
    take(chosen.map((i) => fits[i]));
    rows.push(row);
  }
  return rows;
}

function compute({ sizes, capacity }) {
  const long = sizes.findIndex((size) => size > capacity);
  if (long >= 0) {
    throw new Refused(`Document ${"ABC"[long]} has ${sizes[long]} tokens and does not fit in a row of ${capacity}.`);
  }
  const rows = fillRows(sizes, capacity);
  const ids = [];
  const positions = [];
  const labels = [];
  const cu = [0];
  for (const row of rows) {
    // documents one after another, then padding
    const blocks = row.map((d) => range(sizes[d]).map((p) => APART * d + p));
    const empty = capacity - sum(row.map((d) => sizes[d]));
    if (empty) blocks.push(Array(empty).fill(PAD));
    ids.push(blocks.flat());
    positions.push(blocks.flatMap((block) => block.map((_, p) => p)));
    labels.push(blocks.flatMap((block) => block.map((id, p) => (id === PAD ? -100 : (block[p + 1] ?? -100)))));
    for (const block of blocks) cu.push(cu.at(-1) + block.length);
  }
  const total = sum(sizes);
  return {
    rows,
    ids,
    positions,
    labels,
    cu,
    filled: total / (rows.length * capacity),
    alone: total / (sizes.length * capacity),
    weights: weightsInside(cu),
  };
}

// Equal shares of a position's own document up to itself.
function weightsInside(cu) {
  const weights = range(cu.at(-1)).map(() => Array(cu.at(-1)).fill(0));
  cu.slice(1).forEach((end, d) => {
    for (let i = cu[d]; i < end; i++) {
      for (let j = cu[d]; j <= i; j++) weights[i][j] = 1 / (i - cu[d] + 1);
    }
  });
  return weights;
}

// ------------------------------------------------------------------------------- drawing

const tokenName = (id) => (id < 0 ? "·" : "ABC"[Math.floor(id / APART)] + (id % APART));
const kindOf = (id) => (id < 0 ? "none" : "kind" + Math.floor(id / APART));

function rowTable(numbers, row) {
  const cells = (title, values, text) => [
    title,
    ...values.map((value, i) => [text(value), kindOf(numbers.ids[row][i])]),
  ];
  const made = table(
    [`row ${row}`, ...numbers.ids[row].map(() => "")],
    [
      cells("token", numbers.ids[row], tokenName),
      cells("position", numbers.positions[row], String),
      cells("asked for", numbers.labels[row], (label) => (label < 0 ? "–" : tokenName(label))),
    ],
  );
  made.classList.add("of-tokens");
  return made;
}

function matrix(numbers, row) {
  const names = numbers.ids[row];
  const T = names.length;
  const size = 200 / T;
  const parts = [];
  for (let i = 0; i < T; i++) {
    parts.push(shape("text", { x: 12, y: 26 + size * (i + 0.65), "text-anchor": "middle" }, tokenName(names[i])));
    parts.push(shape("text", { x: 24 + size * (i + 0.5), y: 18, "text-anchor": "middle" }, tokenName(names[i])));
    for (let j = 0; j < T; j++) {
      const weight = numbers.weights[row * T + i][row * T + j];
      const box = { x: 24 + size * j, y: 24 + size * i, width: size - 1.5, height: size - 1.5, rx: 2 };
      const cls = weight ? kindOf(names[i]) : "none";
      const cell = shape("rect", { ...box, class: "cell " + cls, opacity: weight ? 0.3 + 0.7 * weight : 0.35 });
      cell.append(shape("title", {}, `${tokenName(names[i])} takes ${fixed(weight, 2)} from ${tokenName(names[j])}`));
      parts.push(cell);
    }
  }
  return drawing(226, 226, "matrix", `attention in row ${row}`, ...parts);
}

function draw(given, numbers) {
  const rows = range(numbers.rows.length);
  const total = sum(given.sizes);
  put(
    "packed",
    ...rows.map((row) => rowTable(numbers, row)),
    byHand(
      `packed: ${total} tokens on ${rows.length} × ${given.capacity} places = *${percent(numbers.filled)} full*`,
      `a row for each document: ${total} tokens on ${given.sizes.length} × ${given.capacity} places = ${percent(numbers.alone)} full`,
    ),
  );
  const lengths = numbers.cu.slice(1).map((end, i) => end - numbers.cu[i]);
  put(
    "borders",
    byHand(`lengths ${lengths.join(", ")}`, `running sum *${numbers.cu.join(", ")}*`),
  );
  const looks = sum(lengths.map((n) => (n * (n + 1)) / 2));
  const whole = rows.length * (given.capacity * (given.capacity + 1)) / 2;
  put(
    "attention",
    element("div", "side", ...rows.map((row) => matrix(numbers, row))),
    byHand(`looks: ${lengths.map((n) => `${n}·${n + 1}/2`).join(" + ")} = *${looks}*, without borders ${whole}`),
  );
}
