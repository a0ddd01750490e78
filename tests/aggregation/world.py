"""A cohort in memory: silos, a server, and the frames between them for a test to interfere with."""

from __future__ import annotations

import random as stdlib_random
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from securefedcollm.aggregation.coordinator import CoordinatorRound
from securefedcollm.aggregation.header import RingParameters, RoundHeader, Roster
from securefedcollm.aggregation.silo import SiloRound
from securefedcollm.primitives import SigningKey, sha256
