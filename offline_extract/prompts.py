"""From (instruction, shots, query) to token ids, with the positions the method needs."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fv_steer.errors import BadInputError
from fv_steer.schema import FramedInstruction, PromptFormat, Source
from offline_extract.tasks import Pair


@dataclass(frozen=True)
class Context:
    """What precedes the query: an instruction, solved examples, or both. Empty is zero-shot."""

    instruction: FramedInstruction | None = None
    shots: tuple[Pair, ...] = ()


ZERO_SHOT = Context()


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt.

    ids: token ids up to the query position S, the last one.
    target: first token of the expected answer.
    frame: positions of the tokens whose relevance ranks the heads.
    """

    pair: Pair
    ids: tuple[int, ...]
    target: int
    frame: tuple[int, ...]


@dataclass(frozen=True)
class _Text:
    text: str
    frames: tuple[tuple[int, int], ...]
    answer_prefix: str


def build_prompt(tokenizer: Any, context: Context, pair: Pair, fmt: PromptFormat) -> Prompt:
    """Tokenise one prompt; raises BadInputError if the answer has no token of its own."""
    rendered = _render_chat(tokenizer, context, pair) if fmt == "chat" else _render_qa(context, pair.input)
    special = fmt == "qa"
    encoded = tokenizer(rendered.text, add_special_tokens=special, return_offsets_mapping=True)
    ids = tuple(encoded["input_ids"])
    frame = tuple(
        position
        for position, (start, end) in enumerate(encoded["offset_mapping"])
        if any(start < f_end and end > f_start for f_start, f_end in rendered.frames)
    )
    return Prompt(pair, ids, first_answer_token(tokenizer, rendered.answer_prefix + pair.target), frame)


def first_answer_token(tokenizer: Any, answer: str) -> int:
    """First token of an answer as it continues the prompt; `answer` keeps its leading space."""
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not ids:
        raise BadInputError(f"the answer {answer!r} has no tokens")
    return int(ids[0])


def _render_qa(context: Context, query: str) -> _Text:
    """`INSTRUCTION\\nQ: INPUT\\nA:`; solved examples come before the query, one blank line apart."""
    text = context.instruction.text if context.instruction else ""
    frames = _instruction_frames(context, offset=0)
    for shot in context.shots:
        text += f"\nQ: {shot.input}\nA: "
        frames.append((len(text), len(text) + len(shot.target)))
        text += f"{shot.target}\n"
    return _Text(f"{text}\nQ: {query}\nA:", tuple(frames), " ")


def _render_chat(tokenizer: Any, context: Context, pair: Pair) -> _Text:
    messages = []
    for shot in context.shots:
        messages += [{"role": "user", "content": shot.input}, {"role": "assistant", "content": shot.target}]
    messages.append({"role": "user", "content": pair.input})
    if context.instruction:
        messages[0]["content"] = f"{context.instruction.text}\n{messages[0]['content']}"
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    frames = _instruction_frames(context, text.find(context.instruction.text) if context.instruction else 0)
    cursor = 0
    for shot in context.shots:
        cursor = text.index(shot.target, text.index(shot.input, cursor) + len(shot.input))
        frames.append((cursor, cursor + len(shot.target)))
    return _Text(text, tuple(frames), "")


def _instruction_frames(context: Context, offset: int) -> list[tuple[int, int]]:
    """The frame's span in an instruction.

    With solved examples the labels are the frame: the model reads the task off
    them, and the instruction's words then rank the wrong heads.
    """
    if context.instruction is None or context.shots:
        return []
    start = offset + context.instruction.text.find(context.instruction.frame)
    return [(start, start + len(context.instruction.frame))]


def make_contexts(
    source: Source,
    instructions: Sequence[FramedInstruction],
    pool: Sequence[Pair],
    *,
    shots: int,
    count: int,
    seed: int,
) -> list[Context]:
    """`count` contexts of one source; solved examples are drawn from `pool`."""
    rng = random.Random(f"{seed}/contexts/{source}")
    if source != "icl" and not instructions:
        raise BadInputError(f"source {source!r} needs instructions: give --instruction TEXT --frame WORDS")
    picked = list(instructions[:count]) if source != "icl" else [None] * count
    n_shots = 0 if source == "instruction" else min(shots, len(pool) // 2)
    return [Context(instruction, tuple(rng.sample(list(pool), n_shots))) for instruction in picked]
