"""Conversations: the tree of turns, where it is kept, and how one round is run."""
