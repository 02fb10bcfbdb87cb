"""The language heuristic on sentences written for this test, three a language, and on what it must not guess at."""

from __future__ import annotations

import pytest

from keepset.report.languages import CODE, UNCLEAR, language

SENTENCES = {
    "English": [
        "The quick answer is that you can save the file before you close the window.",
        "Here are three tips for staying healthy: eat well, sleep enough and walk every day.",
        "She was not sure whether it would rain, but they went to the park anyway.",
    ],
    "German": [
        "Die Antwort auf diese Frage ist nicht einfach, aber wir können es versuchen.",
        "Hier sind drei Tipps für ein gesundes Leben: viel Wasser trinken, gut schlafen und sich bewegen.",
        "Er wusste nicht, ob der Zug noch kommt, und ging deshalb nach Hause.",
    ],
    "French": [
        "La réponse à cette question n'est pas simple, mais nous pouvons essayer de la trouver.",
        "Voici trois conseils pour rester en bonne santé : manger des légumes et dormir dans le calme.",
        "Elle ne savait pas si le train allait arriver, donc elle est rentrée avec son frère.",
    ],
    "Spanish": [
        "La respuesta a esta pregunta no es sencilla, pero podemos intentar encontrarla.",
        "Aquí hay tres consejos para una vida sana: comer bien, dormir lo suficiente y caminar con los amigos.",
        "Ella no sabía si el tren iba a llegar, por lo que volvió a su casa.",
    ],
    "Portuguese": [
        "A resposta a esta pergunta não é simples, mas podemos tentar encontrar uma solução.",
        "Aqui estão três dicas para uma vida saudável: comer bem, dormir o suficiente e não fumar.",
        "Ela não sabia se o trem ia chegar, então voltou para casa com o irmão.",
    ],
    "Italian": [
        "La risposta a questa domanda non è semplice, ma possiamo provare a trovarla.",
        "Ecco tre consigli per una vita sana: mangiare bene, dormire a sufficienza e camminare con gli amici.",
        "Lei non sapeva se il treno sarebbe arrivato, quindi è tornata a casa con il fratello.",
    ],
    "Dutch": [
        "Het antwoord op deze vraag is niet eenvoudig, maar we kunnen het proberen.",
        "Hier zijn drie tips voor een gezond leven: eet goed, slaap genoeg en ga elke dag naar buiten.",
        "Ze wist niet of de trein nog zou komen en ging daarom met haar broer naar huis.",
    ],
    "Swedish": [
        "Svaret på den här frågan är inte enkelt, men vi kan försöka att hitta det.",
        "Här är tre tips för ett friskt liv: ät bra, sov tillräckligt och gå ut varje dag med en vän.",
        "Hon visste inte om tåget skulle komma och gick därför hem till sin bror.",
    ],
    "Danish": [
        "Svaret på dette spørgsmål er ikke enkelt, men vi kan prøve at finde det.",
        "Her er tre gode råd til et sundt liv: spis godt, sov nok og gå ud hver dag med en ven.",
        "Hun vidste ikke, om toget ville komme, og gik derfor hjem til sin bror.",
    ],
    "Polish": [
        "Odpowiedź na to pytanie nie jest prosta, ale możemy spróbować ją znaleźć.",
        "Oto trzy rady dla zdrowego życia: jedz dobrze, śpij dużo i nie siedź w domu przez cały dzień.",
        "Nie wiedziała, czy pociąg przyjedzie, więc wróciła do domu z bratem.",
    ],
    "Czech": [
        "Odpověď na tuto otázku není jednoduchá, ale můžeme se pokusit ji najít.",
        "Zde jsou tři rady pro zdravý život: jezte dobře, spěte dost a choďte ven, když je hezky.",
        "Nevěděla, jestli vlak přijede, a tak se vrátila domů s bratrem.",
    ],
    "Turkish": [
        "Bu sorunun cevabı basit değil ama birlikte bulmak için bir yol deneyebiliriz.",
        "Sağlıklı bir yaşam için üç öneri: iyi beslenin, çok su için ve her gün yürüyün.",
        "Trenin gelip gelmeyeceğini bilmiyordu, bu yüzden kardeşi ile eve döndü.",
    ],
    "Indonesian": [
        "Jawaban untuk pertanyaan ini tidak sederhana, tetapi kita bisa mencoba menemukannya.",
        "Berikut tiga saran untuk hidup sehat: makan dengan baik, tidur cukup, dan jangan merokok.",
        "Dia tidak tahu apakah kereta akan datang, jadi dia pulang dengan saudaranya.",
    ],
    "Vietnamese": [
        "Câu trả lời cho câu hỏi này không đơn giản, nhưng chúng ta có thể thử tìm nó.",
        "Đây là ba lời khuyên để có một cuộc sống khỏe mạnh: ăn uống tốt và ngủ đủ giấc.",
        "Cô ấy không biết tàu có đến hay không nên đã về nhà với anh trai.",
    ],
    "Russian": [
        "Ответ на этот вопрос не так прост, но мы можем попробовать его найти.",
        "Вот три совета для здоровой жизни: хорошо питайтесь, спите достаточно и гуляйте с друзьями.",
        "Она не знала, придёт ли поезд, и поэтому вернулась домой с братом.",
    ],
    "Ukrainian": [
        "Відповідь на це питання не проста, але ми можемо спробувати її знайти.",
        "Ось три поради для здорового життя: добре їжте, спіть достатньо і гуляйте з друзями.",
        "Вона не знала, чи приїде потяг, і тому повернулася додому з братом.",
    ],
    "Arabic": [
        "الإجابة على هذا السؤال ليست بسيطة، ولكن يمكن أن نحاول العثور عليها.",
        "هذه ثلاث نصائح من أجل حياة صحية: تناول الطعام الجيد ونم بعد العمل في وقت مبكر.",
        "لم تكن تعرف ما إذا كان القطار سيأتي، لذلك عادت إلى البيت مع أخيها.",
    ],
    "Persian": [
        "پاسخ این پرسش ساده نیست، اما می‌توانیم برای پیدا کردن آن تلاش کنیم.",
        "سه توصیه برای زندگی سالم: خوب غذا بخورید، به اندازه بخوابید و هر روز پیاده‌روی کنید.",
        "او نمی‌دانست که قطار می‌آید یا نه، پس با برادرش به خانه برگشت.",
    ],
    "Chinese": [
        "这个问题的答案并不简单,但我们可以试着找到它。",
        "保持健康的三个建议:多喝水。",
        "她不知道火车会不会来。",
    ],
    "Japanese": [
        "この質問の答えは簡単ではありません。",
        "健康のための三つの助言です。",
        "電車が来るかどうか分からなかった。",
    ],
    "Korean": [
        "이 질문에 대한 답은 간단하지 않습니다.",
        "건강을 위한 세 가지 조언입니다.",
        "기차가 올지 몰랐다.",
    ],
    "Greek": [
        "Η απάντηση σε αυτή την ερώτηση δεν είναι απλή.",
        "Τρεις συμβουλές για υγιή ζωή.",
        "Δεν ήξερε αν έρχεται.",
    ],
    "Hindi": [
        "इस प्रश्न का उत्तर सरल नहीं है।",
        "स्वस्थ जीवन के लिए तीन सुझाव।",
        "उसे नहीं पता था।",
    ],
}


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences_are_named_or_left_unclear(name):
    found = [language(sentence) for sentence in SENTENCES[name]]
    assert set(found) <= {name, UNCLEAR}, "a wrong name is worse than none"
    assert found.count(name) >= 2, found


def test_nearly_all_are_named():
    right = [language(s) == name for name, some in SENTENCES.items() for s in some]
    assert sum(right) / len(right) >= 0.95


@pytest.mark.parametrize(
    "text",
    ["", "42", "3.14 + 2 = 5.14", "Paris", "A, B, C", "Kwa hiyo tulienda sokoni.",
     "\ud83d", "🎉🎉", "SELECT name FROM users", "\n \t"],
)  # fmt: skip
def test_what_gives_no_ground_is_unclear(text):
    assert language(text) == UNCLEAR


@pytest.mark.parametrize(
    "text",
    ["def f(x):\n    return x ** 2", "{'a': [1, 2]}", "x = np.zeros((3, 4)); y = x.T @ x", "for (var i = 0;;) {}"],
)
def test_code_is_code(text):
    assert language(text) == CODE


def test_a_mixed_text_gets_its_larger_part():
    assert language(SENTENCES["German"][0] + " " + "OK.") == "German"
    assert language("翻译:" + SENTENCES["English"][0]) == "English"
