"""Dialects: which columns mean what. Each function turns one raw row into turns, or into (prompt, chosen, rejected).

What other columns do to a row (`system`, `tools`, `label` …) is the table of `fields.py`, held against every row first.
Rules that are ours to state: Alpaca's prompt is `instruction`, a newline, `input` (as LLaMA-Factory joins them). A text
completion loses the one leading space that joined it to its prompt. A prompt of the form
`\\n\\nHuman: … \\n\\nAssistant:` is split into messages. A chat may be written as JSON or Python text (`written.py`).
A pool reads a pair as prompt + chosen; a target reads an SFT row as its last answer and what stands before it.
SHP keeps every pair, whatever its score ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keepset.data.fields import SIDE_SCORES, check_row, empty, prompt_column
from keepset.data.parts import (
    Row,
    folded,
    input_column,
    instruction_text,
    is_hh,
    need,
    no_other_text,
    not_repeated,
    one_prompt,
    read_completion,
    read_prompt,
    text_field,
    with_history,
    with_system,
)
from keepset.data.reasons import RowProblem
from keepset.data.turns import CONTEXT, ROLES, Turn, check_chat, looks_hh, read_turns, split_hh
from keepset.data.written import spoken
from keepset.errors import DataError, did_you_mean

Pair = tuple[list[Turn], list[Turn], list[Turn] | None]


# --------------------------------------------------------------------------------------------------- SFT dialects


def messages(row: Row) -> list[Turn]:
    """OpenAI / ChatML: `messages`, a list of {role, content}."""
    return check_chat(read_turns(need(row, "messages")[1], "messages"))


def sharegpt(row: Row) -> list[Turn]:
    """ShareGPT: `conversations`, a list of {from, value}."""
    name, value = need(row, "conversations", "conversation")
    return check_chat(read_turns(value, name))


def prompt_completion(row: Row) -> list[Turn]:
    """TRL: `prompt` and `completion` (or `response`), each text or messages."""
    name, value = need(row, "prompt")
    prompt = with_history(row, read_prompt(name, value))
    completion = read_completion(*need(row, "completion", "response"), strip=is_hh(value))
    one_prompt(row, prompt, "prompt")
    return check_chat(prompt + completion)


def alpaca(row: Row) -> list[Turn]:
    """Alpaca and Dolly: `instruction`, `input` (or `context`), `output` (or `response`)."""
    asked = [("user", instruction_text(row))]
    answer = text_field(row, "output", "response", blank="empty-completion")
    one_prompt(row, asked, "instruction", input_column(row))
    turns = [*with_history(row, asked), ("assistant", answer)]
    return check_chat(turns) if len(turns) > 2 else turns


def question_answer(row: Row) -> list[Turn]:
    """GSM8K and OpenOrca: `question` (or `query`), `answer` (or `response`)."""
    question = [("user", text_field(row, "question", "query", blank="empty-prompt"))]
    answer = text_field(row, "answer", "response", blank="empty-completion")
    one_prompt(row, question, "question" if "question" in row else "query")
    turns = [*with_history(row, question), ("assistant", answer)]
    return check_chat(turns) if len(turns) > 2 else turns


def text(row: Row) -> list[Turn]:
    """Plain `text`: the single turn of the internal role "text", every token after the first supervised."""
    return [("text", text_field(row, "text", blank="empty-completion"))]


# -------------------------------------------------------------------------------------------------- pair dialects


def preference(row: Row) -> Pair:
    """`chosen` and `rejected` with a `prompt`, `question`, `instruction` (+ `input`) …, or one that both share.

    Where `chosen` and `rejected` are whole dialogues, a prompt column must be how they begin. The shared beginning of
    two texts is the prompt only where no column holds one.
    """
    name, chosen = need(row, "chosen")
    _, rejected = need(row, "rejected")
    for better, worse in SIDE_SCORES:
        _check_scores(row.get(better), row.get(worse))
    if "prompt" in row and row["prompt"] is None:
        raise RowProblem("null-field", "'prompt' is null")
    column = prompt_column(row)
    whole = type(chosen) is list and _starts_with_prompt(chosen)
    texts = type(chosen) is str and type(rejected) is str
    if whole or column is None or (texts and looks_hh(chosen) and looks_hh(rejected)):
        sides = (chosen, rejected) if texts else (read_turns(chosen, "chosen"), read_turns(rejected, "rejected"))
        with_history(row, [])
        prompt, chosen, rejected = _shared_text(*sides) if texts else _shared_turns(*sides)
        if type(sides[0]) is str and not looks_hh(sides[0]):
            no_other_text(row, prompt[0][1])
        return _led(row, column, prompt), chosen, rejected
    value = instruction_text(row) if column == "instruction" else spoken(column, row[column])
    strip = is_hh(value)
    prompt = read_prompt(column, value)
    one_prompt(row, prompt, column, *([input_column(row)] if column == "instruction" else []))
    not_repeated(value, chosen, rejected)
    return _pair(
        with_history(row, prompt),
        read_completion(name, chosen, strip=strip),
        read_completion("rejected", rejected, strip=strip),
    )


def _led(row: Row, column: str | None, prompt: list[Turn]) -> list[Turn]:
    """Return the prompt that two whole dialogues share, held against the column that says it; its system turn leads.

    Raises:
        RowProblem: `different-prompts`: a `prompt` that the dialogues don't begin with. Other columns are not looked
            at, the chat being whole.
    """
    if column != "prompt" or empty(row["prompt"]):
        return prompt
    said = read_prompt("prompt", spoken("prompt", row["prompt"]))
    if len(said) == 1 and said[0][0] == "user":  # a text, which may quote the first question or the whole prompt
        whole = folded("\n".join(content for _, content in prompt))
        if folded(said[0][1]) in whole or whole in folded(said[0][1]):
            return prompt
    elif said[0][0] == "system" and prompt[0][0] != "system":
        prompt = said[:1] + prompt
    if said != prompt[: len(said)]:
        raise RowProblem("different-prompts", "'prompt' is not how 'chosen' and 'rejected' begin")
    return prompt


def hh_rlhf(row: Row) -> Pair:
    """HH-RLHF native: `chosen` and `rejected` dialogues of `\\n\\nHuman:` and `\\n\\nAssistant:` turns."""
    chosen = text_field(row, "chosen", blank="empty-completion")
    rejected = text_field(row, "rejected", blank="empty-completion")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not looks_hh(side):
            raise RowProblem("wrong-type", f"'{name}' is not a dialogue of Human: and Assistant: turns")
    return _shared_text(chosen, rejected)


def shp(row: Row) -> Pair:
    """SHP native: `history`, `human_ref_A`, `human_ref_B`, `labels` (1: A is preferred), `score_A`, `score_B`."""
    history = text_field(row, "history", blank="empty-prompt")
    a = text_field(row, "human_ref_A", blank="empty-completion")
    b = text_field(row, "human_ref_B", blank="empty-completion")
    _, label = need(row, "labels", "label")
    if label not in (0, 1, "0", "1") or label is True or label is False:
        raise RowProblem("wrong-type", f"'labels' is {str(label)[:40]}, neither 0 nor 1")
    better, worse = ("A", "B") if int(label) == 1 else ("B", "A")
    _check_scores(row.get(f"score_{better}"), row.get(f"score_{worse}"))
    sides = {"A": a, "B": b}
    return _pair([("user", history)], [("assistant", sides[better])], [("assistant", sides[worse])])


def llamafactory_preference(row: Row) -> Pair:
    """LLaMA-Factory's ranking form: `conversations` is the prompt, `chosen` and `rejected` are one message each."""
    name, value = need(row, "conversations", "conversation", "messages")
    return _pair(
        read_turns(value, name), read_completion(*need(row, "chosen")), read_completion(*need(row, "rejected"))
    )


def stack_exchange(row: Row) -> Pair:
    """Stack Exchange: `title`, a blank line, `body` is the prompt; `chosen` and `rejected` are answers."""
    prompt = text_field(row, "title", blank="empty-prompt") + "\n\n" + text_field(row, "body")
    for better, worse in SIDE_SCORES:
        _check_scores(row.get(better), row.get(worse))
    return _pair(
        [("user", prompt.strip())], read_completion(*need(row, "chosen")), read_completion(*need(row, "rejected"))
    )


def _check_scores(better: Any, worse: Any) -> None:
    try:
        gap = float(better) - float(worse)
    except (TypeError, ValueError):
        return
    if gap == 0:
        raise RowProblem("score-tie", f"both answers have the score {better}")
    if gap < 0:
        raise RowProblem("label-against-scores", f"the preferred answer has the score {better}, the other {worse}")


def _starts_with_prompt(value: list[Any]) -> bool:
    first = value[0] if value else None
    role = first.get("role", first.get("from")) if type(first) is dict else None
    return role in ("user", "human", "system", "developer")


def _shared_text(chosen: str, rejected: str) -> Pair:
    """Take the shared prefix as the prompt: whole turns for HH dialogues, else back to the last white space."""
    if looks_hh(chosen) and looks_hh(rejected):
        return _shared_turns(split_hh(chosen, prompt=False), split_hh(rejected, prompt=False))
    if chosen.strip() == rejected.strip():
        raise RowProblem("identical-pair", "'chosen' and 'rejected' are the same")
    cut = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        cut += 1
    while cut and not chosen[cut - 1].isspace():
        cut -= 1
    if not chosen[:cut].strip():
        raise RowProblem("different-prompts", "'chosen' and 'rejected' share no first word and there is no 'prompt'")
    return _pair(
        [("user", chosen[:cut].strip())],
        [("assistant", chosen[cut:].strip())],
        [("assistant", rejected[cut:].strip())],
    )


def _shared_turns(chosen: list[Turn], rejected: list[Turn]) -> Pair:
    """Take the shared leading turns as the prompt; the first that differs must be the assistant's on both sides."""
    if chosen == rejected:
        raise RowProblem("identical-pair", "'chosen' and 'rejected' are the same")
    cut = 0
    while cut < min(len(chosen), len(rejected)) - 1 and chosen[cut] == rejected[cut]:
        cut += 1
    if not cut or (len(chosen) > cut and len(rejected) > cut and chosen[cut][0] != rejected[cut][0]):
        raise RowProblem("different-prompts", "'chosen' and 'rejected' do not start with the same messages")
    if chosen[cut][0] not in ("assistant", CONTEXT):
        raise RowProblem("different-prompts", f"message {cut + 1} differs and is not an assistant's answer")
    return _pair(chosen[:cut], chosen[cut:], rejected[cut:])


def _pair(prompt: list[Turn], chosen: list[Turn], rejected: list[Turn]) -> Pair:
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side or not side[-1][1].strip():
            raise RowProblem("empty-completion", f"'{name}' is empty")
    if [(r, c.strip()) for r, c in chosen] == [(r, c.strip()) for r, c in rejected]:
        raise RowProblem("identical-pair", "'chosen' and 'rejected' are the same")
    if not prompt:
        raise RowProblem("empty-prompt", "the prompt is empty")
    check_chat(prompt + chosen, n_prompt=len(prompt))
    check_chat(prompt + rejected, n_prompt=len(prompt))
    return prompt, chosen, rejected


# ------------------------------------------------------------------------------------------------------ detection

SFT: dict[str, Callable[[Row], list[Turn]]] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "prompt-completion": prompt_completion,
    "alpaca": alpaca,
    "question-answer": question_answer,
    "text": text,
}
PAIRS: dict[str, Callable[[Row], Pair]] = {
    "preference": preference,
    "hh-rlhf": hh_rlhf,
    "shp": shp,
    "llamafactory-preference": llamafactory_preference,
    "stack-exchange": stack_exchange,
}
#: Other names people use for these.
ALIASES = {"openai": "messages", "chatml": "messages", "conversations": "sharegpt", "gsm8k": "question-answer"} | {
    "dolly": "alpaca",
    "kto": "prompt-completion",
    "dpo": "preference",
    "hh": "hh-rlhf",
}


def known_format(name: str) -> str:
    """Return the dialect of this name.

    Raises:
        DataError: there is no such dialect; the message lists them.
    """
    plain = name.strip().lower().replace("_", "-")
    plain = ALIASES.get(plain, plain)
    if plain not in SFT and plain not in PAIRS:
        known = [*SFT, *PAIRS]
        raise DataError(f"format '{name}' is not known{did_you_mean(plain, known)}; known: {', '.join(known)}")
    return plain


def _sft_dialect(row: Row) -> str | None:
    if "messages" in row:
        return "messages"
    if "conversations" in row or "conversation" in row:
        return "sharegpt"
    if "prompt" in row and ("completion" in row or "response" in row):
        return "prompt-completion"
    if "instruction" in row and ("output" in row or "response" in row):
        return "alpaca"
    if ("question" in row or "query" in row) and ("answer" in row or "response" in row):
        return "question-answer"
    return "text" if "text" in row else None


def _pair_dialect(row: Row) -> str | None:
    if "human_ref_A" in row and "human_ref_B" in row and "history" in row:
        return "shp"
    if "chosen" not in row or "rejected" not in row:
        return None
    if "conversations" in row:
        return "llamafactory-preference"
    if prompt_column(row) is None and (_is_prompt(row.get("messages")) or _is_prompt(row.get("conversation"))):
        return "llamafactory-preference"
    if "prompt" not in row and "title" in row and "body" in row:
        return "stack-exchange"
    return "hh-rlhf" if "prompt" not in row and is_hh(row["chosen"]) else "preference"


def detect(row: Row, *, pairs_first: bool) -> str | None:
    """Name the dialect of one raw row from its columns, or None; a target looks for pairs first, a pool for SFT.

    `conversations` beside `chosen` and `rejected` are always a pair: alone they end on the user. So are `messages` that
    do, and a `text`. A null column counts only where nothing else names a dialect.
    """
    given = {name: value for name, value in row.items() if value is not None}
    if len(given) < len(row) and (dialect := detect(given, pairs_first=pairs_first)):
        return dialect  # tables that were put together hold a null column for each name of the others
    pair, sft = _pair_dialect(row), _sft_dialect(row)
    if pair == "llamafactory-preference" or (pair and sft == "text"):
        return pair
    return (pair or sft) if pairs_first else (sft or pair)


def _is_prompt(value: Any) -> bool:
    """Tell whether a chat stops before an answer."""
    last = value[-1] if type(value) is list and value else None
    role = last.get("role", last.get("from")) if type(last) is dict else None
    return type(role) is str and ROLES.get(role.strip().lower()) in ("user", "tool", "system")


def as_sft(dialect: str) -> Callable[[Row], list[Turn]]:
    """Return the function from a raw row of this dialect to the turns of one SFT row (a pair gives prompt + chosen).

    What it returns raises `RowProblem`, as that of `as_pair` does.
    """
    if dialect in PAIRS:
        pair = as_pair(dialect)

        def chosen_side(row: Row) -> list[Turn]:
            prompt, chosen, _ = pair(row)
            return prompt + chosen

        return chosen_side
    convert = SFT[dialect]

    def turns(row: Row) -> list[Turn]:
        check_row(row, dialect)
        return with_system(row, convert(row))

    return turns


def as_pair(dialect: str) -> Callable[[Row], Pair]:
    """Return the function from a raw row to (prompt, chosen, rejected); an SFT row gives its last answer and None."""
    if dialect in PAIRS:
        convert = PAIRS[dialect]

        def pair(row: Row) -> Pair:
            check_row(row, dialect)
            prompt, chosen, rejected = convert(row)
            return with_system(row, prompt), chosen, rejected

        return pair
    sft = as_sft(dialect)

    def last_answer(row: Row) -> Pair:
        turns = sft(row)
        if turns[-1][0] == CONTEXT:
            raise RowProblem("not-trained", "the last answer is marked as not trained on")
        return turns[:-1], turns[-1:], None

    return last_answer
