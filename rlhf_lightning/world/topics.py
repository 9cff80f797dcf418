"""What is true in the world: topics with facts, each told for beginners and for experts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """A topic with its facts: ``simple[i]`` and ``technical[i]`` say the same to different people."""

    name: str
    simple: tuple[str, ...]
    technical: tuple[str, ...]


_FACTS = """
the moon landing
People first walked on the moon in 1969. | Apollo 11 landed on the lunar surface in July 1969.
A big rocket took three men to the moon. | A Saturn V rocket carried a crew of three into lunar orbit.
The moon walkers brought home rocks. | The lunar crew returned samples of basalt for analysis.
Neil Armstrong was the first man on the moon. | Neil Armstrong commanded the first crewed lunar landing.

rain
Rain falls when clouds get too heavy. | Precipitation occurs when cloud droplets grow too heavy to remain suspended.
Rain is made of tiny drops of water. | Rain drops form as water vapor condenses on small particles.
Plants drink the rain from the ground. | Rain water enters the soil and is absorbed by plant roots.
The sun lifts water up and it comes back as rain. | Solar energy drives evaporation, which later returns as precipitation.

bees
Bees make honey from the juice of flowers. | Bees convert floral nectar into honey by evaporation.
Many bees live together in one hive. | A bee colony contains one queen and thousands of workers.
Bees help flowers to make seeds. | Bees transfer pollen between flowers and enable seed production.
A bee dances to show where flowers are. | Bees communicate the location of nectar by a waggle dance.

volcanoes
A volcano is a mountain with hot rock inside. | A volcano is a vent through which magma reaches the surface.
Hot melted rock comes out of a volcano. | During an eruption a volcano releases lava, ash and gas.
Some volcanoes sleep for a very long time. | A dormant volcano may remain inactive for thousands of years.
There are volcanoes under the sea too. | Most volcanic activity occurs along ridges beneath the ocean.

the heart
Your heart pumps blood all around your body. | The heart circulates blood through arteries and veins.
The heart is a muscle as big as your fist. | The heart is a muscular organ with four chambers.
Your heart beats faster when you run. | Heart rate increases during exercise to supply more oxygen.
The heart never stops to rest. | Cardiac muscle contracts without pause throughout life.

magnets
A magnet pulls things made of iron. | A magnet attracts ferromagnetic materials such as iron.
Every magnet has two ends called poles. | Each magnet has a north pole and a south pole.
Two magnets can push each other away. | Equal poles of two magnets repel each other.
The earth is like one giant magnet. | The earth generates a magnetic field in its liquid core.

the sun
The sun is a very big and hot star. | The sun is a star composed mostly of hydrogen and helium.
The sun gives us light and warmth. | The sun releases energy by nuclear fusion in its core.
The earth goes around the sun once a year. | The earth completes one orbit of the sun in a year.
Sunlight needs eight minutes to reach us. | Solar light travels to the earth in about eight minutes.

whales
Whales are the biggest animals in the sea. | The blue whale is the largest animal known to exist.
Whales must come up to breathe air. | Whales are mammals and breathe air through a blowhole.
A baby whale drinks milk from its mother. | Whale calves are nursed with milk of high fat content.
Whales sing songs under the water. | Whales communicate over great distances by sound of low frequency.

bread
Bread is made from flour and water. | Bread is a baked dough of flour and water.
Yeast makes little bubbles so that bread grows. | Yeast ferments sugar and releases gas, which raises the bread.
Bread is baked in a hot oven. | Baking sets the starch and the proteins of the bread.
The brown skin of bread is called crust. | The crust of bread browns through the Maillard reaction.

glass
Glass is made from melted sand. | Glass is produced by melting silica sand at high temperature.
You can see through glass. | Glass is transparent because it absorbs little visible light.
Glass breaks when it falls down. | Glass is brittle and fractures without bending.
Old glass can be melted and used again. | Glass can be recycled many times without loss of quality.

trains
A train runs on two rails of steel. | A train runs on steel rails with low rolling resistance.
The first trains were pulled by steam. | Early trains were driven by steam engines with coal fires.
Fast trains use electric power. | High speed trains draw electric current from overhead lines.
A train needs a long way to stop. | A train has a long braking distance because of its mass.

teeth
Children have small milk teeth first. | Children have twenty primary teeth before the permanent ones.
Sugar is bad for your teeth. | Bacteria turn sugar into acid, which damages teeth.
The outside of a tooth is very hard. | Tooth enamel is the hardest substance of the body.
You should brush your teeth each day. | Regular brushing of teeth removes plaque from the enamel.

rainbows
A rainbow comes when sun shines on rain. | A rainbow forms when sunlight is refracted in water drops.
A rainbow has many bright colors. | A rainbow shows the spectrum of visible light.
Red is on the outside of a rainbow. | In a rainbow red light is refracted least and lies outside.
You see a rainbow with the sun behind you. | A rainbow appears opposite to the sun at a fixed angle.

spiders
Spiders have eight legs. | Spiders are arachnids with four pairs of legs.
Many spiders catch flies in a web. | Many spiders capture prey with webs of silk proteins.
Spiders are not insects. | Spiders differ from insects by two body segments.
Most spiders do not hurt people. | The venom of most spiders is harmless to humans.

clocks
A clock tells us what time it is. | A clock measures time by counting regular oscillations.
Old clocks have a swinging pendulum. | A pendulum clock keeps time by the period of its swing.
A day on the clock has 24 hours. | The clock divides a day into 24 equal hours.
The best clocks use tiny atoms. | Atomic clocks count the frequency of cesium radiation.

snow
Snow is frozen water from clouds. | Snow consists of ice crystals formed in cold clouds.
Every snow flake has six sides. | Snow crystals have six sides because of the lattice of ice.
Snow looks white and bright. | Snow appears white because it scatters all visible light.
Snow melts when it gets warm. | Snow melts above a temperature of zero degrees Celsius.

elephants
Elephants are the biggest animals on land. | The African elephant is the largest living land mammal.
An elephant drinks with its long trunk. | The elephant trunk contains thousands of muscle bundles.
Elephants live in families led by a mother. | Elephant herds are led by an experienced female.
Elephants flap their ears to stay cool. | Elephant ears release heat through many blood vessels.

gravity
Gravity pulls everything down to the ground. | Gravity is an attractive force between all masses.
Gravity keeps the moon near the earth. | Gravity holds the moon in its orbit around the earth.
You would weigh less on the moon. | Lunar gravity is about one sixth of that on earth.
A heavy and a light ball fall equally fast. | In a vacuum all bodies fall with the same acceleration.

the ocean
The water in the ocean is salty. | Ocean water contains about 35 grams of salt per liter.
The ocean covers most of the earth. | The ocean covers about 71 percent of the earth.
The moon makes the ocean go up and down. | Ocean tides are caused mainly by lunar gravity.
It is dark at the bottom of the ocean. | Sunlight does not penetrate below 1000 meters of ocean.

paper
Paper is made from wood. | Paper is produced from cellulose fibers of wood.
People in China made paper first. | Paper making was developed in China before the year 200.
Old paper can become new paper. | Recycled paper fibers can be used several times.
Paper burns very easily. | Paper ignites at a temperature near 230 degrees Celsius.

dinosaurs
Dinosaurs lived a very long time ago. | Dinosaurs dominated the land during the Mesozoic era.
A big rock from space ended the dinosaurs. | An asteroid impact caused the extinction of most dinosaurs.
Birds are the children of dinosaurs. | Birds are the living descendants of theropod dinosaurs.
We know dinosaurs from bones in stone. | Dinosaurs are studied through fossils in sedimentary rock.

sleep
Your body rests and grows while you sleep. | Growth hormone is released during deep sleep.
You have dreams when you sleep. | Most dreams occur during the REM phase of sleep.
Children need more sleep than adults. | The need for sleep declines from childhood to old age.
Sleep helps you to remember things. | Sleep supports the consolidation of memory.

bicycles
A bicycle has two wheels. | A bicycle is a vehicle with two wheels in line.
You move a bicycle with your feet. | Pedals and a chain transmit power to the bicycle wheel.
A bicycle makes no smoke. | A bicycle produces no emissions during use.
It is easier to balance a fast bicycle. | A moving bicycle is stabilized by steering corrections.

trees
Trees make the air good to breathe. | Trees release oxygen as a product of photosynthesis.
A tree gets one new ring each year. | Annual growth rings record the age of trees.
The roots hold the tree in the ground. | Tree roots provide support and absorb minerals.
Some trees lose their leaves in winter. | Deciduous trees shed their leaves before winter.

the brain
You think with your brain. | The brain processes information in networks of neurons.
The brain is inside your head. | The brain is protected by the skull and by fluid.
Your brain uses a lot of energy. | The brain consumes about 20 percent of the energy at rest.
The brain tells your hands what to do. | The motor cortex of the brain controls movement.

sound
Sound is made when things shake. | Sound is a pressure wave caused by vibration.
There is no sound in empty space. | Sound requires a medium and cannot cross a vacuum.
Sound is slower than light. | Sound travels at about 340 meters per second in air.
Fast shaking makes a high sound. | The frequency of a sound determines its pitch.

salt
Salt makes food taste good. | Salt is the compound sodium chloride.
Salt can come from the sea. | Sea salt is obtained by evaporation of brine.
Salt melts the ice on roads. | Salt lowers the freezing point of water.
Long ago salt kept meat fresh. | Salt preserves food by removing water from microbes.

the eye
Light goes into the eye through a black hole. | Light enters the eye through the pupil.
The eye has a lens like a camera. | The lens of the eye focuses light on the retina.
Tears keep your eyes clean and wet. | Tears lubricate the surface of the eye.
Two eyes show how far things are. | Two eyes provide depth perception through parallax.

ants
Ants are small but very strong. | Ants can lift many times their own body mass.
Ants live in a nest with a queen. | An ant colony is organized around a reproductive queen.
Ants leave a smell to find the way. | Ants mark trails with chemical pheromones.
All ants have six legs. | Ants are insects with three pairs of legs.

bridges
A bridge helps people to cross a river. | A bridge spans an obstacle and carries traffic loads.
Strong ropes of steel hold some bridges. | Suspension bridges carry loads by steel cables in tension.
The oldest bridges are made of stone. | Arch bridges of stone work in compression.
A bridge gets longer in the heat. | Bridges need joints that permit thermal expansion.

deserts
It hardly ever rains in a desert. | A desert receives less than 250 millimeters of rain a year.
A desert is cold at night. | Deserts lose heat quickly at night because the air is dry.
A cactus keeps water for the desert. | Desert plants store water and limit transpiration.
The biggest hot desert is in Africa. | The Sahara is the largest hot desert on earth.

electricity
Electricity makes lamps shine. | Electricity is a flow of electric charge.
Lightning is electricity in the sky. | Lightning is a discharge of atmospheric electricity.
Electricity runs through metal wires. | Metals conduct electricity by mobile electrons.
Wind wheels can make electricity. | Wind turbines convert motion into electricity by induction.
"""


def _topic(block: str) -> Topic:
    name, *facts = block.strip().splitlines()
    simple, technical = zip(*(fact.split(" | ") for fact in facts), strict=True)
    return Topic(name, simple, technical)


TOPICS: tuple[Topic, ...] = tuple(_topic(block) for block in _FACTS.strip().split("\n\n"))
"""Every topic of the world."""
