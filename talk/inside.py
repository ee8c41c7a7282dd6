"""What a model did while it answered: where each token looked, how sure it was, who computed it.

What it teaches: attention can be watched without touching the model. The decoder is handed its attention
as a function (attention.py), so an `attend` that passes on what the model's own returns, and works out the
softmax beside it, shows where every token looked. One forward over prompt and answer is enough: in a causal
model each position still sees only what stood before it.

    ids       system . user . [v v v v] . how many ? . assistant | two things <end>
    chooses                                            two         things <end>        `places`: one before
    keeps     weights (H, n, S), averaged over heads, of every layer; entropy; experts

A visual token is a cell of 2 x 2 patches, the finest that the decoder sees: `picture_cuts` says which cell
of which tile each one is. Attention is where information could come from, and no proof that it was used.

    python generate.py --image some.png --prompt "how many things are there?" --show runs/inside.html

Legend: S tokens of prompt and answer, n of the answer, L layers, H query heads, G key/value heads, D head
size, V words, E experts, K of them for a token.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attention import Segments, packed_attention, share_heads
from data.encode import Encoder
from data.images import normalise, open_image
from data.sample import Document, Sample
from data.tiling import MAX_TILES, grid_for, second_grid
from data.world import FAMILIES, World
from moe import Decisions
from packing import Rows
from vlm import SailVL, VLMConfig

LIKELIEST = 4  # words that are shown beside the one that was chosen


# ----------------------------------------------------------------------------------------- attention


def attention_weights(q: Tensor, k: Tensor, places: Tensor) -> Tensor:
    """How much the tokens at `places` (n,) attend to every token: (H, n, S) fp32, rows sum to 1.

    q (S, H, D) and k (S, G, D) of one document, causal: as `attention.packed_attention` has them.
    """
    # heads before positions, and each key head once for every query head that it serves
    heads = q.shape[1]
    k, _ = share_heads(k, k, heads, dim=1)
    queries = q[places].transpose(0, 1).float()  # (H, n, D)
    keys = k.permute(1, 2, 0).float()  # (H, D, S)
    scores = queries @ keys * q.shape[-1] ** -0.5  # (H, n, S)

    # nothing is seen that comes later
    later = torch.arange(len(k), device=q.device) > places[:, None]  # (n, S)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


class Onlooker:
    """An `attend` that gives what the model's own gives, and keeps who looked where.

    weights: for each layer (n, S), the mean over its heads, of the tokens at `places` (n,).
    """

    def __init__(self, segments: Segments, places: Tensor):
        self.segments = segments
        self.places = places
        self.weights: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert layer == len(self.weights), "layers come in order, each once"
        self.weights.append(attention_weights(q, k, self.places).mean(0).cpu())
        return packed_attention(q, k, v, self.segments, causal=True)


# -------------------------------------------------------------------------------------- one answer


@dataclass(frozen=True)
class Inside:
    """An answer of n tokens, seen from inside.

    ids (S,): the prompt, then the answer without its last token, which nobody read; answer (n,).
    attention (L, n, S): where the position that chose each token looked, mean over heads.
    entropy (n,): nats, of the words it chose from; chance (n,): probability of the chosen one.
    likeliest (n, LIKELIEST) ids, and their `chances`. experts (L, S, K), None for a dense model.
    """

    ids: Tensor
    answer: Tensor
    attention: Tensor
    entropy: Tensor
    chance: Tensor
    likeliest: Tensor
    chances: Tensor
    experts: Tensor | None = None
    total_experts: int = 0

    @property
    def places(self) -> Tensor:
        """(n,) the positions that chose the answer's tokens."""
        n = len(self.answer)
        return torch.arange(len(self.ids) - n, len(self.ids))


@torch.no_grad()
def look_inside(
    model: SailVL, prompt: tuple[list[int], list[np.ndarray]], answer: list[int]
) -> Inside:
    """Run prompt (ids and tiles, as from `Encoder.prompt`) and answer once more, and watch.

    Raises ValueError for an answer without tokens.
    """
    if not answer:
        raise ValueError("the answer has no tokens: there is nothing to look into")
    asked, images = prompt
    llm = model.language_model
    device = llm.lm_head.weight.device

    # all that was read, on the way to the last token
    ids = torch.tensor([*asked, *answer[:-1]], device=device)  # (S,)
    places = torch.arange(len(asked) - 1, len(ids), device=device)  # (n,)

    # one document, watched
    watch = Onlooker(Segments.of([len(ids)], device), places)
    decisions = Decisions()
    pixels = pixels_on(device, images)
    hidden = model.hidden(ids[None], pixels, attend=watch, routing=decisions)  # (S, C)

    # what it chose from, at each place that chose
    logprobs = llm.lm_head(hidden[places]).float().log_softmax(-1)  # (n, V)
    chosen = torch.tensor(answer, device=device)
    likeliest = logprobs.topk(LIKELIEST)

    found = Inside(
        ids=ids.cpu(),
        answer=chosen.cpu(),
        attention=torch.stack(watch.weights),
        entropy=torch.special.entr(logprobs.exp()).sum(-1).cpu(),
        chance=logprobs.gather(1, chosen[:, None])[:, 0].exp().cpu(),
        likeliest=likeliest.indices.cpu(),
        chances=likeliest.values.exp().cpu(),
    )
    # a dense model has decided nothing
    if not len(decisions):
        return found
    experts = torch.stack([routing.indices.cpu() for routing in decisions])  # (L, S, K)
    return replace(found, experts=experts, total_experts=llm.config.num_experts)


def pixels_on(device: torch.device, images: list[np.ndarray]) -> Tensor | list[Tensor] | None:
    """Tiles as the model takes them, where it is; None when there are none."""
    if not images:
        return None
    pixels = normalise(images)
    if torch.is_tensor(pixels):
        return pixels.to(device)
    return [image.to(device) for image in pixels]


def expert_shares(inside: Inside, places: Tensor) -> Tensor:
    """(L, E) share of each expert in what the tokens at `places` were sent to; rows sum to 1."""
    chosen = inside.experts[:, places].flatten(1)  # (L, n * K)
    counts = torch.zeros(len(chosen), inside.total_experts)
    counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float32))
    return counts / chosen.shape[1]


# --------------------------------------------------------------------------------- how pictures are cut


@dataclass(frozen=True)
class Sheet:
    """Tiles laid out as they were cut: pixels (H, W, 3), and the number of the visual token of each
    cell (rows, columns), counted over all pictures."""

    title: str
    pixels: np.ndarray
    cells: np.ndarray


@dataclass(frozen=True)
class CutPicture:
    """A picture: itself, what became of it in words, and its sheets."""

    picture: Image.Image
    note: str
    sheets: tuple[Sheet, ...]


def sheet_titles(
    size: tuple[int, int], tiles: int, config: VLMConfig, pictures: int
) -> list[tuple]:
    """For each tile of a picture of this (width, height) what it is part of: (title, columns).

    pictures: how many the sample has. The order is that of data/tiling.py.
    """
    if config.any_resolution or tiles == 1:
        return [("the whole picture", 1)]

    # the grid, and the whole picture small
    side = config.vision.image_size
    most = max(1, min(config.max_tiles, MAX_TILES // pictures))
    least = min(config.min_tiles, most)
    grid = grid_for(*size, most, side, least)
    first = [(f"{grid[0]} x {grid[1]} tiles", grid[0])] * (grid[0] * grid[1])
    if config.thumbnail and len(first) > 1:
        first.append(("the whole picture, small", 1))
    if len(first) == tiles:
        return first

    # a second pass stands before the last of the first
    other = second_grid(*size, grid, most, side, least)
    again = [(f"a second grid, {other[0]} x {other[1]} tiles", other[0])] * (other[0] * other[1])
    return first[:-1] + again + first[-1:]


def assemble(tiles: list[np.ndarray], columns: int) -> np.ndarray:
    """Arrays of one size (h, w, ...) laid out in so many columns, row by row."""
    rows = range(0, len(tiles), columns)
    return np.concatenate([np.concatenate(tiles[i : i + columns], axis=1) for i in rows])


def sheets_of(tiles: list[np.ndarray], titles: list[tuple], unit: int, before: int) -> list[Sheet]:
    """A picture's tiles (H, W, 3) by what they are part of. unit: pixels of a visual token's side;
    before: visual tokens of the pictures before this one."""
    # the numbers of each tile's visual tokens, in reading order
    numbers = []
    for tile in tiles:
        rows = tile.shape[0] // unit
        columns = tile.shape[1] // unit
        count = rows * columns
        numbers.append(np.arange(before, before + count).reshape(rows, columns))
        before += count

    # tiles of one title beside each other
    sheets = []
    for title, columns in dict.fromkeys(titles):
        mine = [i for i, other in enumerate(titles) if other == (title, columns)]
        pixels = assemble([tiles[i] for i in mine], columns)
        cells = assemble([numbers[i] for i in mine], columns)
        sheets.append(Sheet(title, pixels, cells))
    return sheets


def picture_cuts(encoder: Encoder, sample: Sample) -> list[CutPicture]:
    """Every picture of a sample (videos frame by frame), as the model was shown it."""
    sample = encoder.unrolled(sample)
    arrays, counts = encoder.images(sample)
    parts = [part for message in sample.messages for part in message.parts]
    sources = [part for part in parts if not isinstance(part, str)]
    root = sample.root or encoder.root
    pictures = [open_image(source, root, sample.origin) for source in sources]
    unit = 2 * encoder.config.vision.patch_size

    cuts = []
    waiting = iter(arrays)
    before = 0
    for picture, count in zip(pictures, counts, strict=True):
        # as many tiles as hold its visual tokens
        tiles = []
        while sum(t.shape[0] * t.shape[1] for t in tiles) < count * unit**2:
            tiles.append(next(waiting))
        titles = sheet_titles(picture.size, len(tiles), encoder.config, len(pictures))
        sheets = sheets_of(tiles, titles, unit, before)
        before += count
        cuts.append(CutPicture(picture, cut_note(picture, tiles, sheets, count), tuple(sheets)))
    return cuts


def cut_note(picture: Image.Image, tiles: list, sheets: list[Sheet], tokens: int) -> str:
    """`1000 x 700 pixels, 3 x 2 tiles + the whole picture, small: 7 of 448 x 448, 1792 visual tokens`."""
    height, width = tiles[0].shape[:2]
    names = " + ".join(sheet.title for sheet in sheets)
    given = f"{picture.width} x {picture.height} pixels"
    if len(tiles) == 1:
        taken = "as it is" if picture.size == (width, height) else f"resized to {width} x {height}"
        return f"{given}, {taken}: {tokens} visual tokens"
    return f"{given}, {names}: {len(tiles)} of {width} x {height}, {tokens} visual tokens"


def visual_places(inside: Inside, image_token: int) -> Tensor:
    """Where the visual tokens stand among the ids, in order."""
    return (inside.ids == image_token).nonzero()[:, 0]


# ------------------------------------------------------------------------------------- the packed row


def row_among_samples(encoder: Encoder, inside: Inside, arrays: list[np.ndarray]) -> list[Document]:
    """The row in which packing would put this conversation: it, and samples of the drawn world.

    Of 512 tokens, doubled until the conversation takes up a quarter at most (our choice, to show
    neighbours); what is left over would be padding.
    """
    # the conversation as a document
    ids = np.append(inside.ids.numpy(), int(inside.answer[-1]))
    labels = np.full(len(ids), -100, dtype=np.int64)
    labels[inside.places.numpy()] = inside.answer.numpy()
    weights = (labels >= 0).astype(np.float32)
    work = sum(encoder.config.vision.work(a.shape[0] * a.shape[1]) for a in arrays)
    own = Document(ids, labels, weights, tuple(arrays), "this", "this", {}, vision=work)

    # behind it, what others might have asked
    mixture = dict.fromkeys(FAMILIES, 1.0) | {"text": 0.2}
    samples = (World().stream(mixture, seed=0)[i] for i in itertools.count())
    length = row_length(len(own))
    rows = Rows(itertools.chain([own], map(encoder, samples)), length)
    return next(rows)


def row_length(document: int) -> int:
    """512 tokens, or so many times twice that a document is a quarter of the row at most."""
    length = 512
    while length < 4 * document:
        length *= 2
    return length
