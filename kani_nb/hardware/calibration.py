"""The texts that GPTQ fits its 4-bit weights to when nobody gives others: short passages of different kinds.

Written for this package, so that nothing has to be downloaded, and different from the texts that schemes are compared
on (`metrics.passages`): a model must not be judged on what it was fitted to. Texts of the kind that a model will be
used for are better than these; about 2,000 tokens of anything varied are most of what can be had.
"""

from __future__ import annotations

_PROSE = (
    """\
The lighthouse keeper had not spoken to anyone for nine days when the boat came. He heard the engine long before he \
saw it, a thin, uneven sound that the wind carried up the cliff and took away again. He put the kettle on, because \
that was what one did, and then stood in the doorway with his hands in his sleeves. The girl who climbed the path \
carried a box of oranges and a letter with a black edge. "You are Anselm," she said. It was not a question.""",
    """\
A glacier is a river that takes its time. Snow that falls on the upper slopes is pressed into ice by the snow of later \
years, and under its own weight the ice begins to creep downhill, a few centimetres on most days and several metres on \
some. Where the valley bends, the surface cracks into crevasses; where two glaciers meet, the rubble from their sides \
forms a dark stripe that can be followed for kilometres. At the lower end the ice melts as fast as it arrives, and the \
stones it carried are left behind in long ridges called moraines.""",
    """\
In 1854 a doctor in London marked every death from cholera on a map of his district. The marks crowded around a single \
water pump. He had no microscope that could show the cause and no theory that his colleagues accepted, but he had the \
map, and he persuaded the parish to take the handle off the pump. The outbreak was already fading; what lasted was the \
method. To count, to draw, to ask why one street suffers and the next does not is still how epidemics are traced.""",
    """\
Heat the oven to 200 degrees. Cut the pumpkin into pieces of about three centimetres, toss them with some olive oil, \
salt and a little smoked paprika, and roast them for half an hour, turning once. Meanwhile fry one chopped onion until \
it is soft, add the rice and stir until it looks like glass, then pour in the hot stock one ladle at a time. When the \
rice is tender but not yet soft, fold in the pumpkin and a handful of grated cheese. Serve at once.""",
    """\
The council voted on Tuesday evening to close the old bridge to cars from the first of May. Nineteen members were in \
favour, eleven against, and two were absent. Engineers had reported in January that the northern pier was moving by \
almost two millimetres a year. Shop owners on the east bank fear for their trade; the mayor promised a shuttle bus \
every ten minutes and said that work on a new crossing would begin "within this decade, if the money can be found".""",
    """\
Suppose that a and b are whole numbers whose product is 36 and whose sum is 13. Then b = 13 - a, so a(13 - a) = 36, \
which is the same as a^2 - 13a + 36 = 0. The left side factors into (a - 4)(a - 9), therefore a is 4 or 9, and b is 9 \
or 4. To check: 4 * 9 = 36 and 4 + 9 = 13. If the sum were 12 instead, the equation a^2 - 12a + 36 = 0 would have the \
single solution a = 6, and for a sum of 11 there would be none, because 121 - 144 is negative.""",
    """\
Most headaches pass by themselves within a day. Drink a glass of water, rest in a dark room, and see whether a walk in \
fresh air helps. Talk to a doctor if the pain is the worst you have ever had, if it came suddenly, if you have a fever \
and a stiff neck, or if it follows a blow to the head. Painkillers taken on more than ten days a month can themselves \
become the reason for headaches, so keep a note of how often you need them.""",
    """\
Markets are often described as if they were weather, something that simply happens. But every price is the end of a \
conversation between somebody who would rather have the money and somebody who would rather have the thing. When many \
such conversations take place at once, nobody can follow them all, and the average moves in ways that none of the \
speakers intended. A shortage of tin in one country makes cans dearer in another, and a baker who has never heard of \
the mine changes the shape of his biscuit tins.""",
    """\
The train from Lisbon to the north follows the coast for the first two hours, and it is worth sitting on the left. \
After Coimbra the line turns inland through eucalyptus woods, and the stations become small and tiled in blue. Change \
at Porto for the Douro valley: the slow train stops everywhere, the windows open, and between Pinhão and Pocinho there \
is no road beside the river at all. Tickets are cheap, but the last train back leaves before six.""",
    """\
Die Bibliothek liegt am Ende der Gasse, hinter einer Tür, die man leicht für den Eingang zu einem Keller halten \
könnte. Wer sie kennt, geht trotzdem hinein. Im Lesesaal ist es warm, und niemand fragt, wie lange man bleiben will. \
La vieille dame au guichet parle aussi le français : elle conseille des romans, des cartes et parfois une adresse où \
l'on mange bien. El domingo está cerrado.""",
    """\
Article 4. (1) The tenant shall keep the flat in good order and shall report any damage without delay. (2) Alterations \
to walls, pipes or wiring require the landlord's consent in writing, which may not be refused without good reason. \
(3) Either party may end this agreement with three months' notice to the end of a month; notice must be given in \
writing. (4) The deposit, together with interest, is returned within thirty days after the keys.""",
)

_CODE = (
    '''\
import csv
from collections import defaultdict
from pathlib import Path


def totals_by_month(path: Path) -> dict[str, float]:
    """Sum the column `amount` of a CSV file for each month of its column `date` (YYYY-MM-DD)."""
    totals: dict[str, float] = defaultdict(float)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if not row["amount"].strip():
                continue
            totals[row["date"][:7]] += float(row["amount"])
    return dict(sorted(totals.items()))


if __name__ == "__main__":
    for month, total in totals_by_month(Path("expenses.csv")).items():
        print(f"{month}  {total:10.2f}")''',
    """\
// Ask again, more slowly each time, until the server answers or the patience is gone.
async function fetchWithRetry(url, { tries = 4, delay = 250 } = {}) {
  for (let attempt = 1; ; attempt++) {
    try {
      const response = await fetch(url);
      if (response.ok) return await response.json();
      if (response.status < 500 || attempt === tries) throw new Error(`${url}: ${response.status}`);
    } catch (error) {
      if (attempt === tries) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, delay * 2 ** attempt));
  }
}""",
    """\
{"order": 48213, "customer": {"name": "R. Vasquez", "city": "Leeds", "since": 2019},
 "lines": [{"article": "desk lamp", "count": 2, "price": 34.5}, {"article": "bulb E14", "count": 6, "price": 2.95}],
 "paid": true, "shipped": null, "note": "leave it with the neighbour at number 12"}

SELECT city, COUNT(*) AS orders, ROUND(AVG(total), 2) AS mean_total
FROM orders JOIN customers USING (customer_id)
WHERE placed_at >= '2024-01-01' GROUP BY city HAVING COUNT(*) > 20 ORDER BY mean_total DESC;""",
)

_QUESTIONS = """\
Question: What is the difference between weather and climate?
Answer: Weather is what the air does today or this week: rain, wind, sunshine. Climate is what the weather of a place \
is like on average over decades. One cold winter says little about the climate.

Question: Name three rivers in Africa.
Answer: The Nile, the Congo and the Niger.

Question: How do I undo the last commit in git without losing my changes?
Answer: Run `git reset --soft HEAD~1`. The commit disappears, and its changes stay in the index, ready to be committed \
again.

Question: Who wrote the play about the prince of Denmark?
Answer: William Shakespeare wrote Hamlet, around the year 1600.

Question: Translate "Good morning, where is the station?" into Italian.
Answer: Buongiorno, dov'è la stazione?"""

#: Each is given to the model by itself.
CALIBRATION_TEXTS: tuple[str, ...] = (*_PROSE, *_CODE, _QUESTIONS)
