"""The text on which schemes are compared: six short passages of different kinds, written for this purpose.

Fixed, so that figures of different days can be laid side by side, and new, so that no model has seen it. Nothing here
measures.
"""

from __future__ import annotations

_STORY = """\
The ferry was late again, so Marta sat on the harbour wall and counted the gulls. There were eleven of them, and they \
watched her sandwich the way her brothers used to watch the last slice of cake. When the horn finally sounded across \
the bay, she stood up, brushed the crumbs from her coat, and threw the crust as far as she could. Nine gulls flew \
after it. The other two stayed, because they had seen the paper bag."""

_EXPLANATION = """\
A kettle becomes loud well before its water boils. Small bubbles of vapour form on the hot metal at the bottom, rise a \
few centimetres into water that is still cool, and collapse there. Each collapse makes a tiny click, and thousands of \
them every second make the rising hiss that everybody knows. Shortly before 100 degrees the water is hot enough all \
the way up, the bubbles reach the surface without collapsing, and the kettle grows quiet for a moment."""

_CODE = '''\
def longest_run(values):
    """Return the value that is repeated most often in a row, and how many times it is."""
    best, best_count = None, 0
    current, count = None, 0
    for value in values:
        count = count + 1 if value == current else 1
        current = value
        if count > best_count:
            best, best_count = current, count
    return best, best_count


print(longest_run([3, 3, 1, 1, 1, 2]))  # (1, 3)'''

_DIALOGUE = """\
"Do you have this in blue?" she asked.
"Only in green, I am afraid," said the man behind the counter. "We could order it for you. It takes about two weeks."
"That is too late. The wedding is on Saturday."
"Then you might try the shop next to the station. They had three blue ones in the window this morning."
"Thank you. You are the first person today who has sent me somewhere else."
"It is a small town," he said, and shrugged. "You will be back for the shoes.\""""

_LIST = """\
Shopping for four people, Friday to Sunday:
- 1 kg potatoes, 500 g carrots, 3 onions
- 2 litres of milk, 12 eggs, 250 g butter
- bread: 1 large loaf, 8 rolls
- apples (6), lemons (2)
Budget: 45.00. Spent so far: 18.60, so 26.40 are left for the fish and the wine."""

_LETTER = """\
Dear Mr Okafor,

Thank you for your letter of 3 March. I am sorry to hear that the desk arrived with a broken drawer. We will send a \
new drawer this week, free of charge, and you may keep or throw away the old one. If it has not reached you by the \
15th, please call me at the number below and I will look into it myself.

Kind regards,
Helena Brandt"""

#: Each is read by itself, from its first token.
PASSAGES = (_STORY, _EXPLANATION, _CODE, _DIALOGUE, _LIST, _LETTER)
