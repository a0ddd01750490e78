"""NVIDIA FLARE as the carrier between organisations: mutual TLS, no job code, thin processes.

A participant's own process (``securefedcollm server``, ``client``) holds its models, keys, ledger
and state. FLARE's processes beside it only pass small calls on (:mod:`.relay`), so their failure
costs no work and no budget: the run goes on in the next FLARE job.

======================  ==========================================================
:mod:`.kit`             certificates, the signed start-up kit, its locked-down policy
:mod:`.processes`       FLARE's processes: started with ours, never outliving it
:mod:`.hardening`       what each of them loses before it starts
:mod:`.job`             the one FLARE job, which nobody needs to send
:mod:`.launching`       how FLARE takes that job and starts its process
:mod:`.relay`           what FLARE loads at the server and at a silo
:mod:`.engine`          the coordinator's :class:`~securefedcollm.federation.engines.Engine`
======================  ==========================================================

Adversary: a server that submits other jobs than ours, and everybody on the network.
"""
