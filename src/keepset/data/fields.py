"""Fields beside a row's text that change what the row means: one table of what is done with each in which dialect.

The names are those of TRL, axolotl, LLaMA-Factory, ms-swift, NeMo, OpenAI's fine-tuning format, ShareGPT and OASST.
`FIELDS` is what the code works from: a rule looks at the value and lets the row through, raises `RowProblem`, or says
that the value is none of its business (a `label` of "sports"). A field that is null or empty is as good as absent.
What no rule and no dialect takes is carried along: it stays in the row that is written out, and `keepset inspect` lists
it. `docs/data.md` prints the table; a test holds the page and every row of the table against what the readers do.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from keepset.data.reasons import RowProblem

Rule = Callable[[str, Any], bool]
"""From (place, value) to whether the value was understood; raises `RowProblem` where the row can't be used."""

CHATS = ("messages", "sharegpt", "prompt-completion", "alpaca", "question-answer")
SFT = (*CHATS, "text")
PAIRS = ("preference", "hh-rlhf", "shp", "llamafactory-preference", "stack-exchange")
EVERY = (*SFT, *PAIRS)
TEMPLATED = (*CHATS, *PAIRS)
TEXT_PROMPTS = ("prompt-completion", "alpaca", "question-answer", "preference")

SYSTEM = ("system", "system_prompt")
SIDE_SCORES = tuple(
    (name.format("chosen"), name.format("rejected")) for name in ("{}_score", "score_{}", "{}_rating", "{}-rating")
)
"""The columns that hold a pair's scores: of the chosen side, of the rejected one."""
PROMPTS = ("prompt", "question", "instruction", "query", "problem", "user", "input")
"""The columns that can hold a pair's prompt, the first that is given first."""


def empty(value: Any) -> bool:
    """Tell whether a value says nothing: null, blank, false, an empty list or object, or one of nothing but such."""
    if value is None or value is False or value == b"":
        return True
    if isinstance(value, str):
        text = value.strip()
        return text in ("", "[]", "{}", "null", "None") or (text[0] in "[{" and len(text) <= 200 and _written(text))
    if isinstance(value, Mapping):
        return all(empty(v) for v in value.values())
    return isinstance(value, (list, tuple)) and all(empty(v) for v in value)


def _written(text: str) -> bool:
    """Tell whether a list or an object, as JSON or Python text, says nothing: `[null]` in a cell of a CSV file."""
    for read in (json.loads, ast.literal_eval):
        try:
            return empty(read(text))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return False


def flag(value: Any) -> bool | None:
    """Read true, 1, 1.0, "true" and "1" as True, their opposites as False, and anything else as None."""
    if isinstance(value, str):
        return {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(
            value.strip().lower()
        )
    if isinstance(value, (bool, int, float, Decimal)) and value in (0, 1):
        return bool(value)
    return None


def _refused(reason: str, why: str) -> Rule:
    def rule(place: str, value: Any) -> bool:
        if not empty(value):
            raise RowProblem(reason, f"'{place}' {why}")
        return True

    return rule


def _weight(place: str, value: Any) -> bool:
    if empty(value) and value is not False:
        return True
    trained = flag(value)
    if trained is None:
        raise RowProblem(
            "fractional-weight", f"'{place}' is {str(value)[:40]}: only weights of 0 and 1 are followed; "
            f"`keepset train sft --weight_column {place}` trains with others"
        )  # fmt: skip
    if not trained:
        raise RowProblem("not-trained", f"'{place}' is {str(value)[:40]}: the row is not to be trained on")
    return True


def _false_is_refused(reason: str, why: str, *, numbers: bool) -> Rule:
    def rule(place: str, value: Any) -> bool:
        answer = flag(value) if numbers or not isinstance(value, (int, float, Decimal)) or value is False else None
        if answer is False or (isinstance(value, str) and value.strip().lower() == reason):
            raise RowProblem(reason, f"'{place}' is {str(value)[:40]}: {why}")
        return answer is not None

    return rule


def _true_is_refused(place: str, value: Any) -> bool:
    if flag(value):
        raise RowProblem("not-trained", f"'{place}' is {str(value)[:40]}: the row is not to be trained on")
    return flag(value) is not None


def _mask(place: str, value: Any) -> bool:
    if value is False or not empty(value):
        raise RowProblem("unused-field", f"'{place}' can mean either side of a mask; mark messages by `train`")
    return True


def _row_mask(place: str, value: Any) -> bool:
    # NeMo names the speaker that is not trained on; the user never is
    return (isinstance(value, str) and value.strip().lower() in ("user", "human")) or _mask(place, value)


def _list_is_refused(place: str, value: Any) -> bool:
    if not isinstance(value, (list, tuple)):
        return False
    return _refused("unused-field", "holds token ids or a token mask, which are made anew here")(place, value)


def _carried(place: str, value: Any) -> bool:
    return False


def _honoured(place: str, value: Any) -> bool:
    return True


_MEDIA = _refused("non-text-content", "holds an image, sound or video, and only text is read")
_TOOLS = _refused("tool-calls", "holds tool definitions, which would be lost in rendering")


class Field(NamedTuple):
    """One line of the table: names, where they stand, in which dialects, what is done, and the rule that does it."""

    names: tuple[str, ...]
    where: str
    dialects: tuple[str, ...]
    what: str
    told: str
    rule: Rule


FIELDS: tuple[Field, ...] = (
    # --- columns of a row
    Field(SYSTEM, "row", TEMPLATED, "honoured", "leads the chat; another system text in the chat: refused", _honoured),
    Field(SYSTEM, "row", ("text",), "honoured", "must stand in the text, else refused", _honoured),
    Field(("history",), "row", TEXT_PROMPTS, "honoured", "pairs of texts before the prompt; other forms: refused",
          _honoured),
    Field(("history",), "row", ("messages", "sharegpt", "hh-rlhf", "llamafactory-preference", "stack-exchange"),
          "refused", "unless empty: the chat has its own history",
          _refused("unused-field", "would be dropped; put it into the chat")),
    Field(PROMPTS, "row", ("preference",), "honoured",
          "the first that is given is the prompt (`instruction` with `input`); another that holds other text: refused",
          _honoured),
    Field(("prompt", "question", "instruction", "query", "problem", "input", "context"), "row",
          ("prompt-completion", "alpaca", "question-answer"), "honoured",
          "a text that is not in the prompt: refused", _honoured),
    Field(("context",), "row", ("preference",), "honoured", "joined to `instruction`; beside others: refused if not "
          "in the prompt", _honoured),
    Field(("tools", "functions"), "row", TEMPLATED, "refused", "unless empty", _TOOLS),
    Field(("image", "images", "video", "videos", "audio", "audios", "pixel_values", "image_url", "image_urls",
           "image_path", "image_paths", "image_file", "video_path", "audio_path"), "row", EVERY, "refused",
          "unless empty; `<image>` in a text alone is text", _MEDIA),
    Field(("label", "kto_tag", "desirable", "is_desirable"), "row", CHATS, "refused",
          "where false, 0 or `undesirable`: an answer that is not wanted; others, true and 1 apart, are carried along",
          _false_is_refused("undesirable", "an answer that is not wanted (unpaired preference data)", numbers=True)),
    Field(("label", "kto_tag", "desirable", "is_desirable"), "row", ("text",), "refused",
          "where false or `undesirable`; numbers are carried along (classes)",
          _false_is_refused("undesirable", "an answer that is not wanted (unpaired preference data)", numbers=False)),
    Field(("weight", "sample_weight", "loss_weight", "loss_scale"), "row", EVERY, "refused",
          "unless 1, or named by `keepset train sft --weight_column`", _weight),
    Field(("train", "training", "trainable"), "row", EVERY, "refused",
          "where false or 0; texts are carried along",
          _false_is_refused("not-trained", "the row is not to be trained on", numbers=True)),
    Field(("loss",), "row", EVERY, "refused", "where false; numbers are carried along",
          _false_is_refused("not-trained", "the row is not to be trained on", numbers=False)),
    Field(("masked",), "row", EVERY, "refused", "where true or 1", _true_is_refused),
    Field(("mask",), "row", EVERY, "refused", "unless null or NeMo's `User`", _row_mask),
    Field(("input_ids", "completion_mask", "assistant_masks", "loss_mask"), "row", EVERY, "refused",
          "where it is a list", _list_is_refused),
    Field(("labels",), "row", tuple(d for d in EVERY if d != "shp"), "refused", "where it is a list", _list_is_refused),
    Field(("chat_template_kwargs",), "row", TEMPLATED, "refused", "unless empty",
          _refused("unused-field", "changes how the row is rendered, which is not followed")),
    Field(tuple(name for pair in SIDE_SCORES for name in pair), "row", ("preference", "stack-exchange"),
          "honoured", "a tie, or rejected above chosen: refused", _honoured),
    Field(("split",), "row", EVERY, "carried", "no row is left out for it: filter the file", _carried),
    Field(("reasoning_content", "reasoning", "thinking", "thought"), "row", EVERY, "carried",
          "not rendered: put it into the answer if it is to be learnt", _carried),
    Field(("rejected_response", "rejected_messages"), "row", EVERY, "carried", "the row is not read as a pair",
          _carried),
    Field(("margin", "score"), "row", EVERY, "carried", "not used", _carried),
    # --- keys of a message; whether an assistant's message is trained on is read by `trained`
    Field(("weight", "loss_scale", "step_loss_mask"), "message", (), "honoured",
          "0: the assistant's message is context, not trained on; fractions: refused", _honoured),
    Field(("train", "training", "trainable", "loss", "loss_mask"), "message", (), "honoured",
          "false or 0: the assistant's message is context; true on another speaker: refused", _honoured),
    Field(("masked",), "message", (), "honoured",
          "true: the assistant's message is context; false on another speaker: refused", _honoured),
    Field(("mask",), "message", (), "refused", "unless null: it can mean either side", _mask),
    Field(("train_detail", "training_detail", "train_details", "training_details"), "message", (), "refused",
          "unless empty", _refused("unused-field", "marks parts of a message, and whole ones are followed")),
    Field(("reasoning_content", "reasoning", "reasoning_details", "thinking", "thought", "thoughts"), "message", (),
          "refused",
          "unless empty", _refused("reasoning-field", "holds reasoning beside the content; put it into the content as "
                                   "your model's template writes it (<think>…</think>)")),
    Field(("tool_calls", "function_call"), "message", (), "refused", "unless empty",
          _refused("tool-calls", "holds structured tool calls")),
    Field(("image", "images", "image_url", "video", "videos", "audio", "audios"), "message", (), "refused",
          "unless empty", _MEDIA),
    Field(("refusal",), "message", (), "refused", "unless empty",
          _refused("unused-field", "is a text beside the content")),
    Field(("channel", "recipient"), "message", (), "refused", "unless empty (Harmony)",
          _refused("unused-field", "changes how the message is rendered, which is not followed")),
    Field(("replies",), "message", (), "refused", "unless empty (OASST)",
          _refused("message-tree", "is a tree of answers; write each path through it as `messages`")),
    Field(("name", "tool_call_id"), "message", (), "carried", "not rendered", _carried),
)  # fmt: skip

#: Which columns hold the text of a row, by dialect: of each group the first that is given.
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations", "conversation"),),
    "prompt-completion": (("prompt",), ("completion", "response")),
    "alpaca": (("instruction",), ("input", "context"), ("output", "response")),
    "question-answer": (("question", "query"), ("answer", "response")),
    "text": (("text",),),
    "preference": (("chosen",), ("rejected",)),
    "hh-rlhf": (("chosen",), ("rejected",)),
    "shp": (("history",), ("human_ref_A",), ("human_ref_B",), ("labels", "label"), ("score_A",), ("score_B",)),
    "llamafactory-preference": (("conversations", "conversation", "messages"), ("chosen",), ("rejected",)),
    "stack-exchange": (("title",), ("body",), ("chosen",), ("rejected",)),
}
#: The keys that every message has.
PLAIN = frozenset({"role", "content", "from", "value"})

ROW_RULES: dict[str, dict[str, Rule]] = {
    dialect: {name: f.rule for f in FIELDS if f.where == "row" and dialect in f.dialects for name in f.names}
    for dialect in COLUMNS
}
MESSAGE_RULES: dict[str, Rule] = {name: f.rule for f in FIELDS if f.where == "message" for name in f.names}
#: Message keys whose true (or, `masked`, false) says that the message is trained on; the second three are followed
#: on other speakers' messages by some trainers.
_WEIGHTS = ("weight", "loss_scale", "step_loss_mask")
_TRAIN = ("train", "training", "trainable", "loss", "loss_mask", "masked")
FLAGS = frozenset((*_WEIGHTS, *_TRAIN))
NOTHING: tuple[Any, ...] = (None, "", [], {})
#: What to say of a name that is carried along.
NOTES = {name: f.told for f in FIELDS if f.what == "carried" for name in f.names}


def check_row(row: Mapping[str, Any], dialect: str) -> None:
    """Hold a row's columns against the table.

    Raises:
        RowProblem: a field says that the row is not to be used, or something that would be lost.
    """
    if is_tree(row):
        raise RowProblem(
            "message-tree", "the row is a message of a tree (OASST); write each path through it as `messages`"
        )
    rules = ROW_RULES[dialect]
    for name in row:
        if name in rules:
            rules[name](name, row[name])


def is_tree(row: Mapping[str, Any]) -> bool:
    """Tell OASST's rows: one message with its parent's id, or a `prompt` with `replies`."""
    prompt = row.get("prompt")
    if type(prompt) is dict:
        return "replies" in prompt
    return "parent_id" in row and "message_id" in row and "text" in row


def prompt_column(row: Mapping[str, Any]) -> str | None:
    """Name the column that holds a pair's prompt: the first of `PROMPTS` that is given, None if none is there."""
    there = [name for name in PROMPTS if name in row]
    return next((name for name in there if not empty(row[name])), there[0] if there else None)


def trained(message: Mapping[str, Any], role: str, place: str) -> bool:
    """Hold a message's keys against the table and tell whether it is trained on, if it is the assistant's.

    Raises:
        RowProblem: a key that can't be followed: structured content, fractions, two that contradict each other,
            another speaker's message that is to be trained on.
    """
    marks: dict[str, bool] = {}
    for key, value in message.items():
        rule = MESSAGE_RULES.get(key)
        if rule is None:
            continue
        if key not in FLAGS:
            rule(f"{place}.{key}", value)
        elif value is not None and value != "":
            answer = flag(value)
            if answer is None:
                raise RowProblem(
                    "fractional-weight", f"'{place}.{key}' is {str(value)[:40]}: only 0, 1, false and true are followed"
                )
            marks[key] = answer is not (key == "masked")
    if role != "assistant":
        wrong = next((key for key in _TRAIN if marks.get(key)), None)
        if wrong:
            raise RowProblem("trained-prompt", f"'{place}.{wrong}' says that a {role} message is trained on")
        return True
    if len(set(marks.values())) > 1:
        raise RowProblem("unused-field", f"{', '.join(marks)} of '{place}' contradict each other")
    return all(marks.values())


def carried(row: Mapping[str, Any], dialect: str) -> list[str]:
    """Name the columns of a usable row that neither its dialect reads nor a rule understood; null ones left out."""
    used = {next((name for name in group if row.get(name) is not None), "") for group in COLUMNS[dialect]}
    if dialect == "preference":
        used |= {prompt_column(row) or ""}
        used |= {"input" if row.get("input") is not None else "context"} if "instruction" in used else set()
    rules = {name: rule for name, rule in ROW_RULES[dialect].items() if name not in (*PROMPTS, "context")}
    return [
        name
        for name, value in row.items()
        if name not in used and value not in NOTHING and not (name in rules and rules[name](name, value))
    ]


def carried_keys(message: Mapping[str, Any]) -> list[str]:
    """Name the keys of a usable message that are not used; null ones left out."""
    taken = PLAIN | {name for name, rule in MESSAGE_RULES.items() if rule is not _carried}
    return [key for key, value in message.items() if key not in taken and value not in NOTHING]


def table() -> str:
    """Return `FIELDS` as the two tables of `docs/data.md`."""
    groups = {EVERY: "every", TEMPLATED: "every but text"}
    words = {"honoured": "honoured: ", "refused": "refused ", "carried": "carried along: "}
    heads = {"row": "| column | dialects | |\n|---|---|---|", "message": "| key of a message | |\n|---|---|"}
    out = []
    for where, head in heads.items():
        lines = [head]
        for f in FIELDS:
            if f.where == where:
                names = ", ".join(f"`{name}`" for name in f.names)
                cells = [names, groups.get(f.dialects, ", ".join(f.dialects))] if where == "row" else [names]
                lines.append(f"| {' | '.join([*cells, words[f.what] + f.told])} |")
        out.append("\n".join(lines))
    return "\n\n".join(out) + "\n"
