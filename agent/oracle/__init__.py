"""Who knows the script: runs as they should be, for iv3-tiny to learn to act from."""
