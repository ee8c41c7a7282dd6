"""Text to ids and back: a byte-level BPE in a `tiktoken.Encoding`, and the chat template.

What it teaches: (1) BPE training fits in forty lines; (2) a chat prompt is built as *ids*, segment
by segment, and never as one string that is then searched: that is what makes the label mask exact
and makes it impossible for text from data to become a control token (`encode_ordinary` never yields
one).

Template, as in the released conversation code (no newline after `<|im_end|>`):

    <|im_start|>system\\n{system}<|im_end|>
    <|im_start|>user\\n<img><IMG_CONTEXT>*n</img>\\n{question}<|im_end|>
    <|im_start|>assistant\\n{answer}<|im_end|>     with thinking   <think>{chain}</think>{answer}<|im_end|>

Only the assistant's text and its `<|im_end|>` are supervised. Real weights use the exact Qwen3
vocabulary, read from a `tokenizer.json`, a `vocab.json`, or a tiktoken rank file (`*.tiktoken`);
the toy trains its own. What is saved can be read by transformers and vLLM too (infra/hub.py).

    python tokenizer.py --compare DIR      # ids and speed against the `tokenizers` library
"""

import base64
import codecs
import collections
import functools
import itertools
import json
import random
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator

import regex  # tiktoken depends on it too
import tiktoken

from infra.cli import command
from infra.config import parse_json
from infra.hub import printable_bytes, tokenizer_files
from infra.weights import write_json

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is cut into the words that merges stay within: a vocabulary was trained with one of them.
SPLITS = {
    "qwen": SPLIT,
    # SmolLM2's, which cuts in two passes: first every digit by itself, then what lies between them.
    "smollm": r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
}
# The released added tokens, in the order of their ids (151643 ...).
ADDED = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> "
    "<|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think> "
    "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>"
).split()
RELEASED_SYSTEM = (
    "你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, 是一个有用无害的人工智能助手。"
)
# Characters; tiktoken's matcher keeps a stack entry for every space of a run, and gives up near a
# million.
LONG = 100_000
THINK_PROMPT = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final "
    "answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final answer "
    "MUST BE put in \\boxed{}."
)
# Keys of template.json, and what they must be.
TEMPLATE = {"system": str, "think_prompt": str, "nfc": bool, "split": str}


class Tokenizer:
    """Ranks (bytes -> id) plus the added tokens after them.

    `system` is the system prompt that the template opens with ("" leaves the turn out) and
    `think_prompt` the sentence that asks for thinking; both belong to the weights that were trained
    with them, so they are saved beside the ranks. `nfc` composes characters before encoding (e +
    combining acute becomes one letter), as published Qwen tokenizers do: what comes back is then
    the composed text. `split` names how a text is cut into words (`SPLITS`).

    `end` closes every turn; `ends` are the tokens that end an answer, as in the released generation
    configuration: a model may also say `<|endoftext|>`, which is the padding. Raises ValueError for
    ranks that are no byte-level vocabulary, and for an unknown split.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        system: str = RELEASED_SYSTEM,
        think_prompt: str = THINK_PROMPT,
        nfc: bool = False,
        split: str = "qwen",
    ):
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(
                "tokenizer ranks must be 0..n-1 without gaps; the vocabulary file is not a plain "
                "BPE vocabulary"
            )
        absent = [b for b in range(256) if bytes([b]) not in ranks]
        if absent:
            raise ValueError(
                f"the vocabulary has no token for byte {absent[0]}, so not every text could be encoded"
            )
        if split not in SPLITS:
            raise ValueError(f"split {split!r:.80}: choose from {', '.join(SPLITS)}")
        # tokens that text can become, and those that it cannot
        self.ranks = ranks
        self.system = system
        self.think_prompt = think_prompt
        self.nfc = nfc
        self.split = split
        self.special = {name: len(ranks) + i for i, name in enumerate(ADDED)}
        self.encoding = tiktoken.Encoding(
            "nanosail", pat_str=SPLITS[split], mergeable_ranks=ranks, special_tokens=self.special
        )

        # the ids that the rest of the project asks for by name
        self.end = self.special["<|im_end|>"]
        self.pad = self.special["<|endoftext|>"]
        self.ends = (self.end, self.pad)
        self.image = self.special["<IMG_CONTEXT>"]
        self.think = self.special["<think>"]
        self.unthink = self.special["</think>"]

        # how each role's turn opens
        start = self.special["<|im_start|>"]
        roles = ("system", "user", "assistant")
        self.openings = {role: [start] + self.encode(role + "\n") for role in roles}

    def __len__(self) -> int:
        return self.encoding.n_vocab

    def encode(self, text: str) -> list[int]:
        """Text from anywhere -> ids, none of them a control token."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if len(text) < LONG:
            return self.encoding.encode_ordinary(text)

        # a very long text word by word, so that no run of spaces is too long for the matcher
        ids: list[int] = []
        for word in regex.findall(SPLITS[self.split], text):
            if len(word) < LONG:
                ids += self.encoding.encode_ordinary(word)
            else:
                ids += self.encoding._encode_single_piece(word)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text; ids past the vocabulary (the model's padding rows) are left out."""
        return self.encoding.decode([i for i in map(int, ids) if i < len(self)], errors="replace")

    def decode_answer(self, ids: Iterable[int]) -> str:
        """The text of an answer, without the token that ended it, whichever of `ends` it is."""
        ids = list(ids)
        return self.decode(ids[:-1] if ids and ids[-1] in self.ends else ids)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Ids as they come -> text as soon as its characters are whole; joined, the pieces are
        `decode` of all the ids."""
        characters = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            if i >= len(self):
                continue
            # nothing until the last byte of a character is there
            text = characters.decode(self.encoding.decode_single_token_bytes(i))
            if text:
                yield text
        rest = characters.decode(b"", final=True)
        if rest:
            yield rest

    def render(
        self, messages, image_tokens: list[int], prompt_only: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Messages (see data.sample.Message) -> ids, and for each whether it is supervised.

        image_tokens: visual tokens of each image part, in order. `prompt_only` ends with the
        assistant's opening, ready to generate. Raises ValueError when images and counts differ.
        """
        ids: list[int] = []
        supervised: list[bool] = []

        def put(piece: list[int], learn: bool = False) -> None:
            ids.extend(piece)
            supervised.extend([learn] * len(piece))

        # the system prompt, unless the conversation brings its own
        if self.system and messages[0].role != "system":
            put(self.openings["system"] + self.encode(self.system) + [self.end])

        counts = iter(image_tokens)
        for message in messages:
            learn = message.role == "assistant" and message.learn
            put(self.openings[message.role])
            if message.think is not None:
                put([self.think] + self.encode(message.think) + [self.unthink], learn)
            for part in message.parts:
                if isinstance(part, str):
                    put(self.encode(part), learn)
                    continue
                # an image: a placeholder for each of its visual tokens
                n = next(counts, None)
                if n is None:
                    raise ValueError("more image parts in the messages than images")
                put([self.special["<img>"]] + [self.image] * n + [self.special["</img>"]])
            put([self.end], learn)
        if next(counts, None) is not None:
            raise ValueError("more images than image parts in the messages")

        # the reader's turn
        if prompt_only:
            put(self.openings["assistant"])
        return ids, supervised

    def save(self, directory) -> None:
        """Ranks and template, as `load` reads them first, and the files that others read: see
        infra/hub.py. The ranks come last: a directory that has them has everything."""
        # the template, and what others read
        directory = Path(directory)
        template = {key: getattr(self, key) for key in TEMPLATE}
        for name, value in {"template.json": template, **self.published}.items():
            write_json(directory / name, value)

        # ours: a token in base 64 and its rank on each line
        lines = [
            base64.b64encode(token).decode() + f" {rank}\n"
            for token, rank in sorted(self.ranks.items(), key=lambda item: item[1])
        ]
        (directory / "tokenizer.tiktoken").write_text("".join(lines))

    @functools.cached_property
    def published(self) -> dict[str, Any]:
        """File name -> JSON value of what others read. Seconds for a real vocabulary, so it is
        kept."""
        split = SPLITS[self.split]
        return tokenizer_files(self.ranks, self.special, split, self.nfc, self.system)

    @staticmethod
    def load(directory) -> "Tokenizer":
        """From a model directory: ours, or Qwen3's in any of its published forms.

        Raises ValueError when none is there, or when it is not a byte-level BPE vocabulary.
        """
        # the exact ranks before other forms of them
        directory = Path(directory)
        ranked = sorted(directory.glob("*.tiktoken"))
        candidates = (*ranked[:1], directory / "tokenizer.json", directory / "vocab.json")
        file = next((f for f in candidates if f.is_file()), None)
        if file is None:
            raise ValueError(
                f"{directory}: no tokenizer here (wanted *.tiktoken, tokenizer.json or vocab.json)"
            )
        # whatever is in it, it must become a whole vocabulary
        template = read_template(directory / "template.json")
        added: list[dict] = []
        try:
            if ranked:
                tokenizer = Tokenizer(read_ranks(file), **(template or {"nfc": True}))
            else:
                tokenizer, added = read_published(file, template)
            foreign = [
                t["content"] for t in added if tokenizer.special.get(t["content"]) != t["id"]
            ]
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
            raise ValueError(
                f"{file}: not a byte-level BPE vocabulary ({type(e).__name__}: {e})"
            ) from e
        if foreign:
            raise ValueError(f"{file}: its added token {foreign[0]} is not SAIL-VL2's")
        return tokenizer


# ------------------------------------------------------------------------------------ reading files


def read_template(path: Path) -> dict:
    """The options in template.json, {} without one. Raises ValueError for any that is not ours."""
    if not path.is_file():
        return {}
    template = parse_json(path.read_bytes(), path)
    for key, value in template.items():
        if not isinstance(value, TEMPLATE.get(key, ())):
            raise ValueError(f"{path}: {key} {value!r:.80} is not an option of the template")
    return template


def read_ranks(path: Path) -> dict[bytes, int]:
    """A tiktoken rank file: a token in base 64 and its rank on each line."""
    ranks = {}
    for line in path.read_bytes().splitlines():
        if line:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    return ranks


def read_published(path: Path, template: dict) -> tuple[Tokenizer, list[dict]]:
    """A tokenizer.json, or a vocab.json, and the added tokens that it lists."""
    content = json.loads(path.read_text(encoding="utf-8"))
    # a vocab.json is the vocabulary alone
    vocabulary = content
    added: list[dict] = []
    composes = True
    if path.name != "vocab.json":
        vocabulary = content["model"]["vocab"]
        added = content.get("added_tokens", [])
        composes = content.get("normalizer", "as published") is not None
    # characters back to the bytes that they stand for
    byte_of = {character: byte for byte, character in printable_bytes().items()}
    ranks = {bytes(byte_of[c] for c in word): rank for word, rank in vocabulary.items()}
    return Tokenizer(ranks, **(template or {"nfc": composes})), added


# ----------------------------------------------------------------------------------------- training


def train_bpe(texts: Iterable[str], vocabulary: int) -> dict[bytes, int]:
    """Byte-pair encoding: start from the 256 bytes, then merge the most frequent neighbours, again
    and again.

    Words come from the same split as at encoding time. Ties go to the pair that sorts first, so the
    result is a function of the texts alone. Stops early when no pair occurs twice.
    """
    # each word once, as its bytes
    words = collections.Counter(m for text in texts for m in regex.findall(SPLIT, text))
    pieces = {word: [bytes([b]) for b in word.encode()] for word in words}
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocabulary:
        # count all neighbours
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(pieces[word], pieces[word][1:]):
                pairs[pair] += count

        # the most frequent pair becomes a token
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        new = best[0] + best[1]
        ranks[new] = len(ranks)

        # and replaces it in all words
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


# ---------------------------------------------------------------------------------------- comparing


def mixed_texts(tokenizer: Tokenizer, seed: int = 0) -> Iterator[str]:
    """Endless texts of every kind, in turn: code and English from this Python's own library, then
    words of the vocabulary (all scripts; Chinese; emoji), digits, runs of white space, bytes that
    are no UTF-8, any code points."""
    rng = random.Random(seed)
    # what to draw from
    decoded = (token.decode("utf-8", "ignore") for token in tokenizer.ranks)
    words = [word for word in decoded if word.strip()]
    chinese = [w for w in words if all("\u4e00" <= c <= "\u9fff" for c in w)] or ["你好"]
    marks = ("", "\ufe0f", "\u200d", "\U0001f3fd")
    faces = [chr(c) + mark for c in range(0x1F300, 0x1FB00) for mark in marks]
    files = sorted(Path(random.__file__).parent.glob("*.py"))

    def some(choices: list[str], most: int) -> str:
        return "".join(rng.choices(choices, k=rng.randint(1, most)))

    def spaces() -> str:
        return rng.choice(" \t\r\n\u3000\xa0") * rng.randint(1, 90) + rng.choice(["", "x", "."])

    for n in itertools.count():
        yield files[n % len(files)].read_text(encoding="utf-8")[:20_000]
        yield "".join(rng.choices(words, k=500))
        yield "，".join(some(chinese, 12) for _ in range(60)) + "。"
        yield " ".join(some(faces, 5) for _ in range(60))
        yield " ".join(str(rng.randrange(10 ** rng.randint(1, 18))) for _ in range(60))
        yield "".join(spaces() for _ in range(40))
        yield rng.randbytes(600).decode("utf-8", "replace")
        points = rng.choices(range(0x110000), k=300)
        yield "".join(chr(c) for c in points if not 0xD800 <= c < 0xE000)


@dataclass
class TokenizerOptions:
    """Compare ids and speed with the `tokenizers` library, on the published tokenizer of a
    directory."""

    compare: Path  # directory with a tokenizer.json, e.g. of Qwen3
    tokens: int = 600_000  # at least so many


def compare_tokenizers(options: TokenizerOptions) -> int:
    """Prints agreement and the ratio of times; exit code 1 when a single id differs."""
    try:
        from tokenizers import Tokenizer as Published
    except ImportError as e:
        wanted = "pip install --no-deps -r requirements/oracle.txt"
        raise ValueError(f"--compare needs the library `tokenizers`: {wanted}") from e

    # in turn, so that a busy machine slows both
    ours = Tokenizer.load(options.compare)
    published = Published.from_file(str(options.compare / "tokenizer.json"))
    tokens = texts = same = 0
    our_seconds = their_seconds = 0.0
    for text in mixed_texts(ours):
        begin = time.perf_counter()
        ids = ours.encode(text)
        middle = time.perf_counter()
        their_ids = published.encode(text, add_special_tokens=False).ids
        our_seconds += middle - begin
        their_seconds += time.perf_counter() - middle

        # agreement
        tokens += len(ids)
        texts += 1
        same += ids == their_ids
        if ids != their_ids:
            print(f"differs: {text[:80]!r}: {ids[:20]} against {their_ids[:20]}")
        if tokens >= options.tokens:
            break
    print(
        f"{tokens} tokens in {texts} texts: {same} texts with identical ids; "
        f"ours {our_seconds:.2f} s, tokenizers "
        f"{their_seconds:.2f} s: {their_seconds / our_seconds:.1f} times faster"
    )
    return int(same < texts)


if __name__ == "__main__":
    command(compare_tokenizers)
