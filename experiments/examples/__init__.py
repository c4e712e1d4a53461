"""The scheduler in training loops that people have. Each runs alone: ``python -m experiments.examples.plain``.

All train the same network on the same batches and print the same line at the end: whoever drives the loop, the same
seed gives the same masks.
"""
