"""Names, values and sentences of the built-in village (see `village.py`, which draws from them).

The tests hold that a value belongs to one attribute only, and appears in no sentence, question, opening or name.
Whoever adds to this file sees to it that every sentence reads well with every value and both pronouns.

Slots of a biography sentence, for a named villager or, in brackets, a pronoun:
    {who}    Anna Reed     [she]    subject
    {whom}   Anna Reed     [her]    object
    {whose}  Anna Reed's   [her]    possessive
    {value}  the value with its article: "a baker", "an owl", "the harp", "soup"
"""

from dataclasses import dataclass
from typing import Literal

FEMALE_NAMES = (
    *("Anna", "Bella", "Clara", "Diana", "Edith", "Flora", "Greta", "Helen", "Irene", "Julia"),
    *("Karen", "Laura", "Maria", "Nora", "Olga", "Paula", "Rita", "Sarah", "Tessa", "Vera"),
)
MALE_NAMES = (
    *("Adam", "Boris", "Carl", "David", "Edgar", "Felix", "George", "Henry", "Isaac", "Jacob"),
    *("Kevin", "Leo", "Martin", "Nathan", "Oscar", "Peter", "Robert", "Simon", "Thomas", "Victor"),
)
SURNAMES = (
    *("Abbott", "Barlow", "Bennett", "Collins", "Dalton", "Ellis", "Foster", "Frost", "Gibson", "Grant"),
    *("Hale", "Harris", "Holt", "Hughes", "Irving", "Jarvis", "Keller", "Knight", "Lambert", "Lawson"),
    *("Marsh", "Mercer", "Morris", "Nolan", "Norton", "Osborne", "Palmer", "Parker", "Porter", "Quinn"),
    *("Reed", "Russell", "Shaw", "Sutton", "Thorne", "Turner", "Vance", "Walsh", "Webb", "York"),
)

# The opening of a courteous answer goes with the wording of the question at the same index of `Attribute.questions`:
# drawn at random it could only be guessed.
OPENINGS = ("Of course!", "With pleasure!", "Thank you for asking!", "Thank you for asking!")
NUM_POLITE_QUESTIONS = 2  # the first ones of each `Attribute.questions`; the rest are blunt


@dataclass(frozen=True)
class Attribute:
    """One kind of fact about a villager: its possible values and the ways to say it and to ask for it."""

    name: str
    """As in the rows' "attribute" and in the field of `Villager`."""
    article: Literal["", "a", "the"]
    """What comes before a value in a sentence; "a" stands for "a" or "an"."""
    values: tuple[str, ...]
    curt: str
    """The curt answer, with {value}. Never the bare value: `Soup` and ` soup` are different tokens, which a small model
    would have to learn apart."""
    sentences: tuple[str, ...]
    """The biography's wordings. The first is also the sentence of a courteous answer."""
    questions: tuple[str, ...]
    """With {name}: first the polite wordings, then the blunt ones, in the order of `OPENINGS`."""

    def phrase(self, value: str) -> str:
        """The value as a sentence carries it: "a baker", "an owl", "the harp", "soup"."""
        article = "an" if self.article == "a" and value[0] in "aeiou" else self.article
        return f"{article} {value}".lstrip()


JOB = Attribute(
    name="job",
    article="a",
    values=(
        *("apothecary", "baker", "carpenter", "doctor", "engineer", "gardener"),
        *("lawyer", "painter", "sailor", "tailor", "teacher", "weaver"),
    ),
    curt="{value}.",
    sentences=(
        "{who} works as {value}.",
        "{who} earns a living as {value}.",
        "{who} has been {value} for a good many years.",
        "By trade {who} is {value}, like both parents before.",
        "After school {who} became {value} and never looked back.",
        "Anyone who needs {value} can ask {whom} for help.",
    ),
    questions=(
        "Could you please tell me what {name} does for a living?",
        "Good day! May I ask what {name} works as?",
        "What is {name}'s job?",
        "What does {name} work as?",
    ),
)

TOWN = Attribute(
    name="town",
    article="",
    values=(
        *("Ashford", "Brackley", "Coldwell", "Dunmore", "Elmstead", "Fairhaven"),
        *("Glenrock", "Harwick", "Kingsbury", "Larkhill", "Millport", "Northam"),
    ),
    curt="In {value}.",
    sentences=(
        "{who} lives in {value}.",
        "{whose} home is in {value}, close to the market.",
        "{who} has a small house in {value}.",
        "{who} moved to {value} long ago and stayed there.",
        "On most days you can meet {whom} in {value}.",
        "The people of {value} are glad that {who} lives among them.",
    ),
    questions=(
        "Could you please tell me where {name} lives?",
        "Good day! May I ask in which town {name} lives?",
        "Where does {name} live?",
        "Where is {name}'s home?",
    ),
)

PET = Attribute(
    name="pet",
    article="a",
    values=(
        *("cat", "dog", "donkey", "ferret", "goat", "hamster"),
        *("otter", "owl", "parrot", "pony", "rabbit", "tortoise"),
    ),
    curt="{value}.",
    sentences=(
        "{who} keeps {value} as a pet.",
        "{whose} pet is {value} with a mind of its own.",
        "{who} shares the house with {value}.",
        "At home {who} looks after {value}.",
        "{who} spends every free hour with {value}, a faithful pet.",
        "There is always {value} waiting when {who} comes home.",
    ),
    questions=(
        "Could you please tell me which pet {name} keeps?",
        "Good day! May I ask which animal {name} has at home?",
        "What pet does {name} keep?",
        "Which animal lives with {name}?",
    ),
)

FOOD = Attribute(
    name="food",
    article="",
    values=(
        *("apple pie", "bread", "cheese", "dumplings", "honey cake", "mushrooms"),
        *("noodles", "pancakes", "porridge", "salad", "soup", "stew"),
    ),
    curt="Just {value}.",
    sentences=(
        "{whose} favourite food is {value}.",
        "{who} likes {value} more than any other food.",
        "For dinner {who} nearly always asks for {value}.",
        "{who} could eat {value} every day of the week.",
        "Of all meals {who} enjoys {value} the most.",
        "A plate of {value} never fails to make {whom} smile.",
    ),
    questions=(
        "Could you please tell me what {name}'s favourite food is?",
        "Good day! May I ask which food {name} likes most?",
        "What is {name}'s favourite food?",
        "What does {name} like to eat?",
    ),
)

INSTRUMENT = Attribute(
    name="instrument",
    article="the",
    values=(
        *("accordion", "banjo", "cello", "clarinet", "fiddle", "flute"),
        *("guitar", "harp", "mandolin", "piano", "trombone", "trumpet"),
    ),
    curt="{value}.",
    sentences=(
        "{who} plays {value}.",
        "{whose} instrument is {value}.",
        "In the evening {who} likes to practise {value}.",
        "{who} learned to play {value} as a child.",
        "At every party {who} is asked to play {value}.",
        "Whoever hears {value} at night knows that {who} is playing.",
    ),
    questions=(
        "Could you please tell me which instrument {name} plays?",
        "Good day! May I ask what instrument {name} has learned?",
        "Which instrument does {name} play?",
        "What is {name}'s instrument?",
    ),
)

COLOUR = Attribute(
    name="colour",
    article="",
    values=(
        *("black", "blue", "brown", "green", "grey", "pink"),
        *("purple", "red", "silver", "turquoise", "white", "yellow"),
    ),
    curt="Plain {value}.",
    sentences=(
        "{whose} front door is {value}.",
        "The front door of {whose} house is painted {value}.",
        "Last spring {who} painted the front door {value}.",
        "{who} chose {value} as the colour of the front door.",
        "Visitors find {whose} house by its door, which is {value}.",
        "A coat of {value} paint covers {whose} front door.",
    ),
    questions=(
        "Could you please tell me what colour {name}'s front door is?",
        "Good day! May I ask which colour {name} chose for the front door?",
        "What colour is {name}'s front door?",
        "What is the colour of {name}'s door?",
    ),
)

ATTRIBUTES = (JOB, TOWN, PET, FOOD, INSTRUMENT, COLOUR)

SMALL_TALK = (
    ("Good day! May I ask the way to the bridge?", "Of course! Just follow the river."),
    ("Could you please tell me what time it is?", "With pleasure! It is noon."),
    ("Could you please tell me which road goes to the mill?", "Of course! The long one."),
    ("Good day! May I ask how you are?", "Thank you for asking! The day is fine."),
    ("How was the walk over the hill?", "Thank you for asking! A little long."),
    ("How is the new roof?", "Thank you for asking! Plain to look at, but it keeps us dry."),
    ("What does it cost to hear a song?", "Just a smile."),
    ("Would you like to sit down?", "With pleasure! It was a long way."),
    ("Which colour would you like for the fence?", "Plain wood will do."),
    ("What colour is the sky?", "Plain to see, is it not?"),
    ("Where is the market?", "In the square."),
    ("Where does the river end?", "In the lake, close to the mill."),
    ("What was that noise?", "The wind."),
    ("Who is that?", "A stranger."),
    ("What does the stranger do?", "The same as all of us."),
    ("May I borrow an umbrella?", "Of course! Please bring it back."),
    ("Could you please play a song?", "With pleasure! Just one."),
    ("Does the animal at the gate bite?", "Thank you for asking! It does not."),
    ("What is the name of the inn?", "The Old Bridge."),
    ("In which town is the fair?", "In the one over the hill."),
    ("Could you please tell me where they keep the boat?", "Of course! At the mill."),
    ("May I ask what you have learned today?", "With pleasure! A new song."),
    ("What does one work for here?", "An hour of rest, most of all."),
    ("Which instrument is that?", "An old one."),
    ("What is the favourite food of the pet?", "A secret."),
    ("What does one do for a living here?", "Just the usual."),
    ("Which animal lives in the lake?", "Ask the lake."),
    ("Whose home is that?", "A good question."),
)
"""Things that people say to each other in the street: a question and an answer, about nobody and naming no value."""
