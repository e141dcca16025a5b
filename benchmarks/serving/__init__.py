"""Measuring servers and engines side by side: workloads, a client, peers, limits, a table."""
