"""The systems of the literature, each a loss and a sampler of a few public calls, trained on real text.

`python -m bench.systems.mdlm --text FILE --seconds 60` trains one and lets it write, `make systems` all.
"""
