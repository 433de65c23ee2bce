"""What the stand-ins are called, for those who import no torch."""

METHOD = "evenbits-testing-rows"
CORPUS = "evenbits-testing-text"
