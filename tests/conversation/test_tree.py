"""The tree of turns: where a new turn goes, and what no operation can break."""

from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kani_nb.conversation.tree import CellRef, Conversation, Turn, new_id, replacement_notices
from kani_nb.errors import ConversationError
from kani_nb.messages import ChatMessage


def add(conversation, text, cell=None, *, append=False, parent="place"):
    cell = cell or CellRef()
    if parent == "place":
        parent = conversation.place(text, cell, append=append)
    messages = (ChatMessage.user(text), ChatMessage.assistant(text.upper()))
    return conversation.with_turn(Turn(new_id(), parent, messages, cell, created_at=float(len(conversation.turns))))


def run_cells(conversation, cells, execution):
    """Run cells (id, text) in order, each in an execution of its own."""
    for cell_id, text in cells:
        conversation = add(conversation, text, CellRef(cell_id, f"{execution}/{cell_id}/{text}"))
    return conversation


def said(conversation):
    return [turn.prompt.text for turn in conversation.path()]


def test_a_plain_ask_always_appends():
    conversation = Conversation.new("main")
    for _ in range(3):
        conversation = add(conversation, "same")
    assert said(conversation) == ["same"] * 3


def test_running_all_cells_twice_gives_the_same_conversation_and_keeps_the_old_branch():
    cells = [("a", "one"), ("b", "two"), ("c", "three")]
    once = run_cells(Conversation.new("main"), cells, 1)
    twice = run_cells(once, cells, 2)
    assert said(twice) == said(once) == ["one", "two", "three"]
    assert [leaf.id for leaf in twice.branches()] == [once.head, twice.head]


def test_running_one_cell_again_forks_at_its_parent():
    cells = [("a", "one"), ("b", "two"), ("c", "three"), ("d", "four")]
    conversation = run_cells(Conversation.new("main"), cells, 1)
    edited = run_cells(conversation, [("b", "TWO")], 2)
    assert said(edited) == ["one", "TWO"]
    assert edited.path()[0] == conversation.path()[0]
    assert said(run_cells(edited, cells[2:], 2)) == ["one", "TWO", "three", "four"]


def test_several_chats_of_one_execution_belong_together_and_are_replaced_together():
    conversation = add(Conversation.new("main"), "zero", CellRef("z", "e0"))
    for text in ("x", "y", "x"):
        conversation = add(conversation, text, CellRef("loop", "e1"))
    assert said(conversation) == ["zero", "x", "y", "x"]
    for text in ("X", "Y"):
        conversation = add(conversation, text, CellRef("loop", "e2"))
    assert said(conversation) == ["zero", "X", "Y"]


def test_append_forces_a_new_turn_and_only_the_latest_execution_is_replaced():
    conversation = add(Conversation.new("main"), "one", CellRef("a", "e1"))
    conversation = add(conversation, "two", CellRef("a", "e2"), append=True)
    assert said(conversation) == ["one", "two"]
    assert said(add(conversation, "three", CellRef("a", "e3"))) == ["one", "three"]


def test_a_cell_whose_turn_is_on_no_current_branch_appends_to_the_head():
    conversation = run_cells(Conversation.new("main"), [("a", "one"), ("b", "two")], 1).undone(1)
    assert said(run_cells(conversation, [("b", "two")], 2)) == ["one", "two"]


def test_without_cell_ids_the_text_of_the_first_turn_starts_again_at_the_root():
    conversation = Conversation.new("main")
    for execution in range(2):
        for number, text in enumerate(("one", "two", "two", "three")):
            conversation = add(conversation, text, CellRef(None, f"{execution}-{number}"))
        assert said(conversation) == ["one", "two", "two", "three"]
    assert len(conversation.branches()) == 2


def test_without_cell_ids_a_loop_that_repeats_the_first_text_appends():
    conversation = Conversation.new("main")
    for _ in range(3):
        conversation = add(conversation, "same", CellRef(None, "e1"))
    assert said(conversation) == ["same"] * 3


def test_a_cell_id_without_executions_replaces_its_last_turn():
    conversation = add(Conversation.new("main"), "one", CellRef("a", None))
    conversation = add(conversation, "uno", CellRef("a", None))
    assert said(conversation) == ["uno"]


def test_undo_moves_the_head_and_stops_before_the_first_turn():
    conversation = run_cells(Conversation.new("main"), [("a", "one"), ("b", "two")], 1)
    assert said(conversation.undone(1)) == ["one"]
    assert conversation.undone(9).head is None
    with pytest.raises(ConversationError, match="cannot undo 0"):
        conversation.undone(0)


def test_a_conversation_cannot_be_made_from_turns_that_are_no_tree():
    first, second = Turn("1", "2", ()), Turn("2", "1", ())
    with pytest.raises(ConversationError, match="does not come before it"):
        Conversation("id", "cycle", turns={"1": first, "2": second})
    with pytest.raises(ConversationError, match="no turn 'nowhere'"):
        Conversation("id", "head", head="nowhere")
    with pytest.raises(ConversationError, match="has no turn"):
        Conversation.new("main").moved_to("nowhere")


def test_a_conversation_cannot_be_changed_in_place():
    conversation = add(Conversation.new("main"), "one")
    with pytest.raises(FrozenInstanceError):
        conversation.head = None
    with pytest.raises(TypeError):
        conversation.turns["x"] = None


def test_numbers_that_are_not_there_are_named():
    conversation = add(Conversation.new("main"), "one")
    with pytest.raises(ConversationError, match=r"no turn 2: this branch has 1 turn\n.*%chat history$"):
        conversation.turn_at(2)
    with pytest.raises(ConversationError, match=r"no branch 0: this conversation has 1 branch\n.*%chat branches$"):
        conversation.branch(0)
    with pytest.raises(ConversationError, match="no turn yet"):
        Conversation.new("main").turn_at()


class TreeMachine(RuleBasedStateMachine):
    """Anything in any order: nothing is lost, and the path is unique."""

    @initialize()
    def start(self):
        self.conversation = Conversation.new("main")
        self.committed = {}
        self.execution = 0

    def commit(self, text, cell, parent):
        self.conversation = add(self.conversation, text, cell, parent=parent)
        turn = self.conversation.turns[self.conversation.head]
        assert turn.parent_id == parent
        self.committed[turn.id] = turn

    @rule(text=st.sampled_from(["a", "b", "c"]), cell_id=st.sampled_from([None, "1", "2", "3"]), is_rerun=st.booleans())
    def ask(self, text, cell_id, is_rerun):
        self.execution += is_rerun
        cell = CellRef(cell_id, f"e{self.execution}")
        before = self.conversation.path()
        parent = self.conversation.place(text, cell)
        assert parent is None or parent in {turn.id for turn in before}
        self.commit(text, cell, parent)
        if cell_id is not None:
            ours = {turn.cell.execution_id for turn in self.conversation.path() if turn.cell.cell_id == cell_id}
            assert cell.execution_id in ours

    @rule(number=st.integers(1, 5), text=st.sampled_from(["a", "x"]))
    def edit(self, number, text):
        path = self.conversation.path()
        if number <= len(path):
            self.commit(text, path[number - 1].cell, path[number - 1].parent_id)
            assert len(self.conversation.path()) == number

    @rule(n=st.integers(1, 4))
    def undo(self, n):
        before = self.conversation.path()
        self.conversation = self.conversation.undone(n)
        assert self.conversation.path() == before[: max(0, len(before) - n)]

    @rule(data=st.data())
    def switch(self, data):
        leaves = self.conversation.branches()
        if leaves:
            leaf = self.conversation.branch(data.draw(st.integers(1, len(leaves))))
            self.conversation = self.conversation.moved_to(leaf.id)

    @invariant()
    def nothing_is_lost_and_the_tree_is_one(self):
        turns = self.conversation.turns
        assert dict(turns) == self.committed
        assert self.conversation.head is None or self.conversation.head in turns
        for turn in turns.values():
            path = self.conversation.path(turn.id)
            assert path[-1] is turn
            assert path[0].parent_id is None
            assert all(after.parent_id == before.id for before, after in pairwise(path))
        assert Conversation.from_dict(self.conversation.to_dict()) == self.conversation


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def branch_of(*pairs):
    conversation = Conversation.new("main")
    for number, (text, cell) in enumerate(pairs):
        messages = (ChatMessage.user(text), ChatMessage.assistant(text))
        conversation = conversation.with_turn(Turn(f"t{number}", conversation.head, messages, cell, 1.0 + number))
    return conversation


def asked_again(conversation, text, cell):
    messages = (ChatMessage.user(text), ChatMessage.assistant(text))
    return conversation.with_turn(Turn("again", conversation.place(text, cell), messages, cell, 99.0))


def test_turns_that_a_repeated_cell_leaves_out_are_named_with_their_branch():
    before = branch_of(*((text, CellRef(f"cell-{text}", "run-1")) for text in "abcd"))
    after = asked_again(before, "B", CellRef("cell-b", "run-2"))
    assert replacement_notices(before, after) == ["turns 3-4 are on branch 1 now: %chat branches"]
    after = asked_again(before, "C", CellRef("cell-c", "run-2"))
    assert replacement_notices(before, after) == ["turn 4 is on branch 1 now: %chat branches"]
    after = asked_again(before, "D", CellRef("cell-d", "run-2"))
    assert replacement_notices(before, after) == []
    after = asked_again(before, "e", CellRef("cell-e", "run-2"))
    assert replacement_notices(before, after) == []


def test_a_loop_that_is_run_again_replaces_all_its_turns_without_a_word():
    loop = CellRef("loop", "run-1")
    before = branch_of(("a", CellRef("cell-a", "run-1")), ("x", loop), ("y", loop), ("z", loop))
    assert replacement_notices(before, asked_again(before, "x", CellRef("loop", "run-2"))) == []


def test_a_restart_for_want_of_cell_ids_is_told():
    before = branch_of(("a", CellRef(None, "run-1")), ("b", CellRef(None, "run-2")))
    restart, left = replacement_notices(before, asked_again(before, "a", CellRef(None, "run-3")))
    assert "starts over" in restart
    assert "--append" in restart
    assert left == "turn 2 is on branch 1 now: %chat branches"


def test_a_copy_shares_words_and_branches_but_no_id():
    before = branch_of(("a", CellRef("c", "1")), ("b", CellRef("d", "1"))).undone()
    copy = before.copied()
    assert copy.id != before.id
    assert not set(copy.turns) & set(before.turns)
    assert [turn.prompt.text for turn in copy.turns.values()] == ["a", "b"]
    assert [turn.prompt.text for turn in copy.path()] == ["a"]
    assert len(copy.branches()) == 1
