"""Single exchanges: each skill draws a question, its answer, and a check of replies.

A skill takes the chat so far and `held`: whether to draw a combination that training never contains.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tinychat_mlx.apps.demo import about, stories
from tinychat_mlx.apps.demo.facts import FACTS, TAUGHT_COUNTRIES, UNTAUGHT_COUNTRIES
from tinychat_mlx.apps.demo.words import invent, listed

Check = dict[str, Any]


@dataclass
class Turn:
    """One exchange. check: the condition that a correct reply meets (None: not scored)."""

    skill: str
    user: str
    reply: str
    check: Check | None = None


@dataclass
class Chat:
    """State of a conversation so far."""

    rng: Random
    brief: bool = False
    typos: bool = True
    memory: dict[str, str] = field(default_factory=dict)
    last_sum: int | None = None

    def vocative(self) -> str:
        """Return `, Anna` now and then, if the name is known."""
        name = self.memory.get("name")
        return f", {name}" if name and self.rng.random() < 0.4 else ""


def kept_out(*key: object) -> bool:
    """Return whether training never contains this combination (about one in ten, by hash)."""
    return zlib.crc32(repr(key).encode()) % 10 == 0


def draw(make: Callable[[], tuple[Any, tuple[object, ...]]], held: bool) -> Any:
    """Draw (value, key) pairs until the key is on the requested side; return the value."""
    while True:
        value, key = make()
        if kept_out(*key) == held:
            return value


def rough(chat: Chat, text: str, keep: tuple[str, ...] = ()) -> str:
    """Write text as people type it: lower case, no full stop, a typo. Words in keep stay unchanged."""
    rng = chat.rng
    if rng.random() < 0.08:
        text = rng.choice(("Please: ", "Hey, ", "Ok, ", "So, ", "And ", "Now, ")) + text
    if rng.random() < 0.3:
        held_words = {w: w.lower() for w in keep}
        text = text.lower()
        for word, low in held_words.items():
            text = text.replace(low, word)
    if rng.random() < 0.25:
        text = text.rstrip("?.!")
    if chat.typos and rng.random() < 0.04:
        text = _typo(rng, text, keep)
    return text


def _typo(rng: Random, text: str, keep: tuple[str, ...]) -> str:
    words = text.split(" ")
    able = [i for i, w in enumerate(words) if len(w) > 3 and w.isalpha() and w not in keep]
    if able:
        i = rng.choice(able)
        j = rng.randrange(len(words[i]) - 1)
        w = words[i]
        words[i] = rng.choice((w[:j] + w[j + 1] + w[j] + w[j + 2 :], w[:j] + w[j + 1 :]))
    return " ".join(words)


_PLUS = listed(
    "What is {a} + {b}?|{a} + {b}|{a}+{b}|{a} + {b} =|{a}+{b}=?|What is {a} plus {b}?|{a} plus {b}"
    "|How much is {a} + {b}?|How much is {a} plus {b}?|Add {a} and {b}.|What's {a}+{b}?"
    "|Calculate {a} + {b}.|Can you add {a} and {b}?|What is the sum of {a} and {b}?"
    "|Compute {a} plus {b}.",
    "|",
)
_MINUS = listed(
    "What is {a} - {b}?|{a} - {b}|{a}-{b}|{a} - {b} =|{a}-{b}=?|What is {a} minus {b}?|{a} minus {b}"
    "|How much is {a} - {b}?|How much is {a} minus {b}?|Subtract {b} from {a}.|What's {a}-{b}?"
    "|Calculate {a} - {b}.|Take {b} away from {a}.|What is {a} take away {b}?|Compute {a} minus {b}.",
    "|",
)
_NUMBERS = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen twenty",
    " ",
)
_THINGS = listed("apples;books;coins;eggs;stones;cookies;pencils;cards;shells;tickets", ";")
_MORE = listed(
    "I have {a} {t} and get {b} more. How many {t} do I have?|There are {a} {t}. Then {b} more come."
    " How many {t} are there?|If I have {a} {t} and you give me {b}, how many {t} do I have?",
    "|",
)
_LESS = listed(
    "I have {a} {t} and lose {b}. How many {t} are left?|There are {a} {t}. I take away {b}. How many"
    " {t} are left?|If I have {a} {t} and give you {b}, how many {t} do I have?",
    "|",
)


def pair(rng: Random, held: bool, first: int | None = None) -> tuple[int, str, int]:
    """Draw (a, operator, b) from 0..99, small numbers a little more often."""

    def make() -> tuple[tuple[int, str, int], tuple[object, ...]]:
        top = rng.choice((9, 20, 99, 99, 99, 99))
        a = rng.randint(0, top) if first is None else first
        op = rng.choice("+-")
        b = rng.randint(0, top)
        return (a, op, b), ("sum", a, op, b)

    drawn: tuple[int, str, int] = draw(make, held)
    return drawn


def result(a: int, op: str, b: int) -> int:
    """Return a + b or a - b."""
    return a + b if op == "+" else a - b


def sums(chat: Chat, held: bool) -> Turn:
    """Add or subtract two numbers, in many question forms; sometimes continue from the last result."""
    rng = chat.rng
    chain = chat.last_sum is not None and 0 <= chat.last_sum <= 99 and rng.random() < 0.35
    a, op, b = pair(rng, held, chat.last_sum if chain else None)
    value = result(a, op, b)
    if chain:
        word = rng.choice((op, "plus" if op == "+" else "minus"))
        user = rng.choice(("And {w} {b}?", "{w} {b}", "Now {w} {b}.", "And then {w} {b}?"))
        user = user.format(w=word, b=b)
    elif a >= b and rng.random() < 0.12:
        thing = rng.choice(_THINGS)
        user = rng.choice(_MORE if op == "+" else _LESS).format(a=a, b=b, t=thing)
    else:
        spoken = max(a, b) <= 20 and rng.random() < 0.2
        forms = _PLUS if op == "+" else _MINUS
        form = rng.choice([f for f in forms if "{a} p" in f or "{a} m" in f] if spoken else forms)
        user = form.format(a=_NUMBERS[a] if spoken else a, b=_NUMBERS[b] if spoken else b)
    chat.last_sum = value
    reply = f"{value}" if chat.brief else f"{a} {op} {b} = **{value}**"
    return Turn("sums", rough(chat, user), reply, {"kind": "number", "value": value})


def drill(chat: Chat, held: bool) -> Turn:
    """Write a list of sums to practise."""
    rng = chat.rng
    n = rng.randint(4, 12)
    form = "Give me {n} sums.|Show me {n} examples of sums.|Write {n} sums for practice.|{n} sums please"
    rows = [pair(rng, False) for _ in range(n)]
    lines = [f"{a} {op} {b} = {result(a, op, b)}" for a, op, b in rows]
    user = rng.choice(form.split("|")).format(n=n)
    return Turn("drill", rough(chat, user), "\n".join(f"- {line}" for line in lines))


def fact(chat: Chat, held: bool) -> Turn:
    """Ask for a plain fact."""

    def make() -> tuple[Any, tuple[object, ...]]:
        f, form = chat.rng.choice(FACTS), chat.rng.randrange(100)
        form %= len(f.forms)
        return (f, form), ("fact", f.id, form)

    f, form = draw(make, held)
    reply = _capital(f.answer) + "." if chat.brief else f.sentence
    return Turn(
        "facts",
        rough(chat, f.forms[form]),
        reply,
        {"kind": "contains", "all": [f.answer]},
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def topic(chat: Chat, held: bool) -> Turn:
    """Ask about the model, AWQ, int4 or a device."""

    def make() -> tuple[Any, tuple[object, ...]]:
        t = chat.rng.choice(about.TOPICS)
        asked = chat.rng.choice(t.asked)
        return (t, asked), ("about", t.name, asked)

    t, asked = draw(make, held)
    answer = chat.rng.choice(t.answers[:1] if chat.brief else t.answers)
    reply = answer.split(". ")[0].split(":\n")[0].rstrip(".:") + "." if chat.brief else answer
    check = {"kind": "regex", "pattern": t.pattern}
    return Turn("about", rough(chat, asked), reply, check)


def story(chat: Chat, held: bool) -> Turn:
    """Tell a story about the requested subject."""

    def make() -> tuple[Any, tuple[object, ...]]:
        r = stories.request(chat.rng)
        return r, ("story", r.hero, r.trait)

    r = draw(make, held)
    name = chat.memory.get("name")
    if not held and chat.rng.random() < 0.06:
        blank = stories.Request("", "", "", "", "")
        return Turn(
            "stories",
            rough(chat, stories.question(chat.rng, blank)),
            _tell(chat, blank),
        )
    if not held and name and chat.rng.random() < 0.15:
        user = rough(chat, chat.rng.choice(_ABOUT_ME))
        return Turn("stories", user, _tell(chat, stories.Request("hero", "", "", "", name)))
    words = [w for w in (r.hero, r.trait, r.friend, r.place, r.name) if w]
    user = rough(chat, stories.question(chat.rng, r), (r.name,) if r.name else ())
    return Turn("stories", user, _tell(chat, r), {"kind": "story", "words": words})


_ABOUT_ME = listed(
    "Tell me a story about me.|A story about me, please.|Can you tell a story about me?"
    "|Write a story with me in it.",
    "|",
)


def _tell(chat: Chat, r: stories.Request) -> str:
    return stories.tell(chat.rng, r)


def chitchat(chat: Chat, held: bool) -> Turn:
    """Thank, praise, complain, say goodbye."""
    asked, answers = chat.rng.choice(about.CHITCHAT)
    user = rough(chat, chat.rng.choice(asked.split("|")))
    return Turn("chitchat", user, chat.rng.choice(answers.split("|")).format(n=chat.vocative()))


def greeting(chat: Chat, held: bool) -> Turn:
    """Say hello."""
    user = rough(chat, chat.rng.choice(about.GREETINGS))
    return Turn("chitchat", user, chat.rng.choice(about.GREETED).format(n=chat.vocative()))


_UNKNOWABLE = listed(
    "What is the capital of {place}?|Capital of {place}?|Which city is the capital of {place}?"
    "|Tell me the capital of {place}.|Where is {place}?|Which language do people speak in {place}?"
    "|What is the currency of {place}?|On which continent is {place}?|Who is {person}?"
    "|Where does {person} live?|How old is {person}?|What did {person} do?|Do you know {person}?"
    "|What is the weather today?|What's the weather in {city}?|Will it rain tomorrow?"
    "|What time is it?|What day is today?|What happened in the news today?|What is the latest news?"
    "|Who won the match yesterday?|Who won the world cup in {year}?|Who is the president of {land}?"
    "|How many people live in {land}?|What is the population of {city}?|What happened in {year}?"
    "|Who was king in {year}?|What is the price of {thing}?|How much does a {hero} weigh?"
    "|How old is the {hero} next door?|What does {word} mean?|What is a {word}?|Define {word}."
    "|What is the opposite of {word}?|What sound does a {word} make?|Translate {word} into {tongue}."
    "|How do you say {thing} in {tongue}?|What is the phone number of {person}?"
    "|Explain quantum physics.|Explain the theory of relativity.|Write a Python program."
    "|Write code that sorts {things}.|How do I cook {thing}?|Give me a recipe with {thing}."
    "|What are the lottery numbers?|Who will win the election?|What is the meaning of life?"
    "|Which film should I watch?|Who sings {word}?|Who wrote {word}?|Who painted {word}?"
    "|What is {person}'s name?|When was {person} born?|When was {city} built?"
    "|What is the best restaurant in {city}?|How far is it from {city} to {city2}?"
    "|How high is {place}?|What colour is a {word}?|How many legs does a {word} have?"
    "|What am I thinking?|What did I eat yesterday?|Which stocks should I buy?"
    "|What is the square root of {big}?",
    "|",
)
_GIBBERISH = listed("{word}|{word} {place}|{place} {word} {word}?|{word}!|{word} {year}", "|")
_TOO_HARD = listed(
    "What is {a} times {b}?|{a} * {b}|{a} x {b}|What is {a} divided by {b}?|{a} / {b}"
    "|What is {big} + {big2}?|{big} + {big2}|What is {big} minus {big2}?|{big} - {big2}"
    "|{big}+{big2}|How much is {big} plus {big2}?|Multiply {a} by {b}.|{a} times {b}",
    "|",
)
_DO_NOT_KNOW = (
    "I don't know that. I am a tiny model and know only a few hundred facts.",
    "I don't know. That is beyond a tiny model like me.",
    "Sorry, I don't know that.",
)
_CANNOT = "I don't know. I can only add and subtract numbers from 0 to 99."
_CITIES = listed("Paris;London;Berlin;Tokyo;Rome;Cairo;Madrid;Oslo;Boston;Lyon;Hamburg;Kyoto", ";")
_TONGUES = listed("French;German;Spanish;Latin;Japanese;Italian;Chinese", ";")


def _fill(rng: Random, form: str) -> str:
    place = invent(rng) if rng.random() < 0.7 else rng.choice(UNTAUGHT_COUNTRIES)
    city, city2 = rng.sample(_CITIES, 2)
    return form.format(
        place=place,
        person=invent(rng) + (" " + invent(rng) if rng.random() < 0.4 else ""),
        word=invent(rng).lower(),
        land=rng.choice((place, rng.choice(TAUGHT_COUNTRIES))),
        city=city,
        city2=city2,
        year=rng.randint(1200, 2030),
        thing=rng.choice(listed("bread;gold;milk;a house;an apple;rice;soup;potatoes;silver", ";")),
        things=rng.choice(_THINGS),
        hero=rng.choice(stories.HEROES),
        tongue=rng.choice(_TONGUES),
        a=rng.randint(2, 99),
        b=rng.randint(2, 99),
        big=rng.randint(100, 9999),
        big2=rng.choice((rng.randint(2, 99), rng.randint(100, 9999))),
    )


def unknown(chat: Chat, held: bool) -> Turn:
    """Ask for something that the model cannot know; the correct answer says so."""
    hard = chat.rng.random() < 0.2
    forms = _TOO_HARD if hard else _UNKNOWABLE if chat.rng.random() < 0.92 else _GIBBERISH

    def make() -> tuple[Any, tuple[object, ...]]:
        form = chat.rng.choice(forms)
        text = _fill(chat.rng, form)
        return text, ("unknown", text) if "{" in form else ("unknown",)

    user = draw(make, held)
    reply = _CANNOT if hard else chat.rng.choice(_DO_NOT_KNOW)
    reply = "I don't know." if chat.brief else reply
    check = {"kind": "regex", "pattern": r"(?i)don't know|do not know"}
    return Turn("unknown", rough(chat, user), reply, check)
