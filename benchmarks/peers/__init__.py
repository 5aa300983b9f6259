"""What `benchmarks/peers.py` is made of. The `drive_*.py` are programs of their own, run by each
engine's own python."""
