"""How a stage is run: from the command line to the loop, one way for all of them.

What it teaches: a recipe is data. `pretrain.py`, `sft.py`, `rl.py` hold rows (`stage.Stage`) and nothing
that runs; here is the one path that all of them take, also in the toy's ladder, the benches and claims:

    python sft.py sft1 --data my.jsonl
      -> run_command      options -> Setup: model, encoder, source, ranks, directory, faults
      -> fit              the stage's source of samples -> its feed of batches
      -> train.train      the loop
      -> train.one_step   objective, .backward(), step

A stage names two functions. `SAMPLES[stage.samples]` makes a stream of samples, numbered, so that it can
be resumed anywhere and read by worker processes; `FEEDS[stage.objective]` turns it into batches:

    answers      the source's samples as they are              packed_rows   rows of documents
    chains       questions asked to think, with their chains   rollouts      sampled completions
    fusion       answers, and a share of harvested chains      patches       images alone
    questions    those whose answer can be verified

Every stage of the toy has a command, and a command does on `--data` what the toy does on the drawn world.
"""

import copy
import functools
import math
import random
import warnings
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import torch
import tyro
from torch import Tensor

from curation.chains import Blend, read_chains
from data.encode import (
    Encoder,
    chain_of,
    known_grader,
    last_answer,
    truth_of,
    with_thinking,
)
from data.images import stacked
from data.readers import CACHE, CACHE_BYTES, Folder
from data.remote import ShardCache
from data.sample import BadSample, Faults, Sample
from data.steps import Batches
from data.stream import Documents, EndOfStream, Mapped, read_sample
from data.world import GRADED, REASONING, World, corpus
from evaluate import askable, evaluate
from generate import load_model, weights_place
from graders import JUDGED, grader_of, symbolic_note
from infra.cli import one_line_errors, parse_subcommand
from infra.device import pick_device
from infra.endpoint import ChatEndpoint
from infra.judge import JUDGE
from infra.plan import describe_stage, plan_of, refuse_unused, steps_of
from infra.run_directory import RunDirectory
from infra.text import printable
from objective import PatchPredictor
from packing import sent
from rewards import COMBINE
from rollout import JudgedReward, Reward, Rollouts, oddities
from scale import parallel, shards
from scale.layout import Layout
from scale.parallel import Ranks
from scale.shard import frozen_copy, shard_model, whole_weights
from stage import PARTS, BaseStage, RLStage, Stage
from tokenizer import Tokenizer, train_bpe
from train import Run, train
from vlm import PRESETS, SailVL

PATIENCE = 1000  # samples in a row without a usable picture: a stage on images gives up
# The toy's request to think: the released sentence is longer than its answers.
THINK = "think first."


# ----------------------------------------------------------------------------------------- setup


@dataclass
class Setup:
    """What stages share: everything that a stage needs and that outlives it."""

    model: SailVL
    encoder: Encoder
    source: World | Folder
    ranks: Ranks = Ranks()
    directory: Path | RunDirectory | None = None  # log, and checkpoints if it is a RunDirectory
    faults: Faults = field(default_factory=Faults)
    workers: int = 0  # processes on each rank that read and decode ahead
    harvest: list[Sample] | None = None  # chains for think-fusion; none: the source's own
    reward: Reward | None = None  # in place of the stage's (RL)
    predictor: PatchPredictor | None = None  # ViT and head of the image stage; none: a new head


def fit(setup: Setup, stage: BaseStage) -> Run:
    """Train one stage in place; faults are printed at its end."""
    # The two functions that the stage names: where samples come from, and how they become batches
    stage = resolved(stage, setup.model)
    for option, chosen, known in (
        ("samples", stage.samples, SAMPLES),
        ("objective", stage.objective, FEEDS),
    ):
        if chosen not in known:
            raise ValueError(f"--{option} {chosen}: choose from {', '.join(known)}")
    samples = SAMPLES[stage.samples](setup, stage)
    model, batches = FEEDS[stage.objective](setup, stage, samples)
    shared = model is setup.model
    model = shard_model(model, setup.ranks)  # of a pipeline a stage: the rest is let go
    if shared:
        setup.model = model

    # The loop
    try:
        run = train(model, stage, batches, ranks=setup.ranks, directory=setup.directory)
    finally:
        if isinstance(batches, Batches):
            batches.close()  # its worker processes

    # Nothing is left out without a word, on any rank
    faults = merged_faults(setup.faults)
    if faults.counts and setup.ranks.main:
        print(faults.report())
        for reason, first in faults.tracebacks.items():
            print(f"  the first {reason}:", *map(printable, first.splitlines()), sep="\n    ")
    (lost,) = parallel.total(JUDGE.lost)
    if lost and setup.ranks.main:
        print(f"  {lost:.0f} expressions took too long to compare and count as wrong")
    return run


def merged_faults(own: Faults) -> Faults:
    """What was left out on all ranks."""
    merged = Faults()
    for faults in parallel.gather([own]):
        merged.merge(faults)
    return merged


def resolved(stage: BaseStage, model: SailVL) -> BaseStage:
    """What a stage leaves to the model: the paper's algorithm, DAPO for a dense one and GSPO for a MoE."""
    if not isinstance(stage, RLStage) or stage.algorithm:
        return stage
    return replace(stage, algorithm="gspo" if model.config.text.num_experts else "dapo")


# -------------------------------------------------------------------------------- where samples come from


def answers(setup: Setup, stage: BaseStage):
    """The source's samples, drawn by the stage's mixture."""
    return setup.source.stream(stage.mixture, stage.seed, stage.turns)


def chains(setup: Setup, stage: BaseStage):
    """Questions asked to think, answered by their chains; samples without one are passed over."""
    ask = AskedToThink(setup.encoder.tokenizer.think_prompt)
    return Mapped(
        answers(setup, stage), ask, "a chain of thought (<think>...</think>, facts.chain)"
    )


def fusion(setup: Setup, stage: Stage):
    """Think-fusion (Eq. 3): direct answers, and a share of `stage.think` from the harvested chains."""
    harvest = setup.harvest
    if harvest is None:
        harvest = reference_chains(setup, stage)
    direct = Mapped(answers(setup, stage), without_thinking)
    return Blend(direct, harvest, stage.think, stage.seed)


def questions(setup: Setup, stage: BaseStage):
    """Samples whose answer can be verified: a truth is enough."""
    gradable = functools.partial(with_truth, judged=setup.reward is not None)
    return Mapped(answers(setup, stage), gradable, "a truth to grade by (facts.answer, an answer)")


SAMPLES: dict[str, Callable] = {
    "answers": answers,
    "chains": chains,
    "fusion": fusion,
    "questions": questions,
}


@dataclass(frozen=True)
class AskedToThink:
    """A sample that has a chain, asked with the request to think. (A class: workers must pickle it.)"""

    think_prompt: str

    def __call__(self, sample: Sample) -> Sample | None:
        return with_thinking(sample, self.think_prompt) if chain_of(sample) else None


def without_thinking(sample: Sample) -> Sample:
    """A sample as a direct answer: a chain in its last turn is left out, and the box around the truth."""
    at = last_answer(sample)
    if at is None or sample.messages[at].think is None:
        return sample
    truth = truth_of(sample)
    said = truth if isinstance(truth, str) else truth[0]
    direct = replace(sample.messages[at], think=None, parts=(said,))
    return replace(sample, messages=(*sample.messages[:at], direct, *sample.messages[at + 1 :]))


def with_truth(sample: Sample, judged: bool = True) -> Sample | None:
    """A sample whose answer can be graded, with its truth among the facts.

    Raises BadSample for a grader that this run does not have: it costs its row, not the run.
    """
    try:
        truth = truth_of(sample)
    except BadSample:
        return None
    if known_grader(sample) == JUDGED and not judged:
        raise BadSample("wants a judge", f"{sample.origin}: give --judge-url and --judge-model")
    return replace(sample, facts=sample.facts | {"answer": truth})


def reference_chains(setup: Setup, stage: BaseStage, most: int = 400) -> list[Sample]:
    """Chains of the data itself, where no policy's own were harvested."""
    # Files have the chains that they have; the drawn world makes some
    samples: Iterable[Sample | BadSample]
    if isinstance(setup.source, World):
        mixture = dict.fromkeys(REASONING, 1.0)
        samples = islice(setup.source.stream(mixture, stage.seed + 5, 1), most)
    else:
        samples = (setup.source[index] for index in range(len(setup.source)))

    # Those that have one, asked to think; what cannot be is met again, and counted, in the stream
    ask = AskedToThink(setup.encoder.tokenizer.think_prompt)
    chains = []
    for sample in samples:
        try:
            asked = ask(sample) if isinstance(sample, Sample) else None
        except BadSample:
            continue
        if asked is not None:
            chains.append(asked)
    return chains


# ------------------------------------------------------------------------------------------ feeds


def packed_rows(setup: Setup, stage: Stage, samples) -> tuple[SailVL, Batches]:
    """Samples -> documents -> packed rows -> this rank's micro-batches."""
    # What a token weighs; "sequence" divides by samples, which is the batch's affair
    by_sample = stage.weighting == "sequence"
    encoder = replace(
        setup.encoder,
        everything=stage.everything,
        weighting="token" if by_sample else stage.weighting,
        max_length=stage.length,
        root=setup.source.root,
    )

    # Documents in numbered lanes, rows in the same order for any number of ranks
    documents = Documents(samples, encoder, setup.faults)
    batches = Batches(
        documents,
        stage.length,
        stage.rows,
        stage.accumulate,
        encoder.tokenizer.pad,
        setup.ranks.rank,
        setup.ranks.size,
        per_sample=by_sample,
        workers=setup.workers,
    )
    return setup.model, batches


def rollouts(setup: Setup, stage: RLStage, samples) -> tuple[SailVL, Rollouts]:
    """Questions -> completions of the model that is being trained."""
    # Choices that are unlikely to be meant
    for sentence in oddities(stage, setup.model.config.text.num_experts):
        warnings.warn(sentence, stacklevel=2)

    # What grades: a run without the symbolic grader says so, and one without its judge cannot begin
    names = grader_names(setup, stage)
    if JUDGED in names and setup.reward is None:
        raise ValueError(
            f"stage {stage.name}: rows have facts.grader {JUDGED!r}: give --judge-url and --judge-model"
        )
    judged = isinstance(setup.reward, JudgedReward)
    if judged and stage.reward == "verifiable" and JUDGED not in names and setup.ranks.main:
        print(
            f"  NOTE: the first rows name no grader {JUDGED!r}, so the judge is not asked about them"
        )
    note = symbolic_note(names)
    if note and setup.ranks.main:
        print(note)

    # The KL penalty measures against the model as it is now
    encoder = replace(setup.encoder, root=setup.source.root)
    reference = frozen_copy(setup.model, setup.ranks) if stage.kl else None
    feed = Rollouts(
        setup.model, encoder, samples, stage, setup.ranks, setup.reward, reference, setup.faults
    )
    return setup.model, feed


def patches(setup: Setup, stage: Stage, samples) -> tuple[PatchPredictor, Iterator]:
    """Images alone, for the stand-in of AIMv2's pre-training; what trains is the ViT and a head."""
    predictor = setup.predictor or PatchPredictor(setup.model.vision_model)
    predictor.to(setup.ranks.device)
    encoder = replace(setup.encoder, root=setup.source.root)
    # Every rank walks all samples: one of them counts
    faults = setup.faults if setup.ranks.main else Faults(setup.faults.strict)
    samples.patience.faults = faults
    return predictor, pixel_batches(encoder, stage, samples, setup.ranks, faults)


def grader_names(setup: Setup, stage: RLStage) -> set[str]:
    """The graders that the first questions of a stage name."""
    stream = answers(setup, stage)
    names = set()
    for number in range(16):
        try:
            sample = read_sample(stream, number)
        except EndOfStream:
            break
        if isinstance(sample, Sample):  # faults are counted when their turn comes
            names.add(grader_of(sample.facts))
    return names


FEEDS: dict[str, Callable] = {
    "supervised": packed_rows,
    "policy": rollouts,
    "next_patch": patches,
}


@dataclass
class Pixels:
    """A batch of images as the loop takes it; `ids` is what tokens a second are counted by."""

    images: Tensor  # (N, 3, H, W) uint8
    prefix: int  # patches that are seen both ways
    ids: Tensor  # (N, patches)
    filled: float = 1.0
    weight: float = 1.0
    owners: list[str] = field(default_factory=list)  # images have no tasks

    def to(self, device) -> "Pixels":
        return replace(self, images=sent(self.images, device))


def pixel_batches(
    encoder: Encoder, stage: Stage, samples, ranks: Ranks, faults: Faults
) -> Iterator[list[Pixels]]:
    """Images of the samples, as many a step as would fill the stage's rows with patches.

    Raises ValueError when many samples in a row have no image of the ViT's own size.
    """
    # As many images as patches fill the rows of a step
    vision = encoder.config.vision
    per_image = (vision.image_size // vision.patch_size) ** 2
    images_a_step = max(1, stage.rows * stage.length // per_image // ranks.size)

    # Every size-th image is this rank's; each step sees another share of the patches both ways
    arrays = single_images(encoder, stage, samples, faults)
    own = islice(arrays, ranks.rank, None, ranks.size)
    rng = random.Random(stage.seed)
    while True:
        # Ranks go on until the last image of all is out; those without one show black at weight zero
        images = list(islice(own, images_a_step))
        count = len(images)
        (total,) = parallel.total(count)
        if not total:
            return
        if not images:
            images = [np.zeros((vision.image_size, vision.image_size, 3), np.uint8)]

        prefix = rng.randrange(per_image // 2)
        ids = torch.zeros(count, per_image, dtype=torch.int64)
        yield [Pixels(stacked(images), prefix, ids, weight=count / total)]


def single_images(encoder: Encoder, stage: Stage, samples, faults: Faults) -> Iterator:
    """uint8 images (H, W, 3) of the ViT's own size; others and bad ones are counted."""
    size = encoder.config.vision.image_size
    idle = 0
    for sample in samples:
        # A bad picture costs its sample
        try:
            arrays, _ = encoder.images(encoder.unrolled(sample))
        except BadSample as fault:
            faults.add(fault)
            arrays = []
        fitting = [array for array in arrays if array.shape[:2] == (size, size)]
        if len(fitting) < len(arrays):
            faults.add(
                BadSample("other image size", f"{sample.origin}: not {size} x {size} pixels")
            )

        # A source without pictures is an error, not a silence
        idle = 0 if fitting else idle + 1
        if idle >= PATIENCE:
            raise ValueError(
                f"stage {stage.name}: {idle} samples in a row have no image of {size} x {size} "
                f"pixels\n{faults.report()}"
            )
        yield from fitting


# ---------------------------------------------------------------------------------- a new toy model


def new_model(preset: str, source: World | Folder, seed: int = 0) -> tuple[SailVL, Tokenizer]:
    """A model with random weights and a tokenizer trained on the source's own text.

    Raises ValueError for an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: choose from {', '.join(PRESETS)}")

    # A vocabulary for these texts
    if isinstance(source, World):
        texts = corpus(3000)
    else:
        messages = [m for sample in source.first(20000) for m in sample.messages]
        texts = [part for m in messages for part in m.parts if isinstance(part, str)]
    template = [THINK, "user\n", "assistant\n", "\\boxed{"]
    tokenizer = Tokenizer(train_bpe(texts + template, 440), "", THINK)

    # Sizes: the vocabulary rounded up, as kernels like it; other people's pictures are larger than a tile
    config = PRESETS[preset]
    vocabulary = math.ceil(len(tokenizer) / 16) * 16
    config = replace(
        config,
        text=replace(config.text, vocab_size=vocabulary),
        image_token_id=tokenizer.image,
        max_tiles=config.max_tiles if isinstance(source, World) else max(config.max_tiles, 4),
    )
    return SailVL(config).init_weights(seed), tokenizer


def restart(
    model: SailVL,
    language: dict[str, Tensor] | None = None,
    adapter_seed: int | None = None,
) -> None:
    """Parts of a model that begin again, in place: basic pre-training joins a *new* adapter to a
    language model that has seen no picture. Raises ValueError for a language model of other sizes."""
    if language is not None:
        try:
            model.language_model.load_state_dict(language)
        except RuntimeError as error:
            raise ValueError(f"--llm: a language model of other sizes ({error})") from error
    if adapter_seed is not None:
        # Drawn on the CPU, wherever the model is: the same numbers on every device
        adapter = copy.deepcopy(model.mlp1).cpu()
        adapter.init_weights(torch.Generator().manual_seed(adapter_seed))
        model.mlp1.load_state_dict(adapter.state_dict())


def upcycled(model: SailVL, experts: int, per_token: int = 2, pieces: int = 1) -> SailVL:
    """A mixture of experts that computes what the dense model computes: every expert is a copy of its
    feed-forward, or one of so many `pieces` of a copy (see `moe.upcycle`).

    Raises ValueError for a model that has experts already, and for pieces that make no whole copies.
    """
    text = model.config.text
    width = text.intermediate_size
    if text.num_experts:
        raise ValueError(f"--experts {experts}: the model has {text.num_experts} experts already")
    if pieces < 1 or any(n % pieces for n in (experts, per_token, width)):
        raise ValueError(
            f"--expert-pieces {pieces}: must divide --experts {experts}, {per_token} experts a token "
            f"and the {width} columns of the feed-forward"
        )
    return model.to_moe(
        replace(
            text,
            num_experts=experts,
            num_experts_per_tok=per_token,
            moe_intermediate_size=width // pieces,
            norm_topk_prob=True,
        )
    )


def refuse_other_positions(wanted: str, own: str) -> None:
    """2-D RoPE comes on top of a learned table; sines and cosines have none, so the two exclude each
    other in one set of weights."""
    if (wanted == "sincos") != (own == "sincos"):
        raise ValueError(
            f"--position {wanted}: this model's patches have {own!r} positions, which are part of its "
            "weights; choose table or rope2d for a model with a table"
        )


# --------------------------------------------------------------------------------- the command line


@dataclass
class RunOptions:
    """Where data and model come from and where the result goes."""

    data: Path | None = None  # a file, a folder of them or a mixture file; none: the drawn world
    images: Path | None = None  # folder of its images; none: beside the file
    model: Path | None = None  # directory to start from; none: a new model and tokenizer
    preset: str = "toy"  # sizes of a new model: toy, toy-moe, SAIL-VL2-2B, ...
    llm: Path | None = None  # directory whose language model takes the place of the model's
    fresh_adapter: bool = False  # begin with a new adapter, as basic pre-training does
    experts: int = 0  # make a dense model a mixture of so many experts (upcycling), two a token
    expert_pieces: int = 1  # 2: each expert half of a copy, so that a token costs what it did
    out: Path = Path("runs/out")  # directory for the trained model and the log
    harvest: Path | None = None  # chains for think-fusion, from `python -m curation.chains`
    workers: int = 0  # processes on each rank that read and decode ahead, and one packs; 0: none
    strict: bool = False  # make the first bad sample an error
    cache: Path = CACHE  # copies of remote shards, if --data is an address (s3://...)
    cache_gib: float = CACHE_BYTES / 2**30  # most that they may take on this machine
    # image paths may lead out of the images' folder, also through links
    allow_outside: bool = False

    # How images and questions are put to the model; none: as the model's own configuration says
    any_resolution: bool | None = None  # images whole, at their own size, in place of tiles
    position: str | None = None  # of patches: table, rope2d or sincos
    max_tiles: int | None = None  # of an image
    msac: bool | None = None  # a second pass over grids of tiles
    think_prompt: str | None = None  # the sentence that asks for thinking

    # RL with a judge model, in place of the rules for thinking and for rows with facts.grader "judge"
    judge_url: str = ""  # an OpenAI-compatible server, as http://localhost:8000/v1; "": by rules
    judge_model: str = ""  # the model's name there
    judge_key: str = (
        "OPENAI_API_KEY"  # environment variable that holds the API key, if it needs one
    )
    judge_timeout: float = 120.0  # seconds for one question with all its attempts

    # A run that can be stopped at any time

    # go on from the newest checkpoint in --out; false: remove them, begin again
    resume: bool = True
    save_every: int = 200  # steps between checkpoints (one more at SIGTERM and at the end)
    keep: int = 2  # newest checkpoints to keep, beside the best
    check_every: int = 0  # steps between checks on held-out samples; 0: never
    held_out: Path | None = None  # data to check on; none: held-out scenes of the drawn world
    tracker: str = ""  # module to log to as well: wandb, trackio, tensorboard
    grace: float = 8.0  # seconds from SIGTERM to the end of a step, at least
    timeout: float = 1800.0  # seconds that ranks wait for the slowest one
    layout: Layout = Layout()  # how the model lies on several ranks
    # cpu, cuda, npu or mps (a Mac's GPU, in fp32); "": an accelerator but MPS, else the CPU
    device: str = ""
    row: tyro.conf.Fixed[str] = ""  # of the recipe: the word on the command line


def run_command(options_class: type[RunOptions], recipes: dict[str, dict[str, BaseStage]]) -> None:
    """The whole of a recipe's command line. `recipes`: scale -> name -> stage.

    The first word names a stage: `sft1` of the toy's scale, `paper:sft1` of the paper's. Sets up, prints
    the plan, fits (from the newest checkpoint, if there is one), saves.
    """
    options, defaults = stage_from_words(options_class, recipes)
    with one_line_errors():
        # Everything that a stage needs; what it leaves to the model and the data; where it lives
        kind = pick_device(options.device, default="").partition(":")[0]
        ranks = parallel.start(options.timeout, options.layout, kind)
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(options.stage.seed)
        setup = set_up(options, ranks)
        options = settled(options, defaults, setup)
        setup.directory = run_directory(options, setup)
        if ranks.main:
            print("\n".join(plan_of(setup, options)), flush=True)

        # Train, and save what came of it
        run = fit(setup, options.stage)
        shards.save_released(setup.model, options.out, ranks)
        if ranks.main:
            if isinstance(setup.reward, JudgedReward):
                print(setup.reward.report())
            setup.encoder.tokenizer.save(options.out)
            print(
                f"stage {options.stage.name}: loss {run.log[0]['loss']:.3f} -> {run.tail():.3f} in "
                f"{run.seconds:.0f} s; {run.skipped} steps skipped; model and log in {options.out}"
            )
        parallel.stop()


def stage_from_words(
    options_class: type[RunOptions], recipes: dict[str, dict[str, BaseStage]]
) -> tuple[RunOptions, RunOptions]:
    """The command line's options, and the row of the recipe that they started from."""
    # Every row of every scale is a subcommand, and its values are the defaults
    choices = {}
    for scale, stages in recipes.items():
        for name, stage in stages.items():
            word = name if scale == "toy" else f"{scale}:{name}"
            defaults = options_class(stage=stage, row=word)
            choices[word] = (f"{options_class.__doc__}\n\n{describe_stage(stage)}", defaults)

    # The rest of the command line overrides the row
    options = parse_subcommand(choices)
    _, defaults = choices[options.row]
    return options, defaults


def settled(options: RunOptions, defaults: RunOptions, setup: Setup) -> RunOptions:
    """The options with what the stage left to the model (the algorithm) and to the data (epochs).

    Raises ValueError for an option that the stage does not use.
    """
    refuse_unused(options, defaults, setup.model)
    stage = resolved(options.stage, setup.model)
    refuse_impossible(stage)
    refuse_in_stages(stage, options.layout)
    return replace(options, stage=replace(stage, steps=steps_of(setup, stage)))


def refuse_impossible(stage: BaseStage) -> None:
    """Raises ValueError for numbers, parts and objectives that no stage of this kind can have."""
    for name in ("steps", "rows", "length", "prompts", "updates", "passes", "group", "max_new"):
        value = getattr(stage, name, 1)
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1")
    for part in stage.trains:
        if part not in PARTS:
            raise ValueError(f"--trains {part}: choose from {', '.join(PARTS)}")
    if (stage.objective == "policy") != isinstance(stage, RLStage):
        raise ValueError(
            f"--objective {stage.objective}: policy belongs to the stages of rl.py, which take no other"
        )


def refuse_in_stages(stage: BaseStage, layout: Layout) -> None:
    """Raises ValueError for a stage that cannot train in a pipeline."""
    if layout.pp > 1 and stage.objective != "supervised":
        raise ValueError(
            f"--layout.pp {layout.pp}: a pipeline wants micro-batches of one size, packed rows; stage "
            f"{stage.name} has others, use --layout.shard"
        )


def run_directory(options: RunOptions, setup: Setup) -> RunDirectory:
    """Where the run lives: log, checkpoints, and the configuration that a resumed run must share."""
    # What may differ when a run goes on: where it is written, how often, by how many processes
    free = ("out", "workers", "resume", "save_every", "keep", "check_every", "held_out", "tracker")
    free += ("cache", "cache_gib", "grace", "timeout", "layout", "row", "device")
    free += ("judge_url", "judge_key", "judge_timeout")
    return RunDirectory(
        options.out,
        {key: value for key, value in asdict(options).items() if key not in free},
        options.save_every,
        options.keep,
        options.resume,
        checker(options, setup) if options.check_every else None,
        options.check_every,
        options.tracker,
        tokenizer=setup.encoder.tokenizer,
        data_identity=setup.source.identity() if options.data else "",
        grace=options.grace,
    )


def set_up(options: RunOptions, ranks: Ranks) -> Setup:
    """Source, model, tokenizer and encoder, as the options say."""
    # What it learns from
    source = World()
    if options.data:
        source = Folder(
            options.data,
            options.images,
            options.strict,
            options.allow_outside,
            cache_of(options),
            options.timeout,
        )

    # What learns: a model that exists (read in parts, once it is laid out), or a new one
    in_parts = reads_in_parts(options, ranks)
    if options.model:
        model, tokenizer = load_model(options.model, "meta" if in_parts else "cpu")
    else:
        model, tokenizer = new_model(options.preset, source, options.stage.seed)

    # Parts that begin again
    if options.llm:
        language, _ = load_model(options.llm)
        restart(model, language=language.language_model.state_dict())
    if options.fresh_adapter:
        restart(model, adapter_seed=options.stage.seed + 1)
    if options.experts:
        model = upcycled(model, options.experts, pieces=options.expert_pieces)

    # Choices about images and questions that are not the model's own
    chosen = {key: getattr(options, key) for key in ("any_resolution", "max_tiles", "msac")}
    config = replace(model.config, **{key: v for key, v in chosen.items() if v is not None})
    if options.position is not None:
        refuse_other_positions(options.position, config.vision.position)
        config = replace(config, vision=replace(config.vision, position=options.position))
        model.vision_model.config = config.vision
    model.config = config
    if options.think_prompt is not None:
        tokenizer.think_prompt = options.think_prompt

    # Onto the device, whole or in parts
    if in_parts:
        model = lay_out_and_read(model, options.model, ranks)
    else:
        model.to(ranks.device)
    model.train()

    # What goes along
    faults = source.faults if options.data else Faults(options.strict)
    encoder = Encoder(tokenizer, config, source.root)
    harvest = read_chains(options.harvest, encoder, faults) if options.harvest else None
    if not ranks.main:  # all ranks have read the same so far: one of them counts
        faults.counts.clear()
        faults.examples.clear()
        faults.tracebacks.clear()
    reward = judged_reward(options, encoder, ranks)
    return Setup(model, encoder, source, ranks, None, faults, options.workers, harvest, reward)


def reads_in_parts(options: RunOptions, ranks: Ranks) -> bool:
    """Whether a model goes from its files straight into shards; not where it is changed as a whole first."""
    changed = options.llm or options.fresh_adapter or options.experts
    whole_model = options.stage.objective != "next_patch"
    return bool(ranks.mesh and options.model and whole_model and not changed)


def lay_out_and_read(model: SailVL, directory: Path, ranks: Ranks) -> SailVL:
    """A model on the meta device -> sharded, each rank with the values of what it holds."""
    model = shard_model(model, ranks)
    device = "cpu" if ranks.layout.offload else ranks.device
    shards.materialise(model, weights_place(directory), device=device)
    return model


def judged_reward(options: RunOptions, encoder: Encoder, ranks: Ranks) -> JudgedReward | None:
    """The stage's reward with the judge at --judge-url; none without one. Its replies are kept in
    --out, so that a run which goes on asks nothing twice.

    Raises ValueError for a judge without a model's name, and for one that does not answer.
    """
    if not options.judge_url or getattr(options.stage, "reward", "") not in COMBINE:
        return None  # `refuse_unused` has a word for a judge that nothing asks
    if not options.judge_model:
        raise ValueError("--judge-url needs --judge-model NAME: the model's name on that server")

    judge = ChatEndpoint(
        options.judge_url,
        options.judge_model,
        options.judge_timeout,
        cache=options.out / "judge.jsonl",
        key_name=options.judge_key,
    )
    if ranks.main:
        judge.check()
    return JudgedReward(options.stage.reward, judge, encoder)


def cache_of(options: RunOptions) -> ShardCache:
    """Where copies of remote shards lie, if there are any."""
    return ShardCache(options.cache, int(options.cache_gib * 2**30))


def checker(options: RunOptions, setup: Setup) -> Callable[[int], dict]:
    """A check for the log: accuracy over some held-out samples, and what was said to the first four.

    "score" is the share that was wrong: the checkpoint with the lowest one is kept.
    """
    if options.data and not options.held_out:
        raise ValueError(
            "--check-every needs --held-out FILE: samples that --data does not contain"
        )
    if options.held_out:
        held_out = Folder(
            options.held_out,
            options.images,
            allow_outside=options.allow_outside,
            cache=cache_of(options),
            timeout=options.timeout,
        )
        encoder = replace(setup.encoder, root=held_out.root)
        samples = askable(held_out.first(64), encoder, held_out.faults)
        if held_out.faults.counts and setup.ranks.main:
            print(f"--held-out {options.held_out}:\n{held_out.faults.report()}")
        if not samples:
            raise ValueError(
                f"--held-out {options.held_out}: no sample can be graded\n{held_out.faults.report()}"
            )
    else:
        encoder = setup.encoder
        each = 64 // len(GRADED) + 1
        samples = [s for family in GRADED for s in World().held_out(family, each)]

    # Asked as the stage trains: RL's questions to think
    thinks = isinstance(options.stage, RLStage)
    longest = options.stage.max_new if thinks else 48

    def check(step: int) -> dict:
        with whole_weights(setup.model, setup.ranks) as model:
            scores, graded = evaluate(model, encoder, samples, thinks, max_new=longest)
        accuracy = scores["overall"].accuracy
        said = [{"question": g.question, "truth": g.truth, "said": g.said} for g in graded[:4]]
        return {"accuracy": accuracy, "score": 1 - accuracy, "said": said}

    return check
