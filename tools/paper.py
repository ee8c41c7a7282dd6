"""Where in this project is section 3.2.3, Eq. 2, the second row of Table 5? The map behind PAPER.md, as data.

What it teaches: a reimplementation is read with the paper beside it, so every part of the paper has a line
here: what it says, where it stands in the code, and what was left out ("not built here, because ..."). A test
fails when a part has no line, a place is no longer there, or PAPER.md is not what this file says.

    PARTS: (kind, number, what it says, places, remark)  -->  `paper_blocks`  -->  PAPER.md  (`make readme`)

A place is "file.py: name", or a file or folder alone; what is meant is the function or class of that name.
"""

from typing import NamedTuple

# All parts that the report has, as far as it is divided. Bold titles inside a section are not counted.
NUMBERS: dict[str, tuple[str, ...]] = {
    "equation": ("1", "2", "3"),
    "section": tuple(
        "1 2 2.1 2.1.1 2.1.2 2.2 3 3.1 3.1.1 3.1.2 3.2 3.2.1 3.2.2 3.2.3 3.2.4 4 4.1 4.1.1 4.1.2 "
        "4.1.3 4.2 4.2.1 "
        "4.2.2 4.2.3 4.2.4 4.2.5 5 5.1 5.2 6 6.1 6.2".split()
    ),
    "table": ("1", "2", "3", "4", "5", "6", "7", "8", "9", "10"),
    "figure": ("1", "2", "3", "4", "5", "6"),
}
NOT_BUILT = "not built here, because "


class PaperPart(NamedTuple):
    """A line of the map. number: as printed, with a row or column after a comma ("4, Mixed RL")."""

    kind: str
    number: str
    says: str
    places: tuple[str, ...]
    remark: str = ""

    @property
    def of(self) -> str:
        """The part as printed, without its row."""
        return self.number.partition(",")[0]


def equation(number: str, says: str, *places: str, remark: str = "") -> PaperPart:
    return PaperPart("equation", number, says, places, remark)


def section_of_paper(number: str, says: str, *places: str, remark: str = "") -> PaperPart:
    return PaperPart("section", number, says, places, remark)


def table_of_paper(number: str, says: str, *places: str, remark: str = "") -> PaperPart:
    return PaperPart("table", number, says, places, remark)


def figure_of_paper(number: str, says: str, *places: str, remark: str = "") -> PaperPart:
    return PaperPart("figure", number, says, places, remark)


EQUATIONS = (
    equation(
        "1",
        "AdaLRS: raise, lower or leave the rate, by the slope of the loss",
        "adalrs.py: AdaLRS",
        "adalrs.py: gain",
        "adalrs.py: fit_line",
        "lessons/trial.py: trial_numbers",
        remark="`--adalrs-rule paper` is the equation and nothing else; the default, `safe`, is "
        "ours. By hand: `make lesson`.",
    ),
    equation(
        "2",
        "long CoT: log P of chain and answer, summed, divided by samples",
        "objective.py: supervised",
        "sft.py: AS_PRINTED",
        "packing.py: Batch",
        remark="`--weighting sequence`; which tokens: data/encode.py, and `make lesson` (mask).",
    ),
    equation(
        "3",
        "think-fusion: the same over chains and direct answers together",
        "objective.py: supervised",
        "curation/chains.py: Blend",
        "recipe.py: fusion",
    ),
)

SECTIONS = (
    section_of_paper(
        "1",
        "introduction: 776B tokens, three contributions",
        "README.md",
        "LOG.md",
        remark="A toy and the recipes; the tokens themselves were not trained.",
    ),
    section_of_paper("2", "ViT, adapter, language model", "vlm.py: SailVL", "vlm.py: PRESETS"),
    section_of_paper(
        "2.1",
        "vision encoder and adapter",
        "vit.py: ViT",
        "adapter.py: Adapter",
        "adapter.py: pixel_shuffle",
    ),
    section_of_paper(
        "2.1.1, stage I",
        "warm-up adaptation: the adapter, 8M samples, 2e-4, 1920",
        "pretrain.py: STAGE1",
        "pretrain.py: PAPER",
        remark="`pretrain.py paper:vit1`",
    ),
    section_of_paper(
        "2.1.1, stage II",
        "fine-grained alignment: ViT and adapter, 14.7M, 2e-5, 512",
        "pretrain.py: STAGE2",
        "pretrain.py: PAPER",
        remark="`pretrain.py paper:vit2`",
    ),
    section_of_paper(
        "2.1.1, stage III",
        "world knowledge: everything, 36.5M, 1e-5, 512",
        "pretrain.py: STAGE3",
        "pretrain.py: PAPER",
        remark="`pretrain.py paper:vit3`",
    ),
    section_of_paper(
        "2.1.2, fixed",
        "tiles of 448 x 448 and a thumbnail, 2 x 2 patches a token",
        "data/tiling.py: tiles_of",
        "data/tiling.py: grid_for",
        "vit.py: ViT",
        "adapter.py: pixel_shuffle",
    ),
    section_of_paper(
        "2.1.2, AnyRes",
        "any resolution: the learned positions are resized to the image",
        "vit.py: ViT.position_table",
        "vit.py: ViT.rope",
        "data/tiling.py: fit_to_patches",
        remark="`--any-resolution`; the text says resized embeddings, Figure 2 says 2-D RoPE: "
        "`--position rope2d` adds it. Bicubic, and sides of whole visual tokens, are our choice.",
    ),
    section_of_paper(
        "2.2, layer",
        "Qwen3's sparse feed-forward",
        "moe.py: MoE",
        "moe.py: route",
        "moe.py: expert_mixture",
        remark="By hand: `make lesson` (routing).",
    ),
    section_of_paper(
        "2.2, balance",
        "auxiliary load-balancing loss, average activation across ranks",
        "moe.py: balance_loss",
        "objective.py: router_losses",
        remark="No formula is published: Qwen3-MoE's.",
    ),
    section_of_paper(
        "2.2, calibration",
        "probing on language data, maximal activation entropy",
        "calibrate.py: calibrate_model",
        "calibrate.py: spread_router",
        "claims/calibration.py: measure_calibration",
        remark="No procedure is published: our own design.",
    ),
    section_of_paper("3", "pre-training", "pretrain.py: PAPER", "recipe.py: run_command"),
    section_of_paper("3.1", "its data", "curation/README.md", "data/mixture.py: Dataset"),
    section_of_paper(
        "3.1.1, captions",
        "300M captions scored, filtered to 250M: SAIL-Caption2",
        "curation/captioner.py: caption_files",
        "curation/judges.py: judge_captions",
        "curation/judges.py: filter_captions",
        "curation/judges.py: uniform_captions",
        remark="The systems, on your pictures. The 250M captions: not published.",
    ),
    section_of_paper(
        "3.1.1, charts",
        "charts drawn from code that a language model writes",
        "curation/charts.py: make_charts",
        "curation/chart_check.py: check_charts",
        remark="A specification is written instead of code, so that nothing that a model wrote is ever run.",
    ),
    section_of_paper(
        "3.1.2",
        "captions become questions and answers",
        "curation/caption2qa.py: write_questions",
        "curation/caption2qa.py: question_steps",
    ),
    section_of_paper("3.2", "the recipe of pre-training", "pretrain.py: PAPER", "train.py: train"),
    section_of_paper(
        "3.2.1, basic",
        "64M samples, batch 2048, the adapter alone, AdaLRS from 2e-4",
        "pretrain.py: PAPER",
        "train.py: rate_search",
        remark="`pretrain.py paper:basic`",
    ),
    section_of_paper(
        "3.2.1, multi-task",
        "180M samples, half understanding, half instruction, all parameters",
        "pretrain.py: MULTITASK",
        "pretrain.py: PAPER",
        remark="`pretrain.py paper:multitask`; rate and batch are not published: ours.",
    ),
    section_of_paper(
        "3.2.2, data sets",
        "ratios between data sets, while the adapter learns",
        "curation/balance.py: balance_datasets",
        "data/mixture.py: Dataset",
    ),
    section_of_paper(
        "3.2.2, n-grams",
        "rebalancing at the level of n-grams",
        "curation/balance.py: thin_file",
        "curation/balance.py: thinned",
        remark="No formula is published: our own.",
    ),
    section_of_paper(
        "3.2.3",
        "AdaLRS",
        "adalrs.py: AdaLRS",
        "claims/rates.py: measure_rates",
        remark="RESULTS.md has it on 19 problems.",
    ),
    section_of_paper(
        "3.2.4",
        "performance over the logarithm of multi-task tokens",
        "claims/alignment.py: log_law",
        "claims/alignment.py: fit_curve",
        "claims/data_quality.py: scale_arms",
        remark="The form of the law, at toy size; the 360B tokens were not trained.",
    ),
    section_of_paper(
        "4",
        "post-training",
        "sft.py: PAPER",
        "rl.py: PAPER",
        "claims/posttraining.py: compare_posttraining",
    ),
    section_of_paper("4.1", "its data", "curation/README.md"),
    section_of_paper(
        "4.1.1",
        "SAIL-Video: alignment, richness, difficulty of questions",
        "curation/video_scores.py: score_videos",
        "data/images.py: frames_of",
    ),
    section_of_paper(
        "4.1.2",
        "SAIL-Instruction2: evaluated data sets, latent classes, uniform sampling, answered again",
        "curation/evaluating.py: evaluate_data",
        "curation/classes.py: balance_classes",
        "curation/classes.py: answer_again",
        remark="Clustering, layer and number of classes are not published: ours.",
    ),
    section_of_paper(
        "4.1.3",
        "chains of thought and RL questions: one form, filters, pass@4, free response",
        "curation/long_cot.py: curate_chains",
        "curation/difficulty.py: measure_difficulty",
        "curation/free_response.py: convert_choices",
        remark="Thresholds are not published: ours.",
    ),
    section_of_paper("4.2", "the recipe of post-training", "sft.py: PAPER", "rl.py: PAPER"),
    section_of_paper(
        "4.2.1, phases",
        "four phases of fine-tuning, the last half video",
        "sft.py: PAPER",
        "sft.py: HALF_VIDEO",
        remark="`sft.py paper:sft1` to `paper:sft4`",
    ),
    section_of_paper(
        "4.2.1, soup",
        "the average of runs of one origin",
        "soup.py: average",
        "soup.py: greedy",
        "soup.py: distance",
    ),
    section_of_paper(
        "4.2.2",
        "long-CoT fine-tuning",
        "sft.py: PAPER",
        "recipe.py: chains",
        "data/encode.py: with_thinking",
        remark="`sft.py paper:long-cot`",
    ),
    section_of_paper(
        "4.2.3, rewards",
        "answer (the box) and format (the tags), each 0 or 1",
        "rewards.py: answer_reward",
        "rewards.py: format_reward",
        "rewards.py: verifiable",
        "graders.py: grade",
    ),
    section_of_paper(
        "4.2.3, algorithms",
        "DAPO for dense models, GSPO for experts",
        "policy_losses.py: ALGORITHMS",
        "objective.py: policy",
        "rollout.py: Rollouts",
        remark="`rl.py paper:verifiable`; group size, temperature, KL are not published: ours. By "
        "hand: `make lesson` (group).",
    ),
    section_of_paper(
        "4.2.4",
        "think-fusion: 900K direct answers and 100K of the policy's own chains",
        "recipe.py: fusion",
        "curation/chains.py: harvest_chains",
        "curation/chains.py: rejection_sample",
        remark="`sft.py paper:fusion`",
    ),
    section_of_paper(
        "4.2.5",
        "RL with mixed rewards: answer, thinking, format; a judge where no rule can",
        "rewards.py: mixed_reward",
        "rewards.py: COMBINE",
        "rewards.py: judged_think_reward",
        "infra/endpoint.py: ChatEndpoint",
        remark="`rl.py paper:mixed`; weights are not published: ours. `product` is that of the "
        "team's SAIL-RL.",
    ),
    section_of_paper("5", "infrastructure", "scale/README.md", "scale/parallel.py: Ranks"),
    section_of_paper(
        "5.1, stream packing",
        "samples joined from a buffer to full rows, each seeing itself alone",
        "packing.py: Rows",
        "packing.py: choose_subset",
        "attention.py: packed_attention",
        remark="The rule of choice is not published: ours. By hand: `make lesson` (rows).",
    ),
    section_of_paper(
        "5.1, visual packing",
        "equal visual tokens on every device",
        "packing.py: Rows.wanted_vision",
        "bench/packing_rules.py: compare_rules",
    ),
    section_of_paper(
        "5.2, kernels",
        "fused kernels for experts, attention, norms",
        "kernels/moe_triton.py: TritonExperts",
        "kernels/block_triton.py: TritonRMSNorm",
        "attention.py: attend_by_flash",
    ),
    section_of_paper(
        "5.2, NPU",
        "expert and pipeline parallelism on Ascend",
        "kernels/npu.py: grouped_product_npu",
        "scale/experts.py: MixtureElsewhere",
        "scale/pipeline.py: Staged",
        remark="Layers and experts in parts are tested on CPU processes; no NPU has run it.",
    ),
    section_of_paper(
        "5.2, NVIDIA",
        "ZeRO-2 with moments in host memory",
        "scale/shard.py: shard_model",
        "scale/layout.py: Layout",
        remark="FSDP2, which cuts weights as well; offloading of moments is "
        + NOT_BUILT
        + "moments are cut instead.",
    ),
    section_of_paper("6", "evaluation", "evaluate.py: evaluate"),
    section_of_paper(
        "6.1",
        "benchmarks, judges, VLMEvalKit",
        "evaluate.py: evaluate_files",
        "graders.py: GRADERS",
        "data/container_tsv.py",
        "harness/vlmevalkit.py",
        remark="VLMEvalKit's files are read, and its own code asks our models; the 106 benchmarks and "
        "their judge models are " + NOT_BUILT + "nothing is downloaded here.",
    ),
    section_of_paper(
        "6.2",
        "results of vision encoder, base and thinking models",
        "claims/alignment.py: measure_alignment",
        "RESULTS.md",
        remark="At toy size; numbers of the paper's models are cited, not measured.",
    ),
)

TABLES = (
    table_of_paper("1, 2B", "SAIL-ViT-Huge, Qwen3-1.7B", "vlm.py: PRESETS", "vlm.py: QWEN3"),
    table_of_paper("1, 8B", "SAIL-ViT-Huge, Qwen3-8B", "vlm.py: PRESETS", "vlm.py: QWEN3"),
    table_of_paper("1, 30B-A3B", "SAIL-ViT-Huge, Qwen3-30B-A3B", "vlm.py: PRESETS", "moe.py: MoE"),
    table_of_paper(
        "2",
        "precision and recall of score judges and yes-or-no judges",
        "curation/judges.py: measure_judges",
        "claims/judges.py: claim_judges",
        remark="Measured in the drawn world, where the truth is known.",
    ),
    table_of_paper(
        "3, SAIL-ViT", "121B tokens; connector, then ViT too, then all", "pretrain.py: PAPER"
    ),
    table_of_paper("3, basic", "128B tokens, the connector", "pretrain.py: PAPER"),
    table_of_paper("3, multi-task", "360B tokens, all", "pretrain.py: PAPER"),
    table_of_paper("3, SFT", "42B, 40B, 16B, 70B tokens, all", "sft.py: PAPER"),
    table_of_paper("4, LongCoT SFT", "0.4B tokens, rows of 20,480", "sft.py: PAPER"),
    table_of_paper("4, Verifiable RL", "0.1B tokens, 16,384 + 4,096", "rl.py: PAPER"),
    table_of_paper("4, Think-Fusion SFT", "1B tokens", "sft.py: PAPER"),
    table_of_paper("4, Mixed RL", "0.2B tokens", "rl.py: PAPER"),
    table_of_paper(
        "5, homologous",
        "the soup beats its ingredients",
        "soup.py: cook_soup",
        "claims/posttraining.py: Comparisons",
    ),
    table_of_paper(
        "5, heterologous",
        "a soup of strangers knows nothing",
        "soup.py: farthest",
        "soup.py: STRANGERS",
        remark="A mixture of strangers is refused, with their distance.",
    ),
    table_of_paper(
        "6",
        "a probe on the ViT's features",
        "claims/alignment.py: table6",
        "claims/alignment.py: probe_accuracy",
        remark="On drawn pictures; ImageNet is " + NOT_BUILT + "nothing is downloaded here.",
    ),
    table_of_paper(
        "7",
        "distances between visual and text features",
        "claims/alignment.py: table7",
        "claims/alignment.py: distances",
        remark="Formulas are not published: ours.",
    ),
    table_of_paper(
        "8",
        "benchmarks of models under 4B",
        remark=NOT_BUILT + "benchmarks and judges are downloads; "
        "`evaluate.py --data bench.tsv` grades a file that you have.",
    ),
    table_of_paper(
        "9",
        "benchmarks of the 8B and A3B, 16 random frames a video",
        "data/sample.py: Video",
        "data/sample.py: MAX_FRAMES",
        remark="The frames. The benchmarks: " + NOT_BUILT + "as of Table 8.",
    ),
    table_of_paper(
        "10",
        "OpenCompass's reasoning benchmarks",
        remark=NOT_BUILT + "as of Table 8; thinking is graded by `evaluate.py --think`.",
    ),
)

FIGURES = (
    figure_of_paper("1", "scores of models by size", remark=NOT_BUILT + "it draws Tables 8 to 10."),
    figure_of_paper(
        "2",
        "the architecture, fixed and any resolution",
        "vlm.py: SailVL",
        "vit.py: ViT",
        remark="Ours is a drawing in text: README.md, the way of the data.",
    ),
    figure_of_paper(
        "3", "the construction of data", "curation/README.md", "curation/__main__.py: CONTENTS"
    ),
    figure_of_paper(
        "4",
        "the scaling curve of multi-task pre-training",
        "claims/alignment.py: log_law",
        remark="At toy size.",
    ),
    figure_of_paper(
        "5",
        "fine-tuning by instruction sets of equal size",
        "curation/evaluating.py: composition_evaluation",
        "claims/data_quality.py: balance_arms",
    ),
    figure_of_paper(
        "6",
        "visual and text features, in two dimensions",
        "claims/alignment.py: pca",
        "claims/alignment.py: vision_tokens",
        remark="The numbers behind it; the scatter plot itself is "
        + NOT_BUILT
        + "Table 7 says the same.",
    ),
)

# What SAIL-VL2 uses of other papers: equation, paper, where.
CITED = (
    (
        "attention, QK-norm, rotary positions",
        "Qwen3",
        ("llm.py: SelfAttention", "llm.py: rotary_table"),
    ),
    ("the encoder, native resolution", "AIMv2, 2411.14402", ("vit.py: ViT", "vit.py: sincos")),
    ("the velocity and its error", "AdaLRS, 2506.13274", ("adalrs.py: gain",)),
    (
        "group advantage, Eq. 9; clip-higher, Eq. 8",
        "DAPO, 2503.14476",
        ("policy_losses.py: group_advantage", "policy_losses.py: ppo"),
    ),
    ("soft overlong penalty, Eq. 13", "DAPO", ("policy_losses.py: overlong_penalty",)),
    ("dynamic sampling", "DAPO", ("rollout.py: Group.disagrees", "rollout.py: Rollouts.collect")),
    (
        "sequence ratio, Eq. 5 to 7; by token, Eq. 13 and 14",
        "GSPO, 2507.18071",
        ("policy_losses.py: gspo", "policy_losses.py: gspo_token"),
    ),
    ("the product of rewards", "SAIL-RL, 2511.02280", ("rewards.py: product",)),
    (
        "statistics of captions, side-by-side comparison",
        "SAIL-VL, Tables 1 and 8",
        (
            "curation/caption_statistics.py: measure_captions",
            "curation/side_by_side.py: compare_files",
        ),
    ),
    (
        "phases and stages of the first SAIL-VL",
        "SAIL-VL, Tables 2 and 3",
        ("pretrain.py: V1", "sft.py: V1"),
    ),
)

PARTS: tuple[PaperPart, ...] = EQUATIONS + SECTIONS + TABLES + FIGURES


# ------------------------------------------------------------------------------------------ the page


def linked_places(places: tuple[str, ...]) -> str:
    """Links, a file once with all its names."""
    names: dict[str, list[str]] = {}
    for place in places:
        path, _, name = place.partition(": ")
        names.setdefault(path, []).append(name)
    links = []
    for path, inside in names.items():
        shown = ", ".join(f"`{name}`" for name in inside if name)
        links.append(f"[{path}]({path})" + (f" {shown}" if shown else ""))
    return "; ".join(links)


def map_table(parts: tuple[PaperPart, ...]) -> str:
    """The lines of one kind as a table."""
    lines = ["| in the paper | what it says | where | remark |", "|---|---|---|---|"]
    for part in parts:
        where = linked_places(part.places) or "–"
        lines.append(f"| {part.number} | {part.says} | {where} | {part.remark} |")
    return "\n".join(lines)


def cited_table() -> str:
    """What comes from other papers."""
    lines = ["| what | paper | where |", "|---|---|---|"]
    lines += [f"| {what} | {paper} | {linked_places(places)} |" for what, paper, places in CITED]
    return "\n".join(lines)


def paper_blocks() -> dict[str, str]:
    """Every block of PAPER.md."""
    return {
        "equations": map_table(EQUATIONS),
        "sections": map_table(SECTIONS),
        "tables": map_table(TABLES),
        "figures": map_table(FIGURES),
        "cited": cited_table(),
    }
