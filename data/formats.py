"""Formats: what the fields of a record say, as messages and facts.

What it teaches: every dataset is messages with text and image parts, in another spelling. A reader
for each spelling is short once it has only that to do; what they have in common (marks, typed
parts, chains, truths) is said once.

    fields --reader by field--> turns --dialogue--> messages --+
       +---truth_beside-----------------------------> facts ---+--to_sample--> Sample

    a record with     is read as                                of
    conversations     turns of from/value or role/content       LLaVA, ShareGPT, Qwen-VL, InternVL
    messages          turns; a text with marks, or typed parts  OpenAI, Hugging Face, LLaMA-Factory
    texts             turns of user/assistant, rated            FineVision, the_cauldron
                      texts and images in turn                  OBELICS
    prompt            turns, and reward_model.ground_truth      verl's RL rows
    question          image, options, one answer or several     VLMEvalKit, VQA sets, your own rows
    txt, json         captions, records, pages inside a .tar    WebDataset, img2dataset, idl-wds

    beside them       task: to mix and count by; facts: answer, chain, family, grader, category
    of a turn         weight, loss, train: 0 or false is not learned
                      reasoning_content: the chain, as is <think>...</think> in the text

The truth is the last assistant turn, or what the record says apart from it; what follows that turn
is not asked. Nothing is fetched from the network. To add a format: a reader in READERS, and its
field in RECORD_FIELDS (container_base.py). Whatever a malformed record raises in here costs that
record alone (readers.py).
"""

import base64
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from data.container_base import PICTURES, RECORD_FIELDS, decode_text, strict_json
from data.mixture import Dataset
from data.sample import THINKING, BadSample, Message, Sample, Video
from graders import boxed

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
# the types of a message's parts, as they are called here and there
PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
    "input_video": "video",
    "thinking": "thinking",
    "reasoning": "thinking",
}
# the fields that hold what a part is about
VALUES = {
    "text": ("text", "content"),
    "thinking": ("thinking", "reasoning", "text", "content"),
    "image": ("image", "image_url", "path", "url", "bytes"),
    "video": ("video", "video_url", "path", "url"),
}
CHAINS = ("reasoning_content", "reasoning", "thinking")  # fields of a turn that hold its chain
SUPERVISED = ("weight", "loss", "train", "learn")  # fields of a turn that say whether it is learned

DESCRIBE = "Describe the picture."  # our questions to captions and pages without one
READ = "Read the text in the picture."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER = "\nAnswer with the letter."

MAX_TEXT = 1 << 20  # characters of a turn: a quarter of a million tokens

# The first characters of a JPEG, PNG, GIF and WebP in base64.
BASE64_PICTURES = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")


# ------------------------------------------------------------------------------------ pictures and values


def image_source(value) -> bytes | Path:
    """An image as datasets spell it: path, bytes, {bytes, path}, {url: ...}, data URL, base64.
    Raises TypeError for others."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url") or value.get("image")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise TypeError(f"an image cannot be {type(value).__name__}")

    # a text: the picture itself, or where it is
    if value.startswith("data:"):
        return base64.b64decode(value.partition(",")[2], validate=True)
    if len(value) > 64 and value.startswith(BASE64_PICTURES):
        return base64.b64decode("".join(value.split()), validate=True)
    if re.match(r"https?://", value):
        raise BadSample("remote image", value[:100])
    return Path(value)


def video_source(value) -> Video:
    if isinstance(value, list):
        return Video(tuple(image_source(frame) for frame in value))
    return Video(image_source(value))


def listed(value) -> list:
    """One or several of something, without those that a table leaves empty: null, or a struct of nulls."""
    if value is None or value == "":
        return []
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [one for one in values if not is_null_struct(one)]


def is_null_struct(value) -> bool:
    return isinstance(value, dict) and all(cell is None for cell in value.values())


def images_in(row: dict) -> list:
    """The images of a row, under the names that datasets give them."""
    for key in ("image", "images", "image_bytes"):
        images = listed(row.get(key))
        if images:
            return [image for image in images if image is not None]
    return []


def videos_in(row: dict) -> list:
    if row.get("videos"):
        return listed(row["videos"])
    return [row["video"]] if row.get("video") else []


def rows_of(value) -> list:
    """A list of objects; Hugging Face's sequences store it as an object of lists, older files as
    JSON text."""
    if isinstance(value, str):
        value = strict_json(value)
    if not isinstance(value, dict):
        return value

    # {"role": [a, b], "content": [c, d]} -> [{"role": a, "content": c}, {"role": b, "content": d}]
    lengths = {len(column) for column in value.values()}
    if len(lengths) != 1:
        raise ValueError(f"columns of {sorted(lengths)} values")
    return [dict(zip(value, cells)) for cells in zip(*value.values())]


def text_of_value(value) -> str:
    """A truth as text: 5 and 5.0 are "5". Raises BadSample for what is no truth."""
    if isinstance(value, str):
        inside = boxed(value)
        return value if inside is None else inside
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, (bool, int, float)):
        return str(value)
    raise BadSample("no answer", f"the truth is {type(value).__name__}, wanted a text or a number")


def accepted_texts(value) -> str | list[str]:
    """A truth, or a list of accepted ones (every annotator's counts, so repetitions stay). Raises
    BadSample for none."""
    if not isinstance(value, (list, tuple)):
        text = text_of_value(value)
        if not text.strip():
            raise BadSample("no answer", "the truth is empty")
        return text

    # several: null and empty ones are no answers
    texts = [text_of_value(one) for one in value if one is not None and one != ""]
    if not texts:
        raise BadSample("no answer", "the list of accepted answers is empty")
    return texts if len(texts) > 1 else texts[0]


def first_text(truth: str | list[str]) -> str:
    """What an assistant would say: the commonest of the accepted answers, the first of those."""
    return truth if isinstance(truth, str) else Counter(truth).most_common(1)[0][0]


# ------------------------------------------------------------------------------------ turns to messages


@dataclass(frozen=True)
class ChatTurn:
    """What somebody says: in a user's text <image> and <video> mark where the pictures stand."""

    role: str
    text: str
    think: str | None = None
    learn: bool = True


def chat_turn(said: dict, text: str, think: str | None = None) -> ChatTurn:
    """A turn with what its fields say of it: role, chain, and whether it is learned. Raises
    KeyError, TypeError."""
    if not isinstance(text, str):
        raise TypeError(f"what a turn says is {type(text).__name__}")
    role = ROLES[said.get("from") or said["role"]]
    if role != "assistant":
        return ChatTurn(role, text)

    # a chain beside the text
    for key in CHAINS:
        beside = said.get(key)
        if isinstance(beside, str) and beside and not think:
            think = beside

    # not to be learned: each of these names is some framework's
    learn = True
    for key in SUPERVISED:
        flag = said.get(key)
        if flag is None:
            continue
        if not isinstance(flag, (bool, int, float)):
            raise TypeError(f"{key!r} of a turn must be a number or a truth value")
        learn = learn and bool(flag)
    return ChatTurn(role, text, think, learn)


def dialogue(turns: list[ChatTurn], images: list, videos: list = ()) -> tuple[Message, ...]:
    """Turns with marks, and what the marks stand for, in order. What follows the last assistant
    turn is left out.

    Raises BadSample when marks and pictures do not agree, a turn is empty, or nobody answers.
    """
    queues = {
        "<image>": [image_source(image) for image in images],
        "<video>": [video_source(video) for video in videos],
    }

    # each kind of mark needs as many pictures
    asked = [i for i, turn in enumerate(turns) if turn.role == "user"]
    for mark, queue in queues.items():
        count = sum(turns[i].text.count(mark) for i in asked)
        if count == 0 and len(queue) == 1 and asked:
            # A lone one without a mark goes first.
            first = turns[asked[0]]
            turns[asked[0]] = replace(first, text=f"{mark}\n{first.text}")
            count = 1
        if count != len(queue):
            raise BadSample("wrong placeholder count", f"{count} {mark} marks for {len(queue)}")

    # the last answer is the end
    messages = [message_of(turn, queues) for turn in turns]
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise BadSample("no answer", "no assistant turn")
    return tuple(messages[: answers[-1] + 1])


def message_of(turn: ChatTurn, queues: dict[str, list]) -> Message:
    """The turn as a message; its marks take the next of their queues."""
    if len(turn.text) > MAX_TEXT:
        raise BadSample("oversized record", f"a turn of {len(turn.text)} characters: split it")
    turn.text.encode()  # refuses lone surrogates

    # a chain inside the text
    text = turn.text
    think = turn.think
    if turn.role == "assistant":
        chain = THINKING.fullmatch(text)
        if chain:
            think = think or chain[1]
            text = chain[2]
    if not text.strip() and think is None:
        kind = "answer" if turn.role == "assistant" else "question"
        raise BadSample(f"empty {kind}", "a turn without text or image")

    # the pictures take the places of their marks
    parts = []
    pieces = re.split("(<image>|<video>)", text) if turn.role == "user" else [text]
    for piece in pieces:
        if piece in queues:
            parts.append(queues[piece].pop(0))
        elif piece:
            parts.append(piece)
    return Message(turn.role, tuple(parts), think, turn.learn)


# ---------------------------------------------------------------------------------- readers


def from_conversations(row: dict) -> tuple[Message, ...]:
    """LLaVA and its relatives; Qwen-VL writes its images into the text: Picture 1: <img>red.png</img>."""
    turns = []
    for said in rows_of(row["conversations"]):
        turns.append(chat_turn(said, said["value"] if "value" in said else said["content"]))
    if isinstance(row.get("system"), str) and row["system"]:
        turns.insert(0, ChatTurn("system", row["system"]))

    # images that stand in the text itself
    images = images_in(row)
    if not images and not any("<image>" in turn.text for turn in turns):
        turns, images = inline_images(turns)
    return dialogue(turns, images, videos_in(row))


def inline_images(turns: list[ChatTurn]) -> tuple[list[ChatTurn], list[str]]:
    """Qwen-VL's <img>path</img> in users' turns, as marks and the paths."""
    images = []
    marked = []
    for turn in turns:
        if turn.role == "user":
            images += re.findall(r"<img>([^<>\n]+)</img>", turn.text)
            turn = replace(turn, text=re.sub(r"<img>[^<>\n]+</img>", "<image>", turn.text))
        marked.append(turn)
    return marked, images


def from_messages(row: dict, field: str = "messages") -> tuple[Message, ...]:
    """Content is a text with marks, or a list of typed parts; a part without a value of its own
    takes the next image."""
    said = rows_of(row[field])
    spare = images_in(row)
    spare_videos = videos_in(row)
    contents = [content_parts(m["content"]) for m in said]
    pictured = any(kind in ("image", "video") for parts in contents for kind, _ in parts)
    typed = any(isinstance(m["content"], (list, dict)) for m in said)

    # only texts: their marks stand for the row's images
    if not pictured and (spare or spare_videos or not typed):
        turns = [chat_turn(m, *joined(parts)) for m, parts in zip(said, contents)]
        return dialogue(turns, spare, spare_videos)

    # typed parts say where the images stand; a mark in a text would be only words
    turns = []
    images = []
    videos = []
    for m, parts in zip(said, contents):
        text = ""
        chain = None
        for kind, value in parts:
            if kind == "text":
                text += re.sub("<(?=(image|video)>)", "< ", value)
            elif kind == "thinking":
                chain = (chain or "") + value
            elif kind == "video":
                text += "<video>"
                videos.append(own_or_next(value, spare_videos))
            else:
                text += "<image>"
                images.append(own_or_next(value, spare))
        turns.append(chat_turn(m, text, chain))
    return dialogue(turns, images + spare, videos + spare_videos)


def own_or_next(value, spare: list):
    """What a part holds itself, or the next of the row's pictures."""
    if value is not None:
        return value
    if not spare:
        raise BadSample(
            "wrong placeholder count", "more parts of type image or video than there are"
        )
    return spare.pop(0)


def content_parts(content) -> list[tuple[str, object]]:
    """A message's content as (kind, value) of its parts."""
    if content is None or isinstance(content, str):
        return [("text", content or "")]
    return [typed_part(part) for part in rows_of(content)]


def joined(parts: list[tuple[str, object]]) -> tuple[str, str | None]:
    """Text and chain of a content without pictures."""
    text = "".join(value for kind, value in parts if kind == "text")
    chain = "".join(value for kind, value in parts if kind == "thinking")
    return text, chain or None


def typed_part(part) -> tuple[str, object]:
    """(kind, value) of a part: text, image, video or thinking; a picture's value is None when it
    stands elsewhere.

    Raises BadSample for a type that the reader does not know.
    """
    if isinstance(part, str):
        return "text", part

    # what it is: by its type, or by its only field
    name = part.get("type")
    if name is None:
        name = next((key for key, value in part.items() if value is not None), "nothing")
    kind = PARTS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise BadSample("unknown part", f"a part of type {name!r}: known are {', '.join(PARTS)}")

    # what it holds
    values = [part[key] for key in VALUES[kind] if part.get(key)]
    value = values[0] if values else None
    if kind in ("text", "thinking"):
        if not isinstance(value or "", str):
            raise TypeError(f"the text of a part is {type(value).__name__}")
        return kind, value or ""
    if kind == "video" and isinstance(value, dict):
        value = value.get("url") or value.get("path")
    return kind, value


def from_texts(row: dict, least: int = 0) -> tuple[Message, ...]:
    """FineVision, the_cauldron: turns of {user, assistant}, rated 1 to 5 in FineVision; OBELICS:
    texts and images in turn.

    least: turns with a lower rating are left out.
    """
    texts = rows_of(row["texts"])
    if all(text is None or isinstance(text, str) for text in texts):
        return interleaved(row["images"], texts)

    # turns that are rated high enough in everything
    ratings = [row[key] for key in row if key.endswith("_ratings") and row[key]]
    kept = []
    for i, turn in enumerate(texts):
        if all(rating[i] is None or rating[i] >= least for rating in ratings):
            kept.append(turn)
    if not kept:
        raise BadSample("rated too low", f"no turn is rated {least} or more in everything")

    # all images stand before the first question
    images = images_in(row)
    turns = []
    for pair in kept:
        for role in ("user", "assistant"):
            turns.append(ChatTurn(role, pair[role].replace("<image>", "")))
    marks = "<image>" * len(images) + "\n" * bool(images)
    turns[0] = replace(turns[0], text=marks + turns[0].text)
    return dialogue(turns, images)


def interleaved(images: list, texts: list) -> tuple[Message, ...]:
    """A page of texts and images in turn: one assistant message."""
    parts = []
    for image, text in zip(images, texts, strict=True):
        image = listed(image)
        if bool(image) == (text is not None):
            raise BadSample(
                "malformed record",
                "an interleaved place holds an image or a text, not both and not none",
            )
        parts.append(image_source(image[0]) if text is None else text)
    return (Message("assistant", tuple(parts)),)


def from_prompt(row: dict) -> tuple[Message, ...]:
    """verl: a prompt, and the truth that the reward knows."""
    answer = {"role": "assistant", "content": first_text(truth_beside(row))}
    return from_messages(row | {"prompt": [*rows_of(row["prompt"]), answer]}, "prompt")


def from_question(row: dict) -> tuple[Message, ...]:
    """A question about one or several images, or none; with options, when the row has some."""
    # hint, question, options, request
    asked = f"Hint: {row['hint']}\n" if row.get("hint") else ""
    asked += question_in(row)
    options = options_in(row)
    for letter, text in options.items():
        asked += f"\n{letter}. {text}"
    if options:
        asked += LETTER

    # images without marks go first, in their order
    images = images_in(row)
    if images and "<image>" not in asked:
        asked = "<image>" * len(images) + "\n" + asked
    answer = row.get("multiple_choice_answer") or first_text(truth_beside(row))
    return dialogue([ChatTurn("user", asked), ChatTurn("assistant", answer)], images)


def question_in(row: dict) -> str:
    question = row.get("question") or row.get("problem")
    if not isinstance(question, str):
        raise TypeError(f"a question cannot be {type(question).__name__}")
    return question


def options_in(row: dict) -> dict[str, str]:
    """Options by their letters: columns A, B, ... of a table, or a list under `choices` or `options`."""
    options = option_list(row)
    if options:
        return {letter: text_of_value(option) for letter, option in zip(LETTERS, options)}
    columns = [letter for letter in LETTERS if row.get(letter) not in (None, "")]
    return {letter: text_of_value(row[letter]) for letter in columns}


def option_list(row: dict) -> list:
    options = row.get("choices") or row.get("options")
    return options if isinstance(options, list) else []


def from_tar_fields(row: dict) -> tuple[Message, ...]:
    """Files of one key. A JSON sidecar may hold a record, a caption, or the pages of a document
    (idl-wds)."""
    images = [row[kind] for kind in row if kind in PICTURES]
    side = sidecar(row)
    if field_of(side):
        return read_messages(side | {"images": images, "image": None})
    if not images:
        raise BadSample(
            "no picture",
            f"{row['__key__']} has none of {', '.join(PICTURES)} (PDF and TIFF are not rendered)",
        )

    # what is said about the picture: the lines of a page, or a caption
    asked = DESCRIBE
    if "pages" in side:
        page = side["pages"][0]
        lines = page.get("lines", page)  # pdfa has its lines under "lines", idl at the page itself
        asked = READ
        answer = "\n".join(lines["text"])
    elif "txt" in row:
        answer = decode_text(row["txt"]).replace("\r\n", "\n").strip()
    else:
        answer = side["caption"]
    turns = [ChatTurn("user", "<image>\n" + asked), ChatTurn("assistant", answer)]
    return dialogue(turns, images[:1])


def sidecar(row: dict) -> dict:
    """The JSON beside a picture, {} when there is none. Of a picture that was generated, `prompt`
    is no record."""
    side = strict_json(decode_text(row["json"])) if "json" in row else {}
    if not isinstance(side, dict):
        raise TypeError("the .json of a sample must be an object")
    if "reward_model" not in side:
        side.pop("prompt", None)
    return side


READERS = {
    "conversations": from_conversations,
    "messages": from_messages,
    "texts": from_texts,
    "prompt": from_prompt,
    "question": from_question,
    "problem": from_question,
}
assert tuple(READERS) == RECORD_FIELDS, "a format is known to both containers and readers"


def field_of(row: dict) -> str | None:
    """The field by which a record is told, None when it has none; null is absent."""
    return next((field for field in READERS if row.get(field) is not None), None)


def read_messages(row: dict, min_rating: int = 0) -> tuple[Message, ...]:
    field = field_of(row)
    if field is None:
        names = ", ".join(map(str, row))[:100]
        raise KeyError(f"none of {', '.join(READERS)} among {names}")
    if field == "texts":
        return from_texts(row, min_rating)
    return READERS[field](row)


# ---------------------------------------------------------------------------------- truth


def truth_beside(row: dict) -> str | list[str] | None:
    """The truth that a record states apart from its turns, None when it does not. Raises BadSample
    for one that is none."""
    if field_of(row) == "prompt":
        return accepted_texts(row["reward_model"]["ground_truth"])
    if field_of(row) not in ("question", "problem"):
        return None

    # one answer, those of all annotators, or what these agreed on
    answer = row.get("answer")
    if answer is None or answer == "":
        answer = annotators(row) or row.get("multiple_choice_answer")
    if answer is None or answer == []:
        raise BadSample("no answer", "neither answer nor answers")

    # of options, the letter
    options = options_in(row)
    if options and not isinstance(answer, list):
        return letter_of(answer, options, by_place=bool(option_list(row)))
    return accepted_texts(answer)


def annotators(row: dict) -> list:
    """The answers of all annotators: texts, or objects with a text, as in VQAv2 and its successors."""
    answers = row.get("answers")
    if answers is None or answers == "":
        return []
    each = rows_of(answers) if isinstance(answers, (dict, list)) else [answers]
    return [one["answer"] if isinstance(one, dict) else one for one in each]


def letter_of(answer, options: dict[str, str], by_place: bool) -> str:
    """The letter of the right option: given as itself, as the option's text, or (in datasets with a
    list of options) as its place, from 0. A text that is none of these is the truth as it stands."""
    text = text_of_value(answer).strip()
    bare = text.strip("().: ").upper()  # (b) and B. are B
    if bare in options:
        return bare
    for letter, option in options.items():
        if option.strip() == text:
            return letter

    if by_place and text.isascii() and text.isdigit():
        if len(text) < 9 and int(text) < len(options):
            return list(options)[int(text)]
        raise BadSample("no answer", f"option {text[:20]} of {len(options)}")
    return accepted_texts(text)


def facts_in(row: dict, messages: tuple[Message, ...]) -> dict:
    """What grading knows: the record's own facts, and what can be told from the record. Raises
    TypeError, BadSample."""
    # the record's own: null is absent, and texts are texts
    facts = row["facts"] if "facts" in row else {}
    if not isinstance(facts, dict):
        raise TypeError("`facts` must be an object")
    facts = {key: value for key, value in facts.items() if value is not None}
    for key in ("family", "chain", "words", "grader", "question", "category"):
        if not isinstance(facts.get(key, ""), str):
            raise TypeError(f"`facts.{key}` must be a text")

    # the truth: stated in the facts, beside the turns, or the last turn itself
    last = messages[-1]
    if facts.get("answer") not in (None, "", []):
        facts["answer"] = accepted_texts(facts["answer"])
    else:
        said = "".join(part for part in last.parts if isinstance(part, str))
        facts["answer"] = truth_beside(row) or text_of_value(said)
    if last.think and "chain" not in facts:
        facts["chain"] = last.think

    # what a score is reported by
    if field_of(row) in ("question", "problem"):
        facts.setdefault("question", question_in(row))
        if isinstance(row.get("index"), (str, int)):
            facts.setdefault("index", str(row["index"]))
    if row.get("category") and isinstance(row["category"], str):
        facts.setdefault("category", row["category"])
    return facts


# ---------------------------------------------------------------------------------- sample


def to_sample(row: dict, origin: str, root: Path, dataset: Dataset) -> Sample:
    """Fields -> Sample. Raises BadSample, without its origin, and what malformed fields raise."""
    if not isinstance(row, dict):
        raise TypeError(f"a record must be an object, not {type(row).__name__}")
    if "__key__" in row:
        messages = from_tar_fields(row)
        row = sidecar(row)
    else:
        messages = read_messages(row, dataset.min_rating)

    # the record's label comes first, then the dataset's
    task = row.get("task") or dataset.task
    if not task and field_of(row) == "prompt":
        task = row.get("data_source")
    if not isinstance(task or "", str):
        raise TypeError("`task` must be a text")
    facts = facts_in(row, messages)
    messages = tuple(with_frames(message, dataset) for message in messages)
    return Sample(messages, task or "", origin, facts, root, dataset.max_tiles)


def with_frames(message: Message, dataset: Dataset) -> Message:
    """A message whose videos know how many of their frames the dataset wants."""
    if not any(isinstance(part, Video) for part in message.parts):
        return message
    parts = []
    for part in message.parts:
        if isinstance(part, Video):
            part = Video(part.source, dataset.max_frames, dataset.frames)
        parts.append(part)
    return replace(message, parts=tuple(parts))
