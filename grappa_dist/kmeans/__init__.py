"""k-means over the rows of all ranks: exact, hierarchical, through an inverted file, sampled or balanced."""
