"""What is in a checkpoint: trees of containers, records and arrays; templates, selections and names."""
