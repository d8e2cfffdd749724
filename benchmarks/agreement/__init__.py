"""Function by function, our adapters beside the originals: `python -m benchmarks.peer_agreement`."""
