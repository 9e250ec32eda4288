"""A package that cannot be imported."""

raise RuntimeError("the licence server of raising.example does not answer")
