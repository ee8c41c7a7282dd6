"""From ids, one at a time, to the text that may be shown already.

What it teaches: text that was sent cannot be taken back. So two things are held: half a character (a
Chinese one is three bytes, and often more than one token), and what may become a stop string.

    stop "END"    tokens   "12 E"   "N"   "D"          sent   "12 "                cut before END
                           "12 E"   "N"   "jamin"             "12 " "ENjamin"      it was none

Log-probabilities travel with the text: a token is told when its first character is.
"""

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenScore:
    """A token of an answer: its bytes, its log-probability, and the same of the likeliest at its place."""

    text: bytes
    logprob: float
    likeliest: tuple[tuple[bytes, float], ...] = ()


class Transcript:
    """An answer as it is written: `add` tokens, `take` what may be shown.

    stop: strings that end the answer; what comes before the first of them is the answer, and `stopped`
    says that one came.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer = tokenizer
        self.vocabulary = len(tokenizer)
        self.stop = stop
        self.stopped = False
        self.text = ""
        self.sent = 0  # characters that were taken
        # tokens that were not shown yet, with the place where the text of each begins
        self.held: deque[tuple[int, TokenScore]] = deque()
        self.characters = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int, logprob: float, likeliest: Sequence[tuple[int, float]] = ()) -> None:
        """One more token, and the likeliest ones at its place."""
        # what it adds to the text; rows of the model past the vocabulary add nothing
        raw = self.bytes_of(token)
        others = tuple((self.bytes_of(other), score) for other, score in likeliest)
        self.held.append((len(self.text), TokenScore(raw, logprob, others)))
        self.text += self.characters.decode(raw)

        # the earliest stop string; none can begin in what was sent
        places = [self.text.find(stop, self.sent) for stop in self.stop]
        found = [place for place in places if place >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def bytes_of(self, token: int) -> bytes:
        if token >= self.vocabulary:
            return b""
        return self.tokenizer.encoding.decode_single_token_bytes(token)

    def take(self, last: bool = False) -> tuple[str, tuple[TokenScore, ...]]:
        """Text and tokens that can be shown and were not yet; `last`: nothing follows."""
        whole = last and not self.stopped
        if whole:
            self.text += self.characters.decode(b"", final=True)
        safe = len(self.text)
        if not last and not self.stopped:
            safe -= self.beginning_of_stop()

        piece = self.text[self.sent : safe]
        tokens = []
        while self.held and (whole or self.held[0][0] < safe):
            tokens.append(self.held.popleft()[1])
        self.sent = safe
        return piece, tuple(tokens)

    def beginning_of_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        rest = self.text[self.sent :]
        longest = 0
        for stop in self.stop:
            for n in range(longest + 1, min(len(stop), len(rest) + 1)):
                if rest.endswith(stop[:n]):
                    longest = n
        return longest
