"""What is true in the world: topics, and of each a few facts, every fact told simply and technically."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

Register = Literal["simple", "technical"]


@dataclass(frozen=True)
class Topic:
    """A subject and its facts: ``simple[i]`` and ``technical[i]`` tell the same fact in one sentence each."""

    name: str
    simple: tuple[str, ...]
    technical: tuple[str, ...]

    def told(self, register: Register) -> tuple[str, ...]:
        """Return the facts in one register."""
        return self.simple if register == "simple" else self.technical


@dataclass(frozen=True)
class Fact:
    """Where a sentence of the world comes from; the same fact in two registers has the same topic and number."""

    topic: Topic
    number: int
    register: Register


def other(register: Register) -> Register:
    """Return the register that this one is not."""
    return "technical" if register == "simple" else "simple"


@cache
def facts() -> dict[str, Fact]:
    """Return every sentence of the world with the fact that it tells."""
    registers: tuple[Register, Register] = ("simple", "technical")
    return {
        sentence: Fact(topic, number, register)
        for topic in TOPICS
        for register in registers
        for number, sentence in enumerate(topic.told(register))
    }


TOPICS: tuple[Topic, ...] = (
    Topic(
        "the moon landing",
        simple=(
            "Two men walked on the moon in 1969.",
            "Neil Armstrong was the first to step on the moon.",
            "A very big rocket took the men to the moon.",
            "The men took moon rocks back home with them.",
        ),
        technical=(
            "Apollo 11 landed two astronauts on the moon in 1969.",
            "Neil Armstrong was the first human on the lunar surface.",
            "A Saturn V rocket launched Apollo 11 toward the moon.",
            "Apollo 11 returned lunar rock samples to Earth.",
        ),
    ),
    Topic(
        "rain",
        simple=(
            "Rain is water that falls from clouds.",
            "Rain drops grow when tiny drops join together.",
            "Most rain began as water in the sea.",
            "Rain helps plants and trees to grow.",
        ),
        technical=(
            "Rain is liquid precipitation from clouds.",
            "Rain drops grow as cloud droplets collide and merge.",
            "Most rain originates from evaporation of ocean water.",
            "Rain supplies soil water for plant growth.",
        ),
    ),
    Topic(
        "bees",
        simple=(
            "Bees make sweet honey from flowers.",
            "Bees help flowers to make seeds.",
            "Honey bees live together in a big family.",
            "The queen bee lays the eggs of the hive.",
        ),
        technical=(
            "Honey bees convert flower nectar into honey.",
            "Bees transfer pollen and so enable plant reproduction.",
            "A honey bee colony contains thousands of workers.",
            "The queen bee is the main reproductive female.",
        ),
    ),
    Topic(
        "volcanoes",
        simple=(
            "Volcanoes are holes where hot rock comes out.",
            "Hot melted rock from a volcano is called lava.",
            "Volcanoes can throw ash high into the sky.",
            "Most volcanoes stand where big plates of rock meet.",
        ),
        technical=(
            "Volcanoes are vents through which magma reaches the surface.",
            "Volcanic magma at the surface is called lava.",
            "Volcanic eruptions inject ash into the atmosphere.",
            "Most volcanoes lie near tectonic plate boundaries.",
        ),
    ),
    Topic(
        "the heart",
        simple=(
            "The heart pumps blood around the body.",
            "The heart is a strong muscle in the chest.",
            "The heart has four small rooms inside.",
            "The heart beats faster when you run.",
        ),
        technical=(
            "The heart circulates blood through the vascular system.",
            "The heart consists largely of cardiac muscle.",
            "The human heart has two atria and two ventricles.",
            "Physical exercise increases the heart rate.",
        ),
    ),
    Topic(
        "magnets",
        simple=(
            "Magnets can pull things made of iron.",
            "Every magnet has two ends called poles.",
            "Same ends of two magnets push each other away.",
            "A magnet can show you which way is north.",
        ),
        technical=(
            "Magnets attract ferromagnetic metals such as iron.",
            "Every magnet is a dipole with opposite poles.",
            "Like magnetic poles repel and opposite poles attract.",
            "A free magnet aligns with the magnetic field of Earth.",
        ),
    ),
    Topic(
        "the sun",
        simple=(
            "The sun is the closest star of all.",
            "The sun gives us light and heat.",
            "The sun is a huge ball of hot gas.",
            "All the planets go around the sun.",
        ),
        technical=(
            "The sun is the star nearest to Earth.",
            "The sun emits energy as electromagnetic radiation.",
            "The sun consists largely of hydrogen and helium plasma.",
            "The planets orbit the sun under gravity.",
        ),
    ),
    Topic(
        "plants",
        simple=(
            "Plants make their own food from light.",
            "Plants drink water with their roots.",
            "Plants make oxygen that we need to breathe.",
            "Plants are green because of something in their leaves.",
        ),
        technical=(
            "Plants produce sugar from light by photosynthesis.",
            "Plant roots absorb water and minerals from soil.",
            "Plants release oxygen as a product of photosynthesis.",
            "Chlorophyll gives plants their green colour.",
        ),
    ),
    Topic(
        "the lungs",
        simple=(
            "The lungs bring air to the blood.",
            "People have two lungs in the chest.",
            "The left lung is a bit smaller.",
            "A big muscle below the lungs helps you breathe.",
        ),
        technical=(
            "The lungs exchange gases between air and blood.",
            "Humans have two lungs in the thorax.",
            "The left lung has less volume than the right.",
            "The diaphragm contracts to fill the lungs with air.",
        ),
    ),
    Topic(
        "the brain",
        simple=(
            "The brain helps you think and feel.",
            "The brain sends messages through the body.",
            "The bones of the head keep the brain safe.",
            "The brain is made of many tiny cells.",
        ),
        technical=(
            "The brain controls thought and emotion.",
            "The brain transmits electrical signals through nerves.",
            "The skull protects the brain from injury.",
            "The human brain contains billions of neurons.",
        ),
    ),
    Topic(
        "bones",
        simple=(
            "Bones hold the whole body up.",
            "A grown person has 206 bones.",
            "New blood is made inside the bones.",
            "Broken bones can grow together again.",
        ),
        technical=(
            "Bones provide structural support for the body.",
            "The adult human skeleton has 206 bones.",
            "Bone marrow produces red and white blood cells.",
            "Fractured bones heal by growth of new tissue.",
        ),
    ),
    Topic(
        "whales",
        simple=(
            "Whales live in water but breathe air.",
            "Whale babies drink milk from their mother.",
            "The blue whale is the biggest animal of all.",
            "Some whales sing long songs in the sea.",
        ),
        technical=(
            "Whales are marine mammals that breathe air.",
            "Female whales nurse their young with milk.",
            "The blue whale is the largest known animal.",
            "Male humpback whales produce complex songs.",
        ),
    ),
    Topic(
        "sharks",
        simple=(
            "Sharks are fish with no hard bones.",
            "Sharks get new teeth again and again.",
            "Sharks can smell blood in the water.",
            "Sharks breathe in water through their gills.",
        ),
        technical=(
            "Sharks are fish with skeletons of cartilage.",
            "Sharks replace their teeth throughout life.",
            "Sharks detect small amounts of blood in water.",
            "Sharks extract oxygen from water with gills.",
        ),
    ),
    Topic(
        "birds",
        simple=(
            "Birds have soft feathers on their body.",
            "Birds lay eggs that have hard shells.",
            "Many birds fly to warm lands in winter.",
            "Bird bones are light and often full of air.",
        ),
        technical=(
            "Birds are the only living vertebrates with feathers.",
            "Birds lay eggs with shells of calcium carbonate.",
            "Many bird species migrate to warm regions in winter.",
            "Many bird bones are hollow and contain air.",
        ),
    ),
    Topic(
        "spiders",
        simple=(
            "Spiders have eight legs and are not insects.",
            "Spiders make silk inside their body.",
            "Many spiders catch flies in a web.",
            "Most spiders have eight little eyes.",
        ),
        technical=(
            "Spiders are arachnids with eight legs.",
            "Spiders produce silk proteins in special glands.",
            "Many spiders capture insects with silk webs.",
            "Most spider species have four pairs of eyes.",
        ),
    ),
    Topic(
        "dinosaurs",
        simple=(
            "Dinosaurs lived a very long time ago.",
            "A huge rock from space killed most dinosaurs.",
            "Birds come from a family of dinosaurs.",
            "We know dinosaurs from bones in old rock.",
        ),
        technical=(
            "Dinosaurs lived during the Mesozoic era.",
            "An asteroid impact caused the extinction of most dinosaurs.",
            "Modern birds evolved from small theropod dinosaurs.",
            "Dinosaurs are known from fossils in sedimentary rock.",
        ),
    ),
    Topic(
        "snow",
        simple=(
            "Snow is tiny bits of ice from clouds.",
            "Many snow flakes have six little arms.",
            "Snow looks white because it throws back light.",
            "Snow keeps the ground below it warm.",
        ),
        technical=(
            "Snow consists of ice crystals from clouds.",
            "Snow crystals often show hexagonal symmetry.",
            "Snow appears white because it scatters all visible light.",
            "Snow insulates the soil against cold air.",
        ),
    ),
    Topic(
        "glaciers",
        simple=(
            "Glaciers are slow rivers of ice.",
            "Glaciers grow where snow stays for many years.",
            "Glaciers can cut deep valleys into rock.",
            "Most fresh water on Earth is ice in glaciers.",
        ),
        technical=(
            "Glaciers are masses of ice that flow slowly.",
            "Glaciers form where snow accumulates and compacts.",
            "Glacial erosion creates valleys shaped like a U.",
            "Glaciers and ice sheets store most fresh water.",
        ),
    ),
    Topic(
        "earthquakes",
        simple=(
            "Earthquakes shake the ground when rock slips.",
            "Earthquakes send waves through the ground.",
            "People measure earthquakes with a special tool.",
            "Earthquakes under the sea can make huge waves.",
        ),
        technical=(
            "Earthquakes occur when rock slips along a fault.",
            "Earthquakes release energy as seismic waves.",
            "Seismometers record the ground motion of earthquakes.",
            "Submarine earthquakes can generate a tsunami.",
        ),
    ),
    Topic(
        "lightning",
        simple=(
            "Lightning is a giant spark in the sky.",
            "Thunder is the sound that lightning makes.",
            "Lightning is hotter than the face of the sun.",
            "You see lightning before you hear the thunder.",
        ),
        technical=(
            "Lightning is an electrical discharge in the atmosphere.",
            "Rapid heating of air by lightning causes thunder.",
            "Lightning heats air beyond the solar surface temperature.",
            "The light of lightning travels faster than its sound.",
        ),
    ),
    Topic(
        "sound",
        simple=(
            "Sound is a shaking of the air.",
            "Sound cannot move through empty space.",
            "Sound moves faster in water than in air.",
            "Fast shaking makes a high sound.",
        ),
        technical=(
            "Sound is a pressure wave in a medium such as air.",
            "Sound cannot propagate through a vacuum.",
            "Sound has a higher velocity in water than in air.",
            "The frequency of sound determines its pitch.",
        ),
    ),
    Topic(
        "light",
        simple=(
            "Light is the fastest thing there is.",
            "White light is a mix of all colours.",
            "A mirror throws light back to you.",
            "Light bends when it goes into water.",
        ),
        technical=(
            "Nothing travels faster than light in a vacuum.",
            "White light contains all visible wavelengths.",
            "A mirror reflects light at an equal angle.",
            "Light refracts when it enters water.",
        ),
    ),
    Topic(
        "gravity",
        simple=(
            "Gravity makes all things pull on each other.",
            "Gravity keeps the moon near the Earth.",
            "Gravity is weaker on the moon than here.",
            "Without air gravity makes all things fall equally fast.",
        ),
        technical=(
            "Gravity is an attractive force between masses.",
            "Gravity holds the moon in orbit around Earth.",
            "Lunar gravity is about one sixth of Earth gravity.",
            "In a vacuum gravity accelerates all masses equally.",
        ),
    ),
    Topic(
        "electricity",
        simple=(
            "Electricity flows well through metal wires.",
            "Tiny electrons carry electricity through a wire.",
            "Electricity can make light and heat for us.",
            "A battery makes electricity from what is inside.",
        ),
        technical=(
            "Metals conduct electricity with low resistance.",
            "Electrical current in metals is a flow of electrons.",
            "Electrical energy converts into light and heat.",
            "Batteries convert chemical energy into electricity.",
        ),
    ),
    Topic(
        "computers",
        simple=(
            "Computers count with only zero and one.",
            "Computers follow lists of steps called programs.",
            "Computers can do sums very fast.",
            "Computers keep things in their memory.",
        ),
        technical=(
            "Computers represent data in binary digits.",
            "Computers execute instructions stored as programs.",
            "Computers perform billions of operations per second.",
            "Computers store data in electronic memory.",
        ),
    ),
    Topic(
        "the internet",
        simple=(
            "The internet joins computers all over the world.",
            "The internet sends messages in small bits.",
            "Most internet messages between lands go under the sea.",
            "Every computer on the internet has an address.",
        ),
        technical=(
            "The internet connects computer networks around the world.",
            "The internet transmits data in small packets.",
            "Submarine cables carry most international internet traffic.",
            "Every internet device uses an IP address.",
        ),
    ),
    Topic(
        "airplanes",
        simple=(
            "Airplanes fly because air pushes up their wings.",
            "Engines push airplanes through the air.",
            "The Wright brothers flew their airplane in 1903.",
            "The tail helps an airplane to fly straight.",
        ),
        technical=(
            "The wings of airplanes generate aerodynamic lift.",
            "Airplane engines provide thrust against drag.",
            "The Wright brothers achieved powered airplane flight in 1903.",
            "The tail of an airplane provides stability.",
        ),
    ),
    Topic(
        "bread",
        simple=(
            "Bread is made from flour and water.",
            "Yeast makes bread soft and full of holes.",
            "Bread gets a brown crust in a hot oven.",
            "People have made bread for thousands of years.",
        ),
        technical=(
            "Bread dough is a mixture of flour and water.",
            "Yeast fermentation produces gas that raises bread dough.",
            "The Maillard reaction browns the crust of bread.",
            "The oldest bread remains exceed ten thousand years.",
        ),
    ),
    Topic(
        "the pyramids",
        simple=(
            "The pyramids are the graves of old kings.",
            "The great pyramids stand in Egypt.",
            "People built the pyramids with heavy stone blocks.",
            "The great pyramids are over four thousand years old.",
        ),
        technical=(
            "The pyramids served as tombs of Egyptian pharaohs.",
            "The Giza pyramids lie near Cairo in Egypt.",
            "The Giza pyramids consist largely of limestone blocks.",
            "The Giza pyramids date from the Old Kingdom.",
        ),
    ),
    Topic(
        "penguins",
        simple=(
            "Penguins are birds that cannot fly.",
            "Penguins use their wings to swim fast.",
            "Many penguins stand close together to keep warm.",
            "Some penguins keep the egg on their feet.",
        ),
        technical=(
            "Penguins are flightless birds of the southern oceans.",
            "Penguin wings function as flippers in water.",
            "Emperor penguins huddle to reduce heat loss.",
            "Male emperor penguins incubate the egg on their feet.",
        ),
    ),
    Topic(
        "stars",
        simple=(
            "Stars are suns that are very far away.",
            "Stars shine because they are so hot inside.",
            "Blue stars are hotter than red stars.",
            "Big stars can end with a huge bang.",
        ),
        technical=(
            "Stars are distant spheres of hot plasma.",
            "Nuclear fusion in the core powers most stars.",
            "The colour of stars indicates their surface temperature.",
            "Massive stars can explode as a supernova.",
        ),
    ),
    Topic(
        "frogs",
        simple=(
            "Most frogs start life as little tadpoles.",
            "Frogs can breathe through their wet skin.",
            "Most frogs catch flies with a long tongue.",
            "Most frogs lay soft eggs in the water.",
        ),
        technical=(
            "Most frogs develop from tadpoles by metamorphosis.",
            "Frogs absorb oxygen through their moist skin.",
            "Most frogs capture insects with a sticky tongue.",
            "Most frogs deposit eggs with a jelly coat.",
        ),
    ),
)
