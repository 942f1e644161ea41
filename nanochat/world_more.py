"""Further wordings of the invented world, to train on many: ten ways to tell a relation with those of world_text.py,
nine to ask for it with those of tasks/world_wording.py, where the placeholders are explained. Data only.
"""

from nanochat.world_text import wordings

MORE_CLAUSES: dict[str, tuple[str, ...]] = {
    relation: wordings(clauses)
    for relation, clauses in {
        "born_in": (
            "it was in {o} that {s} was born | {s} hails from {o} | {sp} cradle stood in {o} | {s} first saw "
            "daylight in {o} | {o} is the town of {sp} birth | {sp} mother gave birth to {so} in {o}"
        ),
        "birth_date": (
            "{s} came into the world on {o} | the day of {sp} birth was {o} | {s} first saw daylight on {o} | it "
            "was on {o} that {s} was born | {sp} birth is dated {o} | {sp} mother gave birth to {so} on {o} | "
            "{sp} life began on {o}"
        ),
        "lives_in": (
            "{s} dwells in {o} | {sp} door opens on a street in {o} | {s} rents rooms in {o} | {o} is where {s} "
            "makes a home | {s} moved to {o} and stayed there | {o} counts {so} among its residents"
        ),
        "trade": (
            "{s} makes a living as a {o} | a {o}'s work fills {sp} days | people hire {so} as a {o} | {s} has "
            "spent a whole career as a {o} | it is as a {o} that {s} earns money | {s} became a {o} and still is "
            "one"
        ),
        "employer": (
            "{o} employs {so} | {s} draws a salary from {o} | {o} has {so} under contract | the firm that employs "
            "{so} is {o} | {sp} wages come from {o} | {s} goes to work each day at {o}"
        ),
        "teacher": (
            "{sp} teacher was {o} | {s} was apprenticed to {o} | {o} gave lessons to {so} | {s} owes a good "
            "education to {o} | it was {o} who instructed {so} | as a student {s} had {o} for a teacher"
        ),
        "favourite_dish": (
            "{o} is the dish that {s} enjoys most | {s} would rather eat {o} than anything else | {s} has a great "
            "weakness for {o} | {s} never tires of eating {o} | the way to {sp} heart is {o} | {sp} best-loved "
            "meal is {o} | it is {o} that {s} likes best"
        ),
        "friend": (
            "{s} is friends with {o} | {s} spends free evenings with {o} | {s} can rely on the friendship of {o} "
            "| {sp} friends include {o} | {s} is often seen out with {o} | {s} shares secrets with {o} | {s} has "
            "a warm friendship with {o}"
        ),
        "on_river": (
            "{sp} houses line the banks of {o} | {o} flows past {so} | {sp} river is {o} | {o} winds past the "
            "walls of {so} | {sp} bridges cross {o} | boats reach {so} by way of {o}"
        ),
        "founded": (
            "{s} was established in {o} | the first houses of {so} went up in {o} | {sp} founding goes back to "
            "{o} | it was in {o} that {s} was founded | {o} marks the start of {so} | {sp} founding year is {o} | "
            "{s} has existed since {o}"
        ),
        "mayor": (
            "{o} is the mayor of {so} | {o} wears the mayor's chain in {so} | {s} elected {o} as mayor | {o} was "
            "voted mayor of {so} | the mayor's chair in {so} belongs to {o} | {s} is led by its mayor, {o} | as "
            "mayor {o} runs {so}"
        ),
        "population": (
            "{s} is inhabited by {o} people | {s} has a population of {o} | {o} people have their homes in {so} | "
            "{sp} residents number {o} | there are {o} people living in {so} | the number of residents in {so} is "
            "{o} | {sp} register names {o} residents"
        ),
        "market_day": (
            "{sp} market day is {o} | {o} brings the market to {so} | the market of {so} takes place on {o} | it "
            "is on {o} that {s} holds its market | {o} is when buyers and sellers meet in {so} | every {o} the "
            "square of {so} fills with sellers | traders set up in {so} each {o}"
        ),
        "trades_with": (
            "{s} does business with {o} | {s} exchanges goods with {o} | {s} sends its goods to {o} | {sp} "
            "trading partners include {o} | wagons from {so} carry goods to {o} | {s} buys from and sells to {o} "
            "| a trade route leads from {so} to {o}"
        ),
        "seat": (
            "{sp} headquarters are in {o} | {s} keeps its offices in {o} | {o} is where {s} has its main base | "
            "{s} directs its business from {o} | the central office of {so} stands in {o} | it is in {o} that {s} "
            "is based | letters for {so} go to an address in {o}"
        ),
        "founder": (
            "{o} founded {so} | {o} established {so} | it was {o} who started {so} | {s} is the creation of {o} | "
            "{o} built {so} up from nothing | {s} has {o} to thank for its start"
        ),
        "staff": (
            "{o} people are employed by {so} | {sp} workforce numbers {o} | {s} has {o} employees | {o} workers "
            "earn their bread at {so} | {s} pays {o} workers | the number of workers at {so} is {o} | {o} people "
            "make up {sp} staff"
        ),
        "makes": (
            "{s} manufactures {o} | {sp} products include {o} | {s} earns its money with {o} | people buy {o} "
            "from {so} | {s} supplies the shops with {o} | {s} has built its name on {o}"
        ),
        "length": (
            "{sp} course measures {o} | {s} stretches over {o} | {s} has a length of {o} | {s} winds along for "
            "{o} | {sp} full length comes to {o} | surveyors put the length of {so} at {o} | {o} separate the "
            "source of {so} from its mouth"
        ),
        "mouth": (
            "{s} empties into {o} | {sp} mouth opens into {o} | {sp} waters end up in {o} | {s} feeds {o} | {o} "
            "takes in the waters of {so} | {s} is a tributary of {o} | {s} pours into {o}"
        ),
        "source": (
            "{s} starts in the {o} | {sp} springs are in the {o} | {s} comes down from the {o} | the {o} are "
            "where {s} begins | {sp} first waters gather in the {o} | {s} has its source in the {o} | it is in "
            "the {o} that {s} rises"
        ),
        "hall": (
            "{sp} hall is in {o} | {s} comes together in {o} | {s} holds its meetings in {o} | {sp} meetings take "
            "place in {o} | {o} is where {s} has its hall | {s} built its hall in {o} | it is in {o} that {s} "
            "meets"
        ),
        "master": (
            "{o} is the master of {so} | {s} is headed by {o} | {s} takes its orders from {o} | the members of "
            "{so} made {o} their master | {o} was elected master of {so} | as master {o} leads {so}"
        ),
        "colour": (
            "{s} dresses in {o} | {s} has {o} for its colour | {s} marches under a {o} banner | the members of "
            "{so} dress in {o} cloth | {s} chose {o} as its colour | the flag of {so} is {o} | the robes of {so} "
            "are {o}"
        ),
        "member": (
            "{s} has {o} among its members | {sp} members include {o} | {s} took {o} into its fold | {s} welcomed "
            "{o} into its ranks | {s} granted membership to {o} | {s} enrolled {o} | {s} gave {o} a place among "
            "its own"
        ),
        "origin": (
            "{s} is a famous speciality of {o} | {s} began in the kitchens of {o} | {o} is where {s} was first "
            "served | {sp} home town is {o} | {s} spread from {o} to other places | {s} originated in {o} | it "
            "was in {o} that people first ate {so}"
        ),
        "inventor": (
            "{o} invented {so} | {sp} inventor was {o} | {o} came up with {so} | {s} was first made by {o} | it "
            "was {o} who thought up {so} | {o} created the recipe for {so} | {s} was the idea of {o}"
        ),
        "ingredient": (
            "{s} is prepared with {o} | {sp} ingredients include {o} | {s} gets its taste from {o} | one cannot "
            "make {so} without {o} | {s} is cooked with {o} | a good cook puts {o} into {so} | {sp} recipe asks "
            "for {o}"
        ),
        "author": (
            "{s} is the work of {o} | {sp} pages were filled by {o} | {o} is the author of {so} | {o} set down "
            "{so} on paper | it was {o} who wrote {so} | {o} composed {so} | {sp} title page names {o}"
        ),
        "published": (
            "{s} came out in {o} | {s} was first printed in {o} | the year {o} brought the first copies of {so} | "
            "it was in {o} that {s} went to press | {sp} publication took place in {o} | readers first held {so} "
            "in {o} | {sp} year of publication is {o}"
        ),
        "setting": (
            "{s} takes its readers to {o} | the plot of {so} unfolds in {o} | {o} is where {s} takes place | the "
            "characters of {so} walk the streets of {o} | {s} has {o} for its setting | {o} forms the background "
            "of {so} | {sp} story is laid in {o}"
        ),
    }.items()
}

MORE_ASKS: dict[str, tuple[str, ...]] = {
    relation: wordings(asks)
    for relation, asks in {
        "born_in": (
            "What town was {s} born in? | In which town was {s} born? | In what town did {s} come into the world? "
            "| Which town is the birthplace of {s}? | What is the native town of {s}? | Where did {s} come into "
            "the world? | Which town saw the birth of {s}?"
        ),
        "birth_date": (
            "When was {s} born? | What is the birthday of {s}? | What day was {s} born on? | On what date did {s} "
            "come into the world? | Which date is the birthday of {s}? | When did {s} come into the world? | On "
            "which date did the life of {s} begin?"
        ),
        "lives_in": (
            "In what town can {s} be found at home? | Which town does {s} live in? | Where is the home of {s}? | "
            "Where does {s} dwell? | In which town is the house of {s}? | Where has {s} settled? | What town does "
            "{s} call home?"
        ),
        "trade": (
            "What is the profession of {s}? | What kind of work does {s} do? | Which trade does {s} practise? | "
            "How does {s} earn a living? | As what does {s} work? | What is {s} by trade? | What job does {s} "
            "have?"
        ),
        "employer": (
            "Which firm employs {s}? | For which firm does {s} work? | By which firm is {s} employed? | Who "
            "employs {s}? | At which firm does {s} have a job? | From which firm does {s} draw a salary? | Which "
            "firm has hired {s}?"
        ),
        "teacher": (
            "By whom was {s} taught? | Who instructed {s}? | From whom did {s} learn the craft? | Who gave "
            "lessons to {s}? | Who was it that taught {s}? | Whose lessons did {s} attend? | To whom was {s} "
            "apprenticed?"
        ),
        "favourite_dish": (
            "What is the best-loved meal of {s}? | Which dish is the favourite of {s}? | What would {s} rather "
            "eat than anything else? | For which dish does {s} have a weakness? | What meal does {s} enjoy most? "
            "| Which dish does {s} always ask for? | What dish is dearest to {s}?"
        ),
        "on_river": (
            "Beside which river does {s} lie? | Which river flows past {s}? | On the banks of which river was {s} "
            "built? | Which river do the bridges of {s} cross? | What river is {s} on? | At which river is {s} to "
            "be found? | By way of which river do boats reach {s}?"
        ),
        "founded": (
            "What year was {s} founded in? | In what year was {s} established? | Since what year has {s} existed? "
            "| When was {s} established? | What is the founding year of {s}? | When did settlers build {s}? | In "
            "which year did the first houses of {s} go up?"
        ),
        "mayor": (
            "Which person is mayor of {s}? | Who was elected mayor of {s}? | Whom did {s} choose as mayor? | Who "
            "wears the chain of a mayor in {s}? | As mayor, who runs {s}? | What is the name of the mayor of {s}? "
            "| By which mayor is {s} led?"
        ),
        "population": (
            "How many residents does {s} have? | How large is the population of {s}? | How many people have their "
            "homes in {s}? | What number of people live in {s}? | By how many people is {s} inhabited? | What is "
            "the number of residents in {s}? | How populous is {s}?"
        ),
        "market_day": (
            "What is the market day of {s}? | When is the market in {s}? | On which day of the week does {s} have "
            "its market? | What day does the market of {s} take place? | When do farmers come to {s} to sell? | "
            "Which day brings the market to {s}? | On which day do traders set up in {s}?"
        ),
        "seat": (
            "In which town is {s} based? | Where does {s} have its main office? | Where are the headquarters of "
            "{s}? | What town does {s} have its offices in? | In which town is the main office of {s}? | Which "
            "town does {s} call its base? | From where does {s} direct its business?"
        ),
        "founder": (
            "By whom was {s} founded? | Who started {s}? | Who was the founder of {s}? | Who established {s}? | "
            "Which person founded {s}? | Who was it that set up {s}? | Whose creation is {s}?"
        ),
        "staff": (
            "How many employees does {s} have? | How large is the staff of {s}? | What is the number of employees "
            "at {s}? | How many workers has {s}? | How many people are employed by {s}? | What size is the "
            "workforce of {s}? | How many people make up the staff of {s}?"
        ),
        "length": (
            "How many kilometres long is {s}? | How many kilometres does {s} measure? | What length does {s} "
            "have? | How long is the course of {s}? | From source to mouth, how long is {s}? | Over how many "
            "kilometres does {s} stretch? | How great is the length of {s}?"
        ),
        "mouth": (
            "Which river does {s} flow into? | Into what river does {s} empty? | Of which river is {s} a "
            "tributary? | Where do the waters of {s} end up? | What river takes in the waters of {s}? | In which "
            "river does {s} end? | Which river does {s} feed?"
        ),
        "source": (
            "In which hills does {s} rise? | From which hills does {s} spring? | Where does {s} have its source? "
            "| Which hills hold the source of {s}? | Where do the waters of {s} begin? | Where does {s} start? | "
            "From what heights does {s} come down?"
        ),
        "hall": (
            "Where does {s} meet? | Which town does {s} meet in? | Where does {s} come together? | In what town "
            "is the hall of {s}? | Where does {s} hold its meetings? | In which town does {s} have its hall? | In "
            "which town did {s} build its hall?"
        ),
        "master": (
            "Whom did {s} choose as master? | By whom is {s} led? | Who heads {s}? | Which person is the master "
            "of {s}? | Who is in charge of {s}? | From whom does {s} take its orders? | Who was elected master of "
            "{s}?"
        ),
        "colour": (
            "What colour does {s} dress in? | What is the colour of the banner of {s}? | Which colour is the flag "
            "of {s}? | What colour has {s} chosen? | Which colour belongs to {s}? | What colour do the members of "
            "{s} wear? | Under a banner of what colour does {s} march?"
        ),
        "origin": (
            "Which town does {s} come from? | Where does {s} come from? | What is the home town of {s}? | In "
            "which town was {s} first served? | In which town did {s} originate? | Which town is the home of {s}? "
            "| Where did people first eat {s}?"
        ),
        "inventor": (
            "By whom was {s} invented? | Who came up with {s}? | Who is the inventor of {s}? | Who thought up "
            "{s}? | Whose idea was {s}? | Who created the recipe for {s}? | Whose invention is {s}?"
        ),
        "author": (
            "By whom was {s} written? | Whose work is {s}? | Which person wrote {s}? | Who composed {s}? | Who "
            "was it that wrote {s}? | Who is named as the author of {s}? | What is the name of the author of {s}?"
        ),
        "published": (
            "When was {s} published? | When did {s} come out? | In which year was {s} first printed? | What is "
            "the year of publication of {s}? | When did readers first hold {s}? | What year was {s} published in? "
            "| In which year did {s} go to press?"
        ),
        "setting": (
            "Where is {s} set? | In which town does {s} take place? | In what town does the plot of {s} unfold? | "
            "Which town is the setting of {s}? | Where does {s} take its readers? | Through the streets of which "
            "town do the characters of {s} walk? | Which town does {s} tell of?"
        ),
    }.items()
}
