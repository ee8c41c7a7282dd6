// As adalrs.py with rule="paper", for the first trial: clip_outliers, through_origin, fit_line, gain, _judge.

const NORMAL = 1.4826; // standard deviations of a normal distribution in its median deviation
const EQUAL = 1e-9; // relative: velocities that differ by less are equal

const mean = (values) => sum(values) / values.length;

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

// Minus the slope of a line by least squares.
function velocity(losses) {
  const x = losses.map((_, i) => i - (losses.length - 1) / 2);
  const middle = mean(losses);
  return -sum(losses.map((loss, i) => x[i] * (loss - middle))) / sum(x.map((a) => a * a));
}

// No loss further from the median of all than four (robust) standard deviations.
function clipOutliers(...runs) {
  const pool = runs.flat();
  const middle = median(pool);
  const reach = 4 * NORMAL * median(pool.map((loss) => Math.abs(loss - middle)));
  return runs.map((run) => run.map((loss) => Math.min(Math.max(loss, middle - reach), middle + reach)));
}

// How much faster the trial fell, and the error of that: the slope of the difference through the origin.
function gain(control, trial) {
  const [a, b] = clipOutliers(control, trial);
  const ahead = a.map((loss, i) => loss - b[i]);
  const spread = sum(ahead.map((_, i) => i * i));
  const slope = sum(ahead.map((value, i) => i * value)) / spread;
  const squares = sum(ahead.map((value, i) => (value - slope * i) ** 2));
  return [slope, Math.sqrt(squares / (ahead.length - 1) / spread)];
}

// Losses of k steps from the start; `draws` says where each step's data lies. `limit`: a loss above it is the last.
function descend(rate, noise, draws, start, limit = Infinity) {
  let weight = start;
  const losses = [];
  for (const draw of draws) {
    const target = noise * draw;
    losses.push((weight - target) ** 2 / 2);
    if (losses.at(-1) > limit) break;
    weight -= rate * (weight - target);
  }
  return losses;
}

const gcd = (a, b) => (b ? gcd(b, a % b) : a);

function compute({ exponent, noise, up, down }, { k, start, draws }) {
  if (gcd(up, down) !== 1) {
    throw new Refused(`Eq. 1 wants a and b without a common factor, so that more rates can be reached: not ${up} and ${down}.`);
  }
  const rate = 10 ** exponent;
  const control = descend(rate, noise, draws.slice(0, k), start);
  const highest = Math.max(...control);
  const trial = descend(up * rate, noise, draws.slice(k), start, highest);
  const before = velocity(control);
  if (trial.at(-1) > highest) {
    return { control, trial, action: "abort", before, after: null, error: null, rate: rate / down };
  }

  const [faster, error] = gain(control, trial);
  const doubt = 2 * error + EQUAL * Math.abs(before);
  const action = faster > doubt ? "up" : faster < -doubt ? "down" : "stay";
  const factor = { up, down: 1 / down, stay: 1 }[action];
  return { control, trial, action, before, after: before + faster, error, rate: rate * factor };
}

// ------------------------------------------------------------------------------- drawing

const WIDTH = 560;
const HEIGHT = 200;

function curve(losses, at, cls) {
  const points = losses.map((loss, i) => at(i, loss).map((n) => n.toFixed(1)).join(","));
  const dots = losses.map((loss, i) => {
    const [x, y] = at(i, loss);
    return shape("circle", { cx: x, cy: y, r: 2.6, class: "cell " + cls });
  });
  return [shape("polyline", { points: points.join(" "), class: cls }), ...dots];
}

function raceChart(numbers, k) {
  const all = [...numbers.control, ...numbers.trial];
  const top = Math.min(Math.max(...all), 1.5 * Math.max(...numbers.control)) || 1;
  const at = (step, loss) => [40 + ((WIDTH - 50) * step) / (k - 1), 10 + (HEIGHT - 40) * (1 - Math.min(loss / top, 1.05))];
  const marks = [0, top / 2, top].flatMap((value) => {
    const y = at(0, value)[1];
    return [
      shape("line", { x1: 40, y1: y, x2: WIDTH - 10, y2: y }),
      shape("text", { x: 34, y: y + 4, class: "tick e" }, short(value)),
    ];
  });
  const steps = range(k).map((i) => shape("text", { x: at(i, 0)[0], y: HEIGHT - 10, class: "tick m" }, String(i + 1)));
  const curves = [...curve(numbers.control, at, "kind0"), ...curve(numbers.trial, at, "kind1")];
  return drawing(WIDTH, HEIGHT, "chart", "loss of control and trial", ...marks, ...steps, ...curves);
}

function gainChart(rate, raised) {
  const gained = (r) => r - (r * r) / 2;
  const at = (r) => [30 + (WIDTH - 60) * Math.min(r / 2.3, 1), 84 - 120 * Math.max(gained(r), -0.45)];
  const points = range(76).map((i) => at((2.3 * i) / 75).map((n) => n.toFixed(1)).join(","));
  const [zero] = at(0);
  const parts = [
    shape("line", { x1: zero, y1: 84, x2: WIDTH - 30, y2: 84 }),
    shape("polyline", { points: points.join(" "), class: "fixed" }),
  ];
  [0, 1, 2].forEach((r) => parts.push(shape("text", { x: at(r)[0], y: 100, class: "tick m" }, String(r))));
  [[rate, "kind0"], [raised, "kind1"]].forEach(([r, cls]) => {
    const [x, y] = at(r);
    parts.push(shape("circle", { cx: x, cy: y, r: 5, class: "cell " + cls }, shape("title", {}, short(r))));
  });
  return drawing(WIDTH, 156, "chart", "what a step gains, by its rate", ...parts);
}

const VERDICTS = {
  up: "Faster beyond doubt: the raise is kept.",
  stay: "No clear difference: weights and optimizer go back, the rate stays.",
  down: "Slower beyond doubt: weights and optimizer go back, and the rate is lowered.",
  abort: "The loss rose above all that was seen: back at once, and the rate is lowered.",
};

function draw(given, numbers, data) {
  const rate = 10 ** given.exponent;
  const raised = given.up * rate;
  put(
    "race",
    raceChart(numbers, data.k),
    byHand(`rates: ${short(rate)} and ${given.up} × ${short(rate)} = *${short(raised)}*; both begin at w = ${data.start}`),
  );
  const lines = [`velocity at the present rate, minus the slope of its losses: *${short(numbers.before)}* a step`];
  if (numbers.after !== null) {
    const faster = numbers.after - numbers.before;
    lines.push(
      `how much faster the trial fell, the slope of (control − trial) through 0: *${short(faster)}*, error e = ${short(numbers.error)}`,
      `is ${short(faster)} above 2e = ${short(2 * numbers.error)}, or below −2e?`,
    );
  } else {
    lines.push(`trial loss ${short(numbers.trial.at(-1))} > ${short(Math.max(...numbers.control))}, the highest so far, after ${numbers.trial.length} steps`);
  }
  lines.push(`the rate goes on at *${short(numbers.rate)}*`);
  const sign = { up: "good", stay: "soft", down: "bad", abort: "bad" }[numbers.action];
  put("verdict", element("p", "verdict " + sign, VERDICTS[numbers.action]), byHand(...lines));
  put("theory", gainChart(rate, raised), byHand("gain of one step = rate · g² − rate² · g² / 2, with g the gradient and a curvature of 1"));
}
