"""Every role of a study on one machine: with language models, or with training of one's own."""
