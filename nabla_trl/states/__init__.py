"""What a model keeps of a prefix, layer by layer, so that searches can cut it, share it and go on from it.

A search reads a prefix once, and then goes on from it many times: every branch shares the beginning of its incumbent.
What the model must keep for that depends on the kind of each layer:

    full attention         keys and values of all tokens, whose widths may differ          attention.py
    sliding window, chunks the same, and a mask of its own, because a branch may begin anywhere
    shared keys, values    nothing: the layer uses those of another layer
    indexed attention      keys, values and the keys of the index                          attention.py
    recurrent, convolution a state of fixed size, copied after some of the tokens          recurrent.py

`get_layout` finds out what a model keeps, and refuses a model that cannot go on from a prefix. A `PrefixState` is what
is stored of one sequence: `cut` gives that of a shorter prefix without a copy. Recurrent layers can go on only from a
copy of their state, so tokens between the copy and a cut are read again (`resume_length`), and are charged. Layers
write through a writer (writers.py): behind the arrays of a batch, or into the slots of a decoder (`SlotStore`). Layers
do not know which. A new kind of layer needs a class with the methods that transformers calls, and an entry in
`probe.LAYER_TYPES`.

Hands out: `get_layout`, `StateLayout`, `PrefixState`, `prefill_sequences`, `read_tokens`, `catch_up`, `SlotStore`,
`build_masks`.
May import: utils.
"""
