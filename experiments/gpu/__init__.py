"""A quarter of an hour on a GPU: ``python3 -m experiments.gpu`` runs tests, measures speed and trains a grid."""
