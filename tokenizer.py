"""Text to ids and back: a byte-level BPE in a `tiktoken.Encoding`, and the chat template.

What it teaches: (1) BPE training fits in forty lines; (2) a chat prompt is built as *ids*, segment by segment, and never as
one string that is then searched: that is what makes the label mask exact and makes it impossible for text from data to
become a control token (`encode_ordinary` never yields one).

Template, as in the released conversation code (no newline after `<|im_end|>`):

    <|im_start|>system\\n{system}<|im_end|><|im_start|>user\\n<img><IMG_CONTEXT>*n</img>\\n{question}<|im_end|>
    <|im_start|>assistant\\n{answer}<|im_end|>            and with thinking   <think>{chain}</think>{answer}<|im_end|>

Only the assistant's text and its `<|im_end|>` are supervised. Real weights use the exact Qwen3 vocabulary, read from a
`tokenizer.json`, a `vocab.json`, or a tiktoken rank file (`*.tiktoken`); the toy trains its own.

    python tokenizer.py --compare DIR      # ids and speed against the `tokenizers` library, on DIR's tokenizer.json
"""

import base64
import codecs
import collections
import itertools
import json
import random
import sys
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator

import regex  # tiktoken depends on it too
import tiktoken

from infra.config import parse_json

SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The released added tokens, in the order of their ids (151643 ...).
ADDED = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think> <img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> "
    "<box> </box>"
).split()
RELEASED_SYSTEM = (
    "你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, 是一个有用无害的人工智能助手。"
)
LONG = 100_000  # characters; tiktoken's matcher keeps a stack entry for every space of a run, and gives up near a million
THINK_PROMPT = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The "
    "reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}."
)


class Tokenizer:
    """Ranks (bytes -> id) plus the added tokens after them.

    `system` is the system prompt that the template opens with ("" leaves the turn out) and `think_prompt` the sentence that
    asks for thinking; both belong to the weights that were trained with them, so they are saved beside the ranks. `nfc`
    composes characters before encoding (e + combining acute becomes one letter), as published Qwen tokenizers do: what
    comes back is then the composed text.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        system: str = RELEASED_SYSTEM,
        think_prompt: str = THINK_PROMPT,
        nfc: bool = False,
    ):
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(
                "tokenizer ranks must be 0..n-1 without gaps; the vocabulary file is not a plain BPE vocabulary"
            )
        self.ranks, self.system, self.think_prompt, self.nfc = ranks, system, think_prompt, nfc
        self.special = {name: len(ranks) + i for i, name in enumerate(ADDED)}
        self.encoding = tiktoken.Encoding(
            "nanosail", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=self.special
        )
        self.end, self.pad = self.special["<|im_end|>"], self.special["<|endoftext|>"]
        self.image = self.special["<IMG_CONTEXT>"]
        self.think, self.unthink = self.special["<think>"], self.special["</think>"]
        self._user, self._assistant, self._system = (
            [self.special["<|im_start|>"]] + self.encode(role + "\n")
            for role in ("user", "assistant", "system")
        )

    def __len__(self) -> int:
        return self.encoding.n_vocab

    def encode(self, text: str) -> list[int]:
        """Text from anywhere -> ids, none of them a control token."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if len(text) < LONG:
            return self.encoding.encode_ordinary(text)
        return [
            i
            for word in regex.findall(SPLIT, text)
            for i in (
                self.encoding.encode_ordinary(word)
                if len(word) < LONG
                else self.encoding._encode_single_piece(word)
            )
        ]

    def decode(self, ids) -> str:
        """Ids -> text; ids past the vocabulary (the model's padding rows) are left out."""
        return self.encoding.decode([i for i in map(int, ids) if i < len(self)], errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Ids as they come -> text as soon as its characters are whole; joined, the pieces are `decode` of all the ids."""
        characters = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            if i < len(self) and (
                text := characters.decode(self.encoding.decode_single_token_bytes(i))
            ):
                yield text
        if text := characters.decode(b"", final=True):
            yield text

    def render(
        self, messages, image_tokens: list[int], prompt_only: bool = False
    ) -> tuple[list[int], list[bool]]:
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
            put(
                {"user": self._user, "assistant": self._assistant, "system": self._system}[
                    message.role
                ]
            )
            if message.think is not None:
                put(
                    [self.think] + self.encode(message.think) + [self.unthink],
                    answer and message.learn,
                )
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
        lines = [
            base64.b64encode(token).decode() + f" {rank}\n"
            for token, rank in sorted(self.ranks.items(), key=lambda x: x[1])
        ]
        Path(directory, "tokenizer.tiktoken").write_text("".join(lines))
        Path(directory, "template.json").write_text(
            json.dumps(
                {"system": self.system, "think_prompt": self.think_prompt, "nfc": self.nfc},
                ensure_ascii=False,
                indent=1,
            )
            + "\n"
        )

    @staticmethod
    def load(directory) -> "Tokenizer":
        """From a model directory: ours, or Qwen3's in any of its published forms. Raises ValueError when none is there."""
        directory = Path(directory)
        template = directory / "template.json"
        how = parse_json(template.read_bytes(), template) if template.is_file() else {"nfc": True}
        for key, value in how.items():
            if not isinstance(
                value, {"system": str, "think_prompt": str, "nfc": bool}.get(key, ())
            ):
                raise ValueError(
                    f"{template}: {key} {value!r:.80} is not an option of the template"
                )
        ranked = sorted(directory.glob("*.tiktoken"))
        file = next(
            (
                f
                for f in (*ranked[:1], directory / "tokenizer.json", directory / "vocab.json")
                if f.is_file()
            ),
            None,
        )
        if file is None:
            raise ValueError(
                f"{directory}: no tokenizer here (wanted *.tiktoken, tokenizer.json or vocab.json)"
            )
        try:
            if ranked:
                pairs = (line.split() for line in file.read_bytes().splitlines() if line)
                return Tokenizer(
                    {base64.b64decode(token): int(rank) for token, rank in pairs}, **how
                )
            read, back = (
                json.loads(file.read_text(encoding="utf-8")),
                {c: b for b, c in _printable().items()},
            )
            vocabulary, added = (
                (read, [])
                if file.name == "vocab.json"
                else (read["model"]["vocab"], read.get("added_tokens", []))
            )
            tokenizer = Tokenizer(
                {bytes(back[c] for c in token): i for token, i in vocabulary.items()}, **how
            )
            other = [t["content"] for t in added if tokenizer.special.get(t["content"]) != t["id"]]
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise ValueError(
                f"{file}: not a byte-level BPE vocabulary ({type(e).__name__}: {e})"
            ) from e
        if other:
            raise ValueError(f"{file}: its added token {other[0]} is not SAIL-VL2's")
        return tokenizer


def _printable() -> dict[int, str]:
    """GPT-2's byte -> printable character map, in which published BPE vocabularies are written."""
    kept = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    moved = (b for b in range(256) if b not in set(kept))
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(moved)}


def train_bpe(texts, vocabulary: int) -> dict[bytes, int]:
    """Byte-pair encoding: start from the 256 bytes, then merge the most frequent neighbours, again and again.

    Words come from the same split as at encoding time. Ties go to the pair that sorts first, so the result is a function of
    the texts alone. Stops early when no pair occurs twice.
    """
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


# ------------------------------------------------------------------------------------------------------------- comparing


def mixed_texts(tokenizer: Tokenizer, seed: int = 0):
    """Endless texts of every kind, in turn: code and English from this Python's own library, then words of the vocabulary
    (all scripts; Chinese; emoji), digits, runs of white space, bytes that are no UTF-8, any code points."""
    rng = random.Random(seed)
    words = [w for token in tokenizer.ranks if (w := token.decode("utf-8", "ignore")).strip()]
    chinese = [w for w in words if all("\u4e00" <= c <= "\u9fff" for c in w)] or ["你好"]
    faces = [
        chr(c) + mark
        for c in range(0x1F300, 0x1FB00)
        for mark in ("", "\ufe0f", "\u200d", "\U0001f3fd")
    ]
    files = sorted(Path(random.__file__).parent.glob("*.py"))
    for n in itertools.count():
        yield files[n % len(files)].read_text(encoding="utf-8")[:20_000]
        yield "".join(rng.choices(words, k=500))
        yield (
            "，".join("".join(rng.choices(chinese, k=rng.randint(1, 12))) for _ in range(60)) + "。"
        )
        yield " ".join("".join(rng.choices(faces, k=rng.randint(1, 5))) for _ in range(60))
        yield " ".join(str(rng.randrange(10 ** rng.randint(1, 18))) for _ in range(60))
        yield "".join(
            rng.choice(" \t\r\n\u3000\xa0") * rng.randint(1, 90) + rng.choice(["", "x", "."])
            for _ in range(40)
        )
        yield rng.randbytes(600).decode("utf-8", "replace")
        yield "".join(
            chr(c) for c in rng.choices(range(0x110000), k=300) if not 0xD800 <= c < 0xE000
        )


@dataclass
class Compare:
    """Compare ids and speed with the `tokenizers` library, on the published tokenizer of a directory."""

    compare: Path  # directory with a tokenizer.json, e.g. of Qwen3
    tokens: int = 600_000  # at least so many


def main(o: Compare) -> int:
    """Prints agreement and the ratio of times; exit code 1 when a single id differs."""
    from tokenizers import Tokenizer as Published

    ours, published = (
        Tokenizer.load(o.compare),
        Published.from_file(str(o.compare / "tokenizer.json")),
    )
    tokens = texts = same = 0
    seconds = [0.0, 0.0]
    for text in mixed_texts(ours):
        begin = time.perf_counter()
        ids = ours.encode(text)
        middle = time.perf_counter()
        theirs = published.encode(text, add_special_tokens=False).ids
        seconds = [seconds[0] + middle - begin, seconds[1] + time.perf_counter() - middle]
        tokens, texts, same = tokens + len(ids), texts + 1, same + (ids == theirs)
        if ids != theirs:
            print(f"differs: {text[:80]!r}: {ids[:20]} against {theirs[:20]}")
        if tokens >= o.tokens:
            break
    print(
        f"{tokens} tokens in {texts} texts: {same} texts with identical ids; ours {seconds[0]:.2f} s, tokenizers "
        f"{seconds[1]:.2f} s: {seconds[1] / seconds[0]:.1f} times faster"
    )
    return int(same < texts)


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(Compare)))
