"""Rollouts: sample a group of answers to each question, reward them, and pack them for the update.

What it teaches: around the losses of policy_losses.py, everything that must be exactly right for them to
mean what they say. The image and prompt of a group run once, in sampling and in a micro-batch; sampled
ids are trained as sampled, never decoded and encoded again; the end token is inside the mask; sampling
and scoring share one temperature and one forward, so the ratio starts at 1; log-probabilities are fp32.

    stream -> draw -> generate (a group of answers each) -> rewards, by rule or JudgedReward -> Group
    Groups that disagree, with a verdict for each answer -> advantages -> Completion
    Completions -> minibatches -> this rank's micro-batches -> pack_rollouts -> RolloutBatch -> train.train

Calls to `generate` are spread over the ranks; answers and rewards (not pictures) then travel to all, so
that every rank knows the same groups, drops the same ones and trains on its share of each minibatch.

    one packed row, two groups of two:  [prompt A][A's 1st][A's 2nd][prompt B][B's 1st][B's 2nd]
    segments.after:                          0        0        0        3        3        3

Legend: N completions, L longest completion, n sampled tokens of all of them, S tokens of the row,
mask (N, L) 1 on sampled tokens including the end token, K experts a token.
Sources: SAIL-VL2 section 4.2.3 and 4.2.5. Not published, our choice: group size, temperature, scoring
the samples again in half precision (`score_again`).
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Callable, Iterator

import torch
from torch import Tensor

import rewards
from attention import Segments
from data.encode import Encoder, question_turns, text_of_message, with_thinking
from data.images import open_image, stacked
from data.sample import BadSample, Faults, Sample
from data.stream import EndOfStream, Patience, as_stream, read_sample
from evaluate import text_of
from generate import Answer, generate
from infra.endpoint import in_threads, png_of
from infra.stopping import check_stop
from moe import Decisions
from objective import sampled_logprobs
from packing import Batch
from policy_losses import AGGREGATIONS, ALGORITHMS, divisor, overlong_penalty
from scale import parallel
from scale.experts import catch_up
from scale.parallel import Ranks
from scale.shard import whole_weights
from stage import RLStage
from train import autocast
from vlm import SailVL

# (completion, sample, finished) -> parts, "reward" among them; with a method `many`, a list of such
# triples -> a list of parts, in its place
Reward = Callable[[str, Sample, bool], dict[str, float]]


def oddities(stage: RLStage, experts: int = 0) -> list[str]:
    """What is odd about a stage's choices, as sentences. Raises ValueError for what cannot work."""
    # What cannot work
    if stage.algorithm not in ALGORITHMS:
        raise ValueError(f"--algorithm {stage.algorithm}: choose from {', '.join(ALGORITHMS)}")
    if stage.aggregation and stage.aggregation not in AGGREGATIONS:
        raise ValueError(
            f"--aggregation {stage.aggregation}: choose from {', '.join(AGGREGATIONS)}"
        )
    if stage.reward not in (*rewards.COMBINE, "random"):
        choices = ", ".join(rewards.COMBINE)
        raise ValueError(f"--reward {stage.reward}: choose from {choices}, random")
    if stage.group < 2:
        raise ValueError(
            f"--group {stage.group}: a group of one has nothing to be compared with, every advantage is zero"
        )
    if stage.overlong >= stage.max_new:
        raise ValueError(
            f"--overlong {stage.overlong} leaves no length of {stage.max_new} unpunished"
        )
    if stage.at_once < 0:
        raise ValueError(f"--at-once {stage.at_once}: at least 1 answer, or 0 for all of a call")
    if stage.accumulate < 1:
        raise ValueError(f"--accumulate {stage.accumulate}: at least 1 micro-batch in RL")
    if stage.kl and stage.estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"--estimator {stage.estimator}: choose k1, k2 or k3")
    if stage.temperature <= 0:
        raise ValueError("--temperature must be positive: greedy groups agree and teach nothing")

    # What works, and is unlikely to be meant
    sentences = []
    algorithm = ALGORITHMS[stage.algorithm]
    high = algorithm.high if stage.high is None else stage.high
    aggregation = stage.aggregation or algorithm.aggregation
    by_sequence = algorithm.ratio == "sequence"
    if by_sequence and high > 0.05:
        sentences.append(
            f"{stage.algorithm} with a clip of {high} never clips: a sequence ratio moves by thousandths, "
            "take 3e-4 and 4e-4"
        )
    if not by_sequence and 0 < high < 0.01:
        sentences.append(
            f"{stage.algorithm} with a clip of {high} loses nearly every token after the first update: "
            "token ratios move by tenths"
        )
    if by_sequence and aggregation in ("tokens", "budget"):
        sentences.append(
            f"a sequence ratio summed per token ({aggregation}) weighs each completion by its length: "
            "take sequences"
        )
    if algorithm.ratio == "none" and stage.updates * stage.passes > 1:
        sentences.append(
            f"{stage.algorithm} has no ratio: updates after the first of a rollout batch are "
            "off-policy and biased"
        )
    if stage.kl and stage.estimator == "k1":
        sentences.append(
            "k1 as a loss has an expected gradient of zero: it adds noise and no pull; take k2 or k3"
        )
    if stage.replay and not experts:
        sentences.append("--replay does nothing: the model has no experts")
    if stage.replay and by_sequence:
        sentences.append(
            "routing replay with a sequence ratio: it was made so that this is not needed"
        )
    return sentences


# ------------------------------------------------------------------------------------------ shapes


@dataclass
class RolloutBatch(Batch):
    """A packed batch of completions with their prompts, plus what the policy loss needs.

    at (n,): flat positions whose label was sampled; sequence, place (n,): which completion and which of
    its tokens; old, reference (N, L) log-probabilities, mask (N, L), advantage (N,); choices: per MoE
    layer the experts to use (S, K). `weight` is what the loss is divided by.
    """

    at: Tensor = None
    sequence: Tensor = None
    place: Tensor = None
    old: Tensor = None
    mask: Tensor = None
    advantage: Tensor = None
    reference: Tensor | None = None
    choices: list[Tensor] | None = None
    divisor: float = 0.0
    stats: dict = field(default_factory=dict)

    @property
    def weight(self) -> float:
        return self.divisor


@dataclass
class Group:
    """All completions of one prompt. `index`: the sample's number in its stream; prompt: None on ranks
    that did not sample it; no answers: its prompt could not be made (a bad picture)."""

    index: int
    sample: Sample
    answers: list[Answer]
    parts: list[dict[str, float]]
    prompt: tuple | None = None

    def rewards(self, key: str = "reward") -> list[float]:
        return [p[key] for p in self.parts]

    def judged(self) -> bool:
        """Whether every completion has a finite reward."""
        return bool(self.answers) and all(math.isfinite(r) for r in self.rewards())

    def disagrees(self) -> bool:
        """Whether its rewards differ: a group that agrees has advantages of zero and teaches nothing."""
        return len(set(self.rewards())) > 1


@dataclass
class Completion:
    """One completion that is to be trained on. choices: per MoE layer (S, K), when routing is replayed."""

    index: int
    sample: Sample
    answer: Answer
    advantage: float
    prompt: tuple | None = None
    choices: list[Tensor] | None = None


# ---------------------------------------------------------------------------------------- sampling


def reward_parts(text: str, sample: Sample, finished: bool, kind: str) -> dict[str, float]:
    """Answer, think and format of one completion, and "reward", the stage's combination of them."""
    parts = rewards.parts(text, sample.facts, finished)
    return parts | {"reward": rewards.COMBINE[kind](parts)}


def reward_of(text: str, sample: Sample, finished: bool, kind: str) -> float:
    """The stage's reward of one completion. Raises ValueError for an unknown kind."""
    if kind not in rewards.COMBINE:
        raise ValueError(f"unknown reward {kind!r}; choose from {', '.join(rewards.COMBINE)}")
    return reward_parts(text, sample, finished, kind)["reward"]


def stage_reward(stage: RLStage, seed: int) -> Reward:
    """The reward that a stage names."""
    if stage.reward != "random":
        return lambda text, sample, finished: reward_parts(text, sample, finished, stage.reward)

    # The control: a coin, from which nothing can be learned
    coin = torch.Generator().manual_seed(seed)

    def toss(text: str, sample: Sample, finished: bool) -> dict[str, float]:
        head = float(torch.rand((), generator=coin) < 0.5)
        return reward_parts(text, sample, finished, "verifiable") | {"reward": head}

    return toss


class JudgedReward:
    """A stage's reward with a judge model: how an answer was reached (where the stage's combination
    counts it), and answers whose `facts["grader"]` is "judge".

    judge: (prompt, images) -> its reply, or None; an infra.endpoint.ChatEndpoint, or any function.
    The thinking is judged with the question's pictures, the answer by its text alone. A completion
    without a verdict has a reward that is NaN: its group is left out, and counted as unjudged.
    """

    def __init__(self, kind: str, judge: Callable[..., str | None], encoder: Encoder):
        self.kind = kind
        self.judge = judge
        self.encoder = encoder  # knows where pictures lie
        self.at_once = getattr(judge, "at_once", 1)  # a function need not be safe in threads

    def __call__(self, text: str, sample: Sample, finished: bool) -> dict[str, float]:
        return self.many([(text, sample, finished)])[0]

    def many(self, completions: list[tuple[str, Sample, bool]]) -> list[dict[str, float]]:
        """The parts of many completions, judged beside each other; ends early when told to stop."""
        # The pictures of a sample once, for all of its completions
        pictures: dict[int, list[bytes]] = {}
        if self.kind != "verifiable":
            for _, sample, _ in completions:
                if id(sample) not in pictures:
                    pictures[id(sample)] = self.pictures(sample)

        def judged(completion: tuple[str, Sample, bool]) -> dict[str, float]:
            text, sample, finished = completion
            users = [m for m in question_turns(sample) if m.role == "user"]
            facts = dict(sample.facts)
            if users:
                facts["question"] = text_of_message(users[-1])  # with its options
            think_judge = None
            if self.kind != "verifiable":
                think_judge = partial(self.judge, images=pictures[id(sample)])
            parts = rewards.parts(text, facts, finished, think_judge, self.judge)
            return parts | {"reward": rewards.COMBINE[self.kind](parts)}

        return in_threads(judged, completions, self.at_once)

    def pictures(self, sample: Sample) -> list[bytes]:
        """The question's pictures and frames as PNG files."""
        asked = self.encoder.unrolled(replace(sample, messages=question_turns(sample)))
        root = sample.root or self.encoder.root
        parts = [part for message in asked.messages for part in message.parts]
        sources = [part for part in parts if not isinstance(part, str)]
        return [png_of(open_image(source, root, sample.origin)) for source in sources]

    def report(self) -> str:
        """One line for the end of a run, "" where the judge keeps no counts."""
        report = getattr(self.judge, "report", None)
        return report() if report else ""


def earned(reward: Reward, completions: list[tuple[str, Sample, bool]]) -> list[dict[str, float]]:
    """The parts of each completion: all at once where the reward has `many`, else one by one."""
    many = getattr(reward, "many", None)
    if many:
        return many(completions)

    every = []
    for text, sample, finished in completions:
        every.append(reward(text, sample, finished))
        check_stop()
    return every


@torch.no_grad()
def rollout(
    model: SailVL,
    encoder: Encoder,
    samples: list[Sample],
    stage: RLStage,
    seed: int,
    reward: Reward | None = None,
    faults: Faults | None = None,
) -> list[Group]:
    """`group` completions of every sample, with their rewards. An own `reward` replaces the stage's.

    A sample whose prompt cannot be made becomes a group without answers, and a counted fault.
    """
    faults = faults or Faults()
    reward = reward or stage_reward(stage, seed)

    # Prompts, of the samples that have one
    groups = [Group(i, sample, [], []) for i, sample in enumerate(samples)]
    for group in groups:
        try:
            asked = with_thinking(group.sample, encoder.tokenizer.think_prompt)
            prompt = encoder.prompt(asked)
            if len(prompt[0]) > stage.max_prompt:
                raise BadSample(
                    "too long", f"{group.sample.origin}: a prompt of {len(prompt[0])} tokens"
                )
            group.prompt = prompt
        except BadSample as fault:
            faults.add(fault)
    asked_groups = [group for group in groups if group.prompt]
    if not asked_groups:
        return groups

    # Answers and what they earn
    prompts = [group.prompt for group in asked_groups]
    answers = generate(
        model,
        prompts,
        encoder.tokenizer.ends,
        stage.max_new,
        stage.group,
        stage.temperature,
        seed=seed,
        at_once=stage.at_once,
        each_step=check_stop,
    )
    completions = []
    for answer in answers:
        group = asked_groups[answer.prompt]
        group.answers.append(answer)
        text = text_of(answer, encoder.tokenizer)
        completions.append((text, group.sample, answer.finished))
    for answer, parts in zip(answers, earned(reward, completions), strict=True):
        asked_groups[answer.prompt].parts.append(rewards.checked_parts(parts))
    return groups


class Rollouts:
    """Steps for `train.train`: sample with the present policy, keep groups that disagree, cut
    them into `updates` minibatches.

    If `tries` rounds do not fill the batch with groups that disagree, train on what there is: dynamic
    sampling must end on data that is too easy or too hard. A reward that is not finite (a judge without
    a verdict) drops its group; both are counted. All ranks hold the same groups, so `state_dict` is the
    same on all, is plain JSON, and fits any number of ranks.

    stream: samples by number (data/stream.py), or any iterator of samples. Ends when the stream does.
    Raises ValueError when too many records in a row are of no use. Told to stop, it stops in the middle
    of its work, and the step before it is what a resumed run begins with.
    """

    interruptible = True

    def __init__(
        self,
        model: SailVL,
        encoder: Encoder,
        stream,
        stage: RLStage,
        ranks: Ranks = Ranks(),
        reward: Reward | None = None,
        reference: SailVL | None = None,
        faults: Faults | None = None,
    ):
        # An update of at least one prompt for each rank
        prompts = stage.prompts * stage.passes
        if prompts % stage.updates or prompts // stage.updates < ranks.size:
            raise ValueError(
                f"{stage.prompts} prompts x {stage.passes} passes do not divide into {stage.updates} "
                f"updates of at least one prompt for each of {ranks.size} ranks"
            )
        # What samples, from what, and who rewards
        self.model = model
        self.sampler = model  # the same policy, its weights whole on every rank while it samples
        self.encoder = encoder
        self.stream = as_stream(stream)
        self.stage = stage
        self.ranks = ranks
        self.reward = reward
        self.reference = reference
        self.faults = faults or Faults()

        # Where it is: all that a resumed run needs
        self.next_number = 0  # of the sample to draw next
        self.ended = False  # whether the stream is used up
        self.round = 0  # calls for rollouts so far: each has a seed of its own
        self.queue: list[list[Completion]] = []  # minibatches to come
        self.stats: dict[str, float] = {}  # of the last rollout batch

    def __iter__(self) -> Iterator[list[RolloutBatch]]:
        return self

    def __next__(self) -> list[RolloutBatch]:
        # The update's precision: else the ratio does not start at 1
        with autocast(self.stage, self.ranks.device):
            return self.micro_batches()

    # ------------------------------------------------------------------------------- minibatches

    def micro_batches(self) -> list[RolloutBatch]:
        """This rank's share of the next minibatch. Every rank gets as many micro-batches."""
        # New rollouts when the last ones are used up
        if not self.queue:
            with whole_weights(self.model, self.ranks) as self.sampler:
                self.collect()
            self.sampler = self.model
        minibatch = self.queue.pop(0)

        # This rank's part, and as many micro-batches as the busiest rank has
        batches = [self.pack(part) for part in self.parts_of(minibatch, self.ranks.rank)]
        most = max(len(self.parts_of(minibatch, rank)) for rank in range(self.ranks.size))
        while len(batches) < max(most, 1):  # run the same modules as the others, at weight zero
            batches.append(self.pack(minibatch[:1], empty=True))
        return batches

    def parts_of(self, minibatch: list[Completion], rank: int) -> list[list[Completion]]:
        """The completions of each of a rank's micro-batches."""
        size = self.ranks.size
        share = minibatch[rank * len(minibatch) // size : (rank + 1) * len(minibatch) // size]
        each = math.ceil(len(share) / self.stage.accumulate)
        return [share[i : i + each] for i in range(0, len(share), max(each, 1))]

    def pack(self, part: list[Completion], empty: bool = False) -> RolloutBatch:
        return pack_rollouts(
            part, self.encoder, self.stage, self.stats, self.reference, empty, self.device
        )

    # ---------------------------------------------------------------------------------- sampling

    def draw(self, wanted: int) -> list[tuple[int, Sample]]:
        """The next usable samples and their numbers; fewer when the stream ends."""
        drawn: list[tuple[int, Sample]] = []
        # every rank draws the same: one of them counts what is left out
        patience = Patience(self.faults if self.ranks.main else Faults(self.faults.strict))
        while len(drawn) < wanted:
            number = self.next_number
            try:
                sample = read_sample(self.stream, number)
            except EndOfStream:
                self.ended = True
                break
            self.next_number += 1
            if patience.accepts(sample, number, self.stream):
                drawn.append((number, sample))
        return drawn

    def sample(self, wanted: int) -> list[Group]:
        """New groups, rolled out by all ranks and known to all, in the stream's order."""
        # The same samples on every rank; a call takes a rank's share, or what memory allows
        drawn = self.draw(wanted)
        self.round += 1
        per_call = self.stage.batch or math.ceil(wanted / self.ranks.size)

        # Each rank takes every size-th call of `generate`
        own: dict[int, Group] = {}
        for call, start in enumerate(range(0, len(drawn), per_call)):
            if call % self.ranks.size != self.ranks.rank:
                continue
            samples = [sample for _, sample in drawn[start : start + per_call]]
            seed = self.stage.seed + 7919 * self.round + call
            groups = rollout(
                self.sampler, self.encoder, samples, self.stage, seed, self.reward, self.faults
            )
            for group in groups:
                own[start + group.index] = group

        # Wait where SIGTERM is heard: a collective would not let go
        catch_up(self.sampler, check_stop)
        parallel.meet(f"sampled {self.round}", check_stop)

        # Answers and rewards to everyone; a prompt with its pictures stays where it was made
        sent = [(place, group.answers, group.parts) for place, group in own.items()]
        everyone = {place: (answers, parts) for place, answers, parts in parallel.gather(sent)}
        known = []
        for place, (number, sample) in enumerate(drawn):
            answers, parts = everyone[place]
            prompt = own[place].prompt if place in own else None
            known.append(Group(number, sample, answers, parts, prompt))
        return known

    def collect(self) -> None:
        """Fill the queue with one rollout batch. Raises StopIteration when the stream has ended."""
        stage = self.stage

        # Rounds until enough groups can teach; later ones only fill the gaps
        kept: list[Group] = []
        seen: list[Group] = []
        for attempt in range(stage.tries if stage.dynamic else 1):
            wanted = stage.prompts if attempt == 0 else max(1, stage.prompts // 2)
            groups = [group for group in self.sample(wanted) if group.answers]
            seen += groups
            for group in groups:
                if group.judged() and (group.disagrees() or not stage.dynamic):
                    kept.append(group)
            if len(kept) >= stage.prompts:
                break
        if not seen and self.ended:
            raise StopIteration
        if not seen:
            raise ValueError(
                f"stage {stage.name}: no prompt of a whole rollout batch could be made\n"
                f"{self.faults.report()}"
            )
        self.stats = rollout_statistics(seen, stage) | {"lessons": len(kept)}

        # Groups to completions; without one that can teach, a step of advantage zero
        lessons = kept[: stage.prompts] or seen[:1]
        by_group = [completions_of(group, stage, lesson=bool(kept)) for group in lessons]
        if stage.replay and self.model.config.text.num_experts:
            for completions in by_group:
                self.remember_choices(completions)

        # Minibatches, each pass through the rollouts in the same order
        by_group = by_group * stage.passes
        size = math.ceil(len(by_group) / stage.updates)
        for start in range(0, len(by_group), size):
            self.queue.append([c for group in by_group[start : start + size] for c in group])
        if torch.is_autocast_enabled(self.device.type):
            self.score_again()

    @property
    def device(self) -> torch.device:
        return torch.device(self.ranks.device)

    def score_again(self) -> None:
        """Log-probabilities by the very forward that the update will run, in the same micro-batches.

        In bf16 those of a cached step differ by half a percent, more than GSPO's clip range, and so do
        those of another packing; in fp32 they agree and this is not needed.
        """
        scored: dict[
            tuple[int, int], list[float]
        ] = {}  # (minibatch, place in it) -> log-probabilities
        for m, minibatch in enumerate(self.queue):
            places = {id(c): i for i, c in enumerate(minibatch)}
            for part in self.parts_of(minibatch, self.ranks.rank):
                # without the reference: ranks may have unequal numbers of parts, and it is sharded
                batch = pack_rollouts(part, self.encoder, self.stage, {}).to(self.device)
                check_stop()
                with torch.no_grad():
                    logp = sampled_logprobs(self.sampler, batch, self.stage.temperature)
                for completion, row in zip(part, logp):
                    length = len(completion.answer.ids)
                    scored[m, places[id(completion)]] = row[:length].tolist()

        catch_up(self.sampler, check_stop)
        parallel.meet(f"scored {self.round}", check_stop)

        # Known to everyone; of several passes the first one counts, where the ratio is to be 1
        done: set[int] = set()
        for (m, i), logprobs in sorted(parallel.gather(list(scored.items()))):
            completion = self.queue[m][i]
            if id(completion) not in done:
                completion.answer = replace(completion.answer, logprobs=logprobs)
                done.add(id(completion))

    def remember_choices(self, completions: list[Completion]) -> None:
        """The experts that the sampling policy chose for a group; on every rank, so that all queues agree."""
        batch = pack_rollouts(completions, self.encoder, self.stage, {})
        by_layer = [
            layer.split(batch.segments.lengths) for layer in chosen_experts(self.sampler, batch)
        ]
        for i, completion in enumerate(completions):  # documents: the prompt, then its completions
            completion.choices = [torch.cat((prompt, answers[i])) for prompt, *answers in by_layer]

    # ---------------------------------------------------------------------------- stop and go on

    def state_dict(self) -> dict:
        """What a resumed run needs to go on exactly, as JSON: minibatches that were sampled by an older
        policy included."""
        # Answers and advantages as they are; samples by number, prompts are made again
        queue = []
        for minibatch in self.queue:
            saved = []
            for c in minibatch:
                choices = c.choices and [layer.tolist() for layer in c.choices]
                answer = vars(c.answer)
                saved.append(
                    {
                        "index": c.index,
                        "answer": answer,
                        "advantage": c.advantage,
                        "choices": choices,
                    }
                )
            queue.append(saved)
        return {"next": self.next_number, "round": self.round, "stats": self.stats, "queue": queue}

    def load_state_dict(self, state: dict) -> None:
        """On a fresh object with the same stream: the queue's samples are read again, not rolled out."""
        assert self.next_number == 0, "load the state before the first batch"

        # Samples in rising order, as a plain iterator cannot go back
        wanted = sorted({c["index"] for minibatch in state["queue"] for c in minibatch})
        samples = {number: self.stream[number] for number in wanted}

        # The rest as it was
        self.next_number = state["next"]
        self.round = state["round"]
        self.stats = state["stats"]
        for minibatch in state["queue"]:
            completions = []
            for c in minibatch:
                answer = Answer(**c["answer"])
                choices = c["choices"] and [torch.tensor(layer) for layer in c["choices"]]
                sample = samples[c["index"]]
                completions.append(
                    Completion(c["index"], sample, answer, c["advantage"], choices=choices)
                )
            self.queue.append(completions)


def completions_of(group: Group, stage: RLStage, lesson: bool) -> list[Completion]:
    """A group's completions with their advantages, all zero when there is no lesson in it."""
    # Long answers pay for their length
    shaped = []
    for reward, answer in zip(group.rewards(), group.answers):
        shaped.append(reward + overlong_penalty(len(answer.ids), stage.max_new, stage.overlong))

    # Against the others of the group
    advantages = torch.zeros(len(shaped))
    if lesson:
        advantages = ALGORITHMS[stage.algorithm].advantage(torch.tensor(shaped), stage.group)
    return [
        Completion(group.index, group.sample, answer, float(advantage), group.prompt)
        for answer, advantage in zip(group.answers, advantages)
    ]


def rollout_statistics(groups: list[Group], stage: RLStage) -> dict[str, float]:
    """Of one rollout batch, every sampled group included: reward and its kinds, length, answers that
    were cut off, pass@1 and pass@k, groups without a lesson, and how the useless ones split."""

    def mean(values: list) -> float:
        return sum(values) / max(1, len(values))

    # The reward and its parts, where there is a verdict
    statistics: dict[str, float] = {}
    for key in groups[0].parts[0]:
        values = [value for group in groups for value in group.rewards(key)]
        statistics[key] = mean([v for v in values if v is not None and math.isfinite(v)])

    # Length
    answers = [answer for group in groups for answer in group.answers]
    lengths = [len(answer.ids) for answer in answers]
    penalties = [overlong_penalty(n, stage.max_new, stage.overlong) for n in lengths]
    statistics["length"] = mean(lengths)
    statistics["truncated"] = mean([not answer.finished for answer in answers])
    statistics["overlong"] = mean(penalties)

    # What was solved
    solved = [[p.get("answer", p["reward"]) > 0 for p in group.parts] for group in groups]
    statistics["pass@1"] = mean([right for group in solved for right in group])
    statistics[f"pass@{stage.group}"] = mean([any(group) for group in solved])

    # What could not teach
    agree = [not group.disagrees() for group in groups]
    statistics["useless"] = mean(agree)
    statistics["all_right"] = mean([same and all(group) for same, group in zip(agree, solved)])
    statistics["unjudged"] = mean([not group.judged() for group in groups])
    return statistics


# ----------------------------------------------------------------------------------------- packing


class RolloutRow:
    """Builds one packed row of sampled ids, group by group.

    A prompt with several completions stands there once with its images, without its last token: each
    completion continues it and begins with that token, which predicts the completion's first. The last
    id of each completion is a label only, so it is not fed.
    """

    def __init__(self, empty: bool = False):
        self.empty = empty  # at weight zero: its tokens do not count for the balance of experts
        self.documents: list[list[int]] = []  # ids that are fed
        self.after: list[int] = []  # for each document the one that it continues, or itself
        self.owners: list[str] = []  # its task
        self.images: list = []
        self.choices: list[list[Tensor]] = []  # replayed routing of each document, per layer
        self.completions: list[int] = []  # which completion, in the order of the row
        self.sampled: list[list[int]] = []  # its ids
        self.logprobs: list[list[float]] = []
        self.at: list[int] = []  # flat positions that predict sampled ids
        self.tokens = 0

    def add_document(self, ids: list[int], continues: int | None, task: str) -> None:
        self.after.append(len(self.documents) if continues is None else continues)
        self.documents.append(ids)
        self.owners.append("padding" if self.empty else task)
        self.tokens += len(ids)

    def add_group(
        self, members: list[tuple[int, Completion]], prompt: list[int], images: list
    ) -> None:
        """All completions (with their numbers) of one prompt."""
        task = members[0][1].sample.task
        self.images += images

        # The part of the prompt that they share stands once
        shared = len(prompt) - 1 if len(members) > 1 else 0
        begins = len(self.documents)
        if shared:
            self.add_document(list(prompt[:shared]), None, task)
            self.add_choices(members[0][1], 0, shared)

        # Each completion goes on from there: position t predicts token t + 1
        for number, completion in members:
            ids = completion.answer.ids
            self.add_document([*prompt[shared:], *ids[:-1]], begins if shared else None, task)
            self.add_choices(completion, shared, None)
            self.at += range(self.tokens - len(ids), self.tokens)
            self.completions.append(number)
            self.sampled.append(ids)
            self.logprobs.append(completion.answer.logprobs)

    def add_choices(self, completion: Completion, start: int, end: int | None) -> None:
        if completion.choices:
            self.choices.append([layer[start:end] for layer in completion.choices])


def pack_rollouts(
    part: list[Completion],
    encoder: Encoder,
    stage: RLStage,
    stats: dict,
    reference: SailVL | None = None,
    empty: bool = False,
    device: torch.device | str = "cpu",
) -> RolloutBatch:
    """Completions as one packed row. `empty`: the same row at weight zero; device: the reference's."""
    # The row, a prompt's completions together
    groups: dict[int, list[tuple[int, Completion]]] = {}
    for number, completion in enumerate(part):
        groups.setdefault(completion.index, []).append((number, completion))
    row = RolloutRow(empty)
    for members in groups.values():
        first = members[0][1]
        prompt = first.prompt
        if prompt is None:  # another rank sampled it
            prompt = encoder.prompt(with_thinking(first.sample, encoder.tokenizer.think_prompt))
        row.add_group(members, *prompt)

    # Where each sampled token stands in the (N, L) tables
    counts = torch.tensor([len(ids) for ids in row.sampled])
    sequence = torch.tensor(row.completions).repeat_interleave(counts)  # (n,)
    place = torch.cat([torch.arange(n) for n in counts])  # (n,)
    old = torch.zeros(len(part), int(counts.max()))  # (N, L)
    old[sequence, place] = torch.tensor([p for logprobs in row.logprobs for p in logprobs])
    mask = torch.zeros_like(old)
    mask[sequence, place] = 0.0 if empty else 1.0

    # The row itself
    ids = torch.tensor([[token for document in row.documents for token in document]])  # (1, S)
    labels = torch.tensor([token for sampled in row.sampled for token in sampled])  # (n,)
    segments = Segments.of(map(len, row.documents), after=row.after)
    aggregation = stage.aggregation or ALGORITHMS[stage.algorithm].aggregation
    batch = RolloutBatch(
        ids=ids,
        labels=labels,
        weights=torch.ones(len(labels)),
        positions=segments.positions()[None],
        segments=segments,
        images=stacked(row.images) if row.images else None,
        owners=row.owners,
        at=torch.tensor(row.at),
        sequence=sequence,
        place=place,
        old=old,
        mask=mask,
        advantage=torch.tensor([completion.advantage for completion in part]),
        choices=[torch.cat(layer) for layer in zip(*row.choices)] or None,
        divisor=divisor(mask, aggregation, stage.max_new),
        stats=stats,
    )

    # And what the reference model makes of it
    if reference is not None:
        with torch.no_grad():
            batch.reference = sampled_logprobs(reference, batch.to(device), stage.temperature).cpu()
    return batch


@torch.no_grad()
def chosen_experts(model: SailVL, batch: RolloutBatch) -> list[Tensor]:
    """Per MoE layer the experts (S, K) that the present policy sends each token to."""
    routing = Decisions()
    batch = batch.to(model.language_model.lm_head.weight.device)
    model.hidden(batch.ids, batch.images, batch.positions, batch.segments, routing=routing)
    return [layer.indices.cpu() for layer in routing]
