"""iv3-tiny: a model of the release's kind, small enough to be trained from nothing on two cores, in the toy world."""
