"""Random mutations of whole rounds, and of files that people receive."""
