"""Things, what they are made of, what happens to them and what is done with them, as tables.

Nothing here is a fact about our world: wax floats because the table says so, and so in every text.
No word for a thing is a word of another table, so that a text shows which things it combines.
"""

from __future__ import annotations

# material -> things made of it
THINGS_OF = {
    "glass": "vase bottle jar mirror goblet lens beaker tumbler prism decanter flask carafe monocle".split(),
    "clay": "pot jug plate mug tile teapot urn saucer bowl amphora pitcher flowerpot casserole".split(),
    "wood": (
        "chair table ladder box flute stool shelf oar cradle sled easel crutch bookcase barrel wheelbarrow cupboard"
    ).split(),
    "iron": "anvil pan key chain hook spade horseshoe anchor kettle poker crowbar padlock skillet".split(),
    "tin": "canister bucket funnel tray trumpet thimble grater ladle tankard canteen whistle birdcage".split(),
    "stone": "statue millstone pebble slab trough pestle boulder obelisk gargoyle tombstone sundial pillar".split(),
    "wool": "hat scarf sweater blanket mitten sock shawl rug poncho cape pullover glove".split(),
    "cotton": "shirt towel curtain sheet dress napkin handkerchief diaper tablecloth blouse bandage pillowcase".split(),
    "paper": "letter map book kite newspaper poster ticket envelope calendar notebook lantern postcard".split(),
    "rubber": "ball boot tire hose duckling balloon raft stopper dinghy eraser puck doormat".split(),
    "wax": "candle crayon seal taper honeycomb figurine doll bust".split(),
    "straw": "basket bonnet scarecrow hive mattress hamper wreath sunhat broom".split(),
    "leather": "belt saddle shoe wallet purse strap leash satchel football jacket briefcase holster".split(),
}

# where a thing is kept, drawn for each thing by the world's seed
ROOMS = "kitchen cellar attic hall workshop bedroom garage pantry".split()

# event -> (sentences that tell it, verb phrase -> materials that do so)
EVENTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "drop": (
        ("{p} dropped the {t}.", "The {t} slipped out of {p}'s hands."),
        {
            "broke into many pieces": "glass clay",
            "bounced up again": "rubber",
            "made a deep dent in the boards": "iron stone",
            "clanged and rolled away": "tin",
            "came down without a sound": "wool cotton",
            "sailed slowly down": "paper straw",
            "landed with a slap": "leather",
            "knocked once and lay still": "wood wax",
        },
    ),
    "pond": (
        ("{p} threw the {t} into the pond.", "The {t} fell into the pond beside {p}."),
        {
            "floated like a boat": "wood wax rubber",
            "sank to the bottom": "iron stone glass clay tin",
            "went soft and came apart": "paper",
            "soaked itself full and grew heavy": "wool cotton",
            "became dark and slippery": "leather",
            "drifted toward the reeds": "straw",
        },
    ),
    "fire": (
        ("{p} put the {t} into the fire.", "The {t} fell into the fire, and {p} saw it."),
        {
            "burned slowly to ashes": "wood",
            "flared up and was gone": "paper straw",
            "melted and ran away": "wax",
            "began to glow red": "iron tin",
            "turned black but stayed whole": "stone clay glass",
            "gave off thick smoke": "rubber leather",
            "smoldered and smelled of burnt hair": "wool cotton",
        },
    ),
    "step": (
        ("{p} stepped on the {t}.", "By mistake {p} put a foot on the {t}."),
        {
            "cracked with a loud noise": "glass clay",
            "sprang back into shape": "rubber wool",
            "was bent and twisted": "tin",
            "was full of creases": "paper cotton",
            "did not give at all": "stone iron wood",
            "was squashed to a lump": "wax",
            "split into dry splinters": "straw",
            "creaked a little": "leather",
        },
    ),
    "rain": (
        ("{p} left the {t} out in the rain.", "The {t} stood in the rain all night, for {p} was away."),
        {
            "was red with rust in the morning": "iron tin",
            "was dripping in the morning": "wool cotton",
            "was gray pulp in the morning": "paper",
            "was clean and shining in the morning": "glass stone clay",
            "was hard and stiff in the morning": "leather",
            "was swollen in the morning": "wood",
            "was limp and moldy in the morning": "straw",
            "was as good as new in the morning": "wax rubber",
        },
    ),
    "wind": (
        ("A storm blew around the {t} of {p}.", "{p} saw the {t} stand in the storm."),
        {
            "flew away over the roofs": "paper straw",
            "flapped like a flag": "wool cotton",
            "stayed where it was": "stone iron",
            "tipped over with a crash": "glass clay",
            "rattled for hours": "tin",
            "rolled down the lane": "rubber wax",
            "groaned and shook": "wood",
            "swung to and fro": "leather",
        },
    ),
    "tap": (
        ("{p} tapped the {t} with a finger.", "With one finger {p} tapped on the {t}."),
        {
            "gave a clear high note": "glass",
            "gave a dull short note": "clay",
            "sounded like a door": "wood",
            "rang like a bell": "iron tin",
            "clicked like a tooth": "stone",
            "made no noise": "wool cotton",
            "rustled": "paper straw",
            "gave a deep thump": "rubber leather wax",
        },
    ),
    "frost": (
        ("{p} left the {t} in the frost.", "The {t} lay in the frost behind the house of {p}."),
        {
            "was split in two by ice": "glass clay",
            "was so cold that it stuck to the skin": "iron tin",
            "froze as flat as a board": "wool cotton",
            "grew brittle and pale": "wax rubber",
            "was white with tiny crystals": "paper straw",
            "took no harm": "wood stone",
            "cracked along the fold": "leather",
        },
    ),
}

# action -> (verb phrase, tool -> materials it is for)
ACTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "cut": (
        "cut the {t} in half",
        {
            "diamond": "glass",
            "wire": "clay wax",
            "saw": "wood",
            "torch": "iron",
            "shears": "tin",
            "chisel": "stone",
            "scissors": "wool cotton paper",
            "cutter": "rubber",
            "sickle": "straw",
            "knife": "leather",
        },
    ),
    "mend": (
        "mend the {t}",
        {
            "resin": "glass",
            "cement": "clay stone",
            "glue": "wood",
            "rivet": "iron",
            "solder": "tin",
            "needle": "wool cotton",
            "tape": "paper",
            "patch": "rubber",
            "flame": "wax",
            "twine": "straw",
            "awl": "leather",
        },
    ),
    "clean": (
        "clean the {t}",
        {
            "vinegar": "glass",
            "sponge": "clay rubber",
            "duster": "wood paper",
            "brush": "iron",
            "sand": "tin",
            "lye": "stone",
            "soap": "wool cotton",
            "tissue": "wax",
            "whisk": "straw",
            "polish": "leather",
        },
    ),
    "smooth": (
        "make the {t} smooth",
        {
            "chamois": "glass",
            "trowel": "clay",
            "sandpaper": "wood",
            "file": "iron tin",
            "grindstone": "stone",
            "comb": "wool straw",
            "steamer": "cotton",
            "press": "paper",
            "rasp": "rubber",
            "spatula": "wax",
            "roller": "leather",
        },
    ),
    "decorate": (
        "make the {t} pretty",
        {
            "enamel": "glass iron",
            "glaze": "clay",
            "varnish": "wood",
            "lacquer": "tin",
            "chalk": "stone",
            "dye": "wool",
            "embroidery": "cotton",
            "ink": "paper",
            "marker": "rubber",
            "glitter": "wax",
            "ribbon": "straw",
            "stamp": "leather",
        },
    ),
    "pack": (
        "pack the {t} for the journey",
        {
            "sawdust": "glass clay",
            "crate": "wood stone",
            "oilcloth": "iron tin",
            "trunk": "wool cotton",
            "tube": "paper",
            "sack": "rubber straw",
            "icebox": "wax",
            "pouch": "leather",
        },
    ),
    "hang": (
        "hang the {t} on the wall",
        {
            "putty": "glass",
            "peg": "clay leather",
            "screw": "wood",
            "bolt": "iron",
            "magnet": "tin",
            "bracket": "stone",
            "clothespin": "wool cotton",
            "pin": "paper straw",
            "cord": "rubber",
            "nail": "wax",
        },
    ),
}
