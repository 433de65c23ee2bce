"""People, animals, jobs, homes, places and the small change of stories, as tables. Things are in `materials`.

Who has what is drawn by seed in `world`. Nothing here is a fact about our world: an otter sleeps where the table
says, and so in every text.
"""

from __future__ import annotations

SHE = (
    "Ada Alma Anna Bella Carla Clara Dora Edith Ella Emma Eva Fiona Flora Greta Hanna Helen Ida Ingrid Iris Jane "
    "Julia Karen Laura Lena Lily Lucy Maria Martha Mary Mira Nora Olga Paula Petra Rosa Ruth Sara Sofia Tilda Tina "
    "Ursula Vera Wanda Wilma Yvonne Zoe"
).split()
HE = (
    "Aaron Adam Albert Anton Arthur Ben Boris Bruno Carl Conrad David Edgar Emil Felix Frank Fred George Gustav Hans "
    "Harry Henry Hugo Ivan Jacob John Jonas Karl Leo Louis Lukas Mark Martin Max Nils Oscar Otto Paul Peter Philip "
    "Ralph Robert Simon Theo Thomas Victor Walter"
).split()

SURNAMES = (
    "Abel Adler Becker Berg Blum Brandt Conti Dahl Diaz Eklund Falk Fischer Garcia Haas Horn Ivanov Jansen Keller "
    "Klein Kraus Lang Lopez Maier Moreau Novak Olsen Patel Quist Reed Rossi Sato Schmid Silva Stern Torres Vogel "
    "Weber Wolff Young Zimmer"
).split()

# animal: sound, food, sleeps in the, covering, young, way of moving
ANIMAL_FACTS = ("sound", "food", "bed", "cover", "young", "gait")
ANIMALS = {
    name: tuple(rest)
    for name, *rest in (
        line.split()
        for line in """
cow moo clover barn hide calf trot
horse neigh oats stable hair foal gallop
sheep bleat grass fold fleece lamb graze
goat grumble thistles shed bristles kid climb
pig grunt acorns sty skin piglet wallow
hen cluck corn coop feathers chick scratch
duck quack snails marsh down drakelet paddle
goose honk barley island quills gosling waddle
cat meow mice cushion fur kitten creep
dog bark bones kennel coat puppy run
rabbit squeak carrots burrow fluff bunny hop
mouse peep cheese wainscot velvet pup scurry
owl hoot voles steeple feathers owlet glide
wolf howl venison den fur cub prowl
bear growl honey cave shag bearling lumber
fox yelp grapes thicket fur kit sneak
frog croak flies ditch slime tadpole leap
snake hiss eggs pit scales snakelet slither
bee buzz nectar blossom fuzz grub hover
lion roar zebras savanna mane whelp stalk
monkey chatter bananas treetop hair infant swing
parrot squawk nuts cage plumes fledgling flutter
turtle sigh lettuce mud shell hatchling crawl
whale sing shrimp deep blubber whalelet dive
donkey bray turnips yard felt colt plod
crow caw worms elm feathers nestling circle
otter chirp herring riverbank pelt cublet slide
hedgehog snort beetles leaves spines hoglet roll
""".strip().splitlines()
    )
}

PETS = "cat dog rabbit parrot goat hen duck donkey turtle pig horse goose".split()

# job: place of work, what is always needed, what people come for, what is worn
JOB_FACTS = ("workplace", "equipment", "product", "clothes")
JOBS = {
    name: tuple(rest)
    for name, *rest in (
        line.split()
        for line in """
baker bakery oven bread cap
butcher slaughterhouse cleaver sausages gauntlets
doctor hospital thermometer pills gown
teacher school blackboard lessons spectacles
farmer farm tractor milk overalls
fisher harbor net trout oilskins
tailor boutique thread suits vest
barber salon razor haircuts smock
smith forge bellows swords visor
painter studio palette portraits beret
gardener nursery rake roses clogs
judge court gavel verdicts robe
librarian library index novels cardigan
miner quarry pickaxe coal helmet
pilot airport compass flights uniform
cook restaurant stove soup toque
""".strip().splitlines()
    )
}

# home: what is seen from the window, heard in the evening, growing at the door, and the usual way to town
HOME_FACTS = ("view", "noise", "plant", "way")
HOMES = {
    name: tuple(rest)
    for name, *rest in (
        line.split()
        for line in """
coast ships waves heather ferry
forest oaks woodpeckers ferns sledge
mountain glaciers avalanches edelweiss cableway
desert dunes sandstorms cacti camel
village chimneys roosters lavender wagon
city towers sirens geraniums tram
river barges rapids willows canoe
meadow herds crickets poppies bicycle
island lighthouses gulls palms sailboat
swamp mists toads lilies punt
valley vineyards echoes orchids train
jungle vines parakeets bamboo elephant
""".strip().splitlines()
    )
}

# what one feels -> what one does about it, and the reason why that helps
STATES = {
    "hungry": ("ate a thick sandwich", "food fills the stomach"),
    "thirsty": ("drank a glass of water", "water ends thirst"),
    "tired": ("went to sleep early", "sleep gives new strength"),
    "cold": ("lit the heater", "heat warms the hands"),
    "hot": ("opened every window", "fresh air cools a room"),
    "wet": ("got dry clothes", "dry clothes take the damp away"),
    "dirty": ("had a long bath", "a bath takes the dirt away"),
    "sick": ("called a nurse", "a nurse knows what helps"),
    "bored": ("started a game of chess", "a game makes time pass"),
    "lost": ("asked a policeman for directions", "a policeman knows every street"),
    "lonely": ("phoned an old friend", "a friend is good company"),
    "late": ("ran without stopping", "running saves time"),
    "poor": ("looked for work", "work brings money"),
    "curious": ("read the encyclopedia", "an encyclopedia explains everything"),
    "afraid": ("turned on all the lights", "light drives fear away"),
    "sleepy": ("brewed strong coffee", "coffee keeps the eyes open"),
    "sad": ("sang a cheerful tune", "a tune lifts the heart"),
    "proud": ("wrote it in a diary", "a diary keeps what matters"),
    "hurt": ("tied a plaster around the knee", "a plaster stops the blood"),
    "thrifty": ("hid the pennies under a floorboard", "hidden pennies are not spent"),
    "muddy": ("scraped both heels at the gate", "scraped heels leave no marks"),
    "nervous": ("breathed in and out ten times", "slow breath steadies the pulse"),
    "forgetful": ("made a knot in the ribbon of the sleeve", "a knot reminds the fingers"),
    "angry": ("counted to a hundred", "counting calms the mind"),
}

# place -> what is there, what one does there
PLACES = {
    "market": ("stalls of fruit", "haggle over melons"),
    "park": ("benches and fountains", "walk under the chestnut trees"),
    "museum": ("bones of dinosaurs", "study the labels"),
    "theater": ("red seats and a stage", "applaud the actors"),
    "station": ("long platforms", "wait for the express"),
    "church": ("candlesticks and an organ", "listen to the choir"),
    "circus": ("clowns and acrobats", "laugh at the clowns"),
    "beach": ("shells and driftwood", "build castles"),
    "zoo": ("cages and keepers", "draw the giraffes"),
    "bank": ("counters and clerks", "change coins"),
    "stadium": ("rows of fans", "cheer for the team"),
    "mill": ("bags of flour", "watch the wheel turn"),
    "garden": ("beds of tulips", "pull out weeds"),
    "castle": ("knights in armor", "climb the spiral stairs"),
    "fair": ("swings and roundabouts", "win a prize"),
    "lake": ("rowboats and swans", "skip flat stones"),
    "orchard": ("plums and cherries", "fill the crates"),
    "cinema": ("a wide white screen", "eat popcorn"),
    "gym": ("ropes and weights", "lift dumbbells"),
    "aquarium": ("sharks behind thick panes", "count the starfish"),
    "courtyard": ("pigeons around a well", "feed the pigeons"),
    "monastery": ("monks with shaved heads", "taste the cider"),
    "dockyard": ("masts and cranes", "guess the names of vessels"),
    "greenhouse": ("lemons and ginger", "sniff the blossoms"),
    "observatory": ("telescopes under a dome", "search for planets"),
    "carnival": ("masks and drums", "dance until midnight"),
    "lighthouse": ("spirals of steps and a huge lamp", "wave to the sailors"),
    "bazaar": ("carpets and spices", "taste dates"),
    "waterfall": ("rainbows in the spray", "sit on mossy rocks"),
    "pharmacy": ("drawers of herbs", "buy cough drops"),
}

INSTRUMENTS = "violin piano guitar cello harp clarinet accordion banjo tuba oboe mandolin bassoon".split()
MONTHS = "January February March April May June July August September October November December".split()
DISHES = (
    "pancakes noodles dumplings lasagna omelets goulash risotto pickles waffles curry meatballs porridge tacos "
    "sauerkraut chowder pudding"
).split()

COLORS = "red blue green yellow white black brown gray pink purple orange silver".split()
SIZES = "big small tiny huge narrow wide heavy light".split()
MOODS = "glad merry jolly calm shy brave clever quiet gentle lively patient polite honest careful grumpy dreamy".split()
WEATHER = (
    "The sun was shining.",
    "It was a cloudy day.",
    "A warm wind came from the south.",
    "Fog lay over the fields.",
    "The sky was clear and bright.",
    "Snow covered the ground.",
    "Thunder rolled in the distance.",
    "The air smelled of spring.",
    "Hail drummed on the gutters.",
    "A rainbow stood over the hills.",
    "Dew glittered on every twig.",
    "Dusk was falling early.",
    "The moon was already up.",
    "Dust whirled along the road.",
)
TIMES = (
    "One morning",
    "One day",
    "Last week",
    "On Monday",
    "On Friday",
    "In summer",
    "In winter",
    "After lunch",
    "Before dinner",
    "Yesterday",
    "In the afternoon",
    "Early in autumn",
)
ENDINGS = (
    "It had been a good day.",
    "Everyone went home happy.",
    "That night the stars were bright.",
    "Nobody ever forgot it.",
    "So the day came to its end.",
    "They promised to meet again soon.",
    "Then the clock struck nine and all was still.",
    "What a strange day that was!",
    "Afterward they sipped cocoa by the hearth.",
    "Grandmother heard the whole tale at supper.",
    "Tomorrow would bring something else.",
    "Neighbors spoke about it for months.",
    "And that is all there is to tell.",
    "Then everybody yawned and said good night.",
)
