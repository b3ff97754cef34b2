"""Models as the rest of the project sees them: a chain of blocks, each a module with Linears, read from shards."""
