"""The words of a text, and their hashes for many texts at once without a Python step per word.

A word is a maximal run of `\\w` characters of the lower-cased text (Unicode's letters, digits and underscore). With
punctuation, a maximal run of other visible characters is a token too: NLTK's WordPunct, which DSIR uses. A combining
mark or joiner belongs to what stands before it (Unicode's UAX 29; Python's `\\w` leaves marks out, NLTK's doesn't).
Texts are taken in NFC, so that a letter with its accent is one whether it was written as one character or two.

Chinese, Japanese, Thai, Lao, Khmer, Burmese and the like put no spaces between words. Each of their characters, with
its marks, is a word here, and whoever counts n-grams of words gets n-grams of characters, as with Lucene's CJKAnalyzer:
DSIR and `ngram_vectors` take pairs, near-duplicates five, BM25 the `terms`, words and pairs of words that touch. That
needs no dictionary and finds words of one character and of more. Korean has spaces; Tibetan marks its syllables.

Hash of a token c_0 ... c_k:  mix(Σ_i T(c_i) · B^i mod 2^64),  T = a fixed random number per character, B odd. Two
different tokens collide with a chance of about 2^-64 a pair; nothing here depends on PYTHONHASHSEED or the machine.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

_BASE = 0x9E3779B97F4A7C15 | 1
_ABSENT, _WORD, _OTHER, _MARK, _ALONE = range(5)  # classes of characters
# Scripts without spaces: those that Unicode's line breaking (UAX 14) breaks by dictionary, by syllable or anywhere.
UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\U000116d0-\U000116ff"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf\U00011700-\U0001174f"  # Tai Le, New Tai Lue, Tai Tham, Tai Viet, Ahom
    "\u1b00-\u1b7f\ua980-\ua9df"  # Balinese, Javanese
    "\u3005-\u3007\u3021-\u3029\u3031-\u303c\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Han, with the next line
    "\U00020000-\U0003ffff"
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f"  # Hiragana, Katakana
    "\u3100-\u312f\u31a0-\u31bf"  # Bopomofo
)
JOINERS = "\u200c\u200d"  # zero-width, inside words of Persian, Hindi, Sinhala ...


def folded(text: str) -> str:
    """Return a text composed (Unicode's NFC: é and e + ´ are one) and lower-cased."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFC", text).lower()


def words(text: str, *, punctuation: bool = False) -> list[str]:
    """Return the lower-cased words of one text; the plain form of what `hash_tokens` sees."""
    return patterns(text.isascii())[punctuation].findall(folded(text))


def terms(text: str) -> list[str]:
    """Return the words of one text and the pairs of words that touch; the plain form of what `hash_terms` sees."""
    lower = folded(text)
    matches = list(patterns(text.isascii())[False].finditer(lower))
    pairs = [lower[a.start() : b.end()] for a, b in pairwise(matches) if a.end() == b.start()]
    return [match[0] for match in matches] + pairs


@dataclass(frozen=True)
class Hashes:
    """Hashes of n texts laid end to end: text i owns values[offsets[i] : offsets[i + 1]]."""

    values: np.ndarray  # (t,) uint64
    offsets: np.ndarray  # (n + 1,) int64
    starts: np.ndarray  # (t,) int64, where in `joined` each token, or an n-gram's first token, begins
    ends: np.ndarray  # (t,) int64, where it, or an n-gram's last token, ends
    joined: str  # the lower-cased texts, a line break after each

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.offsets) - 1


def count_words(texts: Iterable[str]) -> np.ndarray:
    """Return (n,) int64: the number of words of each text."""
    return np.concatenate([np.zeros(0, np.int64), *(np.diff(hash_tokens(part).offsets) for part in chunks(texts))])


def chunks(texts: Iterable[str], characters: int = 1 << 19) -> Iterator[list[str]]:
    """Cut texts into lists of about so many characters, so that memory does not grow with the pool."""
    part: list[str] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text) + 1
        if size >= characters:
            yield part
            part, size = [], 0
    if part:
        yield part


def hash_tokens(texts: Sequence[str], *, punctuation: bool = False) -> Hashes:
    """Hash the tokens of some texts (a chunk: memory is about 40 bytes a character).

    With `punctuation` runs of other visible characters count as tokens too.
    """
    lower = [folded(text) for text in texts]
    joined = "\n".join(lower) + "\n"  # a line break is in no token, so no token crosses two texts
    alone = None  # where a character of a script without spaces stands
    if joined.isascii():
        codes: np.ndarray = np.frombuffer(joined.encode("ascii"), dtype=np.uint8)
        kinds, numbers = _classes(128)[codes], _numbers(128)[codes]
    else:
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        kinds, numbers = _classes(sys.maxunicode + 1)[codes], _numbers(sys.maxunicode + 1)[codes]
        if kinds.max() > _OTHER:
            alone = _resolve(kinds)
    if not punctuation:
        kinds = np.where(kinds == _OTHER, np.uint8(_ABSENT), kinds)
    before = np.concatenate([np.zeros(1, np.uint8), kinds[:-1]])
    change = kinds != before
    if alone is not None:
        change |= alone
    starts = np.flatnonzero(change & (kinds != _ABSENT))
    ends = np.flatnonzero(change & (before != _ABSENT))  # every text ends in a line break, so every token has one
    powers, inverses = _powers(1 << max(10, len(codes).bit_length()))
    numbers *= powers[: len(codes)]
    numbers[kinds == _ABSENT] = 0  # so that a sum up to the next token's start is the token's own sum
    values = np.add.reduceat(numbers, starts) if len(starts) else np.zeros(0, np.uint64)
    values = mix(values * inverses[starts])
    last = np.cumsum(np.fromiter((len(t) + 1 for t in lower), dtype=np.int64, count=len(lower)))
    offsets = np.concatenate([np.zeros(1, np.int64), np.searchsorted(starts, last)])
    return Hashes(values, offsets, starts, ends, joined)


def _resolve(kinds: np.ndarray) -> np.ndarray:
    """Give marks, in place, the class of what they stand on; return where a character is a word of its own."""
    marks = np.flatnonzero(kinds == _MARK)
    first = np.concatenate([[True], np.diff(marks) > 1])[: len(marks)]  # of marks in a row
    base = (marks[first] - 1)[np.cumsum(first) - 1]
    stands_on = np.where(base < 0, np.uint8(_ABSENT), kinds[base])
    alone = kinds == _ALONE
    kinds[marks] = np.where(stands_on == _ABSENT, np.uint8(_OTHER), stands_on)  # on nothing: visible, but no word
    return alone


def hash_terms(texts: Sequence[str]) -> Hashes:
    """Hash the words of some texts and, behind the first of each, the pairs of words that touch (see `terms`)."""
    tokens = hash_tokens(texts)
    first = np.flatnonzero(tokens.ends[:-1] == tokens.starts[1:]) if not tokens.joined.isascii() else np.zeros(0, int)
    if not len(first):
        return tokens
    pairs = mix(tokens.values[first] * np.uint64(_BASE) + tokens.values[first + 1])
    offsets = tokens.offsets + np.searchsorted(first, tokens.offsets)
    return Hashes(
        np.insert(tokens.values, first + 1, pairs),
        offsets,
        np.insert(tokens.starts, first + 1, tokens.starts[first]),
        np.insert(tokens.ends, first + 1, tokens.ends[first + 1]),
        tokens.joined,
    )


def ngrams(tokens: Hashes, n: int) -> Hashes:
    """Hash the runs of n neighbouring tokens within each text; a shorter text has none."""
    counts = np.diff(tokens.offsets)
    last = np.repeat(tokens.offsets[1:], counts) - n  # the last start that stays inside the text
    inside = np.arange(len(tokens.values)) <= last
    starts = np.flatnonzero(inside)
    values = tokens.values[starts]
    for step in range(1, n):
        values = mix(values * np.uint64(_BASE) + tokens.values[starts + step])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.maximum(counts - n + 1, 0))])
    return Hashes(values, offsets, tokens.starts[starts], tokens.ends[starts + (n - 1)], tokens.joined)


def segment_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum values (t, ...) over [offsets[i], offsets[i + 1]) for each i; an empty segment sums to 0."""
    out = np.zeros((len(offsets) - 1, *values.shape[1:]), dtype=values.dtype)
    filled = np.flatnonzero(np.diff(offsets))
    if len(filled):
        out[filled] = np.add.reduceat(values, offsets[:-1][filled], axis=0)
    return out


def ngram_vectors(texts: Sequence[str]) -> np.ndarray:
    """Embed texts without a model: signed, hashed counts of words and word pairs, each to the power 1/2, length 1.

    Two n-grams share a column with a chance of 1 / dim, with a random sign (Weinberger et al. 2009). Returns (n, dim =
    512) float32; a text without words is a zero row.
    """
    parts, dim = [], 512
    for part in chunks(texts):
        tokens = hash_tokens(part)
        sums = np.zeros(len(part) * dim)
        for hashed in (tokens, ngrams(tokens, 2)):
            cell = np.repeat(np.arange(len(part)) * dim, np.diff(hashed.offsets))
            cell += (hashed.values % np.uint64(dim)).astype(np.int64)
            sign = np.where(hashed.values >> np.uint64(63), 1.0, -1.0)
            sums += np.bincount(cell, weights=sign, minlength=len(sums))
        vectors = (np.sign(sums) * np.sqrt(np.abs(sums))).reshape(len(part), dim)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        parts.append(vectors.astype(np.float32))
    return np.concatenate(parts) if parts else np.zeros((0, dim), dtype=np.float32)


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 so that every bit depends on every bit (splitmix64's finaliser, Steele et al. 2014)."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


@lru_cache(maxsize=2)
def _classes(size: int) -> np.ndarray:
    """Class of each code point below `size`, by Python's own `re`, so that both forms agree on every character."""
    table = np.full(size, _OTHER, dtype=np.uint8)
    everything = "".join(map(chr, range(size)))
    for pattern, kind in ((r"\w+", _WORD), (r"\s+", _ABSENT), (rf"[{UNSPACED}]+", _ALONE)):
        for match in re.finditer(pattern, everything):
            run = slice(match.start(), match.end())
            table[run] = kind if kind != _ALONE else np.where(table[run] == _WORD, kind, table[run])
    marks = [i for i in np.flatnonzero(table == _OTHER).tolist() if unicodedata.category(chr(i))[0] == "M"]
    table[marks] = _MARK
    if size > 128:
        table[[ord(c) for c in JOINERS]] = _MARK
    return table


@lru_cache(maxsize=2)
def patterns(ascii_only: bool) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return the expressions for words, and for words and punctuation, of lower-cased text; from the same classes."""
    word = r"\w+"
    if not ascii_only:
        mark, alone = (_ranges(_classes(sys.maxunicode + 1) == kind) for kind in (_MARK, _ALONE))
        word = rf"[^\W{alone}]+(?:[{mark}]+[^\W{alone}]*)*|[{alone}][{mark}]*"
    return re.compile(word), re.compile(rf"{word}|[^\w\s]+")


def _ranges(members: np.ndarray) -> str:
    """Write a set of code points as the inside of a character class."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], members.astype(np.int8), [0]])))
    return "".join(f"\\U{a:08x}-\\U{z - 1:08x}" for a, z in edges.reshape(-1, 2).tolist())


@lru_cache(maxsize=2)
def _numbers(size: int) -> np.ndarray:
    return mix((np.arange(size, dtype=np.uint64) + np.uint64(1)) * np.uint64(_BASE))


@lru_cache(maxsize=4)
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """B^0 ... B^(size-1) modulo 2^64 and their inverses."""
    inverse = pow(_BASE, -1, 1 << 64)
    steps = np.full((2, size), [[_BASE], [inverse]], dtype=np.uint64)
    steps[:, 0] = 1
    powers = np.cumprod(steps, axis=1, dtype=np.uint64)
    return powers[0], powers[1]
