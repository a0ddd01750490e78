"""Private retrieval, ``documents`` mode: a silo answers a question that it cannot read.

The asker encrypts its question's embedding under its own key. A silo returns an encrypted score of
every passage on its shelf, then k encrypted passages that the asker chose. Bytes in, bytes out: no
sockets, clock or models. :mod:`~.retrieval.shelf` says who learns what, and
:mod:`~.retrieval.product` how.
"""

from securefedcollm.retrieval.asker import Asker, AskerStep
from securefedcollm.retrieval.index import Index
from securefedcollm.retrieval.messages import Header, Receipt
from securefedcollm.retrieval.passages import Passage, split
from securefedcollm.retrieval.quota import CountingQuota, Quota
from securefedcollm.retrieval.reduction import Reduction
from securefedcollm.retrieval.shelf import PreparedShelf, Shelf, ShelfStep
from securefedcollm.retrieval.terms import Product, Terms

__all__ = [
    "Asker",
    "AskerStep",
    "CountingQuota",
    "Header",
    "Index",
    "Passage",
    "PreparedShelf",
    "Product",
    "Quota",
    "Receipt",
    "Reduction",
    "Shelf",
    "ShelfStep",
    "Terms",
    "split",
]
