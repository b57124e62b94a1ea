"""Write the sample data set: nine small CSVs in the form of the real ones, from word lists below.

    python data/sample/generate.py

All sentences are made here, from a fixed seed; none comes from SST, Quora or STS. Scores on this
data show that the program works and compare with nothing else.
"""

import argparse
import csv
import hashlib
import random
from pathlib import Path

SEED = 20230715
ROWS = {"train": 1500, "dev": 300, "test": 300}
LABEL_NOISE = 0.08  # share of labels moved to a neighbour, as human labels differ
HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------- sentiment: 0 (awful) to 4 (great)

WORKS = (
    "this film|the second season|her debut novel|the museum's new wing|their third album|the play|"
    "this little bakery|the remake|his documentary|the video game|the opening concert|the sequel|"
    "this short story|the evening lecture|the puppet show|the courtroom drama|the cooking show|"
    "this travel diary|the radio series|the school musical|the exhibition|the space opera|"
    "the harbour tour|the detective serial|this picture book|the cartoon"
).split("|")
JUDGEMENTS = {  # what each says of a work, worst to best
    0: "is an insult to anyone who stays awake|is unbearable from the first minute|"
    "is a dreadful waste of an evening|made me want to leave at once|is hopelessly broken|"
    "collapses into embarrassing nonsense|is the worst thing I have seen all year|"
    "is painfully stupid and endlessly long|deserves every empty seat|is a complete disaster",
    1: "never quite finds its rhythm|is rather dull in the middle|feels tired and recycled|"
    "leaves most of its ideas unused|is weaker than it should be|drags more often than it moves|"
    "wears out its one joke|is a bit too pleased with itself|could not hold my attention|"
    "is clumsy where it wants to be clever",
    2: "runs for about two hours|is what you would expect from its makers|tells the story in order|"
    "was finished in the spring|has its moments and its gaps|is neither good nor bad|"
    "follows the book closely|takes place in a small town|will please some and bore others|"
    "is longer than the one before",
    3: "is pleasant company for an hour|has more charm than most|is solid and often funny|"
    "rewards a little patience|is better than its poster suggests|holds together nicely|"
    "has a warm and likable cast|finds a fresh angle on an old theme|is well worth a look|"
    "gets the small things right",
    4: "is a marvel from start to finish|moved me to tears of joy|is simply brilliant|"
    "is the best thing I have seen in years|is a triumph of wit and heart|"
    "is unforgettable and perfectly made|deserves every prize there is|took my breath away|"
    "is a masterpiece that I will return to|is dazzling, generous and wise",
}
JUDGEMENTS = {label: text.split("|") for label, text in JUDGEMENTS.items()}
OPENINGS = (
    "||||to my mind,|as far as I can tell,|after all the talk,|for what it is worth,|"
    "on a rainy night,|seen with friends,|my neighbour says that|critics agree that"
).split("|")
CLOSINGS = "|||, all in all|, I must say|, and that is that|, even now|, on the whole".split("|")


def sentiment_row(rng: random.Random) -> tuple[tuple[str], int]:
    label = rng.randrange(5)
    work, opening, closing = rng.choice(WORKS), rng.choice(OPENINGS), rng.choice(CLOSINGS)
    judgement = rng.choice(JUDGEMENTS[label])
    if rng.random() < 0.35 and label != 2:  # "but" turns a sentence towards its second half
        other = min(3, max(1, 4 - label))
        judgement = f"{rng.choice(JUDGEMENTS[other])}, but in the end it {judgement}"
    elif rng.random() < 0.1:
        closing = f' , or as the leaflet has it , "a {rng.choice(("must", "story", "work"))}"'
    sentence = f"{opening} {work} {judgement}{closing}.".strip()
    if rng.random() < LABEL_NOISE:
        label = min(4, max(0, label + rng.choice((-1, 1))))
    return (sentence[0].upper() + sentence[1:],), label


# --------------------------------------------------------------------- paraphrase: 0 no, 1 yes

INTENTS = {  # what is asked -> ways to ask it, for a thing {x}
    "learn": "How can I learn {x}?|What is the best way to learn {x}?|How do I get started with {x}?|"
    "How should a beginner approach {x}?|I want to pick up {x}, where do I begin?",
    "cost": "How much does {x} cost?|What is the price of {x}?|Is {x} expensive?|"
    "How much money do I need for {x}?|What would I have to pay for {x}?",
    "time": "How long does {x} take?|How many hours does {x} need?|Is {x} quick to do?|"
    "How much time should I set aside for {x}?|When will I be done with {x}?",
    "danger": "Is {x} dangerous?|What are the risks of {x}?|Can I get hurt by {x}?|"
    "How safe is {x}?|Which accidents happen during {x}?",
    "history": "Where does {x} come from?|Who invented {x}?|What is the origin of {x}?|"
    "When did people begin with {x}?|What is the history of {x}?",
    "tools": "What equipment does {x} require?|Which tools do I need for {x}?|"
    "What should I buy before {x}?|What gear do people use for {x}?|What must I bring for {x}?",
}
INTENTS = {intent: ways.split("|") for intent, ways in INTENTS.items()}
THINGS = (
    "rock climbing|beekeeping|chess|sourdough baking|sailing|glass blowing|bird watching|fencing|"
    "photography|the violin|calligraphy|scuba diving|wood carving|ballroom dancing|juggling|"
    "cheese making|pottery|archery|origami|horse riding|stargazing|knitting|surfing|sign language|"
    "book binding|mushroom picking|the accordion|ice skating|candle making|long distance running|"
    "home brewing|car repair|magic tricks|kite building|rowing|gardening on a balcony|paragliding|"
    "sushi making|playing the drums|restoring old furniture"
).split("|")
POLITE = "|||||Please tell me: |Quick question: |Does anybody know this? ".split("|")


def paraphrase_row(rng: random.Random) -> tuple[tuple[str, str], int]:
    intent, other_intent = rng.sample(list(INTENTS), 2)
    thing, other_thing = rng.sample(THINGS, 2)
    way, other_way = rng.sample(INTENTS[intent], 2)
    first = way.format(x=thing)
    label = int(rng.random() < 0.4)
    if label:
        second = other_way.format(x=thing)
    elif rng.random() < 0.5:
        second = rng.choice((way, other_way)).format(x=other_thing)
    else:
        second = rng.choice(INTENTS[other_intent]).format(x=thing)
    if rng.random() < LABEL_NOISE / 2:
        label = 1 - label
    return (rng.choice(POLITE) + first, rng.choice(POLITE) + second), label


# ------------------------------------------------- similarity: 0 (unrelated) to 5 (the same)

SLOTS = {  # slot -> (what a change of it costs, groups of words that mean the same)
    "who": (
        1.5,
        "a man/a guy|a woman/a lady|a child/a kid|a dog/a hound|an old sailor/an aged "
        "seaman|a teacher/an instructor|a tourist/a visitor|a chef/a cook|a band/a music "
        "group|a doctor/a physician|a student/a pupil|a cat/a feline|an artist/a painter",
    ),
    "does": (
        1.8,
        "is eating a sandwich/is having a sandwich|is running/is jogging|is reading a newspaper/is "
        "looking through a newspaper|is singing a song/is performing a song|is sleeping/is taking "
        "a nap|is fixing a bicycle/is repairing a bike|is talking on the phone/is making a phone "
        "call|is waiting for a train/is expecting a train|is carrying a box/is lugging a carton|"
        "is watching the rain/is looking at the rain|is playing with a ball/is tossing a ball|"
        "is washing the windows/is cleaning the windows",
    ),
    "where": (
        1.0,
        "in the park/in a public garden|on the beach/at the seaside|in a kitchen/inside a kitchen|"
        "near the station/close to the station|on a bridge/upon a bridge|in front of the church/"
        "outside the church|in a crowded street/on a busy street|beside the river/by the stream|"
        "on the roof/up on the roof|in the library/inside the library",
    ),
    "when": (
        0.7,
        "this morning/early today|at night/after dark|in the winter/during winter|at noon/at midday|"
        "on a Sunday/one Sunday|before breakfast/ahead of breakfast|in the summer/during summer",
    ),
}
SLOTS = {
    slot: (cost, [group.split("/") for group in groups.split("|")])
    for slot, (cost, groups) in SLOTS.items()
}


def similarity_row(rng: random.Random) -> tuple[tuple[str, str], float]:
    first, second, similarity = [], [], 5.0
    change_rate = rng.choice((0.0, 0.25, 0.5, 0.75, 1.0))
    for cost, groups in SLOTS.values():
        group, other = rng.sample(groups, 2)
        first.append(rng.choice(group))
        if rng.random() < change_rate:
            second.append(rng.choice(other))
            similarity -= cost
        else:
            second.append(rng.choice(group))
            similarity -= 0.1 * (second[-1] != first[-1])
    similarity = min(5.0, max(0.0, similarity + rng.gauss(0, 0.2)))
    sentences = (" ".join(parts) + "." for parts in (first, second))
    return tuple(text[0].upper() + text[1:] for text in sentences), round(similarity, 1)


# ------------------------------------------------------------------------------------------ files

FILES = {  # prefix -> (maker of one row, sentence columns, label column)
    "ids-sst": (sentiment_row, ["sentence"], "sentiment"),
    "quora": (paraphrase_row, ["sentence1", "sentence2"], "is_duplicate"),
    "sts": (similarity_row, ["sentence1", "sentence2"], "similarity"),
}


def distinct_rows(prefix: str, count: int) -> list[tuple[tuple[str, ...], float]]:
    """Rows of which no two have the same sentences, so that train tells nothing of dev."""
    rng = random.Random(f"{SEED} {prefix}")
    rows = {}
    while len(rows) < count:
        sentences, label = FILES[prefix][0](rng)
        rows.setdefault(sentences, label)
    return list(rows.items())


def main() -> None:
    argparse.ArgumentParser(description="Write the sample files again, the same ones.").parse_args()
    for prefix, (_, sentence_columns, label_column) in FILES.items():
        rows = iter(distinct_rows(prefix, sum(ROWS.values())))
        for split, count in ROWS.items():
            suffix = "test-student" if split == "test" else split
            labels = [] if split == "test" else [label_column]
            with open(HERE / f"{prefix}-{suffix}.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, delimiter="\t", lineterminator="\n")
                writer.writerow(["", "id", *sentence_columns, *labels])
                for index in range(count):
                    sentences, label = next(rows)
                    id = hashlib.sha256("\t".join((prefix, *sentences)).encode()).hexdigest()[:25]
                    cells = [] if split == "test" else [label]
                    writer.writerow([index, id, *sentences, *cells])


if __name__ == "__main__":
    main()
