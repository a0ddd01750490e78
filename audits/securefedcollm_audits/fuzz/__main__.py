"""``python -m securefedcollm_audits.fuzz``."""

from securefedcollm_audits.fuzz.targets import main

if __name__ == "__main__":
    main()
