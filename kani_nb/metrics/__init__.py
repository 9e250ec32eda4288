"""What each answer took, and how it is measured."""
