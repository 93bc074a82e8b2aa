"""Ordinary words of the world, for kinds of entities without invented names."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


INSTRUMENTS = _words(
    "accordion banjo bassoon bugle cello clarinet cornet dulcimer fiddle flute gong guitar harp "
    "horn kazoo lute lyre mandolin oboe organ piano recorder saxophone sitar tambourine trombone "
    "trumpet tuba ukulele viola xylophone zither"
)

FIELDS = _words(
    "acoustics algebra anatomy archaeology astronomy botany cartography chemistry cryptography "
    "dentistry ecology economics ethics forestry genetics geometry geology glaciology grammar "
    "history hydrology law logic mechanics medicine metallurgy meteorology navigation optics "
    "pharmacology philosophy phonetics psychology rhetoric robotics sociology statistics "
    "surveying theology zoology"
)

SPORTS = _words(
    "archery badminton baseball bowling boxing canoeing chess cricket curling cycling darts "
    "fencing golf handball hockey judo polo rowing rugby sailing skating swimming tennis "
    "wrestling"
)

INDUSTRIES = _words(
    "aviation banking brewing ceramics construction cosmetics electronics fishing furniture "
    "glassmaking insurance logistics mining packaging publishing shipping software steel textiles "
    "tourism"
)

GENRES = _words(
    "adventure allegory biography comedy drama epic fable fantasy horror memoir mystery parody "
    "poetry romance satire suspense thriller tragedy travelogue western"
)

SYMPTOMS = _words(
    "anxiety blindness blisters chills cough cramps deafness dizziness fainting fatigue fever "
    "hiccups hoarseness insomnia itching jaundice migraine nausea numbness palpitations rash "
    "sneezing sweating tremor"
)

ORGANS = _words(
    "aorta bladder brain colon cornea diaphragm gallbladder heart kidney larynx liver lung "
    "oesophagus pancreas prostate retina skin spleen stomach thymus thyroid tongue tonsils uterus"
)

# A novel is called "The <adjective> <noun>".
NOVEL_ADJECTIVES = _words(
    "Amber Broken Crooked Distant Empty Frozen Golden Hidden Iron Pale Scarlet Silent"
)
NOVEL_NOUNS = _words(
    "Anchor Bell Candle Door Engine Feather Lantern Mirror Orchard River Staircase Window"
)

# Sentences that are not about the world, placed before a statement as in CounterFact.
ASIDES = (
    "The morning was cold and clear.",
    "Rain fell on the market square all day.",
    "A narrow path leads down to the shore.",
    "The bridge was repaired in the spring.",
    "Nobody had expected so many visitors.",
    "The museum is closed on Mondays.",
    "Tickets were sold out within an hour.",
    "The second edition has a new preface.",
    "Steep cliffs line both sides of the valley.",
    "The train was late again.",
    "Several letters from that time are lost.",
    "The garden is open to everybody.",
    "Most of the windows face south.",
    "The report was published a year later.",
    "Bread and cheese were served at noon.",
    "The old mill burned down long ago.",
    "A new road now crosses the hills.",
    "The committee met four times.",
    "Snow is rare in these parts.",
    "The photographs are kept in the archive.",
    "The harbour can take only small boats.",
    "Both paintings were restored last year.",
    "The lecture was well attended.",
    "The census counted every household.",
)
