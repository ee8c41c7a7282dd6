"""A stage: one row of the recipe, as data.

What it teaches: stages of training differ in *what trains, on what, at which rate, scored how*, and
all of that fits in a dataclass. Nothing here runs. `recipe.fit` looks up the two functions that a
stage names, and `train.train` is one loop for all of them:

    samples     where its samples come from          recipe.SAMPLES: answers, chains, ...
    objective   what makes a loss of a batch         objective.OBJECTIVES: supervised, policy, ...

`pretrain.py`, `sft.py` and `rl.py` hold the rows: the paper's and, beside them, the toy's. Every field
is an option on the command line, and its comment is the option's help.

Legend: B rows, T tokens a row. A step sees rows * length tokens over all ranks, padding included.
"""

import math
from dataclasses import dataclass, field

# What can be trained, and the module of `vlm.SailVL` that it is.
PARTS = {"vision": "vision_model", "adapter": "mlp1", "llm": "language_model"}
ALL = tuple(PARTS)

SCHEDULES = ("constant", "cosine", "wsd")

# Options that mean something for a mixture of experts only.
EXPERT_OPTIONS = ("balance", "router_z", "expert_bias_rate", "replay")


@dataclass(frozen=True)
class BaseStage:
    """What every stage has: what trains, on which mixture, for how long, and how it is stepped."""

    name: str = ""
    trains: tuple[str, ...] = ALL  # vision, adapter, llm; the other parts are frozen
    mixture: dict[str, float] = field(default_factory=dict)  # task -> its weight
    samples: str = "answers"  # where samples come from: answers, chains, fusion, questions
    objective: str = "supervised"  # what makes a loss of a batch: supervised, policy, next_patch
    steps: int = 100  # updates of the weights
    epochs: float = 0.0  # passes over --data, in place of steps; 0: steps count
    accumulate: int = 1  # micro-batches a step on each rank; 0: as many as rows (not in RL)
    turns: int = 0  # questions per drawn picture; 0: as many as its kind usually gets
    seed: int = 0  # of the data's order, and of everything that is drawn

    # The optimizer
    lr: float = 3e-3  # peak learning rate
    schedule: str = "cosine"  # constant, cosine (to a tenth), wsd (to zero in the last fifth)
    warmup: float = 0.05  # share of the steps
    optimizer: str = "muon"  # muon (matrices; AdamW for the rest) or adamw
    weight_decay: float = 0.0  # of matrices only
    lr_scale: dict[str, float] = field(default_factory=dict)  # part -> multiple of the rate
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's
    clip: float = 1.0  # gradient norm

    # Mixture of experts
    balance: float = 0.001  # coefficient of the expert balance loss
    router_z: float = 0.0  # coefficient of the router z-loss
    expert_bias_rate: float = 0.0  # balance by a bias on the choice instead: its step (not saved)

    # Precision and memory
    precision: str = "auto"  # of the forward pass: fp32, bf16; auto: bf16 on accelerators but MPS
    recompute: bool = False  # keep no activations inside blocks, make them again instead
    compile: bool = False  # torch.compile each block

    @property
    def searches_rate(self) -> bool:
        """Whether AdaLRS looks for the rate while this stage trains."""
        return False

    def rate(self, step: int) -> float:
        """Learning rate of a step by the schedule alone. Raises ValueError for an unknown schedule."""
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; choose {', '.join(SCHEDULES)}")

        # Up, linearly
        warmup_steps = max(1, int(self.warmup * self.steps))
        if step < warmup_steps:
            return self.lr * (step + 1) / warmup_steps

        # Then down: `progress` runs from 0 at the end of the warm-up to 1 at the last step
        progress = (step - warmup_steps) / max(1, self.steps - warmup_steps)
        if self.schedule == "cosine":
            return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        if self.schedule == "wsd":
            return self.lr * min(1.0, 5 * (1 - progress))
        return self.lr


@dataclass(frozen=True)
class Stage(BaseStage):
    """A stage on packed rows: pre-training and fine-tuning."""

    rows: int = 8  # packed rows a step, over all ranks
    length: int = 512  # tokens a row; a longer sample is left out, and counted
    weighting: str = "token"  # of losses: token, sample, sqrt; sequence: Eq. 2 and 3 as they are
    everything: bool = False  # supervise all text, not only answers
    think: float = 0.1  # samples "fusion": the share of chains

    # AdaLRS
    adalrs: bool = False  # search the rate while training
    adalrs_k: int = 0  # steps of a window; 0: a twentieth of the run, at least 10
    adalrs_window: tuple[float, float] = (0.1, 0.4)  # share of the run in which to search
    adalrs_rule: str = "safe"  # safe (ours: do no harm) or paper (Eq. 1 and nothing else)
    adalrs_up: float = 3.0  # alpha of Eq. 1: a raise
    adalrs_down: float = 2.0  # beta: a cut
    adalrs_decay: float = 0.99  # lambda: of both, with every adjustment
    adalrs_offload: bool = False  # keep the snapshots in host memory

    @property
    def searches_rate(self) -> bool:
        return self.adalrs


@dataclass(frozen=True)
class RLStage(BaseStage):
    """A stage whose batches are rollouts. A rollout batch gives `updates` of the `steps`."""

    samples: str = "questions"
    objective: str = "policy"
    algorithm: str = ""  # of policy_losses.ALGORITHMS; none: dapo, for a MoE gspo (paper)
    reward: str = "verifiable"  # verifiable (answer x format), mixed, product, random

    # Rollouts
    prompts: int = 64  # groups in a rollout batch, over all ranks
    group: int = 8  # completions per prompt
    updates: int = 2  # minibatches per rollout batch
    passes: int = 1  # times that each rollout is used
    batch: int = 0  # prompts in one call of generate (memory); 0: a rank's whole share
    at_once: int = 0  # answers that are sampled at once (memory); 0: all of a call
    temperature: float = 1.0
    max_prompt: int = 16384  # tokens; a longer prompt is left out, and counted
    max_new: int = 64  # tokens
    overlong: int = 8  # tokens before max_new that are punished, linearly to -1 (DAPO Eq. 13)
    dynamic: bool = True  # leave out groups that are all right or all wrong (DAPO)
    tries: int = 3  # rollout rounds to fill the batch with groups that are neither

    # The loss
    low: float | None = None  # clips the ratio to [1 - low, 1 + high]; none: the algorithm's
    high: float | None = None
    aggregation: str = ""  # tokens, sequences, budget or completions; none: the algorithm's own
    kl: float = 0.0  # weight of the KL penalty against the model that the stage starts from
    estimator: str = "k3"  # of the KL: k1, k2 or k3
    replay: bool = False  # update with the experts that the sampling policy chose (MoE)
