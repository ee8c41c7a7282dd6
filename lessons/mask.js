// As tokenizer.py (encode, render) and data/encode.py (with_thinking, Encoder), without a system prompt.

const SPLIT =
  /'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+/gu;

const rankTables = new WeakMap();

// Bytes as a key -> id of the token.
function ranksOf(data) {
  if (!rankTables.has(data)) rankTables.set(data, new Map(data.tokens.map((bytes, id) => [bytes.join(), id])));
  return rankTables.get(data);
}

const idOf = (name, data) => data.tokens.length + data.added.indexOf(name);

// Byte-pair encoding: of all neighbours the pair with the lowest rank becomes one, again and again.
function encodeWord(word, ranks) {
  let parts = [...new TextEncoder().encode(word)].map((byte) => [byte]);
  const whole = ranks.get(parts.flat().join());
  if (whole !== undefined) return [whole];
  for (;;) {
    let best = null;
    for (let i = 0; i + 1 < parts.length; i++) {
      const rank = ranks.get([...parts[i], ...parts[i + 1]].join());
      if (rank !== undefined && (best === null || rank < best.rank)) best = { rank, i };
    }
    if (best === null) return parts.map((part) => ranks.get(part.join()));
    parts.splice(best.i, 2, [...parts[best.i], ...parts[best.i + 1]]);
  }
}

const encode = (text, data) => (text.match(SPLIT) ?? []).flatMap((word) => encodeWord(word, ranksOf(data)));

// Question, chain and answer as they stand in the conversation; asked to think, the answer becomes a box.
function conversation(given, data) {
  const answer = given.answer.trim();
  if (!given.think) return { question: given.question, chain: null, said: given.answer };
  if (/<\/?think>/.test(answer)) throw new Refused("The chain of thought has a box of its own: leave its marks out of the answer.");
  if (!answer) throw new Refused("Asked to think, there must be an answer to put into the box.");
  const said = answer.includes("\\boxed{") ? answer : `\\boxed{${answer}}`;
  return { question: `${given.question} ${data.think}`, chain: given.chain, said };
}

function render(given, data) {
  const { question, chain, said } = conversation(given, data);
  const ids = [];
  const supervised = [];
  const put = (piece, learn = false) => {
    ids.push(...piece);
    supervised.push(...piece.map(() => learn));
  };
  const special = (name) => idOf(name, data);
  put([special("<|im_start|>"), ...encode("user\n", data)]);
  for (let i = 0; i < given.pictures; i++) {
    put([special("<img>"), ...Array(data.visual).fill(special("<IMG_CONTEXT>")), special("</img>")]);
  }
  put(encode((given.pictures ? "\n" : "") + question, data));
  put([special("<|im_end|>")]);
  put([special("<|im_start|>"), ...encode("assistant\n", data)]);
  if (chain !== null) put([special("<think>"), ...encode(chain, data), special("</think>")], true);
  put([...encode(said, data), special("<|im_end|>")], true);
  return { ids, supervised };
}

function compute(given, data) {
  const { ids, supervised } = render(given, data);
  const visual = ["<img>", "</img>", "<IMG_CONTEXT>"].map((name) => idOf(name, data));
  const learn = given.everything ? ids.map((id) => !visual.includes(id)) : supervised;
  const labels = ids.map((_, t) => (learn[t + 1] ? ids[t + 1] : -100));
  const n = labels.filter((label) => label >= 0).length;
  const weight = { sample: 1 / n, sqrt: n ** -0.5 }[given.weighting] ?? 1;
  return { ids, labels, weights: labels.map((label) => (label >= 0 ? weight : 0)) };
}

// ------------------------------------------------------------------------------- drawing

function tokenText(id, data) {
  if (id >= data.tokens.length) return data.added[id - data.tokens.length];
  const text = new TextDecoder().decode(new Uint8Array(data.tokens[id]));
  if (text.includes("\ufffd")) return data.tokens[id].map((byte) => byte.toString(16)).join(" ");
  return text.replaceAll(" ", "·").replaceAll("\n", "⏎");
}

function draw(given, numbers, data) {
  const { ids, labels, weights } = numbers;
  const chips = ids.map((id, t) => {
    const learned = t > 0 && labels[t - 1] >= 0;
    const special = id >= data.tokens.length;
    const seen = id === idOf("<IMG_CONTEXT>", data);
    const chip = element("span", learned ? "learned" : seen ? "seen" : special ? "control" : "", tokenText(id, data));
    chip.title = `place ${t}, id ${id}`;
    return chip;
  });
  const learnedCount = labels.filter((label) => label >= 0).length;
  put(
    "chips",
    element("div", "chips", ...chips),
    byHand(`${ids.length} tokens are read, *${learnedCount}* are learned; their weights sum to *${fixed(sum(weights), 2)}*`),
  );
  const rows = ids.map((id, t) => [
    [String(t), "r off"],
    [String(id), "r off"],
    tokenText(id, data),
    labels[t] < 0 ? ["–100", "off"] : [tokenText(labels[t], data), "good"],
    labels[t] < 0 ? ["", ""] : [fixed(weights[t], 3), "r"],
  ]);
  put("asked", table([["place", "r"], ["id", "r"], "token", "asked for", ["weight", "r"]], rows));
}
