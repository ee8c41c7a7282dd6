"""The command line of the recipes: a stage by name, every knob an option.

What it teaches: an option is a dataclass field, its comment is its help, and an unknown one is an error (tyro does all
three). `--stage NAME --scale toy|paper` picks a row of the recipe; any other option overrides one of its values.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from data.encode import Encoder
from data.readers import Folder
from data.sample import Faults
from data.world import FAMILIES, World, corpus
from infra.checkpoint import RunDirectory
from scale import parallel
from tokenizer import Tokenizer, train_bpe
from vlm import PRESETS, SailVL

THINK = "think first."  # the toy's request to think: the released sentence would be longer than its answers


@dataclass
class RunOptions:
    """Where data and model come from and where the result goes."""

    data: Path | None = (
        None  # JSON, JSONL, TSV, tar, parquet, a folder of them or a mixture file (data/readers.py); none: the toy world
    )
    images: Path | None = None  # folder of its images; none: beside the file
    model: Path | None = None  # directory to start from; none: a new toy model and tokenizer
    preset: str = "toy"  # sizes of a new model: toy, toy-moe, SAIL-VL2-2B, ...
    out: Path = Path("runs/out")  # directory for the trained model and the log
    workers: int = (
        0  # processes on each rank that read and decode ahead; 0: the training process itself
    )
    strict: bool = False  # make the first bad sample an error
    resume: bool = (
        True  # go on from the newest whole checkpoint in --out; False: remove them and begin again
    )
    save_every: int = 200  # steps between checkpoints (one more at SIGTERM and at the end)
    keep: int = 2  # newest checkpoints to keep, beside the best
    check_every: int = 0  # steps between checks: accuracy on held-out samples and some answers in the log; 0: never
    held_out: Path | None = None  # data to check on; none: held-out scenes of the toy world
    tracker: str = ""  # module to log to as well: wandb, trackio


def parse(options: type, recipes: dict[str, dict]):
    """`--stage` and `--scale` choose the defaults, tyro reads the rest. Raises SystemExit for anything unknown."""
    argv = list(sys.argv[1:])
    chosen = {"--scale": "toy", "--stage": None}
    for flag in chosen:
        for i, word in enumerate(argv):
            if word == flag or word.startswith(flag + "="):
                value = word.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
                chosen[flag] = value
                del argv[i : i + 1 + ("=" not in word)]
                break
    default = options()
    if chosen["--scale"] not in recipes:
        sys.exit(f"--scale {chosen['--scale']!r}: choose from {', '.join(recipes)}")
    stages = recipes[chosen["--scale"]]
    name = chosen["--stage"] or default.stage.name
    if name not in stages:
        sys.exit(f"--stage {name!r}: choose from {', '.join(stages)}")
    default = dataclasses.replace(default, stage=stages[name])
    note = f"Stages (--stage): {', '.join(stages)}. Scales (--scale): {', '.join(recipes)}. Defaults shown are of stage {name}."
    return tyro.cli(
        options,
        default=default,
        args=argv,
        description=f"{options.__doc__}\n\n{note}",
        config=(tyro.conf.FlagConversionOff,),
    )


def new_model(preset: str, source, seed: int = 0) -> tuple[SailVL, Tokenizer]:
    """A toy-sized model with random weights and a tokenizer trained on the source's own text."""
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset!r}: choose from {', '.join(PRESETS)}")
    texts = (
        corpus(3000)
        if isinstance(source, World)
        else [
            p
            for s in source.first(20000)
            for m in s.messages
            for p in m.parts
            if isinstance(p, str)
        ]
    )
    tokenizer = Tokenizer(
        train_bpe(texts + [THINK, "user\n", "assistant\n", "\\boxed{"], 440), "", THINK
    )
    config = PRESETS[preset]
    vocabulary = -(-len(tokenizer) // 16) * 16  # rounded up: kernels like it
    config = dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, vocab_size=vocabulary),
        image_token_id=tokenizer.image,
    )
    return SailVL(config).init_weights(seed), tokenizer


def checker(o: RunOptions, model: SailVL, encoder: Encoder):
    """A check for the log: accuracy over 64 held-out samples, and what was said to the first four. Score: the share wrong."""
    from evaluate import evaluate

    if o.data and not o.held_out:
        raise ValueError(
            "--check-every needs --held-out FILE: samples that --data does not contain"
        )
    samples = (
        Folder(o.held_out, o.images).first(64)
        if o.held_out
        else [s for family in FAMILIES for s in World().held_out(family, 64 // len(FAMILIES) + 1)]
    )

    def check(step: int) -> dict:
        scores, graded = evaluate(model, encoder, samples)
        said = [{"question": g.question, "truth": g.truth, "said": g.said} for g in graded[:4]]
        return {
            "accuracy": scores["overall"].accuracy,
            "score": 1 - scores["overall"].accuracy,
            "said": said,
        }

    return check


def run(o: RunOptions, recipes, stage_runner) -> int:
    """Set up world, source and model, run the chosen stage (from its newest checkpoint, if any), save the result."""
    from generate import load_model

    world = parallel.start()
    torch.manual_seed(o.stage.seed)
    source = Folder(o.data, o.images, o.strict) if o.data else World()
    model, tokenizer = load_model(o.model) if o.model else new_model(o.preset, source, o.stage.seed)
    model.to(world.device).train()
    config = {
        k: v
        for k, v in dataclasses.asdict(o).items()
        if k in ("data", "images", "model", "preset", "stage")
    }
    if world.main:
        print(json.dumps(dataclasses.asdict(o), default=str))
    encoder = Encoder(tokenizer, model.config, source.root)
    faults = source.faults if o.data else Faults(o.strict)
    check = checker(o, model, encoder) if o.check_every else None
    home = RunDirectory(
        o.out, config, o.save_every, o.keep, o.resume, check, o.check_every, o.tracker
    )
    result = stage_runner(model, o.stage, source, encoder, world, home, faults)
    if world.main:
        model.save_pretrained(o.out)
        tokenizer.save(o.out)
        print(
            f"stage {o.stage.name}: loss {result.log[0]['loss']:.3f} -> {result.tail():.3f} in {result.seconds:.0f} s; "
            f"{result.skipped} steps skipped; model and log in {o.out}"
        )
    parallel.stop()
    return 0
