"""Cross-entropy of ``hidden @ linear_weight.T + linear_bias``, whose logits are never there as a whole.

    functions.py   the public functions
    factors.py     what stands for the logits while everything is checked
    head.py        every check, and the call as matrices and a `Problem`
    outputs.py     the caller's `out`, and the results in the caller's shapes
    plan.py        how much at a time: from sizes and a budget of memory, in pure Python
    products.py    the products of matrices, by each library
    tiles.py       the rows that count, buffers, logits tile by tile
    gradients.py   gradients that grow product by product
    run.py         the loops; the plain composition for arrays without values

PyTorch's autograd is in `_bridges/_torch_linear.py`.
"""
