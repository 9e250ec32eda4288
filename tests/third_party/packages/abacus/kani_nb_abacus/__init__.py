"""What a package of somebody else's adds to kani_nb: an engine that counts letters, and a scheme of 8 bits."""
