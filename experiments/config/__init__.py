"""The record of a run: what it holds, how it is read, and the recipes."""
