"""What is said in a video: its subtitle streams, the subtitle files beside it, or speech recognition."""
