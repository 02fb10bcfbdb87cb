"""Which language a text is in: scripts and stop words, made for shares in a report, not for single decisions.

1. Letters are counted by script. A script that one language has almost to itself names it (Hangul: Korean); Kana beside
   Han is Japanese, Han alone Chinese. Cyrillic and Arabic script are told apart by letters and stop words.
2. Latin letters: the share of the first `WORDS` words that are stop words of each language. The best language has to
   have two different ones of two letters or more, one word in twelve, and more than the next one; letters that only it
   has count a little.
3. A text with many brackets, semicolons and the like is `code`, whatever its words.

Anything else is `unclear`: very short answers, numbers, languages not listed. Lists are our own. It knows 23 languages
and no dialects; a mixed text gets its larger part. `tests/report/test_languages.py` has the sentences it was held
against.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

UNCLEAR, CODE = "unclear", "code"
LETTERS = 600  # characters looked at
WORDS = 80

STOP_WORDS = {
    "English": "the of and to in is that it for you was with on as are this be at by not or from have an they which "
    "can your if will has but we their what there i my he she do its would when how more these then than been who",
    "German": "der die das und ist nicht ein eine zu den von mit für auf im sich des dem es an auch als wie werden sie "
    "ich wir oder aber bei nach aus noch nur wenn über zum zur dass sind einen einer kann wird man durch",
    "French": "le la les de des et est un une du en que pour dans qui par sur pas plus ce il au ne se avec sont vous "
    "nous ou mais comme je elle leur cette ces aux être son sa été fait peut tout très aussi où",
    "Spanish": "el la los las de y en que un una es del por con para se no su al lo como más pero sus le ha o este si "
    "son entre cuando muy sin sobre ser también está todo me hasta hay donde quien desde puede yo fue",
    "Portuguese": "o a os as de e em que um uma é do da dos das por com para se não no na mais como mas ao ou seu sua "
    "foi são pelo pela isso este você também está muito quando já nos eu ele ela entre ser pode até",
    "Italian": "il lo la i gli le di e che un una è del della dei per con in si non da sono al più come ma nel alla ha "
    "anche su se o questo questa dal delle cui essere ci io quando molto può tra gli dove perché loro",
    "Dutch": "de het een en van is in dat op te niet met voor zijn er aan om ook als maar bij die ik wordt of naar dan "
    "je hij ze nog wel geen worden door over uit kan heeft hebben wat zo deze dit meer was we",
    "Swedish": "och att det som en på är av för med den till inte i om ett han har de jag var kan från eller men vi så "
    "ska man när också vid efter över hur mycket denna detta alla blir finns mellan sig",
    "Danish": "og at det som en på er af for med den til ikke i om et han har de jeg var kan fra eller men vi så skal "
    "man når også ved efter over hvordan meget denne dette alle bliver hvor mellem sig hvad",
    "Polish": "i w na z się nie to że do jest o jak po co tak za od przez dla ale czy by są może być tylko lub który "
    "która które przed oraz ich jego jej gdy ten ta te już bardzo można także pod",
    "Czech": "a v na se je že to s z do o i jako za by jak ale po pro od nebo jsou který která které tak si když co "
    "byl může být jen také při aby už jeho před než mezi velmi však",
    "Turkish": "ve bir bu da de için ile çok olarak daha gibi en var ne kadar ben o olan sonra ama değil olduğu her "
    "ya mi şey ki nasıl veya hem tarafından iyi zaman bunu göre ancak",
    "Indonesian": "yang dan di dari untuk dengan ini itu pada tidak adalah dalam ke akan juga atau oleh saya anda "
    "karena bisa ada kita mereka sebagai dapat lebih telah sangat seperti tersebut setelah jika banyak",
    "Vietnamese": "và của là có một các cho được không trong người những với để này khi đã từ về ở như tôi cũng đến "
    "nhiều ra thì bạn làm vào rất phải hay sẽ nếu",
    "Russian": "и в не на что я с он как это по но из к у за от так для о же бы было его мы вы они или если при только "
    "также может быть который которые чтобы до уже есть очень когда",
    "Ukrainian": "і в не на що я з він як це по але із до у за від так для про ж би було його ми ви вони або якщо при "
    "тільки також може бути який які щоб вже є дуже коли та",
    "Arabic": "في من على أن إلى هذا هذه التي الذي عن مع هو هي ما لا كان كل بعد قد أو ثم إن بين غير يمكن",
    "Persian": "و در به از که این را با است برای آن یک خود تا بر هم می شود کرد نیز اما باید های کند شده",
}
LATIN = [name for name in STOP_WORDS if name not in ("Russian", "Ukrainian", "Arabic", "Persian")]
# A Latin letter that stands alone is a variable or an item of a list as often as a word.
LISTS = {n: frozenset(w for w in words.split() if len(w) > 1 or n not in LATIN) for n, words in STOP_WORDS.items()}

# Letters that speak for some Latin languages against the others of their family.
OWN_LETTERS = {
    "German": "ß", "French": "œç", "Spanish": "ñ¿¡", "Portuguese": "ãõ", "Swedish": "ä", "Danish": "æø",
    "Polish": "łżśźń", "Czech": "ěřů", "Turkish": "ğış", "Vietnamese": "đơưạảấầẩậắằẵặẹẻếềểễệỉịọỏốồổỗộớờởợụủứừửữựỳỷỹ",
}  # fmt: skip
SCRIPTS = {
    "HANGUL": "Korean", "GREEK": "Greek", "HEBREW": "Hebrew", "THAI": "Thai", "DEVANAGARI": "Hindi",
    "BENGALI": "Bengali", "TAMIL": "Tamil", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "CJK": "Han",
    "CYRILLIC": "Cyrillic", "ARABIC": "Arabic script", "LATIN": "Latin",
}  # fmt: skip
SYMBOLS, SYMBOL_SHARE = frozenset("{}[]();=<>#_\\$&|*/+"), 0.09
WORD = re.compile(r"[^\W\d_]+")
_SCRIPT_OF: dict[str, str] = {}


def language(text: str) -> str:
    """Name the language of a text, or `code`, or `unclear`."""
    text = text[:LETTERS].lower()
    scripts: Counter[str] = Counter()
    letters_of = Counter(text)
    symbols, blanks = sum(letters_of[c] for c in SYMBOLS), sum(letters_of[c] for c in " \n\t")
    if symbols >= 3 and symbols > SYMBOL_SHARE * (len(text) - blanks):
        return CODE
    for letter, count in letters_of.items():
        if script := script_of(letter):
            scripts[script] += count
    if not scripts:
        return UNCLEAR
    if "Japanese" in scripts and scripts["Japanese"] * 8 >= scripts["Han"]:
        scripts["Japanese"] += scripts.pop("Han", 0)
    main, letters = scripts.most_common(1)[0]
    if letters < 2 or letters * 2 < scripts.total():
        return UNCLEAR
    if main == "Han":
        return "Chinese"
    words = WORD.findall(text)[:WORDS]
    if main == "Latin":
        return by_words(words, text, LATIN)
    if main == "Cyrillic":
        return "Ukrainian" if any(c in text for c in "іїєґ") else by_words(words, text, ["Russian"])
    if main == "Arabic script":
        return "Persian" if any(c in text for c in "پچژگ") else by_words(words, text, ["Arabic", "Persian"])
    return main


def script_of(letter: str) -> str:
    """The script of a letter as `SCRIPTS` names it; empty for anything that is no letter of one of them."""
    if letter not in _SCRIPT_OF:
        name = unicodedata.name(letter, "") if letter.isalpha() else ""
        _SCRIPT_OF[letter] = SCRIPTS.get(name.split(" ")[0].split("-")[0], "")
    return _SCRIPT_OF[letter]


def by_words(words: list[str], text: str, names: list[str]) -> str:
    """The language with most stop words among `words`, if it has enough of them and more than the next."""
    counts = Counter(words)
    hits = {name: sum(n for word, n in counts.items() if word in LISTS[name]) for name in names}
    found = {name: n + 0.5 * sum(text.count(c) for c in OWN_LETTERS.get(name, "")) if n else 0.0
             for name, n in hits.items()}  # fmt: skip
    best, *rest = sorted(names, key=lambda name: -found[name])
    different = sum(word in LISTS[best] for word in counts)
    enough = different >= 2 and hits[best] * 12 >= len(words)
    return best if enough and (not rest or found[best] > found[rest[0]]) else UNCLEAR
