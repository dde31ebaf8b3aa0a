"""Exchanges about facts on the user: telling, asking, and asking before telling, for each slot."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from tinychat_mlx.apps.demo.talk import Chat, Turn, draw, rough
from tinychat_mlx.apps.demo.words import invent, listed

PEOPLE = listed(
    "Anna;Ben;Clara;David;Emma;Frank;Grace;Henry;Ines;Jack;Karin;Lukas;Maria;Noah;Olivia;Paul;"
    "Rosa;Simon;Tara;Uma;Victor;Wendy;Xavier;Yara;Adam;Bianca;Carlos;Diana;Elias;Fatima;George;"
    "Hanna;Ivan;Julia;Kevin;Laura;Marco;Nina;Omar;Petra;Quentin;Rita;Stefan;Tom;Ursula;Vera;Will;"
    "Yusuf;Alice;Bob;Chen;Dora;Erik;Fiona;Gustav;Helen;Igor;Jane;Kofi;Lena;Mehmet;Nadia;Oleg;Pia;"
    "Raj;Sofia;Tim;Valentina;Walter;Yuki;Amir;Bruno;Charlotte;Daniel;Eva;Felix;Gina;Hugo;Isabel;"
    "John;Kate;Leo;Mia;Nick;Oscar;Paula;Robert;Sarah;Thomas;Aisha;Peter;Linda;James;Mary;Michael;"
    "Sam;Lucy;Martin;Zoe;Alex;Chris;Jamal;Priya;Sven;Ling;Diego;Amara;Hiro;Tomas;Elena;Nora;Max",
    ";",
)
_PETS = listed(
    "Rex;Bella;Max;Luna;Fluffy;Spot;Minka;Rocky;Coco;Simba;Nemo;Molly;Bobby;Kiki;Snowy;Tiger;Daisy;"
    "Charlie;Felix;Rosie;Oreo;Peanut;Biscuit;Shadow;Ginger;Pepper",
    ";",
)
_COLOURS = listed(
    "red;blue;green;yellow;orange;purple;pink;black;white;brown;grey;turquoise;gold;silver", ";"
)
_FOODS = listed(
    "pizza;soup;rice;bread;cheese;pasta;chocolate;salad;pancakes;apples;curry;sushi;cake;potatoes;"
    "ice cream;noodles;fish;beans;cookies;tacos",
    ";",
)
_TOWNS = listed(
    "Paris;London;Berlin;Rome;Madrid;Vienna;Boston;Hamburg;Kyoto;Lisbon;Prague;Chicago;Dublin;Oslo;"
    "Geneva;Milan;Toronto;Sydney;Cologne;Lyon;Munich;Delhi;Lima;Nairobi",
    ";",
)
_ANIMALS = listed(
    "the dog;the cat;the fox;the horse;the owl;the elephant;the panda;the dolphin;the tiger;the frog;"
    "the bear;the rabbit;the penguin;the turtle",
    ";",
)
_HOBBIES = listed(
    "reading;swimming;chess;cooking;football;painting;hiking;dancing;music;fishing;gardening;cycling;"
    "running;tennis;singing",
    ";",
)


@dataclass(frozen=True)
class Slot:
    """A fact about the user: forms to tell, acknowledge, ask and answer it, and the answer if it is unknown."""

    values: tuple[str, ...]
    invented: float
    tell: str
    noted: str
    ask: str
    answer: str
    untold: str


SLOTS: dict[str, Slot] = {
    "name": Slot(
        tuple(PEOPLE),
        0.6,
        "My name is {v}.|I am {v}.|I'm {v}.|Call me {v}.|Hi, I'm {v}.|Hello, my name is {v}."
        "|Hi! My name is {v}.|You can call me {v}.|{v} is my name.|My name's {v}.|Hello, I am {v}."
        "|Hey, {v} here.|People call me {v}.|This is {v}.",
        "Nice to meet you, {v}!|Hello, {v}! How can I help you?|Nice to meet you, {v}! I will"
        " remember your name.",
        "What is my name?|What's my name?|Do you remember my name?|Who am I?|Do you know my name?"
        "|How am I called?|Say my name.|Can you tell me my name?|Tell me my name."
        "|Do you still know my name?|What was my name again?",
        "Your name is {v}.",
        "I don't know your name yet. What is it?",
    ),
    "colour": Slot(
        tuple(_COLOURS),
        0.0,
        "My favourite colour is {v}.|I like the colour {v} best.|{v} is my favourite colour."
        "|The colour I love most is {v}.|My favorite color is {v}.",
        "I like {v} too! I will remember it.|Nice, {v} is a beautiful colour.",
        "What is my favourite colour?|Which colour do I like best?|Do you remember my favourite"
        " colour?|What's my favorite color?|Which colour is my favourite?",
        "Your favourite colour is {v}.",
        "I don't know your favourite colour yet. Which one is it?",
    ),
    "pet": Slot(
        tuple(_PETS),
        0.4,
        "My pet is called {v}.|I have a pet named {v}.|My pet's name is {v}.|My dog is called {v}."
        "|My cat's name is {v}.|I have a dog named {v}.|I have a cat called {v}.",
        "What a nice name, {v}!|Say hello to {v} from me!",
        "What is my pet called?|What is my pet's name?|Do you remember the name of my pet?"
        "|What's the name of my pet?|How is my pet called?",
        "Your pet is called {v}.",
        "I don't know the name of your pet yet. What is it?",
    ),
    "food": Slot(
        tuple(_FOODS),
        0.0,
        "My favourite food is {v}.|I love to eat {v}.|I like {v} most of all foods."
        "|The food I like best is {v}.",
        "Yes, {v} is tasty!|Good choice! I will remember {v}.",
        "What is my favourite food?|Which food do I like best?|What do I like to eat?"
        "|Do you remember my favourite food?",
        "Your favourite food is {v}.",
        "I don't know your favourite food yet. What is it?",
    ),
    "town": Slot(
        tuple(_TOWNS),
        0.3,
        "I live in {v}.|I am from {v}.|My home is in {v}.|I come from {v}.|My city is {v}.",
        "I think {v} is a nice place!|Greetings to {v}!",
        "Where do I live?|Where am I from?|Which city do I live in?|Do you remember where I live?"
        "|What is my home town?",
        "You live in {v}.",
        "I don't know where you live. You have not told me yet.",
    ),
    "animal": Slot(
        tuple(_ANIMALS),
        0.0,
        "My favourite animal is {v}.|The animal I like best is {v}.|I love {v} most of all animals.",
        "Yes, {v} is a wonderful animal!|I like {v} too!",
        "What is my favourite animal?|Which animal do I like best?|Do you remember my favourite animal?",
        "Your favourite animal is {v}.",
        "I don't know your favourite animal yet. Which one is it?",
    ),
    "hobby": Slot(
        tuple(_HOBBIES),
        0.0,
        "My hobby is {v}.|My favourite hobby is {v}.|In my free time I enjoy {v}.",
        "Yes, {v} is a great hobby!|That sounds like fun!",
        "What is my hobby?|What do I do in my free time?|Do you remember my hobby?",
        "Your hobby is {v}.",
        "I don't know your hobby yet. What is it?",
    ),
}
_SLOT_ODDS = ("name",) * 8 + (
    "pet",
    "pet",
    "colour",
    "colour",
    "town",
    "food",
    "animal",
    "hobby",
)


def _value(rng: Random, slot: Slot) -> str:
    return invent(rng) if rng.random() < slot.invented else rng.choice(slot.values)


def tell(chat: Chat, held: bool, which: str = "") -> Turn:
    """Let the user state a fact about themselves."""
    kind = which or chat.rng.choice(_SLOT_ODDS)
    slot = SLOTS[kind]

    def make() -> tuple[Any, tuple[object, ...]]:
        v = _value(chat.rng, slot)
        return v, ("memory", kind, v)

    v = draw(make, held)
    chat.memory[kind] = v
    user = slot_text(chat, slot.tell, v)
    if slot.invented == 0 or (v in slot.values and chat.rng.random() < 0.25):
        user = rough(chat, user)
    else:
        user = rough(chat, user, (v,))
    return Turn("memory", user, slot_text(chat, slot.noted, v))


def slot_text(chat: Chat, forms: str, v: str) -> str:
    """Fill a random form with the value."""
    text = chat.rng.choice(forms.split("|")).format(v=v, V=v[:1].upper() + v[1:])
    return text[:1].upper() + text[1:]


def recall(chat: Chat, held: bool, which: str = "") -> Turn:
    """Ask for a fact that was stated before, or never."""
    told = list(chat.memory)
    kind = which or chat.rng.choice(_SLOT_ODDS)
    if told and not which and chat.rng.random() < 0.75:
        kind = chat.rng.choice(told)
    slot = SLOTS[kind]
    ask = chat.rng.choice(slot.ask.split("|"))
    v = chat.memory.get(kind)
    if v is None:
        return Turn(
            "untold",
            rough(chat, ask),
            slot.untold,
            {"kind": "contains", "all": ["don't know"]},
        )
    # Not bold: after a space, a name has the same tokens as in the user's message, so copying can be learned.
    reply = slot.answer.format(v=v)
    return Turn("memory", rough(chat, ask), reply, {"kind": "contains", "all": [v]})
