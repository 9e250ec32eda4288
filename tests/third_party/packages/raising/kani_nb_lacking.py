"""A package that was installed without what it needs."""

import a_library_that_nobody_has  # noqa: F401
