"""What `braniac-node init --example` prints: a run with everything that can be said about one, as it is by default."""

EXAMPLE = """\
# A run of Braniac. `braniac-node init run.yaml` signs it; what is fixed here is fixed for everybody in the run.
name: my first run

model:
  preset: tiny            # tiny, small, tiny-llama, small-llama; without a preset give every key of a model
  # num_hidden_layers: 4  # any key of the model may differ from the preset
seed: 0                   # of the initial weights, and of who reads which part of its text

# Pace. Left out, these and the codec are the preset's own.
slot_s: 1.0               # one fragment is averaged per slot
fragments: 8              # pieces that the parameters are cut into; as many slots make a window

codec:                    # values kept of each 64x64 tile, and bits of their magnitude
  up: {per_tile: 256, magnitude_bits: 1, turns: 4}    # what a peer sends; after misses so many turns' values at once
  down: {per_tile: 1024, magnitude_bits: 2}           # what everybody gets back

merge:
  step: 1.0               # outer step size, 1/64 to 4
  coverage: 0.5           # 0: divide by everybody's weight, 1: by that of who sent a value, 0.5: in between
  margin_percent: 25      # left out is who agrees with the others so much less than most do; 0: nobody

data:
  tokenizer: bytes        # or a tokenizer.json of Hugging Face, which all who bring text must then have
  text: English novels, out of copyright    # a request to whoever joins, shown before they do; each brings their own

optimizer:                # of every node that does not set its own train.learning_rate
  learning_rate: 0.02     # Muon's, for the matrices
  adam_learning_rate: 0.01    # for embedding and head
  warmup_steps: 20
  weight_decay: 0.0

admission:
  who: anybody            # the only rule there is: any identity that speaks this protocol
  weight_cap: 1           # a contribution weighs at most this many times the median, 1 to 8
"""
