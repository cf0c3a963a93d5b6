"""The format `fabricfn-checkpoint` 1: manifests, data files, and the pieces of arrays in them. No torch."""
