"""The mathematics that methods share. Everything here imports torch."""
