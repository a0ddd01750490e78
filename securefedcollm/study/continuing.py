"""The section of a study that says from which earlier runs it starts.

Every value is public: digests of what the earlier runs released. ``docs/adr/0016`` says why the
base of such a study is identified by a chain of digests and not by the folded weights.
"""

from __future__ import annotations

import struct
from typing import Annotated, Final, Literal

from securefedcollm.primitives import sha256
from securefedcollm.study.kinds import Count, Hex32, Positive, Section, says

ModelName = Literal["slm", "llm"]
_FOLDED: Final = b"securefedcollm/folded-base/v1\0"


class Earlier(Section, frozen=True):
    """An earlier run, whose adapters become part of the base models.

    `securefedcollm study continue RUN` writes this; nobody has to type a digest.
    """

    run: Annotated[
        str,
        says(
            "The earlier run's directory, relative to --data (`client` and `server`: --models) or "
            "to where the new run's own directory lies. A directory there that is named "
            "NAME-DIGEST, as in a participant's `studies/`, is found as well. The files are not "
            "trusted: their digests are compared."
        ),
    ]
    study: Annotated[Hex32, says("The digest of the earlier study.")]
    entries: Annotated[Count, says("Length of the earlier server's evidence log, in entries.")]
    root: Annotated[
        Hex32, says("Root of that log's Merkle tree at this length, as its signed head has it.")
    ]
    scale: Annotated[Positive, says("The earlier adapters' alpha / rank.")]
    slm: Annotated[
        Hex32, says("SHA-256 of the small model's `adapter_model.safetensors` of the earlier run.")
    ]
    llm: Annotated[
        Hex32 | None,
        says(
            "The same of the large model. If left out, the earlier run had none, and the large "
            "model starts as it is."
        ),
    ] = None

    def of(self, model: ModelName) -> str | None:
        """The digest of the adapter of that model."""
        return self.slm if model == "slm" else self.llm


class Continue(Section, frozen=True):
    """What a study starts from: the base models, plus what earlier runs released.

    The earlier adapters are added to the weights (W + scale·B·A) when a model is loaded. The new
    adapter starts as nothing on top, so round 1 begins with the earlier model.
    """

    earlier: Annotated[
        list[Earlier],
        says("The earlier runs, oldest first: each of them started from those before it."),
    ]
    orthogonal: Annotated[
        bool,
        says(
            "Draws the fixed matrix A of `ffa-lora` outside of what the earlier matrices A read, "
            "so that the new adapter does not answer to the inputs that the earlier ones use "
            "(DOLFIN, arXiv 2510.13567). It needs no data and costs no ε."
        ),
    ] = False

    def base(self, model: ModelName, raw: bytes) -> bytes:
        """What identifies the folded base: 32 bytes that follow from digests alone.

        An auditor computes it without any weights. Adversary: whoever folds another adapter, in
        another order or at another scale. Every one of these changes the result.

        Args:
            raw: the base model's own digest, 32 bytes.
        """
        for link in self.earlier:
            raw = link_base(raw, link, model)
        return raw


def link_base(before: bytes, link: Earlier, model: ModelName) -> bytes:
    """The base that one more run makes of the base ``before``; 32 bytes both."""
    folded = link.of(model)
    if folded is None:
        return before
    return sha256(_FOLDED, before, bytes.fromhex(folded), struct.pack(">d", link.scale))
