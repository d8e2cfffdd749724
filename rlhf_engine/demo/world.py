"""The facts that the demo's prompts ask about; the wording of answers is in `answers.py`.

Every table is closed, so that the judge can check an answer and a small model can learn the facts.
"""

COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5}
"""Number words that prompts use."""

CATEGORIES: dict[str, tuple[str, list[str]]] = {
    "fruit": ("fruits", ["apple", "pear", "plum", "cherry", "lemon", "peach", "banana", "melon"]),
    "vegetable": ("vegetables", ["carrot", "onion", "potato", "cabbage", "leek", "turnip", "pumpkin", "radish"]),
    "animal": (
        "animals",
        ["ant", "bee", "mouse", "frog", "rabbit", "cat", "dog", "sheep", "cow", "horse", "elephant", "whale"],
    ),
    "bird": ("birds", ["robin", "eagle", "owl", "duck", "swan", "crow", "parrot", "penguin"]),
    "tool": ("tools", ["hammer", "saw", "drill", "spade", "rake", "wrench", "ladder", "brush"]),
    "musical instrument": (
        "musical instruments",
        ["violin", "piano", "flute", "drum", "harp", "guitar", "trumpet", "bell"],
    ),
    "piece of furniture": (
        "pieces of furniture",
        ["table", "chair", "bed", "shelf", "desk", "sofa", "bench", "wardrobe"],
    ),
    "piece of clothing": ("pieces of clothing", ["coat", "hat", "scarf", "shirt", "glove", "boot", "sock", "dress"]),
}
"""Kind of thing -> (its plural, its members)."""

FACTS: dict[str, list[str]] = {
    "apple": ["is a fruit", "grows on a tree", "is red or green", "tastes sweet"],
    "banana": ["is a fruit", "grows in warm countries", "is long and yellow", "tastes sweet"],
    "lemon": ["is a fruit", "grows on a tree", "is small and yellow", "tastes sour"],
    "melon": ["is a fruit", "grows on the ground", "is big and round", "tastes sweet"],
    "carrot": ["is a vegetable", "grows under the ground", "is long and orange", "can be eaten raw"],
    "onion": ["is a vegetable", "grows under the ground", "makes people cry", "is used in soup"],
    "pumpkin": ["is a vegetable", "grows on the ground", "is big and orange", "is used in soup"],
    "cat": ["is an animal", "lives in a house", "hunts mice", "likes to sleep"],
    "cow": ["is an animal", "lives on a farm", "gives milk", "eats grass"],
    "sheep": ["is an animal", "lives on a farm", "gives wool", "eats grass"],
    "frog": ["is an animal", "lives near a pond", "can jump far", "eats flies"],
    "elephant": ["is an animal", "lives in warm countries", "has a long nose", "has big ears"],
    "whale": ["is an animal", "lives in the sea", "breathes air", "is very big"],
    "bee": ["is an animal", "lives in a hive", "makes honey", "likes flowers"],
    "owl": ["is a bird", "lives in the forest", "hunts at night", "has big eyes"],
    "penguin": ["is a bird", "lives in cold countries", "cannot fly", "swims very well"],
    "parrot": ["is a bird", "lives in warm countries", "has bright feathers", "can learn to talk"],
    "swan": ["is a bird", "lives on a lake", "has white feathers", "has a long neck"],
    "hammer": ["is a tool", "has a heavy head", "drives nails into wood", "is held in one hand"],
    "saw": ["is a tool", "has sharp teeth", "cuts wood", "is held in one hand"],
    "spade": ["is a tool", "has a long handle", "digs holes", "is used in the garden"],
    "rake": ["is a tool", "has a long handle", "gathers leaves", "is used in the garden"],
    "ladder": ["is a tool", "has many steps", "helps people reach high places", "leans on a wall"],
    "violin": ["is a musical instrument", "has four strings", "is made of wood", "is played with a bow"],
    "piano": ["is a musical instrument", "has black and white keys", "is very heavy", "is played with ten fingers"],
    "drum": ["is a musical instrument", "has a round shape", "makes a loud sound", "is played with two sticks"],
    "flute": ["is a musical instrument", "has a thin shape", "makes a soft sound", "is played with the breath"],
    "guitar": ["is a musical instrument", "has six strings", "is made of wood", "is played with the fingers"],
    "bed": ["is a piece of furniture", "stands in the bedroom", "has a soft top", "is used for sleeping"],
    "desk": ["is a piece of furniture", "stands in the office", "has a flat top", "is used for writing"],
    "bench": ["is a piece of furniture", "stands in the park", "has a hard seat", "is made of wood"],
    "coat": ["is a piece of clothing", "keeps people warm", "has two sleeves", "is worn in winter"],
    "scarf": ["is a piece of clothing", "keeps people warm", "is long and soft", "is worn around the neck"],
    "boot": ["is a piece of clothing", "keeps feet dry", "is made of leather", "is worn on the foot"],
}
"""Thing -> all facts about it, as verb phrases."""

SIZES = ["ant", "mouse", "rabbit", "cat", "dog", "sheep", "cow", "horse", "elephant", "whale"]
"""Animals from the smallest to the biggest."""

OPPOSITES: list[tuple[str, str]] = [
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("light", "dark"),
    ("early", "late"),
    ("old", "new"),
    ("hard", "soft"),
    ("wet", "dry"),
    ("loud", "quiet"),
    ("happy", "sad"),
    ("full", "empty"),
    ("open", "closed"),
    ("strong", "weak"),
    ("sweet", "sour"),
    ("high", "low"),
    ("clean", "dirty"),
]

PROCEDURES: dict[str, list[str]] = {
    "make tea": ["boil the water", "warm the pot", "pour the water over the leaves", "wait for three minutes"],
    "boil an egg": ["fill a small pan", "put the egg in the pan", "cook it for six minutes", "cool it under the tap"],
    "bake bread": ["mix the flour and the yeast", "knead the dough", "let the dough rise", "bake it for one hour"],
    "plant a tree": ["choose a sunny place", "dig a deep hole", "set the roots in the hole", "water the young tree"],
    "wash the car": ["rinse off the dust", "scrub it with a sponge", "rinse off the soap", "dry it with a cloth"],
    "paint a wall": ["cover the floor", "clean the wall", "roll on the paint", "add a second coat"],
    "clean a window": ["mix water and soap", "wipe the glass", "pull off the water", "polish it with paper"],
    "send a letter": ["write the letter", "fold the paper", "put on a stamp", "take it to the post office"],
    "cook rice": ["rinse the rice", "add two cups of water", "heat it slowly", "let it rest with the lid on"],
    "build a fire": ["gather dry sticks", "stack the sticks", "light some paper", "add a big log"],
    "fix a flat tire": ["take off the wheel", "find the hole", "glue a patch on it", "pump in some air"],
    "wrap a gift": ["measure the box", "cut the paper", "tape the edges", "tie a ribbon around it"],
    "make a salad": ["wash the leaves", "chop the tomatoes", "stir oil and vinegar", "toss the salad"],
    "borrow a book": ["go to the library", "find the right shelf", "show your card", "note the return date"],
}
"""Procedure -> its steps, in order."""

ADVICE: dict[str, list[str]] = {
    "I cannot sleep": ["drink warm milk", "read a quiet story", "turn off the screen", "go to bed earlier"],
    "I feel lonely": ["call an old friend", "join a club", "visit your family", "talk to a neighbor"],
    "I have a cold": ["stay in bed", "eat hot soup", "drink tea with honey", "see a doctor"],
    "I am always late": ["set two alarms", "leave ten minutes sooner", "pack your bag at night", "buy a better watch"],
    "My back hurts": ["stretch in the morning", "sit up straight", "take a warm bath", "lift less weight"],
    "I spend too much money": ["make a budget", "cook at home", "write down every price", "save a little each week"],
    "I forget names": ["repeat the name aloud", "use a notebook", "link the name to a picture", "ask again politely"],
    "My room is messy": ["throw out old things", "use more boxes", "tidy up every day", "fold your clothes"],
    "I am bored": ["learn a new game", "walk in the park", "start a drawing", "listen to music"],
    "My plants are dying": ["give them more light", "change the soil", "water them less", "use a bigger pot"],
    "I have an exam": ["study a little each day", "solve old papers", "take short breaks", "sleep well before it"],
    "I am afraid of dogs": ["start with a small one", "keep a calm voice", "learn how they act", "let it come to you"],
}
"""Trouble -> what may help."""

PEOPLE = ["teacher", "neighbor", "aunt", "doctor", "friend", "grandmother", "boss", "brother"]
GIFTS = ["book", "cake", "flowers", "lamp", "tickets", "advice", "sweater", "letter"]
MISHAPS = [
    "missing the meeting",
    "losing the key",
    "breaking the window",
    "forgetting the birthday",
    "making so much noise",
    "coming so late",
]
EVENTS = ["dinner", "the party", "the concert", "the wedding", "the picnic"]


def article(noun: str) -> str:
    """Return the noun with its indefinite article: "an apple", "a pear"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def kind_of(thing: str) -> str:
    """Return the category of a thing: "plum" -> "fruit"."""
    return next(kind for kind, (_, members) in CATEGORIES.items() if thing in members)
