"""Questions about everyday things, answered in the language that was asked for.

The question may be in one language and the request for the other. Held out are combinations
of question, its language and the language asked for.
"""

from random import Random

from astrai_train.data.curriculum import checker
from astrai_train.data.curriculum.item import (
    Item,
    Language,
    Split,
    Wordings,
    chat,
    draw,
    split_of,
)
from astrai_train.data.curriculum.lexicon import NOUNS, OPPOSITES, with_article

_CATEGORIES = {
    "animal": ("an animal", "动物"),
    "fruit": ("a fruit", "水果"),
    "vegetable": ("a vegetable", "蔬菜"),
    "vehicle": ("a vehicle", "交通工具"),
    "tool": ("a tool", "工具"),
    "person": ("a person", "人"),
    "place": ("a place", "地方"),
}
_MEMBERS = tuple(noun for noun in NOUNS if noun.category in _CATEGORIES)

_REQUESTS = {
    ("en", "en"): Wordings(
        train=(
            "{question}",
            "{question} Answer in English.",
            "In English: {question}",
            "{question} Please reply in English.",
            "Please answer in English: {question}",
        ),
        held_out=("{question} Please answer in English.",),
    ),
    ("en", "zh"): Wordings(
        train=(
            "{question} Answer in Chinese.",
            "Answer in Chinese: {question}",
            "{question} Reply in Chinese.",
            "In Chinese, please: {question}",
            "{question} Please reply in Chinese.",
            "Please answer in Chinese: {question}",
            "{question} Answer me in Chinese, please.",
        ),
        held_out=("{question} Please answer in Chinese.", "Please reply in Chinese: {question}"),
    ),
    ("zh", "zh"): Wordings(
        train=(
            "{question}",
            "{question}用中文回答。",
            "用中文回答：{question}",
            "{question}请用中文回复。",
            "请用中文回答：{question}",
        ),
        held_out=("{question}请用中文回答。",),
    ),
    ("zh", "en"): Wordings(
        train=(
            "{question}用英文回答。",
            "用英文回答：{question}",
            "{question}用英语回答。",
            "请用英语回答：{question}",
            "{question}请用英文回复。",
            "请用英文回答：{question}",
            "{question}请用英语回答我。",
        ),
        held_out=("{question}请用英文回答。", "请用英文回答我：{question}"),
    ),
}

_IS_A = {
    "en": ("Is {a} {category}?", "Do you think {a} is {category}?"),
    "zh": ("{a}是{category}吗？", "{a}是不是{category}？"),
}
_OPPOSITE = {
    "en": ('What is the opposite of "{a}"?', 'Which word means the opposite of "{a}"?'),
    "zh": ("“{a}”的反义词是什么？", "“{a}”的相反是什么？"),
}


def _is_a(rng: Random) -> tuple[tuple[str, ...], dict[Language, str], dict[Language, str]]:
    noun = rng.choice(_MEMBERS)
    category = noun.category if rng.random() < 0.5 else rng.choice(tuple(_CATEGORIES))
    english, chinese = _CATEGORIES[category]
    name = with_article(noun.english)
    form = rng.randrange(2)
    question: dict[Language, str] = {
        "en": _IS_A["en"][form].format(a=name, category=english),
        "zh": _IS_A["zh"][form].format(a=noun.chinese, category=chinese),
    }
    kind, kind_chinese = _CATEGORIES[noun.category]
    verdict, verdict_chinese = ("yes", "是的") if category == noun.category else ("no", "不是")
    answer: dict[Language, str] = {
        "en": f"{english.capitalize()}? {name.capitalize()} is {kind}, so {verdict}.",
        "zh": f"{chinese}？{noun.chinese}是{kind_chinese}，所以{verdict_chinese}。",
    }
    return ("is_a", noun.english, category), question, answer


def _opposite(rng: Random) -> tuple[tuple[str, ...], dict[Language, str], dict[Language, str]]:
    pair = rng.choice(OPPOSITES)
    word, opposite = rng.sample(pair, 2)
    form = rng.randrange(2)
    question: dict[Language, str] = {
        "en": _OPPOSITE["en"][form].format(a=word.english),
        "zh": _OPPOSITE["zh"][form].format(a=word.chinese),
    }
    answer: dict[Language, str] = {
        "en": f'The opposite of "{word.english}" is "{opposite.english}".',
        "zh": f"“{word.chinese}”的反义词是“{opposite.chinese}”。",
    }
    return ("opposite", word.english), question, answer


def answer_in(rng: Random, split: Split) -> Item:
    """A question in one language, to be answered in the same or the other."""
    languages: tuple[Language, Language] = rng.choice(
        (("en", "en"), ("en", "zh"), ("en", "zh"), ("zh", "zh"), ("zh", "en"), ("zh", "en"))
    )
    asked, answered = languages
    operands, question, answer = draw(
        split,
        lambda: rng.choice((_is_a, _is_a, _is_a, _opposite))(rng),
        lambda candidate: split_of(*candidate[0], *languages),
    )
    wording = _REQUESTS[languages].pick(rng, split)
    return Item(
        task="asked_language",
        language=answered,
        messages=chat(wording.format(question=question[asked]), answer[answered]),
        checker=checker.exact(answer[answered]),
        split=split,
        operands=(*operands, *languages),
        wording=wording,
    )
