"""A world to learn in: clips of moving figures, their scripts, and questions whose answers follow from the scripts.

- Everything is a function of a seed; even seeds are for training, odd ones are held out (`script`).
- script, compose: what happens in a clip. render, subtitles: the clip as a real mp4. labels: what each frame shows.
- questions, score: what is asked, and whether an answer is right. tokenizer: a small BPE for the world's own text.
- dataset: clips and JSONL rows on disk, as training and `iv3 ask` take them.
"""
