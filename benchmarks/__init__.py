"""Speed and memory, measured beside a peer in one run."""
