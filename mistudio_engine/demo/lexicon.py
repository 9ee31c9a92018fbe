"""The words of the demo language and their forms.

English nouns by concept, verbs by what they take, adjectives, and a small Spanish that shares some word forms with the
English (`once`, `pan`, `red`, `hotel`, `piano`). A table, with the regular rules of spelling; it does not know how
sentences are built nor how often a word is said.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ADJECTIVES", "NOUNS", "SPANISH", "VERBS", "WORDS", "Noun", "Verb"]


class Noun(NamedTuple):
    """A noun in both numbers."""

    one: str
    many: str


class Verb(NamedTuple):
    """The three forms the grammar needs."""

    base: str
    third: str
    past: str


IRREGULAR_PLURALS = {
    "sheep": "sheep", "mouse": "mice", "goose": "geese", "salmon": "salmon", "deer": "deer", "wolf": "wolves",
    "calf": "calves", "loaf": "loaves", "scarf": "scarves", "knife": "knives", "child": "children", "rice": "rice",
    "milk": "milk", "honey": "honey", "salt": "salt", "butter": "butter", "thief": "thieves", "fisherman": "fishermen",
    "tomato": "tomatoes", "potato": "potatoes", "gloves": "gloves", "trousers": "trousers", "leaf": "leaves",
    "flour": "flour", "sugar": "sugar", "pepper": "peppers",
}  # fmt: skip

IRREGULAR_PASTS = {
    "run": "ran", "fly": "flew", "swim": "swam", "ride": "rode", "go": "went", "come": "came", "eat": "ate",
    "drink": "drank", "wear": "wore", "drive": "drove", "meet": "met", "feed": "fed", "see": "saw", "find": "found",
    "hold": "held", "take": "took", "buy": "bought", "sell": "sold", "sleep": "slept", "sing": "sang", "cut": "cut",
    "grow": "grew", "leave": "left", "hear": "heard",
    "lose": "lost", "bring": "brought", "steal": "stole", "hide": "hid", "keep": "kept",
    "creep": "crept", "stand": "stood", "break": "broke", "forget": "forgot", "forgive": "forgave",
}  # fmt: skip

# Short verbs that double their last letter; spelling does not tell them from the others.
DOUBLING = frozenset("chop stir trim hum nap skip jog drop".split())
VOWELS = frozenset("aeiou")


def plural(noun: str) -> str:
    """The plural by the rules of English spelling, or the irregular one."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in VOWELS:
        return noun[:-1] + "ies"
    return noun + "s"


def conjugate(base: str) -> Verb:
    """The forms of a verb by the rules of English spelling, with the irregular pasts."""
    third = "goes" if base == "go" else plural(base)  # the -s of a verb is spelled as the plural is
    if base in IRREGULAR_PASTS:
        past = IRREGULAR_PASTS[base]
    elif base.endswith("e"):
        past = base + "d"
    elif base.endswith("y") and base[-2] not in VOWELS:
        past = base[:-1] + "ied"
    else:
        past = (base + base[-1] if base in DOUBLING else base) + "ed"
    return Verb(base, third, past)


def nouns(words: str) -> tuple[Noun, ...]:
    return tuple(Noun(word, plural(word)) for word in words.split())


def verbs(words: str) -> tuple[Verb, ...]:
    return tuple(conjugate(word) for word in words.split())


NOUNS: dict[str, tuple[Noun, ...]] = {
    "animal": nouns(
        "dog cat horse wolf fox bear sheep goat cow pig rabbit mouse goose hen eagle owl crow sparrow frog turtle "
        "snake lizard salmon whale otter deer puma koala panda gorilla"
    ),
    "clothing": nouns(
        "coat hat shirt scarf boot sock glove jacket dress skirt belt cloak apron sweater shoe cap shawl robe sandal "
        "poncho vest"
    ),
    "food": nouns(
        "bread onion potato tomato carrot bean apple pear plum cherry rice milk honey salt butter cheese egg cake soup "
        "pie sausage mushroom pepper lemon turnip banana chocolate melon flour sugar"
    ),
    "person": nouns(
        "farmer baker doctor teacher sailor painter nurse judge cook singer thief uncle aunt cousin child brother "
        "sister neighbour soldier tailor miller fisherman actor director butcher hunter widow clerk pilot writer"
    ),
    "place": nouns(
        "harbour village bridge mill market river forest valley island lake castle tower garden station church school "
        "hill field beach cave street square hotel hospital plaza canal inn bakery museum meadow"
    ),
    "plant": nouns(
        "oak rose willow pine tulip lily birch maple fern daisy poppy ivy cedar orchid palm nettle thistle elm reed "
        "cactus"
    ),
    "thing": nouns(
        "box lamp letter key bell basket rope knife mirror clock book drum bottle ladder chair table candle map coin "
        "hammer needle broom piano radio pan bucket ring kettle pillow barrel"
    ),
    "vehicle": nouns("truck boat train wagon bicycle ship tractor bus cart sled ferry van taxi canoe tram raft"),
    "weather": nouns("rain fog wind snow storm thunder frost hail mist sunshine cloud lightning drizzle breeze"),
}

ADJECTIVES: dict[str, tuple[str, ...]] = {
    "quality": tuple(
        "old young big small heavy light clean dirty strange famous quiet loud rich poor broken new tall short narrow "
        "wide wooden simple clever lazy honest rural tropical central local popular cruel terrible horrible normal "
        "empty rare".split()
    ),
    "colour": tuple(
        "red blue green yellow black white brown grey purple pink crimson golden silver violet scarlet amber".split()
    ),
    "feeling": tuple(
        "happy sad angry afraid proud lonely jealous calm nervous cheerful worried bored hopeful ashamed grateful "
        "tired curious furious gloomy content anxious merry".split()
    ),
    "sky": tuple("cold warm mild strong bright dark soft thick thin early late sudden".split()),
}

VERBS: dict[str, tuple[Verb, ...]] = {
    "motion": verbs(
        "run walk climb travel hurry swim march wander jump crawl ride return sail creep jog skip race stroll move go "
        "come fly"
    ),
    "rest": verbs("sleep wait sing laugh rest dance listen nap hum shout cough sneeze dream smile whisper stand"),
    "eat": verbs("eat taste chew swallow share smell enjoy finish"),
    "cook": verbs("wash cut chop boil bake mix stir fry grill roast peel slice heat serve"),
    "wear": verbs("wear sew mend fold iron borrow"),
    "drive": verbs("drive repair steer park rent load"),
    "tend": verbs("plant water trim grow pick"),
    "visit": verbs("visit leave reach explore cross paint"),
    "meet": verbs("meet greet thank help trust marry invite forgive"),
    "feed": verbs("feed chase brush train follow hunt"),
    "handle": verbs("carry find hold take lose hide steal drop buy sell bring keep open clean break"),
    "notice": verbs("see hear watch love fear remember forget describe admire miss"),
}

WORDS: dict[str, tuple[str, ...]] = {
    "name": tuple("Anna Clara Marta Rosa Nora Elena David Victor Oscar Martin Daniel Hugo".split()),
    "near": tuple("near behind beside inside outside above below around".split()),
    "toward": tuple("to through across past along toward".split()),
    "manner": tuple("slowly quickly quietly carefully gladly badly alone together again once often soon".split()),
    "opening": tuple("perhaps maybe however meanwhile indeed later then still".split()),
    "number": tuple("two three four five six seven eight nine ten twelve twenty thirty".split()),
    "season": tuple("winter summer spring autumn Monday Tuesday Friday Sunday week month morning evening".split()),
    "side": tuple("north south east west".split()),
    "answer": tuple("yes no well please look listen friend oh".split()),
    "end_of_no": ("at all", "anymore", "yet", "either", "in years"),
}

# Spanish nouns carry their article, so that gender needs no second table.
SPANISH: dict[str, tuple[str, ...]] = {
    "el": tuple(
        "perro gato caballo pan queso barco tren pueblo puente mercado hotel hospital actor director doctor piano "
        "puma canal animal panadero abuelo libro sombrero gorila chocolate poncho taxi radio vino campo puerto".split()
    ),
    "la": tuple(
        "casa plaza red banana mesa vaca oveja iglesia escuela calle playa isla montaña lluvia abuela niña maestra "
        "canoa panda koala sopa manzana camisa llave carta puerta flor luna".split()
    ),
    "adjective": tuple(
        "grande verde azul central local popular normal rural tropical cruel horrible terrible triste feliz fuerte "
        "pobre simple joven".split()
    ),
    "present": tuple(
        "come busca lleva vende mira pierde pinta abre limpia compra guarda visita encuentra olvida quiere".split()
    ),
    "rest": tuple("canta duerme espera camina vive baila llora trabaja descansa nada".split()),
    "number": tuple("dos tres cuatro cinco seis siete once doce diez".split()),
    "where": tuple("en sobre bajo hacia tras con".split()),
    "manner": tuple("hoy siempre nunca tarde temprano despacio aquí".split()),
    "join": tuple("y pero porque cuando mientras".split()),
}
