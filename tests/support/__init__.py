"""What tests share: cohorts, arithmetic in place of training, toy models, bundles and forgers.

No test module imports another one; what two of them need is here (``tests/test_structure.py`` holds
that). From the protocol outwards:

=================  ==============================================================================
module             what it gives
=================  ==============================================================================
``cohort``         one round of secure aggregation in memory, with the test in the server's place
``arithmetic``     silos and a server whose updates are known functions: no torch
``rounds``         a whole run of these over the embedded engine; engines that lose, cut and die
``joint``          runs of joint DP-SGD; ``client_level``: those with ``privacy.unit: silo``
``runs``           the same with evidence at every participant
``validated``      silos of arithmetic that set records aside and answer them
``bundles``        fixtures: honest bundles of such runs, made once a session
``forge``          a forger of bundles who holds every participant's key
``members``        participants with identities, homes and a signed study, without a network
``models``         toy models and tokenizers, made on the spot
``inputs``         a study of such models that the command line runs in seconds
``small``          a study whose model has room for canaries
``plans``          training plans from settings by name
``gradients``      one ordinary backward pass a record, to compare with
``tracker``        a tracking tool that may lose the connection
``hostile``        words of another party, and how to see whether they did more than be read
``report_page``    what a reader of the report's page finds; ``browser`` shows it in Chromium
``typed``          a page of the documentation, typed as written
``flare_*``        programs: roles over FLARE, and attackers that run FLARE as it comes
``ledger_*``       programs: two processes on one ledger, and kill -9 at every statement
=================  ==============================================================================
"""
