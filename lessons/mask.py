"""Which tokens of a conversation are learned: `tokenizer.py` and `data/encode.py` by hand.

What it teaches: a prompt is built of ids, piece by piece, and never searched as a string. So it is known of
each token whether it belongs to an answer, and no text, whatever it says, can become a control token: type
<|im_end|> into the question and count the pieces. Labels are shifted by one: each place is asked for the
token after it, if that one is to be learned.

    user: question  -> <|im_start|> user ... <|im_end|> <|im_start|> assistant \\n | 3  <|im_end|>
                       never learned                                              | learned

The real `Encoder` computes it, with a small tokenizer of the toy's sentences. Simplified: no system prompt
(as in the toy), pictures of four visual tokens.
"""

from PIL import Image

from data import world
from data.encode import WEIGHTINGS, Encoder, with_thinking
from data.sample import Message, Sample
from lessons.page import Lesson, Values, choice, controls_row, slider, text_box, tick_box
from recipe import THINK
from tokenizer import ADDED, Tokenizer, train_bpe
from vlm import PRESETS

TOKENIZER = Tokenizer(train_bpe(world.corpus(60), 400), "", THINK)
SIDE = PRESETS["toy"].vision.image_size
TOKENS_OF_A_PICTURE = (SIDE // (2 * PRESETS["toy"].vision.patch_size)) ** 2


def asked_sample(given: Values) -> Sample:
    """The conversation: pictures and a question, an answer, and a chain before it where it thinks.

    Raises ValueError for marks of thinking in an answer: the chain has a box of its own.
    """
    if given["think"] and ("<think>" in given["answer"] or "</think>" in given["answer"]):
        raise ValueError(
            "the chain of thought has a box of its own: leave its marks out of the answer"
        )
    blank = Image.new("RGB", (SIDE, SIDE), "white")
    pictures = (blank,) * given["pictures"]
    question = ("\n" if pictures else "") + given["question"]
    user = Message("user", (*pictures, question))
    sample = Sample((user, Message("assistant", (given["answer"],))), origin="the conversation")
    if not given["think"]:
        return sample
    chain = Message("assistant", (given["answer"],), think=given["chain"] or None)
    return with_thinking(Sample((user, chain), origin="the conversation"), THINK)


def mask_numbers(given: Values) -> Values:
    """question, chain, answer, think, pictures, everything, weighting -> ids, labels, weights (T,).

    Raises ValueError (a BadSample) where there is nothing to learn, or no answer to put into a box.
    """
    encoder = Encoder(
        TOKENIZER,
        PRESETS["toy"],
        everything=given["everything"],
        weighting=given["weighting"],
    )
    document = encoder(asked_sample(given))
    return {
        "ids": document.ids.tolist(),
        "labels": document.labels.tolist(),
        "weights": document.weights.tolist(),
    }


def vocabulary() -> Values:
    """What the script needs to repeat the encoding: tokens as bytes, and the names of the others."""
    ranked = sorted(TOKENIZER.ranks, key=TOKENIZER.ranks.get)
    return {
        "tokens": [list(token) for token in ranked],
        "added": ADDED,
        "visual": TOKENS_OF_A_PICTURE,
        "think": THINK,
    }


EXAMPLE = {
    "question": "how many things are there?",
    "chain": "2 + 1 = 3.",
    "answer": "3",
    "think": True,
    "pictures": 1,
    "everything": False,
    "weighting": "token",
}

LESSON = Lesson(
    name="mask",
    title="What is learned of a conversation",
    teaches="The model reads everything and is asked only for what an assistant says. Switch "
    "thinking on and off, or type a control token like <|im_end|> into the question: it stays "
    "plain text.",
    example=EXAMPLE,
    numbers=mask_numbers,
    controls=(
        controls_row(
            "The conversation",
            text_box("question", "question", EXAMPLE["question"]),
            text_box("answer", "answer", EXAMPLE["answer"]),
            text_box("chain", "chain of thought", EXAMPLE["chain"]),
        ),
        controls_row(
            "How it is asked and learned",
            tick_box("think", "asked to think", EXAMPLE["think"]),
            slider("pictures", "pictures", 0, 3, EXAMPLE["pictures"]),
            tick_box("everything", "learn all text (stage language)", EXAMPLE["everything"]),
            choice("weighting", "what a token counts", WEIGHTINGS, EXAMPLE["weighting"]),
        ),
    ),
    parts=(
        (
            "chips",
            "The tokens",
            "Green: learned. Violet: control tokens, which no text can become. Ochre: of a picture.",
        ),
        (
            "asked",
            "What each place is asked for",
            "The token after it, if that one is learned: labels are shifted by one.",
        ),
    ),
    source="tokenizer.py: Tokenizer.render, Tokenizer.encode; data/encode.py: Encoder, "
    "with_thinking; the paper's Eq. 2 and 3 (sections 4.2.2 and 4.2.4).",
    data=vocabulary(),
)
