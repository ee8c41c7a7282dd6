// As policy_losses.py: group_advantage, clipped, aggregate, divisor, overlong_penalty.

function advantages(rewards, byStd) {
  const middle = sum(rewards) / rewards.length;
  if (rewards.every((r) => r === rewards[0])) return rewards.map(() => 0);
  const spread = Math.sqrt(sum(rewards.map((r) => (r - middle) ** 2)) / rewards.length);
  return rewards.map((r) => (byStd ? (r - middle) / (spread + 1e-6) : r - middle));
}

function overlongPenalty(length, limit, soft) {
  if (soft === 0 || length <= limit - soft) return 0;
  return Math.max(-1, (limit - soft - length) / soft);
}

// All tokens of a completion have one ratio, so a sequence's ratio is its tokens'.
function pushOf({ low, high, aggregation, by_std }, rewards, lengths, ratios, limit) {
  const advantage = advantages(rewards, by_std);
  const clipped = advantage.map((A, i) => (A > 0 && ratios[i] > 1 + high) || (A < 0 && ratios[i] < 1 - low));
  const divisor = { tokens: sum(lengths), sequences: lengths.length, budget: lengths.length * limit }[aggregation];
  const push = advantage.map((A, i) => {
    const share = aggregation === "sequences" ? 1 / lengths[i] : 1;
    return clipped[i] ? 0 : (ratios[i] * A * share) / divisor;
  });
  return { advantage, clipped, divisor, push };
}

function compute({ rewards, lengths, ratios, overlong }, data) {
  const penalties = lengths.map((n) => overlongPenalty(n, data.limit, overlong ? data.soft : 0));
  const shaped = rewards.map((r, i) => r + penalties[i]);
  const algorithms = {};
  for (const [name, row] of Object.entries(data.algorithms)) {
    algorithms[name] = pushOf(row, name === "dapo" ? shaped : rewards, lengths, ratios, data.limit);
  }
  return { penalties, agrees: rewards.every((r) => r === rewards[0]), algorithms };
}

// ------------------------------------------------------------------------------- drawing

const NAMES = { grpo: "GRPO", dr_grpo: "Dr.GRPO", dapo: "DAPO", gspo: "GSPO" };
const answers = (given) => range(given.rewards.length);

function bar(value, largest) {
  const width = largest ? (58 * Math.abs(value)) / largest : 0;
  const place = { x: value < 0 ? 60 - width : 60, y: 3, width, height: 8, class: "cell " + (value < 0 ? "bad" : "good") };
  const middle = shape("line", { x1: 60, y1: 0, x2: 60, y2: 14 });
  return drawing(120, 14, "push", fixed(value, 4), middle, shape("rect", place));
}

function draw(given, numbers, data) {
  const { grpo, dr_grpo } = numbers.algorithms;
  const middle = sum(given.rewards) / given.rewards.length;
  const spread = Math.sqrt(sum(given.rewards.map((r) => (r - middle) ** 2)) / given.rewards.length);
  put(
    "advantages",
    table(
      ["", ["reward", "r"], ["r − mean (Dr.GRPO)", "r"], ["(r − mean) / std", "r"]],
      answers(given).map((i) => [
        `answer ${i + 1}`,
        [short(given.rewards[i]), "r"],
        [fixed(dr_grpo.advantage[i], 2), "r"],
        [fixed(grpo.advantage[i], 2), "r kept"],
      ]),
    ),
    byHand(
      `mean = (${given.rewards.map(short).join(" + ")}) / ${given.rewards.length} = *${fixed(middle, 2)}*, std = *${fixed(spread)}*`,
      numbers.agrees ? "All agree: every advantage is exactly 0, and the group teaches nothing." : "",
    ),
  );
  drawClips(given, numbers, data);
  drawPushes(given, numbers);
  drawChanges(given, numbers, data);
}

function drawClips(given, numbers, data) {
  const names = Object.keys(data.algorithms);
  const heads = ["", ["ratio", "r"], ...names.map((name) => {
    const { low, high } = data.algorithms[name];
    return `${NAMES[name]}: ${fixed(1 - low, 4).replace(/0+$/, "")} to ${fixed(1 + high, 4).replace(/0+$/, "")}`;
  })];
  const rows = answers(given).map((i) => [
    `answer ${i + 1}`,
    [fixed(given.ratios[i], 2), "r"],
    ...names.map((name) => {
      const { advantage, clipped } = numbers.algorithms[name];
      if (clipped[i]) return ["clipped", "bad"];
      return advantage[i] === 0 ? ["no advantage", "off"] : "kept";
    }),
  ]);
  put("clips", table(heads, rows));
}

function drawPushes(given, numbers) {
  const names = Object.keys(numbers.algorithms);
  const largest = Math.max(...names.flatMap((name) => numbers.algorithms[name].push.map(Math.abs)));
  const rows = answers(given).map((i) => [
    `answer ${i + 1} (${given.lengths[i]})`,
    ...names.map((name) => {
      const push = numbers.algorithms[name].push[i];
      return element("div", "", bar(push, largest), fixed(push, 4));
    }),
  ]);
  const { grpo, dapo } = numbers.algorithms;
  const at = Math.max(0, grpo.advantage.findIndex((A, i) => A !== 0 && !grpo.clipped[i]));
  put(
    "pushes",
    table(["a token of (tokens)", ...names.map((name) => NAMES[name])], rows),
    byHand(
      `GRPO, answer ${at + 1}: ratio × advantage / its length / answers = ` +
        `${fixed(given.ratios[at], 2)} × ${fixed(grpo.advantage[at], 2)} / ${given.lengths[at]} / ${grpo.divisor} = *${fixed(grpo.push[at], 4)}*`,
      `DAPO, answer ${at + 1}: ratio × advantage / tokens of all = ` +
        `${fixed(given.ratios[at], 2)} × ${fixed(dapo.advantage[at], 2)} / ${dapo.divisor} = *${fixed(dapo.clipped[at] ? 0 : dapo.push[at], 4)}*`,
    ),
  );
}

function drawChanges(given, numbers, data) {
  const { grpo, dapo } = numbers.algorithms;
  const freed = answers(given).filter((i) => grpo.clipped[i] && !dapo.clipped[i]);
  const list = (places) => places.map((i) => i + 1).join(", ") || "none here";
  put(
    "dapo",
    byHand(
      `clip-higher: up to ${short(1 + data.algorithms.dapo.high)} instead of ${short(1 + data.algorithms.grpo.high)}; kept by it, answers: *${list(freed)}*`,
      `token-level sum: every token is divided by *${dapo.divisor}*, so a long answer counts more as a whole; GRPO divides each answer by its own length first`,
      numbers.agrees
        ? "dynamic sampling: *this group agrees, and is replaced by another*"
        : "dynamic sampling: this group disagrees, so *it is used*",
      `soft overlong penalty (Eq. 13), added to the rewards: *${numbers.penalties.map((p) => fixed(p, 2)).join(", ")}*`,
    ),
  );
}
