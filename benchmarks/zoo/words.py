"""Word lists that the zoo's instances are drawn from.

Knows words, not tasks.
"""

NAMES = (
    "Ann Tom Eva Bob Lea Max Ida Sam Zoe Leo Mia Ben Amy Dan Kim Joe Ella Paul Nina Carl Rosa Hugo Vera Otto "
    "Jane Mark Lucy Adam Sara Eric Tina Ivan Olga Ralf Mona Nils Dora Fred Gina Kurt"
).split()
SURNAMES = (
    "Smith Brown Stone Fisher Baker Carter Cook Hill Wood Young King Miller Taylor Walker Green Hall Clark "
    "Lewis Reed West"
).split()
CITIES = (
    "Paris London Rome Berlin Madrid Oslo Vienna Prague Dublin Athens Lisbon Cairo Tokyo Delhi Lima Quito "
    "Boston Dallas Denver Miami"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
OBJECTS = (
    "apples pens books coins cards shells stamps keys cups plates shirts balls eggs nuts bags boxes".split()
)
HOBBIES = (
    "tennis chess music painting cooking running football swimming reading hiking dancing sailing".split()
)
FOODS = "Thai Greek Indian French Mexican Chinese Turkish Polish Spanish Korean".split()
AREAS = "north south east west centre harbour".split()
PRICES = "low high fair".split()
COLOURS = "Blue Red Green Golden Silver Black White Old".split()
PLACES = "Door Lion Garden Table Bridge Tower Rose Moon Star Horse".split()
ROOMS = "kitchen office bedroom garage garden bathroom".split()
STYLES = "jazz rock folk soul opera disco".split()
FUNCTIONS = "area cost price score speed total weight level rate sum mass tax".split()
VARIABLES = "x y z n k m".split()

COMPARISONS = (
    ("older", "oldest", "youngest"),
    ("taller", "tallest", "shortest"),
    ("faster", "fastest", "slowest"),
    ("richer", "richest", "poorest"),
)

REVIEWED = "soup waiter hotel film room song coffee book game show cake tour".split()
GOOD = "great lovely superb brilliant delightful excellent wonderful perfect".split()
BAD = "awful rude terrible boring dreadful horrible nasty poor".split()
FLAT = "average ordinary usual standard plain typical".split()

TOPICS: dict[str, tuple[tuple[str, str], tuple[str, ...], tuple[str, ...]]] = {
    "sports": (
        ("games", "athletes"),
        ("striker", "goalkeeper", "coach", "runner", "referee"),
        ("scored a goal", "won the final", "lost the match", "broke the record"),
    ),
    "business": (
        ("money", "trade"),
        ("bank", "investor", "company", "shareholder", "merchant"),
        ("raised its profit", "bought shares", "cut the costs", "signed a loan"),
    ),
    "science": (
        ("research", "knowledge"),
        ("chemist", "physicist", "laboratory", "astronomer", "biologist"),
        ("measured the atoms", "found a comet", "tested the theory", "studied the cells"),
    ),
    "travel": (
        ("trips", "roads"),
        ("tourist", "pilot", "guide", "passenger", "camper"),
        ("packed a suitcase", "missed the flight", "toured the castle", "crossed the border"),
    ),
    "food": (
        ("meals", "dishes"),
        ("chef", "baker", "butcher", "farmer", "brewer"),
        ("fried the onions", "baked the bread", "grilled the fish", "cut the cheese"),
    ),
    "music": (
        ("songs", "tunes"),
        ("singer", "drummer", "pianist", "choir", "violinist"),
        ("tuned the strings", "played a concert", "wrote a melody", "recorded an album"),
    ),
}

TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "people": {"name": tuple(NAMES), "city": tuple(CITIES), "hobby": tuple(HOBBIES)},
    "shops": {"area": tuple(AREAS), "food": tuple(FOODS), "city": tuple(CITIES)},
    "events": {"day": tuple(DAYS), "style": tuple(STYLES), "city": tuple(CITIES)},
    "rooms": {"room": tuple(ROOMS), "price": tuple(PRICES), "area": tuple(AREAS)},
}

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_word(number: int) -> str:
    """Spell a number from 0 to 99."""
    if number < 20:
        return _UNITS[number]
    tens = _TENS[number // 10 - 2]
    return tens if number % 10 == 0 else f"{tens} {_UNITS[number % 10]}"
