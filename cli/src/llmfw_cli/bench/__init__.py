"""Measuring: workloads, our engine, peers, and what the machine itself can do."""
