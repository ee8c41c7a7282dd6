"""Text to ids and back: a byte-level BPE in a `tiktoken.Encoding`, and the chat template.

What it teaches: (1) BPE training fits in forty lines; (2) a chat prompt is built as *ids*, segment by segment, and never as
one string that is then searched: that is what makes the label mask exact and makes it impossible for text from data to
become a control token (`encode_ordinary` never yields one).

Template, as in the released conversation code (no newline after `<|im_end|>`):

    <|im_start|>system\\n{system}<|im_end|><|im_start|>user\\n<img><IMG_CONTEXT>*n</img>\\n{question}<|im_end|>
    <|im_start|>assistant\\n{answer}<|im_end|>            and with thinking   <think>{chain}</think>{answer}<|im_end|>

Only the assistant's text and its `<|im_end|>` are supervised. Real weights use the exact Qwen3 vocabulary, read from a
`tokenizer.json`, a `vocab.json`, or a tiktoken rank file (`*.tiktoken`); the toy trains its own.
"""
import base64
import collections
import json
from pathlib import Path

import tiktoken

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# The released added tokens, in the order of their ids (151643 ...).
ADDED = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
         "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
         "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
         "<tool_response> </tool_response> <think> </think> <img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> "
         "<box> </box>").split()
RELEASED_SYSTEM = "你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, 是一个有用无害的人工智能助手。"
THINK_PROMPT = ("You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The "
                "reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}.")


class Tokenizer:
    """Ranks (bytes -> id) plus the added tokens after them.

    `system` is the system prompt that the template opens with ("" leaves the turn out) and `think_prompt` the sentence that
    asks for thinking; both belong to the weights that were trained with them, so they are saved beside the ranks.
    """

    def __init__(self, ranks: dict[bytes, int], system: str = RELEASED_SYSTEM, think_prompt: str = THINK_PROMPT):
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("tokenizer ranks must be 0..n-1 without gaps; the vocabulary file is not a plain BPE vocabulary")
        self.ranks, self.system, self.think_prompt = ranks, system, think_prompt
        self.special = {name: len(ranks) + i for i, name in enumerate(ADDED)}
        self.encoding = tiktoken.Encoding("nanosail", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=self.special)
        self.end, self.pad = self.special["<|im_end|>"], self.special["<|endoftext|>"]
        self.image = self.special["<IMG_CONTEXT>"]
        self.think, self.unthink = self.special["<think>"], self.special["</think>"]
        self._user, self._assistant, self._system = (
            [self.special["<|im_start|>"]] + self.encode(role + "\n") for role in ("user", "assistant", "system"))

    def __len__(self) -> int:
        return self.encoding.n_vocab

    def encode(self, text: str) -> list[int]:
        """Text from anywhere -> ids, none of them a control token."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids) -> str:
        """Ids -> text; ids past the vocabulary (the model's padding rows) are left out."""
        return self.encoding.decode([i for i in map(int, ids) if i < len(self)], errors="replace")

    def render(self, messages, image_tokens: list[int], prompt_only: bool = False) -> tuple[list[int], list[bool]]:
        """Messages (see data.Message) -> ids, and for each whether it is supervised.

        image_tokens: visual tokens of each image part, in order. `prompt_only` ends with the assistant's opening, ready to
        generate. Raises ValueError when images and counts differ.
        """
        ids: list[int] = []
        supervised: list[bool] = []

        def put(piece: list[int], learn: bool = False) -> None:
            ids.extend(piece)
            supervised.extend([learn] * len(piece))

        counts = iter(image_tokens)
        if self.system and messages[0].role != "system":
            put(self._system + self.encode(self.system) + [self.end])
        for message in messages:
            answer = message.role == "assistant"
            put({"user": self._user, "assistant": self._assistant, "system": self._system}[message.role])
            if message.think is not None:
                put([self.think] + self.encode(message.think) + [self.unthink], answer and message.learn)
            for part in message.parts:
                if isinstance(part, str):
                    put(self.encode(part), answer and message.learn)
                    continue
                n = next(counts, None)
                if n is None:
                    raise ValueError("more image parts in the messages than images")
                put([self.special["<img>"]] + [self.image] * n + [self.special["</img>"]])
            put([self.end], answer and message.learn)
        if next(counts, None) is not None:
            raise ValueError("more images than image parts in the messages")
        if prompt_only:
            put(self._assistant)
        return ids, supervised

    def save(self, directory) -> None:
        lines = [base64.b64encode(token).decode() + f" {rank}\n" for token, rank in sorted(self.ranks.items(), key=lambda x: x[1])]
        Path(directory, "tokenizer.tiktoken").write_text("".join(lines))
        Path(directory, "template.json").write_text(json.dumps(
            {"system": self.system, "think_prompt": self.think_prompt}, ensure_ascii=False, indent=1) + "\n")

    @staticmethod
    def load(directory) -> "Tokenizer":
        """From a model directory: ours, or Qwen3's in any of its published forms. Raises ValueError when none is there."""
        directory = Path(directory)
        template = directory / "template.json"
        how = json.loads(template.read_text()) if template.is_file() else {}
        ranked = sorted(directory.glob("*.tiktoken"))
        if ranked:
            pairs = (line.split() for line in ranked[0].read_bytes().splitlines() if line)
            return Tokenizer({base64.b64decode(token): int(rank) for token, rank in pairs}, **how)
        for name in ("tokenizer.json", "vocab.json"):
            if (directory / name).is_file():
                vocabulary = json.loads((directory / name).read_text(encoding="utf-8"))
                vocabulary = vocabulary["model"]["vocab"] if name == "tokenizer.json" else vocabulary
                back = {c: b for b, c in _printable().items()}
                return Tokenizer({bytes(back[c] for c in token): i for token, i in vocabulary.items()}, **how)
        raise ValueError(f"{directory}: no tokenizer here (wanted *.tiktoken, tokenizer.json or vocab.json)")


def _printable() -> dict[int, str]:
    """GPT-2's byte -> printable character map, in which published BPE vocabularies are written."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = (b for b in range(256) if b not in set(kept))
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(moved)}


def train_bpe(texts, vocabulary: int) -> dict[bytes, int]:
    """Byte-pair encoding: start from the 256 bytes, then merge the most frequent neighbours, again and again.

    Words come from the same split as at encoding time. Ties go to the pair that sorts first, so the result is a function of
    the texts alone. Stops early when no pair occurs twice.
    """
    import regex  # tiktoken depends on it too
    words = collections.Counter(m for text in texts for m in regex.findall(SPLIT, text))
    pieces = {word: [bytes([b]) for b in word.encode()] for word in words}
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocabulary:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(pieces[word], pieces[word][1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        new = best[0] + best[1]
        ranks[new] = len(ranks)
        for word, parts in pieces.items():
            if len(parts) > 1 and new in word.encode():
                pieces[word] = _merge(parts, best, new)
    return ranks


def _merge(parts: list[bytes], pair: tuple[bytes, bytes], new: bytes) -> list[bytes]:
    out: list[bytes] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] = new
        else:
            out.append(part)
    return out
