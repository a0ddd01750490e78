"""``python -m securefedcollm_audits.fuzz``."""

from securefedcollm_audits.fuzz.targets import main

main()
