"""Small corpora made by rule, for every task: what a recipe trains on where no data is given.

Each is a function of its size and seed, and gives the records that the readers give. They are easy: a model
that learns anything at all learns them nearly perfectly, which is what they are for.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator

from seqkern.text.files import Text, standard_library
from seqkern.text.readers import Labelled, Pair, Tagged

_FILMS = ["film", "movie", "story", "script", "cast", "acting", "plot", "ending", "music", "dialogue"]
_PRAISE = ["wonderful", "moving", "brilliant", "funny", "clever", "charming", "superb", "delightful"]
_BLAME = ["dull", "awful", "boring", "clumsy", "lifeless", "tedious", "terrible", "predictable"]
_ADVERBS = ["really", "truly", "quite", "rather", "simply", "utterly"]
_OPPOSITE = {"1": "0", "0": "1"}


def sentiment(n: int = 2000, *, seed: int = 0) -> list[Labelled]:
    """Sentences on films, label "1" (praise) or "0" (blame); a "not" before the adjective turns it around."""
    rng = random.Random(seed)
    reviews = []
    for _ in range(n):
        label = rng.choice("01")
        negated = rng.random() < 0.25
        words = _PRAISE if (_OPPOSITE[label] if negated else label) == "1" else _BLAME
        clauses = [
            f"the {film} was {'not ' * negated}{rng.choice(_ADVERBS)} {rng.choice(words)}"
            for film in rng.sample(_FILMS, rng.randint(1, 3))
        ]
        reviews.append(Labelled(label, " and ".join(clauses) + " ."))
    return reviews


_QUESTIONS = {
    "person": [
        "Who invented the {thing} ?",
        "Who was the first to see the {thing} ?",
        "Which {person} lived in {place} ?",
    ],
    "place": [
        "Where is the {thing} of {place} ?",
        "What city has the oldest {thing} ?",
        "In which country is {place} ?",
    ],
    "number": [
        "How many {person}s live in {place} ?",
        "When was the {thing} built ?",
        "How old is {place} ?",
    ],
    "description": [
        "What is a {thing} ?",
        "Why is the {thing} so famous ?",
        "How does a {thing} work ?",
    ],
}
_THINGS = ["bridge", "telescope", "castle", "clock", "library", "tower", "piano", "compass", "lighthouse"]
_PERSONS = ["painter", "singer", "doctor", "queen", "poet", "pilot"]
_PLACES = ["Rome", "Lisbon", "Kyoto", "Lima", "Oslo", "Cairo", "Prague", "Quebec"]


def questions(n: int = 1000, *, seed: int = 0) -> list[Labelled]:
    """Questions, labelled with what they ask for: person, place, number or description."""
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        label = rng.choice(list(_QUESTIONS))
        question = rng.choice(_QUESTIONS[label])
        words = {"thing": rng.choice(_THINGS), "person": rng.choice(_PERSONS), "place": rng.choice(_PLACES)}
        found.append(Labelled(label, question.format(**words)))
    return found


_NAMES = {
    "English": "Smith Brown Taylor Wilson Johnson Walker Wright Robinson Thompson White Hughes Edwards Green "
    "Hall Wood Harris Clarke Jackson Turner Hill Cooper Ward Morris Moore Baker",
    "German": "Schmidt Schneider Fischer Weber Schulz Becker Hoffmann Schäfer Koch Bauer Richter Klein "
    "Schröder Neumann Schwarz Zimmermann Krüger Hofmann Lange Werner Krause Lehmann Köhler Maier "
    "Vogel",
    "Italian": "Rossi Russo Ferrari Esposito Bianchi Romano Colombo Ricci Marino Greco Bruno Gallo Conti "
    "Mancini Costa Giordano Rizzo Lombardi Moretti Barbieri Fontana Santoro Mariani Rinaldi "
    "Caruso",
    "Japanese": "Sato Suzuki Takahashi Tanaka Watanabe Ito Yamamoto Nakamura Kobayashi Kato Yoshida Yamada "
    "Sasaki Yamaguchi Matsumoto Inoue Kimura Hayashi Shimizu Yamazaki Mori Abe Ikeda Hashimoto "
    "Ishikawa",
    "Polish": "Nowak Kowalski Wiśniewski Wójcik Kowalczyk Kamiński Lewandowski Zieliński Szymański Woźniak "
    "Dąbrowski Kozłowski Jankowski Mazur Wojciechowski Kwiatkowski Krawczyk Kaczmarek Piotrowski "
    "Grabowski Zając Pawłowski Michalski Król Wieczorek",
    "Russian": "Ivanov Smirnov Kuznetsov Popov Vasilyev Petrov Sokolov Mikhailov Novikov Fedorov Morozov "
    "Volkov Alekseyev Lebedev Semyonov Yegorov Pavlov Kozlov Stepanov Nikolayev Orlov Andreyev "
    "Makarov Nikitin Zakharov",
}


def names() -> list[Labelled]:
    """Family names of six languages, 25 each; the label is the language."""
    return [Labelled(language, name) for language, line in _NAMES.items() for name in line.split()]


# Tokens with their tags: a word, or a category of which one is drawn.
_Template = list[tuple[str, str]]


def _tagged(
    n: int, seed: int, templates: list[str], draw: dict[str, Callable[[random.Random], _Template]], other: str
) -> list[Tagged]:
    """Sentences from templates: words in capitals are drawn, others stand for themselves with tag `other`."""
    rng = random.Random(seed)
    sentences = []
    for _ in range(n):
        words: _Template = []
        for word in rng.choice(templates).split():
            words += draw[word](rng) if word in draw else [(word, other)]
        sentences.append(Tagged([word for word, _ in words], [tag for _, tag in words]))
    return sentences


def _entity(kind: str, names: list[str]) -> Callable[[random.Random], _Template]:
    """One of `names`, its words tagged B-kind, I-kind, …"""

    def draw(rng: random.Random) -> _Template:
        words = rng.choice(names).split()
        return [(word, f"{'I' if i else 'B'}-{kind}") for i, word in enumerate(words)]

    return draw


def entities(n: int = 1000, *, seed: int = 0) -> list[Tagged]:
    """Sentences with the names of persons, places and organisations, tagged BIO."""
    first_names = ["Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta"]
    persons = [f"{first} {last.text}" for first in first_names for last in names()]
    places = [*_PLACES, *(f"{new} {place}" for new in ("New", "Upper", "Port") for place in _PLACES)]
    companies = ["Acme", "Globex", "Initech", "Umbra"]
    organisations = [*companies, *(f"{name} {kind}" for name in companies for kind in ("Bank", "Motors"))]
    return _tagged(
        n,
        seed,
        templates=[
            "PERSON visited PLACE yesterday .",
            "PERSON of ORGANISATION met PERSON in PLACE .",
            "shares of ORGANISATION fell in PLACE .",
            "ORGANISATION will open an office in PLACE , says PERSON .",
            "the train to PLACE was late again .",
            "yesterday PERSON left ORGANISATION .",
        ],
        draw={
            "PERSON": _entity("person", [*first_names, *persons]),
            "PLACE": _entity("place", places),
            "ORGANISATION": _entity("organisation", organisations),
        },
        other="O",
    )


def parts_of_speech(n: int = 1000, *, seed: int = 0) -> list[Tagged]:
    """Sentences tagged with universal parts of speech; "light" and "watch" may be several of them."""

    def one_of(tag: str, words: str) -> Callable[[random.Random], _Template]:
        return lambda rng: [(rng.choice(words.split()), tag)]

    return _tagged(
        n,
        seed,
        templates=[
            "DET NOUN VERB DET NOUN .",
            "DET ADJ NOUN VERB DET ADJ NOUN .",
            "PRON VERB DET NOUN ADP DET NOUN .",
            "PRON ADV VERB DET ADJ NOUN .",
            "DET NOUN ADP DET NOUN VERB PRON .",
        ],
        draw={
            "DET": one_of("DET", "the a every this"),
            "NOUN": one_of("NOUN", "dog child teacher light watch garden river song"),
            "VERB": one_of("VERB", "see watch light like hear paint"),
            "ADJ": one_of("ADJ", "small light big green quiet"),
            "PRON": one_of("PRON", "they we you"),
            "ADP": one_of("ADP", "in near behind with"),
            "ADV": one_of("ADV", "often never always"),
        },
        other="PUNCT",
    )


# German noun, its gender, English noun
_PEOPLE = [("Mann", "m", "man"), ("Frau", "f", "woman"), ("Kind", "n", "child"), ("Hund", "m", "dog"),
           ("Katze", "f", "cat"), ("Mädchen", "n", "girl")]  # fmt: skip
_OBJECTS = [("Ball", "m", "ball"), ("Hut", "m", "hat"), ("Blume", "f", "flower"), ("Brücke", "f", "bridge"),
            ("Buch", "n", "book"), ("Haus", "n", "house")]  # fmt: skip
_ARTICLES = {"m": ("ein", "einen"), "f": ("eine", "eine"), "n": ("ein", "ein")}
_ENDINGS = {"m": ("er", "en"), "f": ("e", "e"), "n": ("es", "es")}
_ADJECTIVES = [("klein", "small"), ("jung", "young"), ("alt", "old"), ("rot", "red"), ("schön", "beautiful")]
_VERBS = [("sieht", "sees"), ("malt", "paints"), ("sucht", "seeks"), ("findet", "finds")]
_TIMES = [("heute", "today"), ("jetzt", "now"), ("oft", "often")]


def translations(n: int = 2000, *, seed: int = 0) -> list[Pair]:
    """German sentences and their English translations; an adverb in front turns the German order around.

    "Heute sieht ein junger Mann einen roten Hut ." → "Today a young man sees a red hat ."
    """
    rng = random.Random(seed)

    def phrase(nouns: list[tuple[str, str, str]], case: int) -> tuple[str, str]:
        noun, gender, english_noun = rng.choice(nouns)
        adjective, english_adjective = rng.choice(_ADJECTIVES)
        article, ending = _ARTICLES[gender][case], _ENDINGS[gender][case]
        english_article = "an" if english_adjective == "old" else "a"
        return (
            f"{article} {adjective}{ending} {noun}",
            f"{english_article} {english_adjective} {english_noun}",
        )

    pairs = []
    for _ in range(n):
        subject, english_subject = phrase(_PEOPLE, 0)
        thing, english_thing = phrase(_OBJECTS, 1)
        verb, english_verb = rng.choice(_VERBS)
        german, english = f"{subject} {verb} {thing} .", f"{english_subject} {english_verb} {english_thing} ."
        if rng.random() < 0.4:
            time, english_time = rng.choice(_TIMES)
            german = f"{time} {verb} {subject} {thing} ."
            english = f"{english_time} {english}"
        pairs.append(Pair(german[0].upper() + german[1:], english[0].upper() + english[1:]))
    return pairs


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    if docstring := ast.get_docstring(node):
        yield docstring
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child)


def prose() -> list[Text]:
    """English for word-level models: the standard library's docstrings, those of each top module a text."""
    texts = []
    for text in standard_library():
        if "/" in text.name:
            continue
        if found := "\n".join(_docstrings(ast.parse(text.text))):
            texts.append(Text(text.name, found))
    return texts
