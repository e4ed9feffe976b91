"""What changes weights, one file each; every stage trains through loop.py."""
