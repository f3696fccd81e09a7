"""The model as Flax NNX modules, one idea a file.

Dimension suffixes, used in names everywhere in this project:

    B  sequences in the batch          E  routed experts (of the model, or of one device where said)
    T  tokens of a sequence            K  experts chosen by a token
    D  hidden width                    G  expert groups
    H  attention heads                 F  inner width of a feed-forward
    C  latent width (kv_lora_rank)     P  slots for (token, expert) pairs, sorted by expert
    V  vocabulary                      R  rows that a device holds during expert exchange
    L  layers                          S  slots of a send buffer
"""
