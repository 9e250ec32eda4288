"""A package that would take the places of ours; whoever imports it is told."""

raise AssertionError("kani_nb_shadowing was imported")
