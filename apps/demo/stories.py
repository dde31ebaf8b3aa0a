"""Stories of the demo model, from a small grammar: hero × trait × place × trouble × end.

A story is built from the request, so that every sentence can be traced to it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from tinychat_mlx.apps.demo.words import invent, listed

T = TypeVar("T")

HEROES = listed(
    "fox;bear;cat;dog;owl;rabbit;mouse;wolf;lion;elephant;turtle;frog;duck;goose;hen;horse;donkey;"
    "cow;sheep;goat;pig;squirrel;hedgehog;mole;badger;beaver;deer;swan;crow;sparrow;eagle;parrot;"
    "penguin;seal;whale;dolphin;shark;octopus;crab;snail;ant;bee;butterfly;spider;beetle;ladybird;"
    "dragon;unicorn;giant;wizard;witch;knight;king;queen;prince;princess;pirate;robot;astronaut;"
    "farmer;baker;teacher;sailor;painter;gardener;boy;girl;old man;old woman;snowman;ghost;"
    "monkey;tiger;giraffe;zebra;camel;kangaroo;panda;koala;hamster;kitten;puppy;train;little car;"
    "boat;teapot;clock;cloud;star;tree;flower;computer;dinosaur;fairy;clown;fisherman;musician;"
    "lamp;sandwich;balloon;bicycle;violin;book;pencil;shoe;hat;potato;pumpkin;cactus;comet;rocket;"
    "submarine;bus;tractor;mermaid;goblin;elf;troll;vampire;detective;doctor;nurse;pilot;scientist;"
    "student;grandmother;grandfather;baby;chef;tailor;cowboy;ninja;superhero;inventor;dancer;singer;"
    "flamingo;peacock;otter;raccoon;moose;reindeer;llama;ostrich;salmon;worm;bat;crocodile;hippo;"
    "rhino;gorilla;sloth;lobster;jellyfish;caterpillar;dragonfly;toad;lizard;hero",
    ";",
)

TRAITS = listed(
    "brave;shy;clever;lazy;kind;curious;tiny;hungry;sleepy;lonely;happy;sad;proud;funny;forgetful;"
    "patient;grumpy;gentle;noisy;quiet;careful;clumsy;generous;greedy;honest;stubborn;silly;"
    "friendly;nervous;cheerful;wise;young;old;fast;slow;strong;blue;golden;green;polite",
    ";",
)

PLACES = listed(
    "in a forest;on a farm;by the sea;on an island;in a castle;in a small village;in a big city;"
    "on the Moon;in the desert;in the mountains;by a river;in a garden;in a cave;in the snow;"
    "in a library;at school;on a ship;in a kitchen;in a train station;under a bridge;in the jungle;"
    "in a meadow;at the market;in space;in a museum;by a lake;in an old house;in a valley",
    ";",
)

NAMES = listed(
    "Pip;Tilly;Bruno;Mila;Otto;Nia;Rufus;Lola;Finn;Zara;Momo;Ruby;Max;Ivy;Toby;Luna;Oscar;Bella;"
    "Hugo;Daisy;Leo;Poppy;Felix;Nora;Sam;Juno;Milo;Greta;Theo;Wanda",
    ";",
)

# Trouble, attempt, rescue without a friend, rescue with a friend. {h} the hero, {N} its name, {f} the friend.
_TROUBLES = (
    (
        "One day a storm came and blew the roof off {N}'s house.",
        "{N} tried to hold it down, but the wind was too strong.",
        "So {N} waited for the rain to stop and built a new roof from branches.",
        "The {f} came with a rope, and together they tied the roof down.",
    ),
    (
        "One morning {N} woke up and could not find the way home.",
        "{N} looked left and looked right, but every path seemed the same.",
        "Then {N} remembered to follow the Sun, and step by step the way came back.",
        "The {f} knew every path and walked with {N} until they saw the lights of home.",
    ),
    (
        "One evening {N} heard a strange noise outside.",
        "{N} wanted to hide under the blanket, but the noise did not stop.",
        "So {N} took a lamp, opened the door, and found only a loose window in the wind.",
        "The {f} was standing there, cold and wet, so {N} let the {f} in.",
    ),
    (
        "One day there was nothing left to eat.",
        "{N} looked in every cupboard and found only crumbs.",
        "So {N} planted a few seeds, watered them every day, and soon there were fine carrots.",
        "The {f} had a basket of apples and gave half of them to {N}.",
    ),
    (
        "One day {N} lost a little golden key.",
        "{N} searched all morning and found nothing but dust.",
        "At last {N} sat down to think, and there was the key, under the hat.",
        "The {f} had sharp eyes and saw the key shining in the grass.",
    ),
    (
        "One day the big race was about to begin, and everybody laughed at {N}.",
        "{N} stumbled at the start and was far behind.",
        "But {N} did not give up, took one step after another, and crossed the line smiling.",
        "Then the {f} fell, and {N} stopped to help, so they crossed the line together.",
    ),
    (
        "One night the stars were gone from the sky.",
        "{N} called for them, but the sky stayed dark.",
        "So {N} climbed the highest hill, blew the clouds away, and the stars came back.",
        "The {f} held the ladder, {N} climbed up, and together they pushed the clouds away.",
    ),
    (
        "One day {N} found a box that would not open.",
        "{N} pulled it and pushed it, but the lid did not move.",
        "Then {N} said a friendly word, and the box opened, full of music.",
        "The {f} held one side, {N} held the other, and the box opened, full of music.",
    ),
    (
        "One day the bridge over the water broke.",
        "{N} tried to jump across and landed in the cold water.",
        "So {N} laid one stone after another until there was a new path.",
        "The {f} brought wood, {N} brought nails, and they built a new bridge.",
    ),
    (
        "One day {N} wanted to sing, but no sound came out.",
        "{N} drank warm tea and tried again, but it was only a squeak.",
        "So {N} practised every day, first softly, then louder, until the song was there.",
        "The {f} played the drum, {N} hummed along, and soon it was a real song.",
    ),
    (
        "One winter day everything was frozen, and {N} was very cold.",
        "{N} tried to make a fire, but the wood was wet.",
        "So {N} gathered dry leaves, tried once more, and a small warm flame began to dance.",
        "The {f} brought a thick blanket, and side by side they were warm.",
    ),
    (
        "One day a letter came that {N} could not read.",
        "{N} turned it upside down, but that did not help.",
        "So {N} learned one letter each day, and in the end the words said: you are invited.",
        "The {f} read it aloud: it was an invitation for both of them.",
    ),
)

_ENDS = (
    "From that day on, {N} was never afraid of trouble again.",
    "That night {N} slept well and dreamed of new adventures.",
    "And {N} learned that small steps lead far.",
    "And everybody agreed that it had been a wonderful day.",
    "In the end {N} laughed and said: what a day!",
    "And they celebrated with a big cake.",
)

_FRIEND_ENDS = (
    "From that day on, {N} and the {f} were best friends.",
    "And {N} learned that with a friend everything is easier.",
    "That evening {N} and the {f} watched the sunset together.",
)

_WISHES = (
    "Everybody knew how {t} {N} was.",
    "People often said: nobody is as {t} as {N}.",
    "Being {t} was what {N} did best.",
    "{N} was so {t} that even the birds talked about it.",
)

_FORMS = (
    "Tell me a story about {s}.",
    "Can you tell me a story about {s}?",
    "Write a short story about {s}.",
    "A story about {s}, please.",
    "I want to hear a story about {s}.",
    "Story about {s}?",
    "Please write me a little story about {s}.",
    "Tell me a tale about {s}.",
    "Do you know a story about {s}?",
    "Make up a story about {s}.",
    "Once more, but about {s}.",
    "I'd like a bedtime story about {s}.",
)


@dataclass(frozen=True)
class Request:
    """The elements requested in a story; an empty string means none."""

    hero: str
    trait: str
    friend: str
    place: str
    name: str

    def subject(self) -> str:
        """Return the words that name the subject, such as `a shy fox named Pip in a forest`."""
        words = article(f"{self.trait} {self.hero}".strip())
        words += f" named {self.name}" if self.name else ""
        words += f" and {article(self.friend)}" if self.friend else ""
        return words + (f" {self.place}" if self.place else "")


def article(noun: str) -> str:
    """Put `a` or `an` before a noun."""
    return f"an {noun}" if noun[0] in "aeio" or noun.startswith("honest") else f"a {noun}"


def request(rng: Random) -> Request:
    """Draw a request for a story."""
    hero, friend = rng.sample(HEROES, 2)
    name = rng.choice(NAMES) if rng.random() < 0.7 else invent(rng)
    return Request(
        hero,
        rng.choice(TRAITS) if rng.random() < 0.6 else "",
        friend if rng.random() < 0.3 else "",
        rng.choice(PLACES) if rng.random() < 0.35 else "",
        name if rng.random() < 0.18 else "",
    )


_OPEN_FORMS = (
    "Tell me a story.",
    "Can you tell me a story?",
    "A story, please!",
    "Story please",
    "Write a short story.",
    "I want to hear a story.",
    "Another story, please.",
    "One more story!",
)


def question(rng: Random, r: Request) -> str:
    """Ask for the story."""
    if r == Request("", "", "", "", ""):
        return rng.choice(_OPEN_FORMS)
    return rng.choice(_FORMS).format(s=r.subject())


def _leaning(rng: Random, key: str, choices: Sequence[T]) -> T:
    """Draw a choice, mostly the one that is tied to the key, so that greedy stories differ by subject."""
    if rng.random() < 0.4:
        return rng.choice(choices)
    return choices[zlib.crc32(key.encode()) % len(choices)]


def tell(rng: Random, r: Request) -> str:
    """Write the story: five to eight sentences about exactly the request."""
    r = r if r.hero else request(rng)
    name = r.name or _leaning(rng, r.trait + "/" + r.hero, NAMES)
    trait = r.trait or rng.choice(TRAITS)
    friend = r.friend or (rng.choice(HEROES) if rng.random() < 0.4 else "")
    friend = "" if friend == r.hero else friend
    trouble, attempt, alone, together = _leaning(rng, r.hero, _TROUBLES)
    place = r.place or rng.choice(PLACES)
    opening = rng.choice(("Once upon a time there was {a}.", "There once was {a}.")) + " {rest}"
    lived = f"The {r.hero} was called {name} and lived {place}."
    parts = [opening.format(a=article(f"{trait} {r.hero}"), rest=lived)]
    if rng.random() < 0.7:
        parts.append(rng.choice(_WISHES))
    parts += [trouble, attempt]
    if friend:
        met = f"Then {article(friend)} came along."
        parts += [met, together, rng.choice(_FRIEND_ENDS)]
    else:
        parts += [alone, rng.choice(_ENDS)]
    if rng.random() < 0.3:
        parts.append("**The end.**")
    return " ".join(parts).format(N=name, h=r.hero, f=friend, t=trait)
