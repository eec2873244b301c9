"""The k nearest neighbours of every row, exact or through an inverted file."""
