"""What the participants agreed on: the typed study, its digest, identities and signatures."""

from securefedcollm.study.config import Field, Study, digest
from securefedcollm.study.load import dump_study, load_study, study_from_tree

__all__ = ["Field", "Study", "digest", "dump_study", "load_study", "study_from_tree"]
