"""Several runs beside each other: all rows of a comparison, over several seeds; finished runs."""
