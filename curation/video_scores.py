"""SAIL-Video: questions about videos that fit, are rich, and are worth asking.

What it teaches: of a question about a video three things can be wrong. The answer may belong to another
video (alignment), the video may show next to nothing (richness), and a single frame may be enough
(difficulty). The paper has each scored on 16 frames, on a scale of its own, and keeps what reaches all
three thresholds; -1 says that the annotator would not score.

    video --> 16 frames --+
    question, answer -----+--> annotator --> alignment  -1 .. 10   kept from 5
                                             richness   -1 ..  7   kept from 5
                                             difficulty -1 ..  8   kept from 3

    python -m curation.video_scores --data videos.jsonl --out kept.jsonl --annotator.url ...

The funnel has a line for each threshold, as 6.23M became 5.1M.

Source: SAIL-VL2 section 4.1 (scales, thresholds, refusals). Not published: the prompt, and what each number
means; both are ours (prompts/video_scores.txt). Frames are drawn as those of training are: at random, the
same ones for the same record.
"""

from dataclasses import dataclass, field

from curation.annotators import AnnotatorOptions, open_annotator
from curation.pipeline import Item, PipelineOptions
from curation.questions import (
    AskStep,
    AtLeast,
    Scale,
    given_answer,
    last_question,
    pictures_in,
    scores_in,
    walk_and_report,
)
from curation.requests import Request
from data.images import evenly_spaced
from data.sample import MAX_FRAMES, BadSample, Sample
from infra.cli import command
from scale import parallel

REFUSED = -1  # a score that the annotator would not give
VIDEO_SCALES = {
    "alignment": Scale(REFUSED, 10),
    "richness": Scale(REFUSED, 7),
    "difficulty": Scale(REFUSED, 8),
}


def video_frames(sample: Sample, frames: int) -> tuple:
    """At most `frames` pictures of a video, or of one that comes as numbered pictures.

    Raises BadSample for fewer than two: that is no video.
    """
    pictures = pictures_in(sample, frames)
    if len(pictures) < 2:
        raise BadSample("no video", f"{sample.origin}: {len(pictures)} frames")
    return tuple(pictures[i] for i in evenly_spaced(len(pictures), frames))


class VideoScored(AskStep):
    """The three scores, as facts."""

    name = "scored"

    def __init__(self, annotator, frames: int = MAX_FRAMES):
        super().__init__(annotator)
        self.frames = frames

    def request(self, item: Item) -> Request:
        sample = item.sample
        fields = {"question": last_question(sample), "answer": given_answer(sample)}
        return Request("video_scores", fields, video_frames(sample, self.frames), sample)

    def read(self, item: Item, reply: str) -> None:
        scores = scores_in(reply, VIDEO_SCALES)
        why = ", ".join(f"{name} {score}" for name, score in scores.items())

        # One that is missing is a refusal of all
        if REFUSED in scores.values():
            raise BadSample("refused", why)
        item.keep(self.name, why, **scores)


# ---------------------------------------------------------------------------------------- command


@dataclass
class VideoScoreOptions(PipelineOptions):
    """Score questions about videos, and keep those that reach all three thresholds."""

    annotator: AnnotatorOptions = field(default_factory=AnnotatorOptions)
    frames: int = MAX_FRAMES  # of a video that are shown
    alignment: int = 5  # lowest scores that are kept
    richness: int = 5
    difficulty: int = 3


def score_videos(options: VideoScoreOptions) -> None:
    # What can be wrong is found before anybody is asked
    if options.frames < 2:
        raise ValueError(f"--frames {options.frames}: a video has at least two")
    for name, scale in VIDEO_SCALES.items():
        least = getattr(options, name)
        if not scale.low < least <= scale.high:
            raise ValueError(f"--{name} {least}: scores go from 0 to {scale.high}")

    # Scored, then one threshold after the other
    ranks = parallel.start()
    annotator = open_annotator(options.annotator, options.seed)
    limits = [AtLeast(name, getattr(options, name)) for name in VIDEO_SCALES]
    scored = VideoScored(annotator, options.frames)
    walk_and_report(options, ranks, [scored, *limits], annotator=annotator)


if __name__ == "__main__":
    command(score_videos)
