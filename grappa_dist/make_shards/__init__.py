"""From folders, CSV files, tars and published benchmarks to WebDataset shards with an index."""
