"""The formats that ``sparse-trainer export`` writes, a file each."""
