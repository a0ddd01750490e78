"""Private questions to other members' documents, in the roles of a study.

The protocol is :mod:`securefedcollm.retrieval`. Here it gets a study's encoder (:mod:`.space`),
a shelf made of files (:mod:`.shelves`), a silo's memory and evidence (:mod:`.quota`, :mod:`.desk`),
and the asker's side over all silos at once (:mod:`.inquiry`). Nothing here opens a connection:
whoever asks gives a function that carries a frame to a silo.
"""
