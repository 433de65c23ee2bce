"""One module a library: its options, what they cost, and its descriptor. Imports no torch."""
