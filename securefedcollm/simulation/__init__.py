"""Every role of a study on one machine: with language models, or with your own training code."""
