"""Verdicts read out of replies as models write them."""

from __future__ import annotations

import pytest

from keepset.judging.replies import parse_verdict

A, B, TIE, NONE = 1.0, 0.0, 0.5, None
REPLIES = [
    ("Verdict: A", A),
    ("Verdict: B", B),
    ("Verdict: tie", TIE),
    ("verdict: a", A),
    ("VERDICT: B.", B),
    ("**Verdict: B**", B),
    ("**Verdict:** A", A),
    ("Verdict: **A**", A),
    ("Verdict: `B`", B),
    ("Verdict: [A]", A),
    ("Verdict: (B)", B),
    ("Verdict: \"A\"", A),
    ("Verdict - B", B),
    ("Verdict = A", A),
    ("Verdict:\nB", B),
    ("Verdict: Answer A", A),
    ("Verdict: answer_B", B),
    ("Verdict: Response B is better", B),
    ("The verdict is A.", A),
    ("Final answer: B", B),
    ("Winner: A", A),
    ("[[A]]", A),
    ("[[B]]", B),
    ("[[C]]", TIE),
    ("My final verdict is: [[ b ]]", B),
    ("Answer A is longer, Answer B is right. [[B]]", B),
    ("[[A]] at first sight, but on reflection [[B]]", NONE),
    ("A", A),
    ("B.", B),
    (" **b** ", B),
    ("Answer A", A),
    ("tie", TIE),
    ("Tie.", TIE),
    ("Verdict: tied", TIE),
    ("Verdict: both", TIE),
    ("Verdict: neither", TIE),
    ("Verdict: draw", TIE),
    ("Answer A is wordy. Answer B is to the point.\n\nVerdict: B", B),
    ("Verdict: A\n\nBecause answer B does not answer the question.", A),
    ("One might say Verdict: A. But it is wrong.\nVerdict: B", B),
    ("Verdict: A or B", NONE),
    ("Verdict: A/B", NONE),
    ("Answer A is better than the other.", A),
    ("Answer B is clearly the better one.", B),
    ("I would prefer answer B here", B),
    ("Answer A is better in style, Answer B is better in content.", NONE),
    ("A is a letter of the alphabet and so is B.", NONE),
    ("I can't decide without more context.", NONE),
    ("", NONE),
    ("   \n ", NONE),
    ("<think>Verdict: A? no, B is better</think>\nVerdict: B", B),
    ("<think>Verdict: A, I think, but", NONE),
    ("As an AI model I cannot compare.", NONE),
    ("Verdict: Apple", NONE),
    ("Both answers are bad.", NONE),
    ("判定：A", NONE),
    ("{\"verdict\": \"A\"}", A),
    ("Step 1: read.\nStep 2: compare.\nB", B),
    ("Answer: Both fine\nVerdict: Tie", TIE),
]  # fmt: skip


def test_there_are_at_least_fifty_awkward_replies():
    assert len(REPLIES) >= 50


@pytest.mark.parametrize(("reply", "verdict"), REPLIES)
def test_parsing(reply, verdict):
    assert parse_verdict(reply) == verdict
