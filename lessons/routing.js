// As moe.py: route, tokens_per_expert, balance_loss, entropy, z_loss.

function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - largest));
  return powers.map((power) => power / sum(powers));
}

const logSumExp = (logits) => Math.log(sum(logits.map(Math.exp)));

function compute({ logits, k, normalise }) {
  if (k === 1 && normalise) {
    throw new Refused(
      "One expert whose weight is divided by itself has weight 1, whatever the router says: the router would learn " +
        "nothing from the task. Take two experts, or leave the weights as they are.",
    );
  }
  const S = logits.length;
  const E = logits[0].length;
  const probabilities = logits.map(softmax);
  const chosen = probabilities.map((p) => {
    const order = range(E).sort((a, b) => p[b] - p[a]);
    return order.slice(0, k);
  });
  const weights = chosen.map((experts, s) => {
    const kept = experts.map((e) => probabilities[s][e]);
    return normalise ? kept.map((p) => p / sum(kept)) : kept;
  });

  const counts = range(E).map((e) => chosen.flat().filter((other) => other === e).length);
  const f = counts.map((count) => count / S);
  const P = range(E).map((e) => sum(probabilities.map((p) => p[e])) / S);
  const shares = counts.map((count) => count / sum(counts));
  return {
    probabilities,
    chosen,
    weights,
    counts,
    f,
    P,
    balance: E * sum(f.map((value, e) => value * P[e])),
    entropy: -sum(shares.map((share) => (share ? share * Math.log(share) : 0))),
    z: sum(logits.map((row) => logSumExp(row) ** 2)) / S,
  };
}

// ------------------------------------------------------------------------------- drawing

function draw(given, numbers) {
  const experts = range(given.logits[0].length);
  const rows = numbers.probabilities.map((p, s) => [
    `token ${s}`,
    ...experts.map((e) => [fixed(p[e]), numbers.chosen[s].includes(e) ? "r kept" : "r off"]),
    numbers.chosen[s].map((e, i) => `${fixed(numbers.weights[s][i], 2)} × expert ${e}`).join(" + "),
  ]);
  const heads = ["", ...experts.map((e) => [`p of expert ${e}`, "r"]), "the layer's output"];
  put("routed", table(heads, rows));
  put("first", firstByHand(given, numbers));
  put("balance", balanceTable(given, numbers, experts));
}

function firstByHand(given, numbers) {
  const logits = given.logits[0];
  const powers = logits.map(Math.exp);
  const kept = numbers.chosen[0].map((e) => numbers.probabilities[0][e]);
  const lines = logits.map(
    (logit, e) =>
      `p of expert ${e} = e^${fixed(logit, 1)} / (${logits.map((l) => "e^" + fixed(l, 1)).join(" + ")}) = ` +
      `${fixed(powers[e], 2)} / ${fixed(sum(powers), 2)} = *${fixed(numbers.probabilities[0][e])}*`,
  );
  lines.push(`kept, the ${given.k} largest: *expert ${numbers.chosen[0].join(", ")}*`);
  numbers.chosen[0].forEach((e, i) => {
    const divided = given.normalise ? ` / (${kept.map((p) => fixed(p)).join(" + ")})` : "";
    lines.push(`weight of expert ${e} = ${fixed(kept[i])}${divided} = *${fixed(numbers.weights[0][i])}*`);
  });
  return byHand(...lines);
}

function balanceTable(given, numbers, experts) {
  const rows = experts.map((e) => [
    `expert ${e}`,
    [String(numbers.counts[e]), "r"],
    [fixed(numbers.f[e], 2), "r"],
    [fixed(numbers.P[e]), "r"],
    [fixed(numbers.f[e] * numbers.P[e]), "r"],
  ]);
  const products = experts.map((e) => fixed(numbers.f[e] * numbers.P[e]));
  const heads = ["", ["choices", "r"], ["f = choices / tokens", "r"], ["P = mean p", "r"], ["f P", "r"]];
  return element(
    "div",
    "",
    table(heads, rows),
    byHand(
      `balance loss = E Σ f P = ${experts.length} × (${products.join(" + ")}) = *${fixed(numbers.balance)}* ` +
        `(${given.k} when all are used alike)`,
      `entropy of the choices = *${fixed(numbers.entropy)}* nats, at most log ${experts.length} = ${fixed(Math.log(experts.length))}`,
      `z-loss, the mean of (log Σ e^logit)² = *${fixed(numbers.z)}*`,
    ),
  );
}
