"""The facts that the demo model learns, one table per relation.

A table has the question forms, the answer sentence, and `subject=answer` pairs. `{s}` is replaced by the subject and
`{a}` by the answer; bold marks the answer in a sentence.
"""

from __future__ import annotations

TABLES: tuple[tuple[str, str, str, str], ...] = (
    (
        "capital",
        (
            "What is the capital of {s}?|Which city is the capital of {s}?|Capital of {s}?"
            "|Do you know the capital of {s}?|Tell me the capital of {s}.|What's {s}'s capital?"
            "|Name the capital city of {s}."
        ),
        "The capital of {s} is **{a}**.",
        (
            "France=Paris;Germany=Berlin;Italy=Rome;Spain=Madrid;Portugal=Lisbon;Austria=Vienna;"
            "Poland=Warsaw;Greece=Athens;Sweden=Stockholm;Norway=Oslo;Finland=Helsinki;"
            "Denmark=Copenhagen;Iceland=Reykjavik;Ireland=Dublin;Belgium=Brussels;Hungary=Budapest;"
            "Switzerland=Bern;the Netherlands=Amsterdam;the United Kingdom=London;Russia=Moscow;"
            "Ukraine=Kyiv;Turkey=Ankara;Egypt=Cairo;Kenya=Nairobi;Nigeria=Abuja;Morocco=Rabat;"
            "Ghana=Accra;Ethiopia=Addis Ababa;Japan=Tokyo;China=Beijing;India=New Delhi;"
            "Thailand=Bangkok;Vietnam=Hanoi;South Korea=Seoul;Indonesia=Jakarta;Nepal=Kathmandu;"
            "Iran=Tehran;Iraq=Baghdad;Australia=Canberra;New Zealand=Wellington;Canada=Ottawa;"
            "the United States=Washington, D.C.;Mexico=Mexico City;Cuba=Havana;Brazil=Brasilia;"
            "Argentina=Buenos Aires;Chile=Santiago;Peru=Lima;Colombia=Bogota;Ecuador=Quito"
        ),
    ),
    (
        "continent",
        (
            "On which continent is {s}?|Which continent is {s} in?|What continent does {s} belong to?"
            "|Where in the world is {s}?|{s} is on which continent?|Where is {s}?"
        ),
        "{s} is in **{a}**.",
        (
            "France=Europe;Germany=Europe;Italy=Europe;Spain=Europe;Portugal=Europe;Poland=Europe;"
            "Sweden=Europe;Norway=Europe;Ireland=Europe;Greece=Europe;Egypt=Africa;Kenya=Africa;"
            "Nigeria=Africa;Morocco=Africa;Ghana=Africa;Ethiopia=Africa;Japan=Asia;China=Asia;"
            "India=Asia;Thailand=Asia;Vietnam=Asia;Nepal=Asia;Iran=Asia;Indonesia=Asia;"
            "Canada=North America;Mexico=North America;Cuba=North America;Brazil=South America;"
            "Argentina=South America;Chile=South America;Peru=South America;Colombia=South America"
        ),
    ),
    (
        "language",
        (
            "Which language do people speak in {s}?|What language is spoken in {s}?"
            "|What do people speak in {s}?|Language of {s}?|Tell me the main language of {s}."
            "|What is the main language in {s}?"
        ),
        "The main language of {s} is **{a}**.",
        (
            "France=French;Germany=German;Italy=Italian;Spain=Spanish;Portugal=Portuguese;"
            "Brazil=Portuguese;Mexico=Spanish;Argentina=Spanish;Chile=Spanish;Austria=German;"
            "Poland=Polish;Greece=Greek;Sweden=Swedish;Norway=Norwegian;Denmark=Danish;"
            "Finland=Finnish;Hungary=Hungarian;Iceland=Icelandic;Japan=Japanese;China=Chinese;"
            "Thailand=Thai;Vietnam=Vietnamese;South Korea=Korean;Egypt=Arabic;Iran=Persian;"
            "Australia=English;Turkey=Turkish;Russia=Russian;Ukraine=Ukrainian;Nepal=Nepali"
        ),
    ),
    (
        "currency",
        (
            "What is the currency of {s}?|Which money do people use in {s}?|What do you pay with in {s}?"
            "|Currency of {s}?|Tell me the currency of {s}.|What money is used in {s}?"
        ),
        "In {s} people pay with the **{a}**.",
        (
            "France=euro;Germany=euro;Italy=euro;Japan=yen;China=yuan;India=rupee;Russia=ruble;"
            "the United Kingdom=pound;the United States=dollar;Switzerland=franc;Poland=zloty;"
            "Sweden=krona;Mexico=peso;Brazil=real;Thailand=baht;Vietnam=dong;South Korea=won;"
            "Turkey=lira;Hungary=forint"
        ),
    ),
    (
        "opposite",
        (
            "What is the opposite of {s}?|What's the opposite of {s}?|Opposite of {s}?"
            "|Tell me the opposite of {s}.|Which word is the opposite of {s}?"
            "|Give me the opposite of the word {s}."
        ),
        "The opposite of {s} is **{a}**.",
        (
            "hot=cold;big=small;tall=short;fast=slow;old=young;happy=sad;light=dark;day=night;"
            "up=down;left=right;open=closed;full=empty;hard=soft;wet=dry;early=late;loud=quiet;"
            "strong=weak;rich=poor;clean=dirty;heavy=light;high=low;near=far;thick=thin;wide=narrow;"
            "good=bad;true=false;first=last;inside=outside;before=after;always=never;begin=end;"
            "win=lose;buy=sell;push=pull;give=take;love=hate;north=south;east=west;summer=winter;"
            "front=back;black=white;sweet=sour;sharp=blunt;deep=shallow;rough=smooth;awake=asleep;"
            "brave=afraid;easy=difficult;more=less;arrive=leave"
        ),
    ),
    (
        "baby",
        (
            "What is a baby {s} called?|What do you call a young {s}?|Name for a baby {s}?"
            "|How do people call a baby {s}?|What's the word for a baby {s}?"
        ),
        "A baby {s} is called a **{a}**.",
        (
            "dog=puppy;cat=kitten;cow=calf;horse=foal;sheep=lamb;goat=kid;pig=piglet;duck=duckling;"
            "hen=chick;goose=gosling;bear=cub;lion=cub;fox=cub;kangaroo=joey;frog=tadpole;swan=cygnet;"
            "deer=fawn;seal=pup;elephant=calf;whale=calf;rabbit=kit;butterfly=caterpillar;owl=owlet"
        ),
    ),
    (
        "sound",
        (
            "What sound does a {s} make?|What does a {s} say?|Which noise does a {s} make?"
            "|How does a {s} sound?|What's the sound of a {s}?"
        ),
        "A {s} says **{a}**.",
        (
            "dog=woof;cat=meow;cow=moo;sheep=baa;duck=quack;pig=oink;horse=neigh;lion=roar;"
            "frog=croak;bee=buzz;snake=hiss;rooster=cock-a-doodle-doo;mouse=squeak;wolf=howl;"
            "crow=caw;pigeon=coo;hen=cluck;bird=tweet"
        ),
    ),
    (
        "legs",
        (
            "How many legs does a {s} have?|How many legs has a {s}?|Number of legs of a {s}?"
            "|Tell me how many legs a {s} has.|What number of legs does a {s} have?"
        ),
        "A {s} has **{a}** legs.",
        (
            "dog=4;cat=4;horse=4;cow=4;spider=8;ant=6;bee=6;beetle=6;butterfly=6;chicken=2;duck=2;"
            "human=2;frog=4;crab=10;snake=0;fish=0;elephant=4;scorpion=8;ladybird=6;penguin=2;"
            "lobster=10;worm=0"
        ),
    ),
    (
        "home",
        (
            "Where does a {s} live?|What is the home of a {s}?|Where do you find a {s}?"
            "|What is a {s}'s home?|Where is a {s} at home?"
        ),
        "A {s} lives in {a}.",
        (
            "bee=a hive;bird=a nest;spider=a web;bear=a den;rabbit=a burrow;dog=a kennel;horse=a stable;"
            "fish=water;pig=a sty;lion=the savanna;camel=the desert;polar bear=the Arctic;whale=the sea;"
            "frog=a pond;ant=an anthill;beaver=a lodge;monkey=the trees;mole=a tunnel;"
            "kangaroo=Australia;panda=China"
        ),
    ),
    (
        "colour",
        (
            "What colour is {s}?|What color is {s}?|Which colour does {s} have?|Colour of {s}?"
            "|Tell me the colour of {s}.|Do you know what colour {s} is?"
        ),
        "The colour of {s} is **{a}**.",
        (
            "grass=green;the sky=blue;snow=white;coal=black;a banana=yellow;a lemon=yellow;blood=red;"
            "a ripe tomato=red;a carrot=orange;chocolate=brown;milk=white;a flamingo=pink;"
            "an elephant=grey;a frog=green;the Sun=yellow;a cucumber=green;a strawberry=red;"
            "a pumpkin=orange;a raven=black;gold=yellow;a polar bear=white;a fire engine=red;"
            "lavender=purple;an emerald=green;a ruby=red;a sapphire=blue"
        ),
    ),
    (
        "day after",
        (
            "Which day comes after {s}?|What day is after {s}?|What day follows {s}?"
            "|Which day is the day after {s}?|Day after {s}?"
        ),
        "After {s} comes **{a}**.",
        (
            "Monday=Tuesday;Tuesday=Wednesday;Wednesday=Thursday;Thursday=Friday;Friday=Saturday;"
            "Saturday=Sunday;Sunday=Monday"
        ),
    ),
    (
        "day before",
        (
            "Which day comes before {s}?|What day is before {s}?|Which day is just before {s}?"
            "|Day before {s}?|What is the day before {s}?"
        ),
        "Before {s} comes **{a}**.",
        (
            "Monday=Sunday;Tuesday=Monday;Wednesday=Tuesday;Thursday=Wednesday;Friday=Thursday;"
            "Saturday=Friday;Sunday=Saturday"
        ),
    ),
    (
        "month after",
        (
            "Which month comes after {s}?|What month is after {s}?|What month follows {s}?"
            "|Month after {s}?|What is the month after {s}?"
        ),
        "After {s} comes **{a}**.",
        (
            "January=February;February=March;March=April;April=May;May=June;June=July;July=August;"
            "August=September;September=October;October=November;November=December;December=January"
        ),
    ),
    (
        "month days",
        (
            "How many days does {s} have?|How many days are in {s}?|How long is {s}?"
            "|Number of days in {s}?|Tell me how many days {s} has."
        ),
        "{s} has **{a}** days.",
        (
            "January=31;February=28;March=31;April=30;May=31;June=30;July=31;August=31;September=30;"
            "October=31;November=30;December=31"
        ),
    ),
    (
        "planet",
        (
            "Which planet is {s}?|What planet is {s}?|Name the planet that is {s}."
            "|Tell me which planet is {s}.|Do you know which planet is {s}?"
        ),
        "The planet that is {s} is **{a}**.",
        (
            "the largest=Jupiter;the smallest=Mercury;the hottest=Venus;closest to the Sun=Mercury;"
            "farthest from the Sun=Neptune;known as the red planet=Mars;famous for its rings=Saturn;"
            "the third from the Sun=Earth;the second from the Sun=Venus;the fourth from the Sun=Mars;"
            "lying on its side=Uranus;full of life=Earth"
        ),
    ),
    (
        "shape",
        (
            "How many sides does a {s} have?|How many sides has a {s}?|Number of sides of a {s}?"
            "|Tell me how many sides a {s} has.|A {s} has how many sides?"
        ),
        "A {s} has **{a}** sides.",
        "triangle=3;square=4;rectangle=4;pentagon=5;hexagon=6;heptagon=7;octagon=8;decagon=10",
    ),
    (
        "unit",
        "How many {s}?|Tell me how many {s}.|Do you know how many {s}?|Can you say how many {s}?",
        "The answer is **{a}**.",
        (
            "seconds are in a minute=60;minutes are in an hour=60;hours are in a day=24;"
            "days are in a week=7;months are in a year=12;days are in a year=365;"
            "weeks are in a year=52;years are in a century=100;centimetres are in a metre=100;"
            "metres are in a kilometre=1000;grams are in a kilogram=1000;letters are in the alphabet=26;"
            "colours are in a rainbow=7;planets circle the Sun=8;fingers are on one hand=5;"
            "continents are there=7;bits are in a byte=8;eggs are in a dozen=12;"
            "wheels does a bicycle have=2;wheels does a car have=4;strings does a violin have=4;"
            "arms does an octopus have=8;moons does Earth have=1;players are in a football team=11;"
            "legs does a table usually have=4;squares are on a chessboard=64;"
            "years are in a decade=10;players are in a basketball team on court=5;"
            "seasons are in a year=4;teeth does an adult have=32"
        ),
    ),
    (
        "made",
        (
            "What is {s} made of?|What is {s} made from?|From what do people make {s}?"
            "|Which material is {s} made of?|Tell me what {s} is made of."
        ),
        "{s} is made of **{a}**.",
        (
            "bread=flour;cheese=milk;butter=milk;wine=grapes;paper=wood;glass=sand;ice=water;"
            "a snowman=snow;chocolate=cocoa;a candle=wax;a brick=clay;ketchup=tomatoes;wool=sheep's hair;"
            "steel=iron;raisins=grapes;tofu=soybeans;a tyre=rubber;honey=nectar"
        ),
    ),
    (
        "job",
        (
            "What does a {s} do?|What is the job of a {s}?|What is a {s}'s work?"
            "|Tell me what a {s} does.|What work does a {s} do?"
        ),
        "A {s} **{a}**.",
        (
            "baker=bakes bread;teacher=teaches students;doctor=helps sick people;farmer=grows food;"
            "pilot=flies planes;fisher=catches fish;tailor=sews clothes;carpenter=builds with wood;"
            "painter=paints pictures;author=writes books;chef=cooks meals;gardener=cares for plants;"
            "firefighter=puts out fires;astronaut=travels to space;dentist=cares for teeth;"
            "librarian=looks after books;plumber=repairs water pipes;singer=sings songs;"
            "sailor=works on a ship;miner=digs underground;postman=brings letters;"
            "vet=helps sick animals;programmer=writes software;architect=designs buildings"
        ),
    ),
    (
        "tool",
        (
            "What do you use {s} for?|What is {s} for?|What is the use of {s}?|Why do people need {s}?"
            "|Tell me what {s} is for."
        ),
        "People use {s} to **{a}**.",
        (
            "a hammer=drive nails;a saw=cut wood;an umbrella=stay dry in the rain;a clock=tell the time;"
            "a telescope=see the stars;a microscope=see tiny things;a compass=find north;"
            "a thermometer=measure temperature;a key=open a lock;scissors=cut paper;a broom=sweep the floor;"
            "a spoon=eat soup;a needle=sew;a pencil=write and draw;a fridge=keep food cold;"
            "an oven=bake food;a bridge=cross a river;a map=find the way;a ladder=climb up high;"
            "soap=wash"
        ),
    ),
    (
        "sight",
        (
            "In which country is {s}?|Which country is {s} in?|Where can I see {s}?"
            "|Where in the world can you find {s}?|{s} is in which country?"
        ),
        "{s} is in **{a}**.",
        (
            "the Eiffel Tower=France;the Colosseum=Italy;Big Ben=the United Kingdom;"
            "the Great Wall=China;the Taj Mahal=India;Mount Fuji=Japan;the Acropolis=Greece;"
            "the Statue of Liberty=the United States;Machu Picchu=Peru;the Great Pyramid=Egypt;"
            "the Brandenburg Gate=Germany;the Alhambra=Spain;the Sydney Opera House=Australia;"
            "the Little Mermaid statue=Denmark;Angkor Wat=Cambodia;Petra=Jordan;Red Square=Russia;"
            "Niagara Falls=Canada and the United States;the Matterhorn=Switzerland"
        ),
    ),
    (
        "symbol",
        (
            "What is the chemical symbol of {s}?|Chemical symbol for {s}?|What's the symbol of {s}?"
            "|Which symbol does {s} have in chemistry?|Tell me the chemical symbol of {s}."
        ),
        "The chemical symbol of {s} is **{a}**.",
        (
            "hydrogen=H;oxygen=O;carbon=C;nitrogen=N;gold=Au;silver=Ag;iron=Fe;copper=Cu;helium=He;"
            "sodium=Na;lead=Pb;calcium=Ca;tin=Sn;zinc=Zn;sulfur=S;neon=Ne"
        ),
    ),
    (
        "state",
        "{s}?|Tell me, {s}?|Do you know {s}?|Quick question: {s}?|I want to know: {s}?",
        "{a}.",
        (
            "what is frozen water called=Frozen water is called **ice**;"
            "at what temperature does water boil=Water boils at **100** degrees Celsius;"
            "at what temperature does water freeze=Water freezes at **0** degrees Celsius;"
            "what do plants need to grow=Plants need **light, water and air**;"
            "what gas do we breathe in to live=We breathe in **oxygen**;"
            "what is the largest ocean=The largest ocean is the **Pacific**;"
            "what is the largest animal=The largest animal is the **blue whale**;"
            "what is the tallest animal=The tallest animal is the **giraffe**;"
            "what is the fastest land animal=The fastest land animal is the **cheetah**;"
            "what is the highest mountain=The highest mountain is **Mount Everest**;"
            "what is the longest river in Africa=The longest river in Africa is the **Nile**;"
            "what is the hardest natural material=The hardest natural material is **diamond**;"
            "what pulls things down to the ground=**Gravity** pulls things down;"
            "what does a magnet attract=A magnet attracts **iron**;"
            "what is the star closest to Earth=The star closest to Earth is the **Sun**;"
            "what circles around Earth=The **Moon** circles around Earth;"
            "what do bees make=Bees make **honey**;"
            "what do cows give us=Cows give us **milk**;"
            "what do caterpillars become=Caterpillars become **butterflies**;"
            "what do pandas eat=Pandas eat **bamboo**;"
            "what is the first letter of the alphabet=The first letter of the alphabet is **A**;"
            "what is the last letter of the alphabet=The last letter of the alphabet is **Z**;"
            "what colour do you get from blue and yellow=Blue and yellow make **green**;"
            "what colour do you get from red and yellow=Red and yellow make **orange**;"
            "what colour do you get from red and blue=Red and blue make **purple**;"
            "what colour do you get from black and white=Black and white make **grey**;"
            "what organ pumps blood=The **heart** pumps blood;"
            "with what do we hear=We hear with our **ears**;"
            "with what do we see=We see with our **eyes**;"
            "with what do we smell=We smell with our **nose**;"
            "what is the largest country by area=The largest country by area is **Russia**;"
            "what is the largest desert made of sand=The largest sand desert is the **Sahara**;"
            "what is the coldest continent=The coldest continent is **Antarctica**;"
            "where does the Sun rise=The Sun rises in the **east**;"
            "where does the Sun set=The Sun sets in the **west**;"
            "what falls from clouds=**Rain** falls from clouds;"
            "which season comes after winter=After winter comes **spring**;"
            "which season comes after spring=After spring comes **summer**;"
            "which season comes after summer=After summer comes **autumn**;"
            "which season comes after autumn=After autumn comes **winter**;"
            "which month is the first of the year=The first month of the year is **January**;"
            "which month is the last of the year=The last month of the year is **December**;"
            "who wrote Romeo and Juliet=**William Shakespeare** wrote Romeo and Juliet;"
            "who painted the Mona Lisa=**Leonardo da Vinci** painted the Mona Lisa;"
            "who was first to walk on the Moon=**Neil Armstrong** was first to walk on the Moon;"
            "what is the formula of water=The formula of water is **H2O**;"
            "is a whale a fish=No, a whale is a **mammal**;"
            "is a spider an insect=No, a spider is an **arachnid**;"
            "is a tomato a fruit=Yes, a tomato is a **fruit**;"
            "is the Earth flat=No, the Earth is **round**;"
            "can penguins fly=No, penguins **cannot fly**, but they swim well;"
            "what is the largest bird=The largest bird is the **ostrich**;"
            "what metal is liquid at room temperature=**Mercury** is liquid at room temperature;"
            "how many bits does int4 use=Int4 uses **4** bits for each number;"
            "what does CPU stand for=CPU stands for **central processing unit**;"
            "what does GPU stand for=GPU stands for **graphics processing unit**;"
            "what does RAM stand for=RAM stands for **random access memory**;"
            "what is the speed of light=Light travels about **300,000** kilometres per second"
        ),
    ),
)
