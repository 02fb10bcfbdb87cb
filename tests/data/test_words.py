"""What a word is, script by script: against a loop over characters, and through every method that counts words."""

import re
import unicodedata
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepset.data.buckets import NgramBuckets
from keepset.data.words import UNSPACED, count_words, hash_terms, hash_tokens, ngram_vectors, terms, words
from keepset.methods.bm25 import bm25
from keepset.methods.dsir import dsir
from keepset.selection.dedup import near_pairs
from tolerance import tolerance

# letters and marks of many scripts, joiners, a variation selector, emoji, full-width and other punctuation
CHARACTERS = "aZéİ1_ \n.,!’。，！ｆ３中文好々〇ひらカーｶﾞ한글ไทยปู่ำ๑ລາວខ្មែរမြန်မာབོད་སྐདनमस्तेПриЖ"
CHARACTERS += "\u0301\u0308\u200c\u200d\ufe0f\u20dd❤😀²—"
MIXED = st.lists(st.text(alphabet=st.sampled_from(CHARACTERS), max_size=30), min_size=1, max_size=6)


def slow_tokens(text: str) -> list[tuple[str, bool]]:
    """(token, whether it is a word), a character at a time."""
    out: list[list] = []
    last = "space"
    for c in unicodedata.normalize("NFC", text).lower():
        if c.isspace():
            last = "space"
            continue
        mark = unicodedata.category(c)[0] == "M" or c in "\u200c\u200d"
        if mark:
            kind = "other" if last == "space" else last
        elif c.isalnum() or c == "_":
            kind = "alone" if re.match(rf"[{UNSPACED}]", c) else "word"
        else:
            kind = "other"
        if kind == last and (kind != "alone" or mark):
            out[-1][0] += c
        else:
            out.append([c, kind != "other"])
        last = kind
    return [(token, word) for token, word in out]


@given(MIXED)
def test_tokens_are_those_of_a_loop_over_the_characters(texts):
    for punctuation in (False, True):
        hashed = hash_tokens(texts, punctuation=punctuation)
        expected = [[token for token, word in slow_tokens(text) if word or punctuation] for text in texts]
        assert [words(text, punctuation=punctuation) for text in texts] == expected
        assert np.diff(hashed.offsets).tolist() == list(map(len, expected))
        spans = zip(hashed.starts, hashed.ends, strict=True)
        assert [hashed.joined[a:z] for a, z in spans] == [token for tokens in expected for token in tokens]
    assert count_words(texts).tolist() == [len(words(text)) for text in texts]


@given(MIXED)
def test_terms_are_the_words_and_the_pairs_that_touch(texts):
    hashed = hash_terms(texts)
    value_of: dict[str, int] = {}
    for i, text in enumerate(texts):
        a, z = hashed.offsets[i : i + 2]
        spelt = [hashed.joined[p:q] for p, q in zip(hashed.starts[a:z], hashed.ends[a:z], strict=True)]
        assert sorted(spelt) == sorted(terms(text))
        for term, value in zip(spelt, hashed.values[a:z].tolist(), strict=True):
            assert value_of.setdefault(term, value) == value
    assert len(set(value_of.values())) == len(value_of)


SPACED = [
    "The quick brown fox’s “jump” didn't cost £3.50 — 42_000 times! naïve café x² ❤️ 👩‍👩‍👧\n\tI'm done…",
    "Die Größe der Äpfel überraschte den Käufer: »Straßenbahn« um 8 Uhr, z. B. für 3,50 €.",
    "Он сказал: «Ёлка стоит 5 рублей», — и ушёл. Что-то не так? Да!",
    "Café crème à l’œuvre; señor, ¿qué tal? Ankara'da çok güzel. Ελληνικά Σίσυφος. Zażółć gęślą jaźń.",
    "오늘 서울 날씨는 맑고, 기온은 20도입니다. 한국어는 띄어쓰기를 한다!",
    "שלום עולם. مرحبا بالعالم، كيف حالك؟ Xin chào thế giới.",
]


@pytest.mark.parametrize("text", SPACED, ids=["en", "de", "ru", "other", "ko", "he-ar-vi"])
def test_scripts_with_spaces_are_split_as_before(text):
    assert words(text) == terms(text) == re.findall(r"\w+", text.lower())
    assert words(text, punctuation=True) == re.findall(r"\w+|[^\w\s]+", text.lower())


def test_marks_and_joiners_stay_in_their_word():
    """NLTK 3.10's WordPunct, which the DSIR package calls, gives the same tokens for each of these, once in NFC."""
    for text, expected in {
        "नमस्ते दुनिया": ["नमस्ते", "दुनिया"],
        "e\u0301a cafe\u0301!": ["\u00e9a", "caf\u00e9"],
        "x\u0301a": ["x\u0301a"],  # no letter of its own
        "می\u200cشود": ["می\u200cشود"],
        "ක්\u200dෂ": ["ක්\u200dෂ"],
        "İstanbul": ["i\u0307stanbul"],
        "мно\u0301го воды\u0301": ["мно\u0301го", "воды\u0301"],
        "பூனை தமிழ்": ["பூனை", "தமிழ்"],
        "مُحَمَّد": ["مُحَمَّد"],
    }.items():
        assert words(text) == expected
    assert words("བོད་སྐད་") == ["བོད", "སྐད"]  # syllables, between their marks


def test_a_word_is_one_however_it_is_composed():
    """e + ´ as a Mac writes it, Hangul in jamo, and the composed form are canonically equivalent in Unicode."""
    for composed in ("caf\u00e9", "\uc11c\uc6b8", "\u30ac", "\u1ec7"):
        apart = unicodedata.normalize("NFD", composed)
        assert apart != composed and words(apart) == words(composed) and terms(apart) == terms(composed)
        assert hash_tokens([apart]).values.tolist() == hash_tokens([composed]).values.tolist()
        assert hash_terms([apart]).values.tolist() == hash_terms([composed]).values.tolist()


def test_a_character_with_its_marks_is_a_word_where_there_are_no_spaces():
    assert words("ปู่ดีใจ") == ["ปู่", "ดี", "ใ", "จ"]
    assert words("使用Python编程，2024年。") == ["使", "用", "python", "编", "程", "2024", "年"]
    assert terms("用Python编程。好") == ["用", "python", "编", "程", "好", "用python", "python编", "编程"]
    assert words("「東京タワー」へ") == ["東", "京", "タ", "ワ", "ー", "へ"]


# a question, then a row on the same thing and two on others
SHARED = {
    "zh": ("北京明天的天气怎么样？", "明天北京天气晴朗，气温二十度。", "我喜欢吃苹果和香蕉。", "编程语言有很多种类。"),
    "zh-one-character": ("猫", "我家的猫很可爱。", "我家的狗很可爱。", "你家的鸟很可爱。"),
    "zh-latin": ("用Python写一个排序函数", "这是Python排序函数的例子", "我喜欢吃苹果", "今天天气很好"),
    "ja": (
        "東京の天気を教えてください",
        "今日の東京の天気は晴れです。",
        "私は寿司が好きです。",
        "プログラミングを学ぶ。",
    ),
    "ja-katakana": ("コンピューターとは何か", "コンピューターの歴史", "寿司の歴史", "カレーを作る"),
    "th": ("พรุ่งนี้อากาศที่กรุงเทพเป็นอย่างไร", "อากาศในกรุงเทพร้อนมาก", "ฉันชอบกินข้าวผัด", "ภาษาไทยมีสระหลายตัว"),
    "th-one-character": ("งู", "ฉันกลัวงูมาก", "ฉันรักแมวมาก", "บ้านหลังใหญ่"),
    "lo": ("ອາກາດຢູ່ວຽງຈັນເປັນແນວໃດ", "ວຽງຈັນມີອາກາດຮ້ອນ", "ຂ້ອຍມັກກິນເຂົ້າໜຽວ", "ພາສາລາວມີຫຼາຍສຽງ"),
    "km": ("អាកាសធាតុនៅភ្នំពេញយ៉ាងម៉េច", "ភ្នំពេញមានអាកាសធាតុក្តៅ", "ខ្ញុំចូលចិត្តញ៉ាំបាយ", "ភាសាខ្មែរមានអក្សរច្រើន"),
    "my": ("ရန်ကုန်မှာရာသီဥတုဘယ်လိုလဲ", "ရန်ကုန်ရာသီဥတုပူတယ်", "ကျွန်တော်ထမင်းကြိုက်တယ်", "မြန်မာစာကိုလေ့လာနေတယ်"),
    "bo": ("ལྷ་སའི་གནམ་གཤིས་ག་འདྲ་རེད།", "ལྷ་ས་ཡི་གནམ་གཤིས་བཟང་པོ་འདུག", "ང་ཁ་ལག་ཟ་གི་ཡོད།", "བོད་སྐད་སྦྱོང་གི་ཡོད།"),
    "hi": ("दिल्ली का मौसम कैसा है", "आज दिल्ली में मौसम अच्छा है", "मुझे चावल पसंद हैं", "हिन्दी भाषा सीखना"),
    "ko": ("서울 날씨 어때요", "오늘 서울 날씨 맑음", "나는 사과를 좋아해", "프로그래밍을 배운다"),
}


@pytest.mark.parametrize("script", SHARED)
def test_a_row_that_shares_a_word_with_the_target_is_found(script):
    query, hit, *misses = SHARED[script]
    docs = [misses[0], hit, misses[1], "The weather in London is fine."]
    scores, _ = bm25(docs, [query], ["t"])
    assert scores[1] > 0 and np.argmax(scores) == 1 and scores[1] > 1.5 * max(scores[0], scores[2])
    assert scores[3] == 0
    weights, _ = dsir(docs[:3], [query], per_token=True)
    assert np.argmax(weights) == 1
    vectors = ngram_vectors(docs[:3])
    assert np.argmax(vectors @ ngram_vectors([query])[0]) == 1


def test_bm25_is_the_formula_on_terms():
    docs = [row for _, *rows in SHARED.values() for row in rows]
    queries = [query for query, *_ in SHARED.values()]
    _, per_query = bm25(docs, queries, ["t"] * len(queries), per="query")
    found = [terms(doc) for doc in docs]
    average = sum(map(len, found)) / len(found)
    for m, query in enumerate(queries):
        for n, doc in enumerate(found):
            score = 0.0
            for term in terms(query):
                df, tf = sum(term in other for other in found), doc.count(term)
                saturation = tf / (tf + 1.5 * (0.25 + 0.75 * len(doc) / average))
                score += np.log(1 + (len(docs) - df + 0.5) / (df + 0.5)) * saturation
            assert per_query[n, m] == pytest.approx(score, rel=tolerance(64), abs=tolerance(64))


@given(MIXED)
def test_dsir_counts_the_runs_of_tokens(texts):
    expected = np.zeros(101, dtype=int)
    for text in texts:
        tokens = [token for token, _ in slow_tokens(text)]
        for gram in [*tokens, *map(" ".join, zip(tokens, tokens[1:], strict=False))]:
            expected[int(sha256(gram.encode()).hexdigest(), 16) % 101] += 1
    np.testing.assert_array_equal(NgramBuckets(n_buckets=101).counts(texts), expected)


def test_near_copies_in_scripts_without_spaces():
    first = "春天来了，公园里的花都开了，孩子们在草地上奔跑，老人们在树下聊天，大家都很高兴。"
    second = "ฤดูใบไม้ผลิมาถึงแล้วดอกไม้ในสวนบานสะพรั่งเด็กๆวิ่งเล่นบนสนามหญ้าทุกคนมีความสุขมาก"
    texts = [first, second, "机器学习是人工智能的一个分支，它让计算机从数据中学习规律，而不需要明确的编程。"]
    edited = [first.replace("都很高兴", "都很开心"), second + "จริง", "今天我们去图书馆借了三本关于历史的书。"]
    assert near_pairs(edited, texts, 0.7) == {0: 0, 1: 1}
