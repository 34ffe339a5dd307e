"""`python -m dlcore demo`: samplers on a language whose exact posteriors are known, and a trained model.

In the first chapter a Markov chain is fitted to real text and stands in for the network, so that what a
sampler loses is the sampler's own error. One module a matter: `options` (the command line), `text`,
`samplers` (compositions of `dlcore.process`), `measures` (exact figures of what they wrote), `progress`,
`report` (tables and JSON), `picture`, `timing` (step times against torch) and `run`, which strings them
together. The second chapter, `blocks`, trains a `block_transformer` and writes with a KV cache and without.
The third is the first again with `flows`: bits, spheres and embeddings in place of tokens.
"""
